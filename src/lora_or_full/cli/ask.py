"""Ask what was trained.

python src/ask.py RUN --context FILE "Who founded it?"   one answer; - reads the context from a pipe
python src/ask.py RUN --context FILE                     a conversation over one context
python src/ask.py RUN --data QUESTIONS.json              answers to a file in SQuAD's format

RUN is the folder of a finished run, of an adapter in PEFT's format or of a model; several are asked
side by side. An answer comes with its probability (that of its tokens, the end included), with the
characters of the context where it stands, and with others that begin otherwise.
"""

import argparse
import contextlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lora_or_full.errors import UserError, command
from lora_or_full.runs import store

if TYPE_CHECKING:  # seconds, which a mistake on the command line need not wait for
    from lora_or_full.generation.context_session import ContextSession
    from lora_or_full.generation.predictor import Predictor, Reply

ALTERNATIVES = 3
PLACES = 5  # of an answer that are named


@command()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("words", nargs="*", metavar="RUN", help="folders, then the QUESTION")
    parser.add_argument(
        "--context", metavar="FILE", help="a text file in UTF-8; - is what is piped in"
    )
    parser.add_argument("--data", type=Path, metavar="FILE", help="questions in SQuAD's format")
    parser.add_argument(
        "--output", type=Path, default=Path("predictions.json"), metavar="FILE",
        help="where --data's answers go, as the official script reads them (predictions.json)",
    )  # fmt: skip
    parser.add_argument(
        "--model", help="folder or hub id of the base model, where it is not the one that RUN names"
    )
    args = parser.parse_intermixed_args()
    places, question = parted(args.words)
    if (args.context is None) == (args.data is None):
        raise UserError("Give --context=FILE to ask about, or --data=FILE with questions.")
    if args.data is not None:
        if question is not None or len(places) > 1:
            raise UserError("--data asks one RUN, and takes no other question.")
        answer_file(places[0], args.model, args.data, args.output)
    else:
        answer_context(places, args.model, context_of(args.context, question), question)


def parted(words: list[str]) -> tuple[list[Path], str | None]:
    """The folders in the words of a command line, and the question behind them, if there is one.

    Raises:
        UserError: there is no folder, or what can't be told apart.
    """
    places, rest = list(words), None
    if words and not os.path.isdir(words[-1]):  # Path.is_dir raises on what is too long for a name
        *places, rest = words
    wrong = [word for word in places if not os.path.isdir(word)]
    if rest is not None and os.sep in rest and not any(map(str.isspace, rest)):
        wrong.append(rest)
    if wrong:
        raise UserError(
            f"There is no folder {wrong[0]}. First come the folders of runs, then one question in "
            "quotation marks."
        )
    if not places:
        raise UserError("Which run? Give its folder, such as runs/<run>, before the question.")
    if rest is not None and not rest.strip():
        raise UserError("The question is empty.")
    return [Path(word) for word in places], rest


def context_of(name: str, question: str | None) -> str:
    """The text to ask about: of a file, or (for -) of what is piped in.

    Raises:
        UserError: it can't be read, or is empty.
    """
    if name == "-" and question is None:
        raise UserError("--context - takes all input for the context: give the question too.")
    try:
        raw = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        text = raw.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"--context {name} can't be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise UserError(f"--context {name} is no text in UTF-8.") from None
    if "\0" in text:
        raise UserError(f"--context {name} is no text.")
    if not text.strip():
        raise UserError(f"--context {name} is empty.")
    return text


def answer_file(place: Path, base: str | None, file: Path, output: Path) -> None:
    """Write the answer to each question of a file, by its id."""
    from lora_or_full.data import squad
    from lora_or_full.generation.finished_run import load

    # Gold answers, where there are some, play no part: wrong places of theirs do no harm.
    questions, _ = squad.check(squad.read_files([file]), unanswerable="keep", misaligned="repair")
    if not questions:
        raise UserError(f"{file} holds no question.")
    given = load(place, base).answers([(q.context, q.question) for q in questions])
    texts = {
        q.id: one.answer.text if one.answer else "" for q, one in zip(questions, given, strict=True)
    }
    try:
        store.write_json(output, texts)
    except OSError as error:
        raise UserError(f"--output {output} can't be written: {error.strerror}.") from None
    print(f"{len(texts):,} answers: {output}")
    for count, what in (
        (sum(one.context_cut for one in given), "contexts were too long, and shortened"),
        (sum(one.answer is None for one in given), "questions were too long, and not asked"),
    ):
        if count:
            print(f"Note: {count:,} {what}.", file=sys.stderr)


def answer_context(
    places: list[Path], base: str | None, context: str, question: str | None
) -> None:
    """Print the answers to a question about a context, or to all that are then typed."""
    from lora_or_full.generation.finished_run import load

    runs = [load(place, base) for place in places]
    readings = [run.read(context) for run in runs]
    if question is not None:
        show(runs, readings, question)
        return
    with contextlib.suppress(ImportError):  # where there is none, a line can't be edited
        import readline  # noqa: F401

    at_terminal = sys.stdin.isatty()
    if at_terminal:
        print(f"The context has {readings[0].tokens:,} tokens. Ctrl-D ends.")
    while True:
        try:
            asked = input("\n? " if at_terminal else "")
        except EOFError:
            return
        try:
            show(runs, readings, asked)
        except UserError as error:
            print(error, file=sys.stderr)


def show(runs: "list[Predictor]", readings: "list[ContextSession]", question: str) -> None:
    """Print what each run answers."""
    for run, reading in zip(runs, readings, strict=True):
        replies = run.ask(reading, question, ALTERNATIVES)
        if len(runs) > 1:
            print(f"{run.label}:")
        print("\n".join(lines(replies, reading.context)), flush=True)
        if reading.read < reading.tokens:
            print(
                f"Note: {run.label} reads {reading.read:,} of the context's {reading.tokens:,} "
                "tokens, the first ones. Ask about its parts, each in a file of its own.",
                file=sys.stderr,
            )


def lines(replies: "list[Reply]", context: str) -> list[str]:
    """An answer in words, its place, and the alternatives."""
    answer, *others = replies
    end = "" if answer.ended else "; cut off, since it did not end"
    found = [named(answer), f"  probability {answer.probability:.1%}{end}"]
    if answer.places:
        places = ", ".join(f"{start}-{stop}" for start, stop in answer.places[:PLACES])
        more = len(answer.places) - PLACES
        start, stop = answer.places[0]
        before, after = context[max(0, start - 40) : start], context[stop : stop + 40]
        found += [
            f"  in the context, characters {places}{f' and {more} more' if more > 0 else ''}:",
            f"  …{printable(before)}[{printable(context[start:stop])}]{printable(after)}…",
        ]
    elif answer.text:
        found.append("  not in the context")
    if others:
        found.append("  or: " + "; ".join(f"{named(o)} {o.probability:.1%}" for o in others))
    return found


def named(reply: "Reply") -> str:
    return printable(reply.text) or "(no answer)"


def printable(text: str) -> str:
    """In one line, and without what a terminal would take as a command."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "\ufffd" for c in text)


if __name__ == "__main__":
    main()
