"""Errors that the user can fix, and their one-line messages."""

import errno
import io
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

MAX_NAMES, MAX_LENGTH = 20, 100  # in a list of names, and of each name
# Of a full or read-only disk, an exceeded quota, a broken or a remote file system.
STORAGE_ERRORS = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO,
    errno.ESTALE, errno.ENOLCK, errno.ENOTSUP,
}  # fmt: skip
# In torch's messages; the first is of the CPU.
MEMORY_ERRORS = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
GLOO_ERROR = "gloo/transport"  # a lost process: in a RuntimeError, if it is not a DistError


class UserError(Exception):
    """An error that the user can fix: what was given, what is accepted, which key to change.

    Unprintable characters are escaped, so that quoted data can't control the terminal.
    """

    def __init__(self, message: str) -> None:
        escaped = [
            c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode()
            for c in message
        ]
        super().__init__("".join(escaped))


@contextmanager
def command_line_errors(folder: Path | None = None) -> Iterator[None]:
    """Exit without a traceback: 1 after an error that the user can fix, 130 after Ctrl-C.

    Args:
        folder: Folder of the run or sweep, to `explain` other errors too.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # its encoding may lack a character of a path
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the rest can't be written either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        problem = explain(error, folder) if folder else error
        if not isinstance(problem, UserError):
            raise
        print(f"Error: {problem}", file=sys.stderr)
        sys.exit(1)


def first_line(error: BaseException) -> str:
    """The first line of an error's message that is not blank, or else the error's type."""
    lines = str(error).splitlines()
    return next((line for line in lines if line.strip()), type(error).__name__)


def listed(names: Iterable[object]) -> str:
    """Join names that come from data, shortened to a few of limited length."""
    texts = [text if (text := str(name)).isprintable() else repr(text) for name in names]
    shown = [t if len(t) <= MAX_LENGTH else f"{t[:MAX_LENGTH]}..." for t in texts[:MAX_NAMES]]
    more = f" and {len(texts) - MAX_NAMES} more" if len(texts) > MAX_NAMES else ""
    return ", ".join(shown) + more


def explain(error: BaseException, folder: Path) -> UserError | None:
    """Recognize an error that the user can fix: of storage, memory, lost devices, or a UserError.

    Args:
        error: The error; those that it was raised from count too.
        folder: Folder of the run, which the message says how to resume.
    """
    resumable = (folder / "config.yaml").is_file()
    again = f"python src/run.py resume='{folder}'" if resumable else "the same command again"
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserError):
            return cause
        text, number = str(cause), getattr(cause, "errno", None)
        if in_rust := re.search(r"\(os error (\d+)\)", text):  # safetensors and tokenizers
            number = int(in_rust[1])
        no_memory = isinstance(cause, MemoryError) or number == errno.ENOMEM
        if no_memory or any(words in text for words in MEMORY_ERRORS):
            return UserError(
                f"The memory is full ({text.partition(chr(10))[0] or type(cause).__name__}). A run "
                "with a smaller batch_size, eval_batch_size or max_length, or with more "
                f"trainer.accumulate_grad_batches, takes less; with more memory free: {again}"
            )
        if any(kind.__name__ == "DistError" for kind in type(cause).__mro__) or GLOO_ERROR in text:
            return UserError(
                f"The processes of the devices have lost each other ({first_line(cause)}). One may "
                "have been killed, for example because memory ran out. The last checkpoint is "
                f"kept. To resume: {again}"
            )
        if number in STORAGE_ERRORS:
            file = getattr(cause, "filename", None) or folder
            return UserError(
                f"{file}: {os.strerror(number)}. What was saved before is kept. "
                f"When that is fixed: {again}"
            )
        cause = cause.__cause__ or cause.__context__
    return None
