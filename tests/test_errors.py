"""What users read: one line with the problem, in which data can't control the terminal."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from torch.distributed import DistNetworkError

from lora_or_full import errors
from lora_or_full.errors import UserError, command_line_errors, explain, first_line, listed

RUST = "Error while serializing: I/O error: No space left on device (os error 28)"
# What torch raises where it writes to a file that Python opened.
WRITER = "[enforce fail at inline_container.cc:672] . unexpected pos 768 vs 662"
GLOO = "[pair.cc:534] gloo/transport/tcp: Connection closed by peer [127.0.0.1]:3000"
CUDA = "CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total capacity of 8 GiB."


def raised_from(error: Exception, cause: Exception) -> Exception:
    error.__context__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "full", "runs/a/last.ckpt"), "runs/a/last.ckpt: No space left on"),
        (OSError(errno.EROFS, "read-only"), "{folder}: Read-only file system."),
        (OSError(errno.EDQUOT, "quota"), "{folder}: Disk quota exceeded."),
        (OSError(errno.ENOLCK, "locks"), "{folder}: No locks available."),
        (SafetensorError(RUST), "{folder}: No space left on device."),
        (raised_from(RuntimeError(WRITER), OSError(errno.ENOSPC, "full")), "{folder}: No space"),
        (MemoryError(), "The memory is full (MemoryError)"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "The memory is full ([Errno 12]"),
        (RuntimeError(GLOO), "The processes of the devices have lost each other ([pair.cc:534]"),
        (DistNetworkError("The client socket has timed out"), "lost each other (The client socket"),
        (
            RuntimeError(CUDA),
            "The memory is full (CUDA out of memory. Tried to allocate 2.00 GiB.)",
        ),
    ],
)
def test_errors_of_storage_memory_and_devices_are_explained_in_one_line(
    error: Exception, words: str, tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").touch()
    message = str(explain(error, tmp_path))
    assert words.format(folder=tmp_path) in message
    assert message.endswith(f"python src/run.py resume='{tmp_path}'")
    assert "\n" not in message
    if message.startswith("The memory"):
        assert all(key in message for key in ("batch_size", "eval_batch_size", "max_length"))


def test_torchs_own_message_of_full_memory_is_recognized(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 52)
    message = str(explain(raised.value, tmp_path))
    assert message.startswith("The memory is full (")
    assert message.endswith("the same command again")  # there is no run yet to resume


def test_any_other_error_keeps_its_trace(tmp_path: Path) -> None:
    assert explain(ValueError("a mistake of ours"), tmp_path) is None
    assert explain(FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)), tmp_path) is None


def test_a_user_error_is_returned_unchanged(tmp_path: Path) -> None:
    error = UserError("lr=0: must be a number above 0.")
    assert explain(error, tmp_path) is error


def test_a_message_keeps_its_lines_and_escapes_unprintable_characters() -> None:
    message = str(UserError("one\ntwo \x1b[31m\u202e\ud800\x00 é 東京"))
    assert message == "one\ntwo \\x1b[31m\\u202e\\ud800\\x00 é 東京"
    message.encode()


def test_the_first_line_is_not_blank() -> None:
    assert first_line(ValueError("\n \n what\nmore")) == " what"
    assert first_line(ValueError()) == first_line(ValueError("\n")) == "ValueError"


def test_few_of_many_and_parts_of_long_names_are_listed() -> None:
    assert listed(["a", 3, "b\n"]) == r"a, 3, 'b\n'"
    assert listed(map(str, range(30))).endswith(f"19 and {30 - errors.MAX_NAMES} more")
    assert len(listed(["x" * 10**6])) == errors.MAX_LENGTH + len("...")


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [(UserError("No."), 1, "Error: No.\n"), (KeyboardInterrupt(), 130, "Stopped.\n")],
)
def test_a_command_ends_with_one_line(
    raised: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end, command_line_errors():
        raise raised
    assert end.value.code == code
    assert capsys.readouterr() == ("", said)


@pytest.mark.parametrize("shown", ["print('x' * 100_000)", "print('x')", "sys.exit(print('x'))"])
def test_a_command_with_a_closed_pipe_prints_nothing(shown: str) -> None:
    code = (
        "import sys\nfrom lora_or_full.errors import command_line_errors\n"
        f"with command_line_errors():\n    sys.stdin.read()\n    {shown}"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=pipe, stdout=pipe, stderr=pipe,
        cwd=Path(errors.__file__).parent,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        process.stdout.close()
        process.stdout = None
        _, said = process.communicate()
    assert (process.returncode, said) == (1, b"")
