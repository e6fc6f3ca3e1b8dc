"""The runs of a study, and the arms that they make."""

import hashlib
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_or_full.config.schema import RESULT_NEUTRAL
from lora_or_full.runs.reader import Answers
from lora_or_full.runs.schema import Epoch, Prediction, RunRecord

# Keys in which the runs of one arm may differ, and keys that only repeat another one.
WITHIN_ARM = RESULT_NEUTRAL | {"seed", "adapter._target_", "adapter.r", "model.target_modules"}


@dataclass(frozen=True)
class Run:
    """A finished run: its record, and its answers by id."""

    folder: Path
    record: RunRecord
    answers: Answers

    @property
    def predictions(self) -> list[Prediction]:
        """Answers to the test questions, by id."""
        return self.answers.predictions

    @property
    def contexts(self) -> dict[str, str]:
        """Contexts by the number that predictions name."""
        return self.answers.contexts

    @property
    def mode(self) -> str:
        """The arm's file in conf/mode/."""
        return self.record.config.mode

    @property
    def model(self) -> str:
        """Name of the base model; of a local folder the last part, the same on any machine."""
        name = self.record.model.name
        return Path(name).name if Path(name).is_absolute() else name

    @property
    def seed(self) -> int:
        """The run's seed."""
        return self.record.config.seed

    @property
    def best(self) -> Epoch:
        """The epoch that was chosen on the validation questions, and scored."""
        return self.record.best

    @property
    def trained_on(self) -> str:
        """Fingerprint of the training questions."""
        return self.record.data.train.fingerprint

    @property
    def seconds_per_step(self) -> float:
        """Seconds of an optimizer step, all of its micro-batches."""
        micro_batches = self.record.config.trainer.accumulate_grad_batches
        return self.record.cost.seconds_per_batch * micro_batches

    @cached_property
    def config(self) -> dict[str, Any]:
        """Configuration by dotted key, without what may differ between runs of an arm."""
        values = self.record.config.flat()
        return {k: v for k, v in values.items() if k not in WITHIN_ARM and v is not None}

    @property
    def comparable(self) -> dict[str, str]:
        """What has to be the same in all runs of a study, by the words for it."""
        record = self.record
        return {
            "model": f"{self.model} {record.model.fingerprint}",
            "data files": record.data.source[:16],
            "test questions": record.data.test.fingerprint,
            "validation questions": record.data.validation.fingerprint,
            "precision": record.config.trainer.precision,
            "device": record.environment.device,
            "way to measure memory": record.cost.peak_memory_is,
            "set of answered questions": hashlib.sha256(
                json.dumps([p["id"] for p in self.predictions]).encode()
            ).hexdigest()[:16],
        }

    def scores(self, metric: str) -> NDArray[np.float64]:
        """Give the exact_match or f1 (percent) of each question (questions)."""
        values: list[Any] = [dict(p)[metric] for p in self.predictions]
        return np.array(values, dtype=np.float64)


@dataclass(frozen=True)
class Arm:
    """The runs that differ in nothing but their seed, by seed; `label` names them."""

    label: str
    runs: dict[int, Run]

    @property
    def mode(self) -> str:
        """The arm's file in conf/mode/."""
        return self.any.mode

    @property
    def has_adapter(self) -> bool:
        """Whether an adapter was trained, not every weight."""
        return self.any.record.config.adapter is not None

    @property
    def any(self) -> Run:
        """One of the runs, for what all of them share."""
        return next(iter(self.runs.values()))

    @property
    def validation_f1(self) -> float:
        """Mean over seeds, by which the best arm of a mode is chosen."""
        return statistics.fmean(run.best.f1 for run in self.runs.values())

    @property
    def rank(self) -> tuple[int, float]:
        """Sort key for the arm to choose: the most seeds, then the highest validation F1."""
        return len(self.runs), self.validation_f1

    def shared_seeds(self, other: "Arm") -> list[int]:
        """Give the seeds that both arms have."""
        return sorted(self.runs.keys() & other.runs.keys())

    def minus(self, other: "Arm", metric: str) -> NDArray[np.float64]:
        """Give the differences of scores (shared seeds, questions)."""
        return np.stack([
            self.runs[seed].scores(metric) - other.runs[seed].scores(metric)
            for seed in self.shared_seeds(other)
        ])  # fmt: skip

    def values(self, value: Callable[[RunRecord], float]) -> list[float]:
        """Give a value of each seed's record."""
        return [value(run.record) for run in self.runs.values()]

    def test(self, metric: str) -> list[float]:
        """Give the exact_match or f1 (percent) on the test questions of each seed."""
        return self.values(lambda record: getattr(record.test, metric))


@dataclass(frozen=True)
class Study:
    """Arms that can be compared, and runs that were left out, each with the reason."""

    arms: list[Arm]
    left_out: list[str]

    @property
    def modes(self) -> list[str]:
        """The modes of the arms, those with an adapter first."""
        return list(dict.fromkeys(arm.mode for arm in self.arms))

    def best(self, mode: str) -> Arm | None:
        """Choose the arm of a mode with the highest validation F1.

        It is chosen among the arms with masked prompts that have the most seeds.
        """
        own = [arm for arm in self.arms if arm.mode == mode and arm.any.record.config.mask_prompt]
        return max(own, key=lambda arm: arm.rank, default=None)

    def compared(self) -> tuple[Arm | None, Arm | None]:
        """Give the best arm of the first mode with an adapter, and that of the mode without."""
        modes = {arm.has_adapter: arm.mode for arm in reversed(self.arms)}
        return tuple(  # type: ignore[return-value]
            self.best(modes[adapter]) if adapter in modes else None for adapter in (True, False)
        )

    def leading(self, most: int) -> list[Arm]:
        """Give at most so many arms of each mode, the best ones, in their order."""
        ranked = sorted(self.arms, key=lambda arm: arm.rank, reverse=True)
        chosen = [
            arm for mode in self.modes for arm in [a for a in ranked if a.mode == mode][:most]
        ]
        return [arm for arm in self.arms if any(arm is other for other in chosen)]


def shown(value: Any) -> str:
    """Write a value of a configuration as a person would."""
    return f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value)
