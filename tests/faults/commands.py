"""The user's commands in forks of this process, which has imported all that they need."""

import contextlib
import gc
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# One thread, so that a fork is the whole of this process.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OPENBLAS_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

import conftest  # noqa: F401  # first: it keeps the libraries offline
import datasets
import peft  # noqa: F401  # this and the next two: what a run would import late
import torch.utils.tensorboard  # noqa: F401
import transformers.models.gpt2.modeling_gpt2  # noqa: F401
from hydra.core.global_hydra import GlobalHydra

import experiment  # noqa: F401
import run
from lora_or_full.cli import report  # noqa: F401
from lora_or_full.data import fingerprints  # noqa: F401
from lora_or_full.training import sweep

gc.freeze()  # a run collects garbage before each measurement: not among what is imported
SECONDS = 600  # that a command may take before it counts as hanging
WORK = Path(tempfile.mkdtemp(prefix="faults_"))
datasets.config.HF_DATASETS_CACHE = WORK / "datasets"


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
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str


class Commands:
    """The user's commands, in a folder of a case."""

    def __init__(self, place: Path) -> None:
        self.place, self.number = place, 0
        place.mkdir(parents=True)

    def start(
        self,
        words: Sequence[str],
        before: Callable[[], object] = lambda: None,
        main: Any = run.main,
    ) -> Fork:
        """Begin the command `words`; `before` is called in its process first."""
        self.number += 1
        self.log = self.place / f"command{self.number}"

        def work() -> None:
            os.chdir(self.place)
            sys.argv = ["command", *words]
            sweep.subprocess = SimpleNamespace(Popen=Job)
            before()
            main()

        return Fork(work, self.log)

    def end(self, fork: Fork) -> Done:
        code = fork.wait()
        out, err = (Path(f"{self.log}.{n}").read_text(errors="replace") for n in ("out", "err"))
        return Done(code, out, err)

    def __call__(
        self,
        words: Sequence[str],
        before: Callable[[], object] = lambda: None,
        main: Any = run.main,
    ) -> Done:
        return self.end(self.start(words, before, main))


class Job(Fork):
    """In place of subprocess.Popen: a job of a sweep, without the seconds of its imports."""

    before: Callable[[list[str]], object] = staticmethod(lambda words: None)

    def __init__(self, command: list[str], env: Mapping[str, str]) -> None:
        words = command[2:]

        def work() -> None:
            os.environ |= env
            GlobalHydra.instance().clear()
            sys.argv = ["command", *words]
            Job.before(words)
            run.main()

        super().__init__(work, None)

    def wait(self, seconds: float = SECONDS) -> int:
        return super().wait(seconds)
