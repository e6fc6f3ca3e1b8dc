"""The command `lora-or-full`: what is done with finished runs and other models.

lora-or-full ask RUN --context FILE "QUESTION"   ask what was trained
lora-or-full page RUN [RUN ...]                  ask it on a local page
lora-or-full report RUNS [RUNS ...]              the report of a study
lora-or-full evaluate MODEL [MODEL ...] DATA     score runs, or any model, on questions
lora-or-full export RUN                          hand on what was trained, with a model card

Each takes --help. Training: python src/run.py --help
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from functools import partial

from lora_or_full.errors import command_line_errors

COMMANDS = ("ask", "page", "report", "evaluate", "export")


@command_line_errors()
def main(words: Sequence[str] | None = None) -> None:
    """Run the command that the first of `words` names; None stands for this process's own."""
    words = sys.argv[1:] if words is None else words
    parser_of = partial(argparse.ArgumentParser, formatter_class=argparse.RawTextHelpFormatter)
    usage = f"lora-or-full {{{','.join(COMMANDS)}}} ..."
    parser = parser_of("lora-or-full", usage, __doc__)
    parser.add_argument("command", choices=COMMANDS, help=argparse.SUPPRESS)
    name = parser.parse_args(words[:1]).command
    module = importlib.import_module(f"lora_or_full.cli.{name}")
    parser = parser_of(f"lora-or-full {name}", description=module.__doc__)
    module.add_arguments(parser)
    # Options may stand between the folders and the question.
    module.run(parser.parse_intermixed_args(words[1:]))


if __name__ == "__main__":
    main()
