"""The command `lora-or-full`: what is done with finished runs.

lora-or-full ask RUN --context FILE "QUESTION"   ask what was trained
lora-or-full page RUN [RUN ...]                  ask it on a local page
lora-or-full report RUNS [RUNS ...]              the report of a study
lora-or-full evaluate RUN [RUN ...] DATA         score runs on other questions
lora-or-full export RUN                          hand on what was trained, with a model card

Each takes --help. Training: python src/run.py --help
"""

import argparse
import importlib
import sys
from collections.abc import Sequence

from lora_or_full.errors import command_line_errors

COMMANDS = ("ask", "page", "report", "evaluate", "export")


@command_line_errors()
def main(words: Sequence[str] | None = None) -> None:
    """Run the command that the first word names.

    Args:
        words: The command line; None for that of this process.
    """
    words = sys.argv[1:] if words is None else words
    parser = argparse.ArgumentParser(
        prog="lora-or-full", usage=f"lora-or-full {{{','.join(COMMANDS)}}} ...",
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter,
    )  # fmt: skip
    parser.add_argument("command", choices=COMMANDS, help=argparse.SUPPRESS)
    name = parser.parse_args(words[:1]).command
    module = importlib.import_module(f"lora_or_full.cli.{name}")
    parser = argparse.ArgumentParser(
        prog=f"lora-or-full {name}", description=module.__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )  # fmt: skip
    module.add_arguments(parser)
    # Options may stand between the folders and the question.
    module.run(parser.parse_intermixed_args(words[1:]))


if __name__ == "__main__":
    main()
