"""Tests whether two arms differ over other seeds and other paragraphs at once.

A two-way analysis of variance of the paired differences, in percentage points; simulated studies
show the coverage of its interval.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from lora_or_full.report.stats.paired import (
    LEVEL,
    Array,
    Interval,
    by_paragraph,
    equivalence_p,
    seeds_needed,
)

STUDIES = 100_000  # simulated for the coverage; its standard error is then below 0.1 %


@dataclass(frozen=True, slots=True)
class SeedByParagraphTest:
    """Test over other seeds and other paragraphs at once."""

    mean: float
    interval: Interval  # 95 %
    p: float  # two-sided
    p_equivalent: float  # p of two one-sided tests against the margin
    degrees_of_freedom: float
    coverage: dict[int, float]  # share of intervals that hold the truth, by number of seeds
    seeds_needed: int | None  # to find a difference of the margin with a power of 80 %


@dataclass(frozen=True, slots=True)
class Components:
    """Variance components of a difference: seeds, paragraphs, and the rest."""

    seeds: float
    paragraphs: float
    rest: float

    def expected(self, seeds: int, paragraphs: int) -> tuple[float, float, float]:
        """Give the expected mean squares with so many seeds and paragraphs."""
        of_seeds = self.rest + paragraphs * self.seeds
        return of_seeds, self.rest + seeds * self.paragraphs, self.rest


@dataclass(frozen=True, slots=True)
class AnovaEstimate:
    """A mean difference with its uncertainty over seeds and paragraphs."""

    mean: float
    error: float  # standard error of the mean
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

    Seeds and paragraphs both count as drawn at random.

    Args:
        differences: (seeds, questions).
        paragraphs: Paragraph of each question.

    Returns:
        None with one seed or paragraph, or if nothing varies.
    """
    sums, counts = by_paragraph(differences, paragraphs)
    s, p = sums.shape
    if s < 2 or p < 2:
        return None
    mean = float(differences.mean())
    # Each paragraph's contribution to the mean, as sizes differ: (seeds, paragraphs)
    contributions = mean + (sums - mean * counts) * p / counts.sum()
    of_seeds, of_paragraphs, rest = mean_squares(contributions)
    error, freedom = map(float, anova_standard_error(of_seeds, of_paragraphs, rest, s, p))
    if error < 1e-9:
        return None
    components = Components(
        max(0.0, (of_seeds - rest) / p), max(0.0, (of_paragraphs - rest) / s), rest
    )
    return AnovaEstimate(mean, error, freedom, components, s, p)


def seed_by_paragraph_test(
    differences: Array, paragraphs: Sequence[Hashable], margin: float
) -> SeedByParagraphTest | None:
    """Compare two arms over seeds and paragraphs.

    Args:
        differences: (seeds, questions).
        paragraphs: Paragraph of each question.
        margin: Margin of equivalence.

    Returns:
        None where `anova_estimate` gives none.
    """
    found = anova_estimate(differences, paragraphs)
    if found is None:
        return None
    mean, error, freedom = found.mean, found.error, found.degrees_of_freedom
    components, p = found.components, found.paragraphs

    def spread(seeds: int) -> tuple[float, float]:
        error, freedom = anova_standard_error(*components.expected(seeds, p), seeds, p)
        return float(error), float(freedom)

    return SeedByParagraphTest(
        mean,
        found.interval,
        float(2 * stats.t.sf(abs(mean) / error, freedom)),
        equivalence_p(mean, error, freedom, margin),
        freedom,
        {s: simulated_coverage(components, s, p) for s in sorted({3, 6, 10, found.seeds})},
        seeds_needed(margin, spread),
    )


def mean_squares(values: Array) -> tuple[float, float, float]:
    """Give the mean squares of seeds, paragraphs and the rest, of values (seeds, paragraphs)."""
    s, p = values.shape
    mean = values.mean()
    rows, columns = values.mean(axis=1, keepdims=True), values.mean(axis=0, keepdims=True)
    rest = values - rows - columns + mean
    return (
        float(p * ((rows - mean) ** 2).sum() / (s - 1)),
        float(s * ((columns - mean) ** 2).sum() / (p - 1)),
        float((rest**2).sum() / ((s - 1) * (p - 1))),
    )


def anova_standard_error(
    of_seeds: float | Array, of_paragraphs: float | Array, rest: float | Array, s: int, p: int
) -> tuple[Array, Array]:
    """Give the standard error of the mean, and its degrees of freedom (Satterthwaite, 1946).

    Args:
        of_seeds: Mean square of seeds; `of_paragraphs` and `rest` likewise.
        s: Number of seeds.
        p: Number of paragraphs.
    """
    # Only by chance is it less than what seeds or paragraphs alone make.
    total = np.maximum(of_seeds + of_paragraphs - rest, np.maximum(of_seeds, of_paragraphs))
    below = (
        np.square(of_seeds) / (s - 1)
        + np.square(of_paragraphs) / (p - 1)
        + np.square(rest) / ((s - 1) * (p - 1))
    )
    freedom = np.divide(total**2, below, out=np.ones_like(total), where=below > 0)
    return np.sqrt(total / (s * p)), np.maximum(freedom, 1.0)


def simulated_coverage(components: Components, s: int, p: int) -> float:
    """Simulate studies of s seeds and p paragraphs: the share whose interval holds the truth.

    With normal effects the three mean squares and the mean are independent. The first follow
    chi-squared distributions, the last a normal one, so only these four are drawn.
    """
    rng = np.random.default_rng(0)
    expected = components.expected(s, p)
    freedoms = (s - 1, p - 1, (s - 1) * (p - 1))
    of_seeds, of_paragraphs, rest = (
        value * rng.chisquare(freedom, STUDIES) / freedom
        for value, freedom in zip(expected, freedoms, strict=True)
    )
    mean = rng.normal(0.0, np.sqrt((expected[0] + expected[1] - expected[2]) / (s * p)), STUDIES)
    error, freedom = anova_standard_error(of_seeds, of_paragraphs, rest, s, p)
    half = stats.t.ppf((1 + LEVEL) / 2, freedom) * error
    return float((np.abs(mean) <= half).mean())
