"""The command `lora-or-full`: what is done with finished runs.

lora-or-full ask|page|report|evaluate|export ...
"""

import importlib
import sys

COMMANDS = ("ask", "page", "report", "evaluate", "export")


def main() -> None:
    """Run the command that the first word names; the others are its own."""
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        print(f"usage: lora-or-full {{{','.join(COMMANDS)}}} ...", file=sys.stderr)
        sys.exit(2)
    name = sys.argv.pop(1)
    sys.argv[0] = f"lora-or-full {name}"
    importlib.import_module(f"lora_or_full.cli.{name}").main()


if __name__ == "__main__":
    main()
