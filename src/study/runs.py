"""The runs of a study: read from their folders, and put into arms that can be compared."""

import json
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from study import record

# What may differ between the runs of one arm.
WITHIN_ARM = record.PLACES | {"seed", "lora.r", "lr_by_mode.lora", "lr_by_mode.full"}
REQUIRED = ("config", "data", "model", "parameters", "epochs", "before", "test", "cost")


@dataclass(frozen=True)
class Run:
    """A finished run: its record, and its predictions in the order of their ids."""

    folder: Path
    results: dict[str, Any]
    predictions: list[dict[str, Any]]

    @property
    def mode(self) -> str:
        return str(self.results["config"]["mode"])

    @property
    def seed(self) -> int:
        return int(self.results["config"]["seed"])

    @property
    def best(self) -> dict[str, float]:
        """The epoch that was chosen on the validation questions, and scored."""
        number = self.results["best_epoch"]
        return next(epoch for epoch in self.results["epochs"] if epoch["epoch"] == number)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The configuration by dotted keys, without what may differ between runs of an arm."""
        values = record.flat(self.results["config"])
        return {key: value for key, value in values.items() if key not in WITHIN_ARM}

    @property
    def comparable(self) -> dict[str, str]:
        """What has to be the same in all runs of a study, by the words for it."""
        r = self.results
        return {
            "model": r["model"]["fingerprint"],
            "test questions": r["data"]["test"]["fingerprint"],
            "validation questions": r["data"]["validation"]["fingerprint"],
            "precision": str(r["config"]["trainer"]["precision"]),
            "device": r["environment"]["device"],
            "set of answered questions": str([p["id"] for p in self.predictions]),
        }

    def scores(self, metric: str) -> NDArray[np.float64]:
        """The exact_match or f1 (percent) of each question."""
        return np.array([p[metric] for p in self.predictions], dtype=float)


@dataclass(frozen=True)
class Arm:
    """The runs that differ in nothing but their seed, by seed; `label` tells it from the others."""

    label: str
    runs: dict[int, Run]

    @property
    def mode(self) -> str:
        return self.any.mode

    @property
    def any(self) -> Run:
        return next(iter(self.runs.values()))

    @property
    def validation_f1(self) -> float:
        """The mean over seeds, by which the best arm of a mode is chosen."""
        return statistics.fmean(run.best["f1"] for run in self.runs.values())

    def values(self, *path: str) -> list[float]:
        """What results.json holds at `path`, of each seed."""
        found = []
        for run in self.runs.values():
            value: Any = run.results
            for key in path:
                value = value[key]
            found.append(float(value))
        return found


@dataclass(frozen=True)
class Study:
    """Arms that can be compared, and what was left out of them, with the reason."""

    arms: list[Arm]
    left_out: list[str]

    def best(self, mode: str) -> Arm | None:
        """The arm of a mode with the best F1 on the validation questions, prompts being masked."""
        own = [arm for arm in self.arms if arm.mode == mode and arm.any.config["mask_prompt"]]
        return max(own, key=lambda arm: arm.validation_f1, default=None)


def collect(places: Iterable[Path]) -> Study:
    """The study that the run folders in `places` (runs, sweeps, or folders of them) make."""
    runs, left_out = [], []
    for folder in dict.fromkeys(_folders(places)):
        found = _read(folder)
        if isinstance(found, Run):
            runs.append(found)
        else:
            left_out.append(f"{folder}: {found}")
    runs, unlike = _alike(runs)
    arms, twice = _arms(runs)
    return Study(arms, left_out + unlike + twice)


def _folders(places: Iterable[Path]) -> list[Path]:
    found: list[Path] = []
    for place in places:
        inside = sorted({file.parent for file in place.rglob("config.yaml")})
        found += [folder for folder in inside if ".git" not in folder.parts]
    return found


def _read(folder: Path) -> Run | str:
    """The run in a folder, or why it is none that can be used."""
    state = record.status(folder)
    if state.get("state") == "failed":
        return f"failed ({state.get('error', 'it does not say why')})"
    if not (folder / "results.json").is_file():
        return f"not finished (status: {state.get('state', 'none')})"
    try:
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        lines = (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
        run = Run(folder, results, sorted(map(json.loads, lines), key=lambda p: p["id"]))
        if missing := [key for key in REQUIRED if key not in results]:
            return f"results.json has no {', '.join(missing)}"
        contexts = json.loads((folder / "contexts.json").read_text(encoding="utf-8"))
        if any(str(p["paragraph"]) not in contexts for p in run.predictions):
            return "contexts.json lacks a paragraph of predictions.jsonl"
        _ = run.mode, run.seed, run.best, run.comparable, run.config["mask_prompt"]
        for metric in ("exact_match", "f1"):
            # The record and the answers were written together: unlike means are a broken file.
            scores = run.scores(metric)
            if not len(scores) or abs(scores.mean() - results["test"][metric]) > 1e-6:
                return f"predictions.jsonl does not give the {metric} of results.json"
    except (OSError, ValueError, KeyError, TypeError, StopIteration) as error:
        return f"its files can't be read ({type(error).__name__}: {error})"
    return run


def _alike(runs: Sequence[Run]) -> tuple[list[Run], list[str]]:
    """The largest set of runs that can be compared, and why the others are left out."""
    sets = Counter(tuple(run.comparable.values()) for run in runs)
    if not sets:
        return [], []
    common = sets.most_common(1)[0][0]
    kept, left_out = [], []
    for run in runs:
        unlike = [
            name
            for (name, value), wanted in zip(run.comparable.items(), common, strict=True)
            if value != wanted
        ]
        if unlike:
            left_out.append(f"{run.folder}: another {', '.join(unlike)} than most runs")
        else:
            kept.append(run)
    return kept, left_out


def _arms(runs: Sequence[Run]) -> tuple[list[Arm], list[str]]:
    """The runs by configuration; of two with the same seed, the first counts."""
    grouped: dict[str, dict[int, Run]] = {}
    left_out = []
    for run in runs:
        seeds = grouped.setdefault(json.dumps(run.config, sort_keys=True), {})
        if run.seed in seeds:
            left_out.append(f"{run.folder}: the same as {seeds[run.seed].folder}, counted once")
        else:
            seeds[run.seed] = run
    arms = [dict(sorted(seeds.items())) for seeds in grouped.values()]
    arms.sort(key=lambda seeds: _order(next(iter(seeds.values()))))
    return [Arm(_label(seeds, arms), seeds) for seeds in arms], left_out


def _order(run: Run) -> tuple[Any, ...]:
    config = run.config
    return (run.mode != "lora", config.get("rank") or 0, config["lr"], json.dumps(config))


def _label(seeds: dict[int, Run], arms: Sequence[dict[int, Run]]) -> str:
    """The mode, and what else tells these runs from others of the same mode."""
    own = next(iter(seeds.values()))
    peers = [run for other in arms if (run := next(iter(other.values()))).mode == own.mode]
    keys = [
        key
        for key in own.config
        if any(peer.config.get(key) != own.config[key] for peer in peers)
        or (key == "mask_prompt" and not own.config[key])
    ]
    name = {"lora": "LoRA", "full": "full"}.get(own.mode, own.mode)
    return ", ".join([name, *(f"{key} {_shown(own.config[key])}" for key in keys)])


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
