"""The user's commands in forks of this process, which has imported all that they need."""

import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# One thread, so that a fork is the whole of this process.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OPENBLAS_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

import conftest  # noqa: F401  # first: it keeps the libraries offline
import datasets
from forks import Fork, preload

import run

preload()
WORK = Path(tempfile.mkdtemp(prefix="faults_"))
datasets.config.HF_DATASETS_CACHE = WORK / "datasets"


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
