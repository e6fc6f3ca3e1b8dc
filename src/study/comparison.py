"""Whether two arms of a study differ: over seeds, over questions, and over both.

Every difference is of the first arm minus the second, paired: the same seed, the same question.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

LEVEL = 0.95  # of every interval
RESAMPLES = 10_000
STUDIES = 1_000  # simulated, for the coverage of the joint interval
POWER = 0.8

Array = NDArray[np.float64]
Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class OverSeeds:
    """Of the differences of whole runs, a seed each: would other seeds of this recipe differ?

    `p_t` and `p_sign_flip` are two-sided; no sign-flip test of so few seeds can give less than
    `smallest_p`. `p_equivalent` is of two one-sided t tests against the margin. So many as
    `seeds_needed` find a difference of the margin with a power of 80 %. None: not with one seed."""

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
class OverQuestions:
    """Of these very models, over other paragraphs: the mean difference and its interval."""

    mean: float
    interval: Interval
    paragraphs: int


@dataclass(frozen=True, slots=True)
class Discordant:
    """McNemar's exact test of two models: questions that only one of them has right."""

    seed: int
    first_only: int
    second_only: int
    p: float


@dataclass(frozen=True, slots=True)
class Joint:
    """Over other seeds and other paragraphs at once. `coverage` is the share of simulated studies
    whose interval held the truth, by number of seeds."""

    mean: float
    interval: Interval
    p: float
    p_equivalent: float
    degrees_of_freedom: float
    coverage: dict[int, float]


def over_seeds(differences: Sequence[float], margin: float) -> OverSeeds:
    """Compare two arms by the difference (percentage points) of each seed."""
    d = np.asarray(differences, dtype=float)
    n, mean = len(d), float(d.mean())
    smallest = 2.0 ** (1 - n)
    if n < 2:
        return OverSeeds(tuple(d), mean, None, None, None, None, smallest, None, None)
    deviation = float(d.std(ddof=1))
    if deviation == 0.0:
        # No t test: all seeds gave the same difference.
        return OverSeeds(
            tuple(d), mean, 0.0, (mean, mean), None, sign_flip(d), smallest, None, None
        )
    test = stats.ttest_1samp(d, 0.0)
    low, high = test.confidence_interval(LEVEL)
    return OverSeeds(
        tuple(d),
        mean,
        deviation,
        (float(low), float(high)),
        float(test.pvalue),
        sign_flip(d),
        smallest,
        equivalence(mean, deviation / math.sqrt(n), n - 1, margin),
        seeds_needed(deviation, margin),
    )


def sign_flip(d: Array) -> float:
    """The share of all ways to flip the signs of `d` whose mean is as far from zero; two-sided."""
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


def seeds_needed(deviation: float, difference: float) -> int | None:
    """Seeds with which a paired t test at 5 % finds `difference` with a power of 80 %; at most
    10,000, else None."""
    for n in range(2, 10_001):
        limit = stats.t.ppf((1 + LEVEL) / 2, n - 1)
        shift = difference * math.sqrt(n) / deviation
        power = stats.nct.sf(limit, n - 1, shift) + stats.nct.cdf(-limit, n - 1, shift)
        if power >= POWER:
            return n
    return None


def over_questions(differences: Array, paragraphs: Sequence[Hashable]) -> OverQuestions:
    """Compare by `differences` (seeds, questions): a percentile bootstrap that draws paragraphs.

    The mean of a draw is that of its questions.
    """
    sums, counts = _by_paragraph(differences.mean(axis=0)[None], paragraphs)
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
    return OverQuestions(float(differences.mean()), (float(low), float(high)), len(counts))


def discordant(seed: int, first: Array, second: Array) -> Discordant:
    """McNemar's test, as the exact binomial one, of what two models have right (questions)."""
    only_first = int(((first > 0) & (second == 0)).sum())
    only_second = int(((second > 0) & (first == 0)).sum())
    both = only_first + only_second
    p = float(stats.binomtest(only_first, both).pvalue) if both else 1.0
    return Discordant(seed, only_first, only_second, p)


def joint(differences: Array, paragraphs: Sequence[Hashable], margin: float) -> Joint | None:
    """Compare by `differences` (seeds, questions), both seeds and paragraphs taken as drawn.

    A two-way analysis of variance without replication, its degrees of freedom by Satterthwaite
    (as in the comparison of readers over cases: Hillis 2007). None with one seed or paragraph.
    """
    sums, counts = _by_paragraph(differences, paragraphs)
    seeds, places = sums.shape
    if seeds < 2 or places < 2:
        return None
    mean = float(differences.mean())
    # Each paragraph's part in the mean, paragraphs being of unlike size: (seeds, paragraphs)
    parts = mean + (sums - mean * counts) * places / counts.sum()
    variances, freedoms = _two_way(parts[None])
    error, freedom = math.sqrt(variances[0]), float(freedoms[0])
    if error == 0.0:
        return None
    t = stats.t(freedom)
    half = float(t.ppf((1 + LEVEL) / 2)) * error
    return Joint(
        mean,
        (mean - half, mean + half),
        float(2 * t.sf(abs(mean) / error)),
        equivalence(mean, error, freedom, margin),
        freedom,
        {n: coverage(parts, n) for n in sorted({3, 6, 10, seeds})},
    )


def coverage(parts: Array, seeds: int) -> float:
    """The share of simulated studies of so many `seeds` whose joint interval holds the truth.

    They are drawn with the components of variance that `parts` (seeds, paragraphs) have.
    """
    s, p = parts.shape
    of_seeds, of_places, rest = (float(m[0]) for m in _mean_squares(parts[None]))
    between_seeds = max(0.0, (of_seeds - rest) / p)
    between_places = max(0.0, (of_places - rest) / s)
    rng = np.random.default_rng(0)
    held = 0
    for studies in _pieces(STUDIES, 50):
        drawn = (
            rng.normal(0, math.sqrt(between_seeds), (studies, seeds, 1))
            + rng.normal(0, math.sqrt(between_places), (studies, 1, p))
            + rng.normal(0, math.sqrt(rest), (studies, seeds, p))
        )
        variance, freedom = _two_way(drawn)
        half = stats.t.ppf((1 + LEVEL) / 2, freedom) * np.sqrt(variance)
        held += int((np.abs(drawn.mean(axis=(1, 2))) <= half).sum())
    return held / STUDIES


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


def _by_paragraph(values: Array, paragraphs: Sequence[Hashable]) -> tuple[Array, Array]:
    """The sums (seeds, paragraphs) of `values` (seeds, questions), and the questions of each."""
    numbers = {name: number for number, name in enumerate(dict.fromkeys(paragraphs))}
    of = np.array([numbers[name] for name in paragraphs])
    sums = np.stack([np.bincount(of, weights=row, minlength=len(numbers)) for row in values])
    counts = np.bincount(of, minlength=len(numbers))
    return sums.astype(np.float64), counts.astype(np.float64)


def _mean_squares(parts: Array) -> tuple[Array, Array, Array]:
    """Of seeds, of paragraphs and of the rest, of each study in (studies, seeds, paragraphs)."""
    _, s, p = parts.shape
    whole = parts.mean(axis=(1, 2), keepdims=True)
    rows, columns = parts.mean(axis=2, keepdims=True), parts.mean(axis=1, keepdims=True)
    rest = parts - rows - columns + whole
    return (
        p * ((rows - whole) ** 2).sum(axis=(1, 2)) / (s - 1),
        s * ((columns - whole) ** 2).sum(axis=(1, 2)) / (p - 1),
        (rest**2).sum(axis=(1, 2)) / ((s - 1) * (p - 1)),
    )


def _two_way(parts: Array) -> tuple[Array, Array]:
    """The variance of each study's mean, and its degrees of freedom."""
    _, s, p = parts.shape
    seeds, places, rest = _mean_squares(parts)
    # Less than what seeds or paragraphs alone make can only come of chance.
    total = np.maximum(seeds + places - rest, np.maximum(seeds, places))
    below = seeds**2 / (s - 1) + places**2 / (p - 1) + rest**2 / ((s - 1) * (p - 1))
    freedom = np.maximum(np.divide(total**2, below, out=np.ones_like(total), where=below > 0), 1.0)
    return total / (s * p), freedom


def _pieces(total: int, size: int) -> list[int]:
    return [min(size, total - start) for start in range(0, total, size)]
