"""The user's commands in forks of one process, which has imported all that they need: imports take
seconds, and a fork does not repeat them.

As a program it does this for a test (see `Commands`): it reads one line of JSON per command (words,
folder, seconds, given) and writes one: the exit code (null after a time-out), output and errors.
"""

import contextlib
import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

SECONDS = 600  # that a command may take before it counts as hanging


def preload() -> None:
    """Import what the commands import, early or late, and have the jobs of sweeps forked too."""
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import torch.utils.tensorboard  # noqa: F401
    import transformers.models.gpt2.modeling_gpt2
    import transformers.models.llama.modeling_llama  # noqa: F401

    import experiment  # noqa: F401
    from lora_or_full.cli import ask, evaluate, export, report  # noqa: F401
    from lora_or_full.data import fingerprints  # noqa: F401
    from lora_or_full.generation import predictor  # noqa: F401
    from lora_or_full.training import sweep

    sweep.subprocess = SimpleNamespace(Popen=Job)  # type: ignore[attr-defined]
    gc.freeze()  # a run collects garbage before each measurement: not among what is imported


class Fork:
    """This process again, which does `work` and ends; with `log`, in a group of its own and its
    output in two files."""

    def __init__(self, work: Callable[[], None], log: Path | None) -> None:
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _end(work, log)
        if log:
            with contextlib.suppress(OSError):  # it has done so itself, or has ended
                os.setpgid(self.pid, self.pid)

    def wait(self, seconds: float = SECONDS) -> int:
        """The exit code; of a signal its negative number."""
        until = time.monotonic() + seconds
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() > until:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise TimeoutError(f"nothing came of it in {seconds} s")
            time.sleep(0.005)

    def terminate(self) -> None:
        os.kill(self.pid, signal.SIGTERM)


def _end(work: Callable[[], None], log: Path | None) -> None:
    """Do `work`, and end this process as Python would."""
    code = 1
    try:
        if log:
            os.setpgid(0, 0)
            for stream, name in ((1, "out"), (2, "err")):
                flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND
                os.dup2(os.open(f"{log}.{name}", flags), stream)
        work()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


class Job(Fork):
    """In place of subprocess.Popen: a job of a sweep, without the seconds of its imports."""

    before: Callable[[list[str]], object] = staticmethod(lambda words: None)

    def __init__(self, command: list[str], env: Mapping[str, str]) -> None:
        words = command[2:]

        def work() -> None:
            from hydra.core.global_hydra import GlobalHydra

            import run

            os.environ |= env
            GlobalHydra.instance().clear()
            sys.argv = ["command", *words]
            Job.before(words)
            run.main()

        super().__init__(work, None)

    def wait(self, seconds: float = SECONDS) -> int:
        return super().wait(seconds)


class Commands:
    """Runs `python` with some words, in forks of a process that has imported the project of `src`.

    Use it as a context manager, which ends that process.
    """

    def __init__(self, src: Path, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {
                "HF_HUB_OFFLINE": "1", "COLUMNS": "120", "PYTHONPATH": str(src),
                "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",  # a fork keeps one thread
            } | environment,
        )  # fmt: skip

    def __enter__(self) -> "Commands":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()

    def __call__(
        self, words: list[str], folder: Path, seconds: float = SECONDS, given: str = ""
    ) -> dict[str, Any]:
        """Give the exit code, output and errors (`code`, `out`, `errors`); `given` is its input."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        asked = {"words": words, "folder": str(folder), "seconds": seconds, "given": given}
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


def run_forked(words: list[str], folder: str, seconds: float, given: str) -> dict[str, Any]:
    """Run `python` with these words in a folder, for at most some seconds."""
    with tempfile.TemporaryDirectory() as logs:
        log, file = Path(logs) / "log", Path(logs) / "in"
        file.write_text(given)

        def work() -> None:
            os.dup2(os.open(file, os.O_RDONLY), 0)
            os.chdir(folder)
            as_python(words)

        code: int | None = None
        with contextlib.suppress(TimeoutError):
            code = Fork(work, log).wait(seconds)
        out, errors = (Path(f"{log}.{name}").read_text(errors="replace") for name in ("out", "err"))
        return {"code": code, "out": out, "errors": errors}


def as_python(words: list[str]) -> None:
    """Do in this process what `python` does with these words."""
    first, *rest = words
    if first == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path[0] = str(Path(first).resolve().parent)
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    preload()
    for line in sys.stdin:
        print(json.dumps(run_forked(**json.loads(line))), flush=True)
