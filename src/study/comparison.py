"""Whether two arms of a study differ: over seeds, over questions, and over both.

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
STUDIES = 100_000  # simulated, for the coverage of the joint interval
POWER = 0.8
MOST_SEEDS = 10_000

Array = NDArray[np.float64]
Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class OverSeeds:
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
class OverQuestions:
    """Of these very models, over other paragraphs: the mean difference and its interval (None with
    one paragraph)."""

    mean: float
    interval: Interval | None
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
    whose interval held the truth, by number of seeds. So many as `seeds_needed` find a difference
    of the margin with a power of 80 % on so many paragraphs; None: no number of seeds does."""

    mean: float
    interval: Interval
    p: float
    p_equivalent: float
    degrees_of_freedom: float
    coverage: dict[int, float]
    seeds_needed: int | None


@dataclass(frozen=True, slots=True)
class Components:
    """The variance of a difference that seeds make, paragraphs, and the two together."""

    seeds: float
    paragraphs: float
    rest: float

    def expected(self, seeds: int, paragraphs: int) -> tuple[float, float, float]:
        """The mean squares to expect of so many seeds and paragraphs."""
        return (
            self.rest + paragraphs * self.seeds,
            self.rest + seeds * self.paragraphs,
            self.rest,
        )


def over_seeds(differences: Sequence[float], margin: float) -> OverSeeds:
    """Compare two arms by the difference (percentage points) of each seed."""
    d = np.asarray(differences, dtype=float)
    n, mean = len(d), float(d.mean())
    smallest = 2.0 ** (1 - n)
    if n < 2:
        return OverSeeds(tuple(d), mean, None, None, None, None, smallest, None, None)
    deviation = float(d.std(ddof=1))
    if deviation < 1e-9:
        return OverSeeds(tuple(d), mean, 0.0, None, None, sign_flip(d), smallest, None, None)
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
        seeds_needed(margin, lambda seeds: (deviation / math.sqrt(seeds), seeds - 1)),
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


def over_questions(differences: Array, paragraphs: Sequence[Hashable]) -> OverQuestions:
    """Compare by `differences` (seeds, questions): a percentile bootstrap that draws paragraphs.

    The mean of a draw is that of its questions.
    """
    sums, counts = _by_paragraph(differences.mean(axis=0)[None], paragraphs)
    if len(counts) < 2:
        return OverQuestions(float(differences.mean()), None, len(counts))
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
    (as in the comparison of readers over cases: Hillis 2007). None with one seed or paragraph, or
    where nothing varies.
    """
    sums, counts = _by_paragraph(differences, paragraphs)
    seeds, places = sums.shape
    if seeds < 2 or places < 2:
        return None
    mean = float(differences.mean())
    # Each paragraph's part in the mean, paragraphs being of unlike size: (seeds, paragraphs)
    parts = mean + (sums - mean * counts) * places / counts.sum()
    squares = mean_squares(parts)
    error, freedom = (float(value) for value in standard_error(*squares, seeds, places))
    if error < 1e-9:
        return None
    of_seeds, of_places, rest = squares
    components = Components(
        max(0.0, (of_seeds - rest) / places), max(0.0, (of_places - rest) / seeds), rest
    )

    def spread(n: int) -> tuple[float, float]:
        error, freedom = standard_error(*components.expected(n, places), n, places)
        return float(error), float(freedom)

    t = stats.t(freedom)
    half = float(t.ppf((1 + LEVEL) / 2)) * error
    return Joint(
        mean,
        (mean - half, mean + half),
        float(2 * t.sf(abs(mean) / error)),
        equivalence(mean, error, freedom, margin),
        freedom,
        {n: coverage(components, n, places) for n in sorted({3, 6, 10, seeds})},
        seeds_needed(margin, spread),
    )


def mean_squares(parts: Array) -> tuple[float, float, float]:
    """Of seeds, of paragraphs and of the rest, of (seeds, paragraphs)."""
    s, p = parts.shape
    whole = parts.mean()
    rows, columns = parts.mean(axis=1, keepdims=True), parts.mean(axis=0, keepdims=True)
    rest = parts - rows - columns + whole
    return (
        float(p * ((rows - whole) ** 2).sum() / (s - 1)),
        float(s * ((columns - whole) ** 2).sum() / (p - 1)),
        float((rest**2).sum() / ((s - 1) * (p - 1))),
    )


def standard_error(
    of_seeds: float | Array, of_places: float | Array, rest: float | Array, seeds: int, places: int
) -> tuple[Array, Array]:
    """Of the mean, from the mean squares; and its degrees of freedom."""
    # Less than what seeds or paragraphs alone make can only come of chance.
    total = np.maximum(of_seeds + of_places - rest, np.maximum(of_seeds, of_places))
    below = (
        np.square(of_seeds) / (seeds - 1)
        + np.square(of_places) / (places - 1)
        + np.square(rest) / ((seeds - 1) * (places - 1))
    )
    freedom = np.divide(total**2, below, out=np.ones_like(total), where=below > 0)
    return np.sqrt(total / (seeds * places)), np.maximum(freedom, 1.0)


def coverage(components: Components, seeds: int, places: int) -> float:
    """The share of STUDIES, drawn with these components, whose joint interval holds the truth.

    Of normal seeds, paragraphs and rests the three mean squares and the mean are independent: the
    first follow chi-squared distributions, the last a normal one, and only they are drawn.
    """
    rng = np.random.default_rng(0)
    expected = components.expected(seeds, places)
    freedoms = (seeds - 1, places - 1, (seeds - 1) * (places - 1))
    drawn = [
        value * rng.chisquare(freedom, STUDIES) / freedom
        for value, freedom in zip(expected, freedoms, strict=True)
    ]
    of_seeds, of_places, rest = expected
    truth = math.sqrt((of_seeds + of_places - rest) / (seeds * places))
    mean = rng.normal(0.0, truth, STUDIES)
    error, freedom = standard_error(drawn[0], drawn[1], drawn[2], seeds, places)
    half = stats.t.ppf((1 + LEVEL) / 2, freedom) * error
    return float((np.abs(mean) <= half).mean())


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
