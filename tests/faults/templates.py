"""What the cases start from: finished and interrupted runs, a sweep, a report."""

import json
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from commands import WORK, Commands  # first: it says where the project is
from conftest import save_gpt2, write_squad
from forks import Fork
from strikes import Places, Strike, counted

import run
from lora_or_full.cli import main as cli
from lora_or_full.runs import store

MODES = ("lora", "full")
WORDS = [
    f"model.name={WORK / 'model'}",
    f"data.path={WORK / 'train.json'}",
    f"data.test_path={WORK / 'test.json'}",
    "data.train_size=10", "data.validation_size=3", "data.test_size=6", "eval_batch_size=2",
    "max_length=200", "max_new_tokens=4", "lr=1e-2", "trainer.accelerator=cpu",
    "trainer.precision=32-true", "trainer.enable_progress_bar=false",
    "trainer.log_every_n_steps=1",
]  # fmt: skip
SWEEP = ["-m", "mode=lora,full", "seed=1,2", "study=study", *WORDS]
# Where templates of interrupted runs were killed: a moment, and the number of its event.
KILLED = {"in the second epoch": ("training", 5), "in the third epoch": ("training", 8),
          "in the test": ("test", 2)}  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What a run leaves that must not depend on faults."""

    epochs: Any
    before: Any
    test: Any
    samples: int
    files: dict[str, bytes]


def outcome(folder: Path, but: str = "") -> Outcome:
    """What the finished run in `folder` left, without the file `but`."""
    results = json.loads((folder / "results.json").read_text())
    names = ["predictions.jsonl", "contexts.json", "metrics.csv"]
    names += [str(f.relative_to(folder)) for f in sorted(folder.glob("[am]*/*.safetensors"))]
    files = {name: (folder / name).read_bytes() for name in names if name != but}
    samples = results["cost"]["samples"]
    return Outcome(results["epochs"], results["before"], results["test"], samples, files)


def tree(folder: Path) -> dict[str, tuple[int, bytes]]:
    """All files of `folder`, with the time they were changed, but for the lock."""
    return {
        str(file.relative_to(folder)): (file.stat().st_mtime_ns, file.read_bytes())
        for file in folder.rglob("*")
        if file.is_file() and file.name != store.LOCK
    }


def weights_of(folder: Path) -> Path:
    return next(folder.glob("[am]*/*.safetensors"))


class Templates:
    """What cases start from: a finished sweep, interrupted runs, a report.

    Also how often each moment comes in a run, and what a run leaves.
    """

    def __init__(self) -> None:
        made = Fork(lambda: save_gpt2(WORK / "model"), None)
        assert made.wait() == 0
        for number, name in enumerate(("train", "test")):
            write_squad(WORK / f"{name}.json", 6, 2, 2, seed=number)
        command = Commands(WORK / "templates")
        self.place = command.place
        self.counts: dict[str, dict[str, int]] = {}
        self.seconds: dict[str, float] = {}
        self.outcomes: dict[str, Outcome] = {}
        for mode in MODES:
            folder, cache = self.place / mode, self.place / f"cache_{mode}"
            words = self.words(mode, folder, cache)
            self.counts[mode], self.seconds[mode] = self._count(
                command, words, Places(folder, cache), run.main
            )
            self.outcomes[f"{mode} 1"] = outcome(folder)
            for name, (moment, number) in KILLED.items():
                kill = Strike("SIGKILL", moment, number, Places(), random.Random(0))
                place = self.interrupted(mode, name)
                words = self.words(mode, place, self.place / "cache")
                assert command(words, kill.install).code == -signal.SIGKILL
        self.sweep = [*SWEEP, f"output_dir={self.place}", f"cache_dir={self.place / 'cache'}"]
        done = command(self.sweep)
        assert done.code == 0, done.err
        self.study = self.place / "study"
        self.runs = [file.parent for file in sorted(self.study.glob("*/results.json"))]
        for folder in self.runs:
            found = outcome(folder)
            # The cache was cold above, and is warm here.
            assert self.outcomes.setdefault(key_of(folder), found) == found
        self.report = self.place / "report"
        self.counts["report"], self.seconds["report"] = self._count(
            command, ["report", "study", "--output=report"], Places(report=self.report), cli.main
        )

    def words(self, mode: str, folder: Path, cache: Path) -> list[str]:
        places = [f"hydra.run.dir={folder}", f"output_dir={folder.parent}", f"cache_dir={cache}"]
        return [f"mode={mode}", *WORDS, *places]

    def interrupted(self, mode: str, name: str) -> Path:
        return self.place / f"{mode}_{name.replace(' ', '_')}"

    def _count(
        self, command: Commands, words: list[str], places: Places, main: Callable[[], None]
    ) -> tuple[dict[str, int], float]:
        file = self.place / "counts.json"

        def counting() -> None:
            counts = counted(places)
            main()
            file.write_text(json.dumps(counts))

        began = time.monotonic()
        done = command(words, main=counting)
        assert done.code == 0, done.err
        return json.loads(file.read_text()), time.monotonic() - began


def key_of(folder: Path) -> str:
    """The mode and seed of a run."""
    config = json.loads((folder / "results.json").read_text())["config"]
    return f"{config['mode']} {config['seed']}"
