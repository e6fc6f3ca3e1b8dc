"""Metrics of an answer, a file each. Its name stands in the key `metrics`, in records and tables.

A file sets METRIC. A score is a percentage, and the best of all gold answers counts.
"""

import importlib
import pkgutil
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass

from lora_or_full.evaluation.intervals import mean_interval


@dataclass(frozen=True)
class Metric:
    """A metric.

    Attributes:
        label: In tables and figures.
        score: Of a prediction, its gold answers and the rules that tell words (`scoring`); percent.
        interval: 95 % interval of the mean over questions, by scores and paragraphs.
    """

    label: str
    score: Callable[[str, Sequence[str], str], float]
    interval: Callable[[Sequence[float], Sequence[Hashable]], tuple[float, float]] = mean_interval


def metric(name: str) -> Metric:
    """Give a metric by its name."""
    found = importlib.import_module(f"{__name__}.{name}").METRIC
    assert isinstance(found, Metric)
    return found


def labels(names: Iterable[str]) -> dict[str, str]:
    """Give the label of each metric; its name, if its file is not there any more."""
    known = {module.name for module in pkgutil.iter_modules(__path__)}
    return {name: metric(name).label if name in known else name for name in names}
