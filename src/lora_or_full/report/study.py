"""The runs of a study, and the arms that they make."""

import hashlib
import json
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lora_or_full.config.schema import RESULT_NEUTRAL
from lora_or_full.errors import UserError
from lora_or_full.evaluation.metrics import labels
from lora_or_full.evaluation.predictions import values
from lora_or_full.runs.schema import Epoch, EvaluationRecord, Prediction, RunRecord

# Keys in which the runs of one arm may differ, and keys that only repeat another one.
WITHIN_ARM = RESULT_NEUTRAL | {
    "seed", "scoring", "metrics", "adapter._target_", "adapter.r", "model.target_modules",
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A finished run: its record, its answers by id, and the contexts that they name."""

    folder: Path
    record: RunRecord
    predictions: list[Prediction]
    contexts: dict[str, str]

    @property
    def model(self) -> str:
        """Name of the base model; of a local folder the last part, the same on any machine."""
        name = self.record.model.name
        return Path(name).name if Path(name).is_absolute() or name.startswith(".") else name

    @property
    def seconds_per_step(self) -> float:
        """Seconds of an optimizer step, all of its micro-batches."""
        record = self.record
        return record.cost.seconds_per_batch * record.config.trainer.accumulate_grad_batches

    @cached_property
    def config(self) -> dict[str, Any]:
        """Configuration by dotted key, without what may differ between runs of an arm."""
        config = {
            key: value
            for key, value in self.record.config.flat().items()
            if not {key, key.partition(".")[0]} & WITHIN_ARM and value is not None
        }
        return config | ({"init_from": "other weights"} if self.record.model.first_weights else {})

    @property
    def precision(self) -> str:
        """Lightning's name of the precision, which the hardware may have chosen."""
        return self.record.config.trainer.precision

    @cached_property
    def recipe(self) -> str:
        """What the runs of an arm share: the configuration without the precision."""
        shared = {k: v for k, v in self.config.items() if k != "trainer.precision"}
        return json.dumps(shared, sort_keys=True)

    @property
    def hardware(self) -> str:
        """Device, precision, and way to measure memory: what makes costs comparable."""
        record = self.record
        return f"{record.environment.device}, {self.precision}, {record.cost.peak_memory_is}"

    @property
    def comparable(self) -> dict[str, str]:
        """What has to be the same in all runs of a study, by the words for it."""
        record = self.record
        ids = json.dumps([p["id"] for p in self.predictions])
        return {
            "model": f"{self.model} {record.model.fingerprint}",
            "data files": record.data.source[:16],
            "test questions": record.data.test.fingerprint,
            "validation questions": record.data.validation.fingerprint,
            "scoring": record.config.scoring,
            "set of answered questions": hashlib.sha256(ids.encode()).hexdigest()[:16],
        }


@dataclass(frozen=True)
class Arm:
    """The runs that differ in nothing but their seed, by seed; `label` names them."""

    label: str
    runs: dict[int, Run]

    @property
    def any(self) -> Run:
        """One of the runs, for what all of them share."""
        return next(iter(self.runs.values()))

    @cached_property
    def config(self) -> dict[str, Any]:
        """Configuration by dotted key that all of the runs share."""
        others = [run.config for run in self.runs.values()]
        own = self.any.config.items()
        return {k: value for k, value in own if all(other.get(k) == value for other in others)}

    @property
    def mode(self) -> str:
        """The arm's file in conf/mode/."""
        return self.any.record.config.mode

    @property
    def has_adapter(self) -> bool:
        """Whether an adapter was trained, not every weight."""
        return self.any.record.config.adapter is not None

    @property
    def rank(self) -> tuple[int, float]:
        """Sort key for the arm to choose: the most seeds, then the highest validation F1."""
        return len(self.runs), statistics.fmean(self.values(lambda record: record.best.f1))

    def values(self, value: Callable[[RunRecord], float]) -> list[float]:
        """Give a value of each seed's record."""
        return [value(run.record) for run in self.runs.values()]

    @property
    def by_epoch(self) -> list[list[Epoch]]:
        """Each epoch of the runs that reached it: a callback may stop some earlier."""
        own = [run.record.epochs for run in self.runs.values()]
        return [
            [epochs[number] for epochs in own if number < len(epochs)]
            for number in range(max(map(len, own)))
        ]

    def test(self, metric: str) -> list[float]:
        """Give a metric (percent) on the test questions of each seed."""
        return self.values(lambda record: getattr(record.test, metric))

    def minus(self, other: "Arm", metric: str) -> NDArray[np.float64]:
        """Give the differences of scores (shared seeds, questions), percentage points."""
        return differences(self.runs, other.runs, metric)


class Answered(Protocol):
    """What holds predictions by id: a run, or an evaluation."""

    @property
    def predictions(self) -> list[Prediction]:
        """The predictions."""


def differences(
    first: Mapping[int, Answered], second: Mapping[int, Answered], metric: str
) -> NDArray[np.float64]:
    """Give the differences of scores (shared seeds, questions), percentage points.

    Args:
        first: Answers by seed.
        second: Answers to the same questions by seed.
        metric: Name of the metric.
    """
    scores = (
        np.array([values(by_seed[seed].predictions, metric) for by_seed in (first, second)])
        for seed in sorted(first.keys() & second.keys())
    )
    return np.stack([own - other for own, other in scores])


@dataclass(frozen=True)
class Evaluation:
    """A model's answers to the questions of a test set, by id."""

    record: EvaluationRecord
    predictions: list[Prediction]


@dataclass(frozen=True)
class Untrained:
    """A model that was scored without training, once for each seed of its examples."""

    label: str
    evaluations: list[Evaluation]

    def test(self, metric: str) -> list[float]:
        """Give a metric (percent) on the test questions of each seed; empty if one lacks it."""
        records = [one.record for one in self.evaluations]
        has = all(metric in record.test.metrics for record in records)
        return [getattr(record.test, metric) for record in records] if has else []


def shared_seeds(first: Arm, second: Arm) -> list[int]:
    """Give the seeds that both arms have."""
    return sorted(first.runs.keys() & second.runs.keys())


@dataclass(frozen=True)
class Study:
    """Arms that can be compared, models scored without training, and what was left out, and why."""

    arms: list[Arm]
    left_out: list[str]
    untrained: list[Untrained] = field(default_factory=list)

    @cached_property
    def metrics(self) -> dict[str, str]:
        """Labels of the metrics that all runs have, by name."""
        scored = [run.record.test.metrics for arm in self.arms for run in arm.runs.values()]
        return labels(name for name in scored[0] if all(name in own for own in scored))

    @property
    def modes(self) -> list[str]:
        """The modes of the arms, those with an adapter first."""
        return list(dict.fromkeys(arm.mode for arm in self.arms))

    @property
    def masked(self) -> list[Arm]:
        """The arms whose loss is on the answer alone; others are never chosen as the best."""
        return [arm for arm in self.arms if arm.any.record.config.mask_prompt]

    def best(self, mode: str | None) -> Arm | None:
        """Choose among the masked arms of a mode: the most seeds, then the best validation F1."""
        own = [arm for arm in self.masked if arm.mode == mode]
        return max(own, key=lambda arm: arm.rank, default=None)

    def compared(self, against: str | None = None) -> tuple[list[Arm], Arm | None]:
        """Choose the arms to compare, and their reference.

        Args:
            against: Label of the reference. None: the best arm of full fine-tuning, or, if there
                is none, of the first mode of several.

        Returns:
            The best arm of each other mode (of one mode alone: all its other arms), and the
            reference.

        Raises:
            UserError: No arm has that label.
        """
        first = sorted(self.modes, key=lambda mode: self._of(mode)[0].has_adapter)
        if against is None:
            full = bool(first) and not self._of(first[0])[0].has_adapter
            reference = self.best(first[0]) if full or len(first) > 1 else None
        else:
            labels = {arm.label: arm for arm in self.arms}
            if against not in labels:
                raise UserError(f"--against={against}: must be one of: {'; '.join(labels)}.")
            reference = labels[against]
        if reference is None:
            return [], None
        best = [self.best(mode) for mode in self.modes if mode != reference.mode]
        others = [arm for arm in best if arm is not None]
        return others or [arm for arm in self.arms if arm is not reference], reference

    @property
    def by_hardware(self) -> list[Arm]:
        """The arms, each parted by hardware if the runs of the study are on several kinds."""
        kinds = dict.fromkeys(run.hardware for arm in self.arms for run in arm.runs.values())
        if len(kinds) == 1:
            return self.arms
        parted = []
        for arm in self.arms:
            for kind in kinds:
                own = {seed: run for seed, run in arm.runs.items() if run.hardware == kind}
                if own:
                    seeds = ", ".join(map(str, own))
                    parted.append(Arm(f"{arm.label}, {kind} (seed {seeds})", own))
        return parted

    def _of(self, mode: str) -> list[Arm]:
        return [arm for arm in self.arms if arm.mode == mode]

    def leading(self, most: int) -> list[Arm]:
        """Give at most so many arms of each mode, the best ones, in their order."""
        ranked = sorted(self.arms, key=lambda arm: arm.rank, reverse=True)
        chosen = {
            mode: [arm.label for arm in ranked if arm.mode == mode][:most] for mode in self.modes
        }
        return [arm for arm in self.arms if arm.label in chosen[arm.mode]]


def shown(value: Any) -> str:
    """Write a value of a configuration as a person would."""
    return f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value)
