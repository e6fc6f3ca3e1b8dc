"""What a person reads: one line of what is lacking, which data can't steer."""

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
def test_what_the_machine_lacks_is_told_in_a_line(
    error: Exception, words: str, tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").touch()
    told = str(explain(error, tmp_path))
    assert words.format(folder=tmp_path) in told
    assert told.endswith(f"python src/run.py resume='{tmp_path}'")
    assert "\n" not in told
    if told.startswith("The memory"):
        assert all(key in told for key in ("batch_size", "eval_batch_size", "max_length"))


def test_torch_says_what_is_looked_for_when_the_processor_has_no_memory(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 52)
    told = str(explain(raised.value, tmp_path))
    assert told.startswith("The memory is full (")
    assert told.endswith("the same command again")  # there is no run yet that could go on


def test_any_other_error_keeps_its_trace(tmp_path: Path) -> None:
    assert explain(ValueError("a mistake of ours"), tmp_path) is None
    assert explain(FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)), tmp_path) is None


def test_what_a_person_asked_wrongly_is_told_as_it_is(tmp_path: Path) -> None:
    error = UserError("lr=0: must be a number above 0.")
    assert explain(error, tmp_path) is error


def test_a_message_keeps_its_lines_and_spells_out_what_is_not_printed() -> None:
    message = str(UserError("one\ntwo \x1b[31m\u202e\ud800\x00 é 東京"))
    assert message == "one\ntwo \\x1b[31m\\u202e\\ud800\\x00 é 東京"
    message.encode()


def test_the_first_line_is_one_that_says_something() -> None:
    assert first_line(ValueError("\n \n what\nmore")) == " what"
    assert first_line(ValueError()) == first_line(ValueError("\n")) == "ValueError"


def test_of_many_or_long_names_a_few_are_listed() -> None:
    assert listed(["a", 3, "b\n"]) == r"a, 3, 'b\n'"
    assert listed(map(str, range(30))).endswith(f"19 and {30 - errors.MOST} more")
    assert len(listed(["x" * 10**6])) == errors.LONGEST + len("...")


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [(UserError("No."), 1, "Error: No.\n"), (KeyboardInterrupt(), 130, "Stopped.\n")],
)
def test_a_command_ends_with_a_line(
    raised: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end, command_line_errors():
        raise raised
    assert end.value.code == code
    assert capsys.readouterr() == ("", said)


@pytest.mark.parametrize("shown", ["print('x' * 100_000)", "print('x')", "sys.exit(print('x'))"])
def test_a_command_that_nobody_reads_says_nothing(shown: str) -> None:
    code = f"import sys\nfrom lora_or_full import errors\nwith errors.command_line_errors():\n    sys.stdin.read()\n    {shown}"
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
