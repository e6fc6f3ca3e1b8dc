"""Ask a trained model questions about a text.

lora-or-full ask RUN --context FILE "Who founded it?"   one answer; FILE - is standard input
lora-or-full ask RUN --context FILE                     many questions about one context
lora-or-full ask RUN --data QUESTIONS.json              answers to a file in SQuAD's format

RUN is the folder of a finished run, of an adapter in PEFT's format or of a model; several answer
side by side. Each answer comes with its probability (of all its tokens, the end included), its
position in the context, and alternatives that begin differently.
"""

import argparse
import contextlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lora_or_full.cli.arguments import add_base_model, finished_of
from lora_or_full.errors import UserError
from lora_or_full.runs import store

if TYPE_CHECKING:  # torch takes seconds, which a wrong command line need not wait for
    from lora_or_full.generation.context_session import ContextSession
    from lora_or_full.generation.predictor import Predictor, Reply

ALTERNATIVES = 3
MOST_SPANS = 5  # positions of an answer that are printed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("words", nargs="*", metavar="RUN", help="folders, then the QUESTION")
    parser.add_argument("--context", metavar="FILE", help="text file in UTF-8; - is standard input")
    parser.add_argument("--data", type=Path, metavar="FILE", help="questions in SQuAD's format")
    parser.add_argument(
        "--output", type=Path, default=Path("predictions.json"), metavar="FILE",
        help="answers to --data, as the official script reads them (predictions.json)",
    )  # fmt: skip
    add_base_model(parser)


def run(args: argparse.Namespace) -> None:
    """Answer the question of the command line, those typed, or those of a file."""
    folders, question = _folders_and_question(args.words)
    folders = finished_of(folders)
    if (args.context is None) == (args.data is None):
        raise UserError("Give --context=FILE to ask about, or --data=FILE with questions.")
    if args.context is not None:
        _answer_context(folders, args.model, _read_context(args.context, question), question)
    elif question is None and len(folders) == 1:
        _answer_file(folders[0], args.model, args.data, args.output)
    else:
        raise UserError("--data takes one RUN, and no other question.")


def lines(replies: "list[Reply]", context: str) -> list[str]:
    """Lines that show an answer, its positions in the context, and the alternatives."""
    answer, *others = replies
    doubtful = "; ".join(doubts(replies))
    found = [f"{_shown(answer)}{doubtful and f'   (doubtful: {doubtful})'}"]
    found.append(f"  probability {answer.probability:.1%}")
    if answer.spans:
        positions = ", ".join(f"{start}-{stop}" for start, stop in answer.spans[:MOST_SPANS])
        more = len(answer.spans) - MOST_SPANS
        start, stop = answer.spans[0]
        before, after = context[max(0, start - 40) : start], context[stop : stop + 40]
        found += [
            f"  in the context, characters {positions}{f' and {more} more' if more > 0 else ''}:",
            f"  …{printable(before)}[{printable(context[start:stop])}]{printable(after)}…",
        ]
    if others:
        found.append("  or: " + "; ".join(f"{_shown(o)} {o.probability:.1%}" for o in others))
    return found


def doubts(replies: "list[Reply]") -> list[str]:
    """Say what speaks against an answer, which the alternatives follow; nothing if none does."""
    answer, *others = replies
    found = []
    if answer.text and not answer.spans:
        found.append("not in the context")
    if better := [other for other in others if other.probability > answer.probability]:
        found.append(f"less probable than {_shown(better[0])}")
    if not answer.ended:
        found.append("cut off at the length limit")
    return found


def printable(text: str) -> str:
    """Replace line ends, and characters that would control the terminal."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "\ufffd" for c in text)


def _shown(reply: "Reply") -> str:
    return printable(reply.text) or "(no answer)"


def _folders_and_question(words: list[str]) -> tuple[list[Path], str | None]:
    """Split the words of the command line: all are folders, but the last may be the question."""
    folders, question = list(words), None
    if words and not os.path.isdir(words[-1]):  # Path.is_dir raises on a name that is too long
        *folders, question = words
    wrong = [word for word in folders if not os.path.isdir(word)]
    if question and os.sep in question and not any(map(str.isspace, question)):
        wrong.append(question)
    if wrong:
        raise UserError(
            f"There is no folder {wrong[0]}. First come the folders of runs, then one question in "
            "quotation marks."
        )
    if not folders:
        raise UserError("Which run? Give its folder, such as runs/<run>, before the question.")
    if question is not None and not question.strip():
        raise UserError("The question is empty.")
    return list(map(Path, folders)), question


def _read_context(name: str, question: str | None) -> str:
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


def _answer_context(
    folders: list[Path], base: str | None, context: str, question: str | None
) -> None:
    """Print the answers to one question, or to each line of standard input."""
    from lora_or_full.generation.predictor import load

    runs = [load(folder, base) for folder in folders]
    read = [(run, run.read(context)) for run in runs]
    if question is not None:
        _print_answers(read, question)
        return
    with contextlib.suppress(ImportError):  # makes the line editable, where the module exists
        import readline  # noqa: F401

    at_terminal = sys.stdin.isatty()
    if at_terminal:
        print(f"The context has {read[0][1].tokens:,} tokens. Ctrl-D ends.")
    while True:
        try:
            _print_answers(read, input("\n? " if at_terminal else ""))
        except EOFError:
            return
        except UserError as error:
            print(error, file=sys.stderr)


def _print_answers(read: "list[tuple[Predictor, ContextSession]]", question: str) -> None:
    for run, session in read:
        replies = run.ask(session, question, ALTERNATIVES)
        if len(read) > 1:
            print(f"{run.label}:")
        print("\n".join(lines(replies, session.context)), flush=True)
        if session.read < session.tokens:
            print(
                f"Note: {run.label} reads the first {session.read:,} of the context's "
                f"{session.tokens:,} tokens. Split it, and ask about each part.",
                file=sys.stderr,
            )


def _answer_file(folder: Path, base: str | None, file: Path, output: Path) -> None:
    """Write the answers to the questions of a file, by their ids."""
    from lora_or_full.data import squad

    # Gold answers are not used: they may be missing or have wrong offsets.
    questions, _ = squad.check(squad.read_files([file]), unanswerable="keep", misaligned="repair")
    if not questions:
        raise UserError(f"{file} holds no question.")
    from lora_or_full.generation.predictor import load  # after what needs no model

    given = load(folder, base).answers(questions)
    texts = {row["id"]: answer.text if answer else "" for row, answer in given}
    try:
        store.write_json(output, texts)
    except OSError as error:
        raise UserError(f"--output {output} can't be written: {error.strerror}.") from None
    print(f"{len(texts):,} answers: {output}")
    for count, problem in (
        (sum(row["context_cut"] for row, _ in given), "contexts were too long, and shortened"),
        (sum(answer is None for _, answer in given), "questions were too long, and not answered"),
    ):
        if count:
            print(f"Note: {count:,} {problem}.", file=sys.stderr)
