"""Whether two arms of a study differ, over other seeds and other paragraphs at once.

A two-way analysis of variance of the paired differences, whose interval is tried on simulated
studies.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from lora_or_full.report.stats.paired import (
    LEVEL,
    Array,
    Interval,
    by_paragraph,
    equivalence,
    seeds_needed,
)

STUDIES = 100_000  # simulated, for the coverage of the interval


@dataclass(frozen=True, slots=True)
class SeedByParagraphTest:
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


@dataclass(frozen=True, slots=True)
class Estimate:
    """The mean difference, its standard error and degrees of freedom, and what they come from."""

    mean: float
    error: float
    degrees_of_freedom: float
    components: Components
    seeds: int
    paragraphs: int

    @property
    def interval(self) -> Interval:
        """Of the mean, by the t distribution."""
        half = float(stats.t.ppf((1 + LEVEL) / 2, self.degrees_of_freedom)) * self.error
        return self.mean - half, self.mean + half


def estimate(differences: Array, paragraphs: Sequence[Hashable]) -> Estimate | None:
    """Of `differences` (seeds, questions), both seeds and paragraphs taken as drawn.

    A two-way analysis of variance without replication, its degrees of freedom by Satterthwaite
    (1946). None with one seed or paragraph, or where nothing varies.
    """
    sums, counts = by_paragraph(differences, paragraphs)
    seeds, places = sums.shape
    if seeds < 2 or places < 2:
        return None
    mean = float(differences.mean())
    # Each paragraph's part in the mean, paragraphs being of unlike size: (seeds, paragraphs)
    parts = mean + (sums - mean * counts) * places / counts.sum()
    of_seeds, of_places, rest = mean_squares(parts)
    error, freedom = (float(v) for v in standard_error(of_seeds, of_places, rest, seeds, places))
    if error < 1e-9:
        return None
    components = Components(
        max(0.0, (of_seeds - rest) / places), max(0.0, (of_places - rest) / seeds), rest
    )
    return Estimate(mean, error, freedom, components, seeds, places)


def joint(
    differences: Array, paragraphs: Sequence[Hashable], margin: float
) -> SeedByParagraphTest | None:
    """Compare by `differences` (seeds, questions); None where there is no estimate."""
    found = estimate(differences, paragraphs)
    if found is None:
        return None
    components, places = found.components, found.paragraphs

    def spread(n: int) -> tuple[float, float]:
        error, freedom = standard_error(*components.expected(n, places), n, places)
        return float(error), float(freedom)

    mean, error, freedom = found.mean, found.error, found.degrees_of_freedom
    return SeedByParagraphTest(
        mean,
        found.interval,
        float(2 * stats.t.sf(abs(mean) / error, freedom)),
        equivalence(mean, error, freedom, margin),
        freedom,
        {n: coverage(components, n, places) for n in sorted({3, 6, 10, found.seeds})},
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
