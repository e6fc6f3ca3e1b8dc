"""The runs of a study, and the arms that they make."""

import hashlib
import json
import statistics
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_or_full.config import schema
from lora_or_full.runs.schema import at

# What may differ between the runs of one arm: what another key holds too is not told twice.
WITHIN_ARM = schema.RESULT_NEUTRAL | {
    "seed", "lora.r", "lr_by_mode.lora", "lr_by_mode.full", "model.target_modules"
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A finished run: its record, its predictions in the order of their ids, and the contexts that
    these name."""

    folder: Path
    results: dict[str, Any]
    predictions: list[dict[str, Any]]
    contexts: dict[str, str]

    @property
    def mode(self) -> str:
        return str(self.results["config"]["mode"])

    @property
    def model(self) -> str:
        """Its name; of a local folder the last part, which does not depend on the machine."""
        name = str(self.results["model"]["name"])
        return Path(name).name if Path(name).is_absolute() else name

    @property
    def seed(self) -> int:
        return int(self.results["config"]["seed"])

    @property
    def best(self) -> dict[str, float]:
        """The epoch that was chosen on the validation questions, and scored."""
        number = self.results["best_epoch"]
        return next(epoch for epoch in self.results["epochs"] if epoch["epoch"] == number)

    @property
    def trained_on(self) -> str:
        """The fingerprint of the training questions."""
        return str(self.results["data"]["train"]["fingerprint"])

    @property
    def seconds_per_step(self) -> float:
        """Of an optimizer step, which may be computed in parts."""
        parts = self.results["config"]["trainer"]["accumulate_grad_batches"]
        return float(self.results["cost"]["seconds_per_batch"] * parts)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The configuration by dotted keys, without what may differ between runs of an arm."""
        values = schema.flat(self.results["config"])
        return {k: v for k, v in values.items() if k not in WITHIN_ARM and v is not None}

    @property
    def comparable(self) -> dict[str, str]:
        """What has to be the same in all runs of a study, by the words for it."""
        r = self.results
        return {
            "model": f"{self.model} {r['model']['fingerprint']}",
            "data files": r["data"]["source"][:16],
            "test questions": r["data"]["test"]["fingerprint"],
            "validation questions": r["data"]["validation"]["fingerprint"],
            "precision": str(r["config"]["trainer"]["precision"]),
            "device": r["environment"]["device"],
            "way to measure memory": r["cost"]["peak_memory_is"],
            "set of answered questions": hashlib.sha256(
                json.dumps([p["id"] for p in self.predictions]).encode()
            ).hexdigest()[:16],
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

    @property
    def standing(self) -> tuple[int, float]:
        """What is higher for the arm to take: more seeds; of equals, the better validation F1."""
        return len(self.runs), self.validation_f1

    def shared_seeds(self, other: "Arm") -> list[int]:
        """The seeds that both have."""
        return sorted(self.runs.keys() & other.runs.keys())

    def minus(self, other: "Arm", metric: str) -> NDArray[np.float64]:
        """The differences of their scores, (seeds that both have, questions)."""
        return np.stack([
            self.runs[seed].scores(metric) - other.runs[seed].scores(metric)
            for seed in self.shared_seeds(other)
        ])  # fmt: skip

    def values(self, *path: str) -> list[float]:
        """What results.json holds at `path`, of each seed."""
        return [float(at(run.results, ".".join(path))) for run in self.runs.values()]


@dataclass(frozen=True)
class Study:
    """Arms that can be compared, and what was left out of them, with the reason."""

    arms: list[Arm]
    left_out: list[str]

    def best(self, mode: str) -> Arm | None:
        """The arm of a mode with the best F1 on the validation questions, among those with masked
        prompts that have the most seeds."""
        own = [arm for arm in self.arms if arm.mode == mode and arm.any.config["mask_prompt"]]
        return max(own, key=lambda arm: arm.standing, default=None)

    def leading(self, most: int) -> list[Arm]:
        """At most so many arms of each mode, those of the highest standing, in their order."""
        ranked = sorted(self.arms, key=lambda arm: arm.standing, reverse=True)
        chosen = {
            mode: [arm for arm in ranked if arm.mode == mode][:most] for mode in ("lora", "full")
        }
        return [arm for arm in self.arms if arm in chosen[arm.mode]]


def shown(value: Any) -> str:
    """A value of a configuration, as a person would write it."""
    return f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value)
