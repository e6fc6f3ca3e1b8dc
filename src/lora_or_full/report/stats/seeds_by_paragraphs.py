"""Tests whether two arms differ over other seeds and other paragraphs at once.

A two-way analysis of variance of the paired differences; simulated studies show the coverage of its
interval.
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

STUDIES = 100_000  # simulated for the coverage; its standard error is then below 0.1 %


@dataclass(frozen=True, slots=True)
class SeedByParagraphTest:
    """Test over other seeds and other paragraphs at once.

    Attributes:
        mean: Difference, percentage points.
        interval: 95 % interval.
        p: Two-sided p.
        p_equivalent: p of two one-sided tests against the margin.
        degrees_of_freedom: By Satterthwaite (1946).
        coverage: Share of simulated studies whose interval holds the truth, by number of seeds.
        seeds_needed: Seeds that find a difference of the margin with a power of 80 % on as many
            paragraphs; None if no number does.
    """

    mean: float
    interval: Interval
    p: float
    p_equivalent: float
    degrees_of_freedom: float
    coverage: dict[int, float]
    seeds_needed: int | None


@dataclass(frozen=True, slots=True)
class Components:
    """Variance components of a difference: seeds, paragraphs, and the rest."""

    seeds: float
    paragraphs: float
    rest: float

    def expected(self, seeds: int, paragraphs: int) -> tuple[float, float, float]:
        """Give the expected mean squares with so many seeds and paragraphs."""
        return (
            self.rest + paragraphs * self.seeds,
            self.rest + seeds * self.paragraphs,
            self.rest,
        )


@dataclass(frozen=True, slots=True)
class AnovaEstimate:
    """Mean difference, its standard error and degrees of freedom, and the variance components."""

    mean: float
    error: float
    degrees_of_freedom: float
    components: Components
    seeds: int
    paragraphs: int

    @property
    def interval(self) -> Interval:
        """95 % interval of the mean by the t distribution."""
        half = float(stats.t.ppf((1 + LEVEL) / 2, self.degrees_of_freedom)) * self.error
        return self.mean - half, self.mean + half


def anova_estimate(differences: Array, paragraphs: Sequence[Hashable]) -> AnovaEstimate | None:
    """Estimate a mean difference by a two-way analysis of variance without replication.

    Seeds and paragraphs both count as drawn at random; degrees of freedom by Satterthwaite (1946).

    Args:
        differences: Percentage points (seeds, questions).
        paragraphs: Paragraph of each question.

    Returns:
        None with one seed or paragraph, or if nothing varies.
    """
    sums, counts = by_paragraph(differences, paragraphs)
    seeds, places = sums.shape
    if seeds < 2 or places < 2:
        return None
    mean = float(differences.mean())
    # Each paragraph's contribution to the mean, as sizes differ: (seeds, paragraphs)
    parts = mean + (sums - mean * counts) * places / counts.sum()
    of_seeds, of_places, rest = mean_squares(parts)
    error, freedom = (
        float(v) for v in anova_standard_error(of_seeds, of_places, rest, seeds, places)
    )
    if error < 1e-9:
        return None
    components = Components(
        max(0.0, (of_seeds - rest) / places), max(0.0, (of_places - rest) / seeds), rest
    )
    return AnovaEstimate(mean, error, freedom, components, seeds, places)


def seed_by_paragraph_test(
    differences: Array, paragraphs: Sequence[Hashable], margin: float
) -> SeedByParagraphTest | None:
    """Compare two arms over seeds and paragraphs.

    Args:
        differences: Percentage points (seeds, questions).
        paragraphs: Paragraph of each question.
        margin: Margin of equivalence, percentage points.

    Returns:
        None where `anova_estimate` gives none.
    """
    found = anova_estimate(differences, paragraphs)
    if found is None:
        return None
    components, places = found.components, found.paragraphs

    def spread(n: int) -> tuple[float, float]:
        error, freedom = anova_standard_error(*components.expected(n, places), n, places)
        return float(error), float(freedom)

    mean, error, freedom = found.mean, found.error, found.degrees_of_freedom
    return SeedByParagraphTest(
        mean,
        found.interval,
        float(2 * stats.t.sf(abs(mean) / error, freedom)),
        equivalence(mean, error, freedom, margin),
        freedom,
        {n: simulated_coverage(components, n, places) for n in sorted({3, 6, 10, found.seeds})},
        seeds_needed(margin, spread),
    )


def mean_squares(parts: Array) -> tuple[float, float, float]:
    """Give the mean squares of seeds, paragraphs and the rest, of values (seeds, paragraphs)."""
    s, p = parts.shape
    whole = parts.mean()
    rows, columns = parts.mean(axis=1, keepdims=True), parts.mean(axis=0, keepdims=True)
    rest = parts - rows - columns + whole
    return (
        float(p * ((rows - whole) ** 2).sum() / (s - 1)),
        float(s * ((columns - whole) ** 2).sum() / (p - 1)),
        float((rest**2).sum() / ((s - 1) * (p - 1))),
    )


def anova_standard_error(
    of_seeds: float | Array, of_places: float | Array, rest: float | Array, seeds: int, places: int
) -> tuple[Array, Array]:
    """Give the standard error of the mean and its degrees of freedom, from the mean squares."""
    # Only by chance is it less than what seeds or paragraphs alone make.
    total = np.maximum(of_seeds + of_places - rest, np.maximum(of_seeds, of_places))
    below = (
        np.square(of_seeds) / (seeds - 1)
        + np.square(of_places) / (places - 1)
        + np.square(rest) / ((seeds - 1) * (places - 1))
    )
    freedom = np.divide(total**2, below, out=np.ones_like(total), where=below > 0)
    return np.sqrt(total / (seeds * places)), np.maximum(freedom, 1.0)


def simulated_coverage(components: Components, seeds: int, places: int) -> float:
    """Simulate studies, and give the share whose interval holds the truth.

    With normal effects the three mean squares and the mean are independent. The first follow
    chi-squared distributions, the last a normal one, so only these four are drawn.
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
    error, freedom = anova_standard_error(drawn[0], drawn[1], drawn[2], seeds, places)
    half = stats.t.ppf((1 + LEVEL) / 2, freedom) * error
    return float((np.abs(mean) <= half).mean())
