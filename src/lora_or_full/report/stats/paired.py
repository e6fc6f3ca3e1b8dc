"""Whether two arms of a study differ: over seeds, and over questions.

Every difference is of the first arm minus the second, paired: the same seed, the same question.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

LEVEL = 0.95  # of every interval
RESAMPLES = 10_000
POWER = 0.8
MOST_SEEDS = 10_000

Array = NDArray[np.float64]
Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class PairedSeedTest:
    """Of the differences of whole runs, a seed each: would other seeds of this recipe differ?

    `p_t` and `p_sign_flip` are two-sided; no sign-flip test of so few seeds can give less than
    `smallest_p`. `p_equivalent` is of two one-sided t tests against the margin. So many as
    `seeds_needed` find a difference of the margin with a power of 80 %. None: not with one seed,
    nor (but for the sign flips) with seeds that do not differ at all."""

    differences: tuple[float, ...]
    mean: float
    deviation: float | None
    interval: Interval | None
    p_t: float | None
    p_sign_flip: float | None
    smallest_p: float
    p_equivalent: float | None
    seeds_needed: int | None


@dataclass(frozen=True, slots=True)
class ParagraphBootstrap:
    """Of these very models, over other paragraphs: the mean difference and its interval (None with
    one paragraph)."""

    mean: float
    interval: Interval | None
    paragraphs: int


@dataclass(frozen=True, slots=True)
class McNemarTest:
    """McNemar's exact test of two models: questions that only one of them has right."""

    seed: int
    first_only: int
    second_only: int
    p: float


def over_seeds(differences: Sequence[float], margin: float) -> PairedSeedTest:
    """Compare two arms by the difference (percentage points) of each seed."""
    d = np.asarray(differences, dtype=float)
    n, mean = len(d), float(d.mean())
    smallest = 2.0 ** (1 - n)
    if n < 2:
        return PairedSeedTest(tuple(d), mean, None, None, None, None, smallest, None, None)
    deviation = float(d.std(ddof=1))
    if deviation < 1e-9:
        return PairedSeedTest(tuple(d), mean, 0.0, None, None, sign_flip(d), smallest, None, None)
    test = stats.ttest_1samp(d, 0.0)
    low, high = test.confidence_interval(LEVEL)
    return PairedSeedTest(
        tuple(d),
        mean,
        deviation,
        (float(low), float(high)),
        float(test.pvalue),
        sign_flip(d),
        smallest,
        equivalence(mean, deviation / math.sqrt(n), n - 1, margin),
        seeds_needed(margin, lambda seeds: (deviation / math.sqrt(seeds), seeds - 1)),
    )


def sign_flip(d: Array) -> float:
    """The share of all ways to flip the signs of `d` whose mean is as far from zero; two-sided.

    Of more than 14 seeds, not all ways but as many drawn ones as 14 seeds have."""
    if not d.any():
        return 1.0
    test = stats.permutation_test(
        (d,),
        lambda x, axis: np.mean(x, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=2**14,
        rng=np.random.default_rng(0),
    )
    return float(min(1.0, test.pvalue))


def equivalence(mean: float, error: float, degrees_of_freedom: float, margin: float) -> float:
    """The p of two one-sided t tests that a difference lies within ±`margin` (Schuirmann 1987)."""
    t = stats.t(degrees_of_freedom)
    return float(max(t.sf((mean + margin) / error), t.cdf((mean - margin) / error)))


def seeds_needed(difference: float, spread: Callable[[int], tuple[float, float]]) -> int | None:
    """The seeds with which a t test at 5 % finds `difference` with a power of 80 %.

    `spread` gives the standard error and the degrees of freedom of so many. None: not even
    MOST_SEEDS do."""

    def suffices(seeds: int) -> bool:
        error, freedom = spread(seeds)
        shift = difference / error
        if shift > 30:  # beyond doubt, and beyond what the distribution below is computed for
            return True
        limit = stats.t.ppf((1 + LEVEL) / 2, freedom)
        power = stats.nct.sf(limit, freedom, shift) + stats.nct.cdf(-limit, freedom, shift)
        return bool(power >= POWER)

    if not suffices(MOST_SEEDS):
        return None
    low, high = 1, 2
    while not suffices(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if suffices(middle) else (middle, high)
    return high


def over_questions(differences: Array, paragraphs: Sequence[Hashable]) -> ParagraphBootstrap:
    """Compare by `differences` (seeds, questions): a percentile bootstrap that draws paragraphs.

    The mean of a draw is that of its questions.
    """
    sums, counts = by_paragraph(differences.mean(axis=0)[None], paragraphs)
    if len(counts) < 2:
        return ParagraphBootstrap(float(differences.mean()), None, len(counts))
    result = stats.bootstrap(
        (sums[0], counts),
        lambda s, c, axis: s.sum(axis=axis) / c.sum(axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=200,
        confidence_level=LEVEL,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    low, high = result.confidence_interval
    return ParagraphBootstrap(float(differences.mean()), (float(low), float(high)), len(counts))


def discordant(seed: int, first: Array, second: Array) -> McNemarTest:
    """McNemar's test, as the exact binomial one, of what two models have right (questions)."""
    only_first = int(((first > 0) & (second == 0)).sum())
    only_second = int(((second > 0) & (first == 0)).sum())
    both = only_first + only_second
    p = float(stats.binomtest(only_first, both).pvalue) if both else 1.0
    return McNemarTest(seed, only_first, only_second, p)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p values, adjusted for being several (Holm 1979)."""
    adjusted, so_far = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        so_far = max(so_far, (len(p_values) - rank) * p_values[index])
        adjusted[index] = min(1.0, so_far)
    return adjusted


def mean_over_seeds(values: Sequence[float]) -> tuple[float, float | None, Interval | None]:
    """Mean, standard deviation and t interval of a value of each seed; None with one."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, None, None
    deviation = float(np.std(values, ddof=1))
    half = float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1)) * deviation / len(values) ** 0.5
    return mean, deviation, (mean - half, mean + half)


def by_paragraph(values: Array, paragraphs: Sequence[Hashable]) -> tuple[Array, Array]:
    """The sums (seeds, paragraphs) of `values` (seeds, questions), and the questions of each."""
    numbers = {name: number for number, name in enumerate(dict.fromkeys(paragraphs))}
    of = np.array([numbers[name] for name in paragraphs])
    sums = np.stack([np.bincount(of, weights=row, minlength=len(numbers)) for row in values])
    counts = np.bincount(of, minlength=len(numbers))
    return sums.astype(np.float64), counts.astype(np.float64)
