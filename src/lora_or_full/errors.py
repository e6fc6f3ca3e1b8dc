"""The one error that a person can mend, which also tells in words what the machine lacks."""

import errno
import io
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

MOST, LONGEST = 20, 100  # names that are listed, and characters of each
# What a full or read-only disk, a quota, a broken or a remote file system answer.
OF_STORAGE = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO,
    errno.ESTALE, errno.ENOLCK, errno.ENOTSUP,
}  # fmt: skip
# What torch says on its devices; the first is that of the processor.
OF_MEMORY = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
OF_DEVICES = "gloo/transport"  # what torch says of lost ones is a RuntimeError, or its DistError


class UserError(Exception):
    """A mistake in what was asked for.

    Its message is all that the person sees: what was given, what is accepted, which key to change.
    What it quotes from data can't steer a terminal: characters that are not printed are spelt out.
    """

    def __init__(self, message: str) -> None:
        super().__init__("".join(c if c.isprintable() or c == "\n" else _spelt(c) for c in message))


@contextmanager
def command_line_errors() -> Iterator[None]:
    """What a command does, which ends with a line and no trace: on a person's mistake (exit code 1)
    and on Ctrl-C (130); without a line where nobody reads on, as before `| head` (1)."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a folder's name may be no text in its encoding
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # nor can what is left be written
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def first_line(error: BaseException) -> str:
    """The first line of what a library says was wrong that says anything."""
    lines = str(error).splitlines()
    return next((line for line in lines if line.strip()), type(error).__name__)


def listed(names: Iterable[object]) -> str:
    """Names that data brings, a few of them: there may be any number, of any length."""
    texts = [text if (text := str(name)).isprintable() else repr(text) for name in names]
    shown = [text if len(text) <= LONGEST else f"{text[:LONGEST]}..." for text in texts[:MOST]]
    more = f" and {len(texts) - MOST} more" if len(texts) > MOST else ""
    return ", ".join(shown) + more


def _spelt(character: str) -> str:
    return character.encode("unicode_escape").decode()


def explain(error: BaseException, folder: Path) -> UserError | None:
    """What a person can mend about an `error` of the run in `folder`; None where that is nothing.

    A full or read-only disk and too little memory are told by what the libraries raise for them,
    each in its own way, or by what that was raised from.
    """
    resumable = (folder / "config.yaml").is_file()
    again = f"python src/run.py resume='{folder}'" if resumable else "the same command again"
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserError):
            return cause
        text = str(cause)
        number, file = getattr(cause, "errno", None), getattr(cause, "filename", None)
        if of_rust := re.search(r"\(os error (\d+)\)", text):  # safetensors and tokenizers
            number = int(of_rust[1])
        short = isinstance(cause, MemoryError) or number == errno.ENOMEM
        if short or any(words in text for words in OF_MEMORY):
            return UserError(
                f"The memory is full ({text.partition(chr(10))[0] or type(cause).__name__}). A run "
                "with a smaller batch_size, eval_batch_size or max_length, or with more "
                f"trainer.accumulate_grad_batches, takes less; with more memory free: {again}"
            )
        if any(kind.__name__ == "DistError" for kind in type(cause).__mro__) or OF_DEVICES in text:
            return UserError(
                f"The processes of the devices have lost each other ({first_line(cause)}). One may "
                "have been ended, for want of memory for example. What was saved before is kept. "
                f"To go on: {again}"
            )
        if number in OF_STORAGE:
            return UserError(
                f"{file or folder}: {os.strerror(number)}. What was saved before is kept. "
                f"When that is mended: {again}"
            )
        cause = cause.__cause__ or cause.__context__
    return None
