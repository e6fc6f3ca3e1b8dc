"""The one error that a person can mend, and in such words what the machine may lack."""

import errno
import os
import re
from pathlib import Path

# What a full or read-only disk, a quota, a broken or a remote file system answer.
OF_STORAGE = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO,
    errno.ESTALE, errno.ENOLCK, errno.ENOTSUP,
}  # fmt: skip
# What torch says on its devices; the first is that of the processor.
OF_MEMORY = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


class UserError(Exception):
    """A mistake in what was asked for.

    Its message is all that the person sees: what was given, what is accepted, which key to change.
    """


def in_words(error: BaseException, folder: Path) -> UserError | None:
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
        if number in OF_STORAGE:
            return UserError(
                f"{file or folder}: {os.strerror(number)}. What was saved before is kept. "
                f"When that is mended: {again}"
            )
        cause = cause.__cause__ or cause.__context__
    return None
