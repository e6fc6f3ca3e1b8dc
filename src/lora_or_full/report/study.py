"""The runs of a study, and the arms that they make."""

import hashlib
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_or_full.config.schema import RESULT_NEUTRAL
from lora_or_full.runs.schema import Prediction, RunRecord

# Keys in which the runs of one arm may differ, and keys that only repeat another one.
WITHIN_ARM = RESULT_NEUTRAL | {"seed", "adapter._target_", "adapter.r", "model.target_modules"}


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
        return Path(name).name if Path(name).is_absolute() else name

    @property
    def seconds_per_step(self) -> float:
        """Seconds of an optimizer step, all of its micro-batches."""
        record = self.record
        return record.cost.seconds_per_batch * record.config.trainer.accumulate_grad_batches

    @cached_property
    def config(self) -> dict[str, Any]:
        """Configuration by dotted key, without what may differ between runs of an arm."""
        return {
            key: value
            for key, value in self.record.config.flat().items()
            if not {key, key.partition(".")[0]} & WITHIN_ARM and value is not None
        }

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
            "precision": record.config.trainer.precision,
            "device": record.environment.device,
            "way to measure memory": record.cost.peak_memory_is,
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

    def test(self, metric: str) -> list[float]:
        """Give the exact_match or f1 (percent) on the test questions of each seed."""
        return self.values(lambda record: getattr(record.test, metric))

    def minus(self, other: "Arm", metric: str) -> NDArray[np.float64]:
        """Give the differences of scores (shared seeds, questions), percentage points."""
        return np.stack([
            question_scores(self.runs[seed].predictions, metric)
            - question_scores(other.runs[seed].predictions, metric)
            for seed in shared_seeds(self, other)
        ])  # fmt: skip


def question_scores(predictions: Sequence[Prediction], metric: str) -> NDArray[np.float64]:
    """Give the exact_match or f1 (percent) of each question (questions)."""
    return np.array([p[metric] for p in predictions], dtype=np.float64)  # type: ignore[literal-required]


def shared_seeds(first: Arm, second: Arm) -> list[int]:
    """Give the seeds that both arms have."""
    return sorted(first.runs.keys() & second.runs.keys())


@dataclass(frozen=True)
class Study:
    """Arms that can be compared, and runs that were left out, each with the reason."""

    arms: list[Arm]
    left_out: list[str]

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

    def compared(self) -> tuple[Arm | None, Arm | None]:
        """Give the best arm of the first mode with an adapter, and that of the mode without."""
        first = {arm.has_adapter: arm.mode for arm in reversed(self.arms)}
        return self.best(first.get(True)), self.best(first.get(False))

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
