"""Ask what was trained.

lora-or-full ask RUN --context FILE "Who founded it?"   one answer; - reads the context from a pipe
lora-or-full ask RUN --context FILE                     a conversation about one context
lora-or-full ask RUN --data QUESTIONS.json              answers to a file in SQuAD's format

RUN is the folder of a finished run, of an adapter in PEFT's format or of a model; several answer
side by side. An answer comes with its probability (that of its tokens, the end included), with its
position in the context, and with alternatives that begin differently.
"""

import argparse
import contextlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lora_or_full.errors import UserError
from lora_or_full.runs import store

if TYPE_CHECKING:  # seconds, which a mistake on the command line need not wait for
    from lora_or_full.generation.context_session import ContextSession
    from lora_or_full.generation.predictor import Predictor, Reply

ALTERNATIVES = 3
MOST_SPANS = 5  # of an answer that are named


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
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


def run(args: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        UserError: An argument is wrong, or a run can't be asked.
    """
    folders, question = split_words(args.words)
    if (args.context is None) == (args.data is None):
        raise UserError("Give --context=FILE to ask about, or --data=FILE with questions.")
    if args.data is None:
        answer_context(folders, args.model, read_context(args.context, question), question)
        return
    if question is not None or len(folders) > 1:
        raise UserError("--data takes one RUN, and no other question.")
    answer_file(folders[0], args.model, args.data, args.output)


def split_words(words: list[str]) -> tuple[list[Path], str | None]:
    """Split the words of a command line into folders and the question, if there is one.

    Raises:
        UserError: There is no folder, or a word is neither.
    """
    folders, rest = list(words), None
    if words and not os.path.isdir(words[-1]):  # Path.is_dir raises on what is too long for a name
        *folders, rest = words
    wrong = [word for word in folders if not os.path.isdir(word)]
    if rest is not None and os.sep in rest and not any(map(str.isspace, rest)):
        wrong.append(rest)
    if wrong:
        raise UserError(
            f"There is no folder {wrong[0]}. First come the folders of runs, then one question in "
            "quotation marks."
        )
    if not folders:
        raise UserError("Which run? Give its folder, such as runs/<run>, before the question.")
    if rest is not None and not rest.strip():
        raise UserError("The question is empty.")
    return [Path(word) for word in folders], rest


def read_context(name: str, question: str | None) -> str:
    """Read the text to ask about.

    Args:
        name: A file; - for what is piped in.
        question: None for a conversation.

    Raises:
        UserError: The text can't be read, or is empty.
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


def answer_file(folder: Path, base: str | None, file: Path, output: Path) -> None:
    """Write the answer to each question of a file, by its id.

    Args:
        folder: What to ask.
        base: Its base model, where it does not name it.
        file: Questions in SQuAD's format.
        output: JSON file to write.
    """
    from lora_or_full.data import squad
    from lora_or_full.generation.predictor import load

    # Gold answers, if there are any, are not used: wrong offsets do no harm.
    questions, _ = squad.check(squad.read_files([file]), unanswerable="keep", misaligned="repair")
    if not questions:
        raise UserError(f"{file} holds no question.")
    given = load(folder, base).answers([(q.context, q.question) for q in questions])
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
    folders: list[Path], base: str | None, context: str, question: str | None
) -> None:
    """Print the answers to a question about a context, or to all that are then typed.

    Args:
        folders: What to ask.
        base: Their base model, where they do not name it.
        context: The text to ask about.
        question: None for a conversation.
    """
    from lora_or_full.generation.predictor import load

    runs = [load(folder, base) for folder in folders]
    sessions = [run.read(context) for run in runs]
    if question is not None:
        show(runs, sessions, question)
        return
    with contextlib.suppress(ImportError):  # where there is none, a line can't be edited
        import readline  # noqa: F401

    at_terminal = sys.stdin.isatty()
    if at_terminal:
        print(f"The context has {sessions[0].tokens:,} tokens. Ctrl-D ends.")
    while True:
        try:
            asked = input("\n? " if at_terminal else "")
        except EOFError:
            return
        try:
            show(runs, sessions, asked)
        except UserError as error:
            print(error, file=sys.stderr)


def show(runs: "list[Predictor]", sessions: "list[ContextSession]", question: str) -> None:
    """Print the answers of each run."""
    for run, session in zip(runs, sessions, strict=True):
        replies = run.ask(session, question, ALTERNATIVES)
        if len(runs) > 1:
            print(f"{run.label}:")
        print("\n".join(lines(replies, session.context)), flush=True)
        if session.read < session.tokens:
            print(
                f"Note: {run.label} reads {session.read:,} of the context's {session.tokens:,} "
                "tokens, the first ones. Ask about its parts, each in a file of its own.",
                file=sys.stderr,
            )


def lines(replies: "list[Reply]", context: str) -> list[str]:
    """Lines that show an answer, its position, and the alternatives."""
    answer, *others = replies
    end = "" if answer.ended else "; cut off, since it did not end"
    found = [named(answer), f"  probability {answer.probability:.1%}{end}"]
    if answer.spans:
        positions = ", ".join(f"{start}-{stop}" for start, stop in answer.spans[:MOST_SPANS])
        more = len(answer.spans) - MOST_SPANS
        start, stop = answer.spans[0]
        before, after = context[max(0, start - 40) : start], context[stop : stop + 40]
        found += [
            f"  in the context, characters {positions}{f' and {more} more' if more > 0 else ''}:",
            f"  …{printable(before)}[{printable(context[start:stop])}]{printable(after)}…",
        ]
    elif answer.text:
        found.append("  not in the context")
    if others:
        found.append("  or: " + "; ".join(f"{named(o)} {o.probability:.1%}" for o in others))
    return found


def named(reply: "Reply") -> str:
    """An answer's text for the terminal."""
    return printable(reply.text) or "(no answer)"


def printable(text: str) -> str:
    """A text in one line, without what a terminal would take as a command."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "\ufffd" for c in text)
