"""Tests whether two arms of a study differ: over seeds, and over paragraphs.

Every difference is the first arm minus the second, paired by seed and question, in percentage
points.
"""

import bisect
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import stats

LEVEL = 0.95  # of every interval
RESAMPLES = 10_000
POWER = 0.8
MOST_SEEDS = 10_000

Array = NDArray[np.float64]
K = TypeVar("K", bound=Hashable)
Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class PairedSeedTest:
    """Tests over seeds: would other seeds of these recipes differ?

    A value is None with one seed, and, except for the sign flips, if all seeds differ equally.
    """

    differences: tuple[float, ...]  # of whole runs, one per seed
    mean: float
    smallest_p: float  # the smallest that the sign flips of so few seeds can give
    deviation: float | None = None  # standard deviation
    interval: Interval | None = None  # 95 % t interval of the mean
    p_t: float | None = None  # two-sided p of the paired t test
    p_sign_flip: float | None = None  # two-sided p of the sign-flip permutation test
    p_equivalent: float | None = None  # p of two one-sided t tests against the margin
    seeds_needed: int | None = None  # to find a difference of the margin with a power of 80 %


@dataclass(frozen=True, slots=True)
class ParagraphBootstrap:
    """Difference of these very models over other paragraphs."""

    mean: float
    interval: Interval | None  # None with one paragraph
    paragraphs: int


@dataclass(frozen=True, slots=True)
class McNemarTest:
    """McNemar's exact test of two models (McNemar, 1947)."""

    seed: int
    first_only: int  # questions that only the first model answers exactly
    second_only: int
    p: float  # two-sided


def paired_seed_test(differences: Sequence[float], margin: float) -> PairedSeedTest:
    """Compare two arms over seeds, by the difference of each and a margin of equivalence."""
    d = np.asarray(differences, dtype=float)
    n, mean = len(d), float(d.mean())
    known = (tuple(d), mean, 2.0 ** (1 - n))
    if n < 2:
        return PairedSeedTest(*known)
    deviation = float(d.std(ddof=1))
    if deviation < 1e-9:
        return PairedSeedTest(*known, 0.0, p_sign_flip=sign_flip_p(d))
    test = stats.ttest_1samp(d, 0.0)
    return PairedSeedTest(
        *known,
        deviation,
        test.confidence_interval(LEVEL),
        float(test.pvalue),
        sign_flip_p(d),
        equivalence_p(mean, deviation / math.sqrt(n), n - 1, margin),
        seeds_needed(margin, lambda seeds: (deviation / math.sqrt(seeds), seeds - 1)),
    )


def sign_flip_p(d: Array) -> float:
    """Give the two-sided p of the sign-flip permutation test of differences (seeds).

    With more than 14 seeds it draws as many sign flips as 14 seeds have, instead of all.
    """
    if not d.any():
        return 1.0
    rng = np.random.default_rng(0)
    test = stats.permutation_test(
        (d,), np.mean, permutation_type="samples", n_resamples=2**14, rng=rng
    )
    return float(min(1.0, test.pvalue))


def equivalence_p(mean: float, error: float, degrees_of_freedom: float, margin: float) -> float:
    """Give p of two one-sided t tests that a difference lies within ±margin (Schuirmann, 1987)."""
    t = stats.t(degrees_of_freedom)
    return float(max(t.sf((mean + margin) / error), t.cdf((mean - margin) / error)))


def seeds_needed(difference: float, spread: Callable[[int], tuple[float, float]]) -> int | None:
    """Give the seeds with which a t test at 5 % finds a difference with a power of 80 %.

    Args:
        difference: Percentage points.
        spread: Standard error and degrees of freedom of a number of seeds.

    Returns:
        None if not even MOST_SEEDS suffice.
    """

    def suffices(seeds: int) -> bool:
        error, freedom = spread(seeds)
        limit, shift = stats.t.ppf((1 + LEVEL) / 2, freedom), difference / error
        # scipy gives NaN for the lower tail where it is far below 1e-9.
        lower = np.nan_to_num(stats.nct.cdf(-limit, freedom, shift))
        return bool(stats.nct.sf(limit, freedom, shift) + lower >= POWER)

    needed = bisect.bisect_left(range(MOST_SEEDS + 1), True, lo=2, key=suffices)
    return needed if needed <= MOST_SEEDS else None


def paragraph_bootstrap(differences: Array, paragraphs: Sequence[Hashable]) -> ParagraphBootstrap:
    """Compare two arms by a percentile bootstrap of whole paragraphs (Efron, 1979).

    Args:
        differences: (seeds, questions).
        paragraphs: Paragraph of each question.
    """
    sums, counts = by_paragraph(differences.mean(axis=0)[None], paragraphs)
    mean = float(differences.mean())
    if len(counts) < 2:
        return ParagraphBootstrap(mean, None, len(counts))
    result = stats.bootstrap(
        (sums[0], counts),
        lambda s, c, axis: s.sum(axis=axis) / c.sum(axis=axis),
        paired=True,
        n_resamples=RESAMPLES,
        batch=200,
        confidence_level=LEVEL,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    return ParagraphBootstrap(mean, result.confidence_interval, len(counts))


def mcnemar_test(seed: int, differences: Array) -> McNemarTest:
    """Compare two models by McNemar's exact test of their differences (questions) in EM."""
    only_first, only_second = int((differences > 0).sum()), int((differences < 0).sum())
    both = only_first + only_second
    p = float(stats.binomtest(only_first, both).pvalue) if both else 1.0
    return McNemarTest(seed, only_first, only_second, p)


def holm(p_values: Mapping[K, float | None]) -> dict[K, float]:
    """Adjust the p values that are not None for testing several hypotheses (Holm, 1979)."""
    known = {name: p for name, p in p_values.items() if p is not None}
    adjusted, so_far = dict(known), 0.0
    for rank, name in enumerate(sorted(known, key=known.__getitem__)):
        so_far = max(so_far, (len(known) - rank) * known[name])
        adjusted[name] = min(1.0, so_far)
    return adjusted


def mean_over_seeds(values: Sequence[float]) -> tuple[float, float | None, Interval | None]:
    """Give mean, standard deviation and 95 % t interval over seeds; None with one seed."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, None, None
    deviation = float(np.std(values, ddof=1))
    half = float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1)) * deviation / len(values) ** 0.5
    return mean, deviation, (mean - half, mean + half)


def by_paragraph(values: Array, paragraphs: Sequence[Hashable]) -> tuple[Array, Array]:
    """Sum values (seeds, questions) by the paragraph of each question.

    Returns:
        Sums (seeds, paragraphs), and the number of questions of each paragraph.
    """
    numbers: dict[Hashable, int] = {}
    of = np.array([numbers.setdefault(name, len(numbers)) for name in paragraphs])
    sums = [np.bincount(of, weights=row) for row in values]
    return np.array(sums, dtype=np.float64), np.bincount(of).astype(np.float64)
