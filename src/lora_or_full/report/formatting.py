"""How the report writes numbers."""

import statistics
from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import Any

from lora_or_full.report.stats.paired import Interval, mean_over_seeds

MB = 1e6
NONE = "\N{EN DASH}"  # where there is no number


def written(value: float | None, form: str) -> str:
    """Write a number, if there is one, in a form such as `,.1f`."""
    return NONE if value is None else format(value, form)


def cell(value: object) -> str:
    """Write a value of a table as it is, if there is one."""
    return NONE if value is None else str(value)


def part_of(part: float, whole: float) -> str:
    """Write a number with its share of a whole."""
    return f"{part:.1f} ({100 * part / whole:.1f} %)"


def mean(values: Iterable[Any], of: str) -> float:
    """Give the mean of an attribute, as `record.cost.samples` of runs."""
    return statistics.fmean(map(attrgetter(of), values))


def spread(values: Sequence[float]) -> str:
    """Write mean ± standard deviation and 95 % interval over seeds."""
    average, deviation, interval = mean_over_seeds(values)
    if deviation is None or interval is None:
        return f"{average:.1f}"
    return f"{average:.1f} ± {deviation:.1f} [{interval[0]:.1f}, {interval[1]:.1f}]"


def signed(value: float) -> str:
    """Write a difference with its sign."""
    return f"{value:+.2f}".replace("-", "−")


def shown_interval(interval: Interval | None) -> str:
    """Write an interval."""
    return NONE if interval is None else f"[{signed(interval[0])}, {signed(interval[1])}]"


def p_value(p: float | None) -> str:
    """Write a p value."""
    if p is None:
        return NONE
    return "< 0.001" if p < 0.001 else "> 0.999" if p > 0.999 else f"{p:.3f}"


def p_with(p: float) -> str:
    """Write a p value for a sentence."""
    shown = p_value(p)
    return f"p {shown}" if shown[0] in "<>" else f"p = {shown}"


def listing(names: Iterable[str]) -> str:
    """Write names in a sentence: A, B and C."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def counted(number: int, what: str) -> str:
    """Write a number with its noun, in the plural if need be."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"
