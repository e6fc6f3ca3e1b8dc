"""Tests whether two arms differ over other seeds and other paragraphs at once.

A two-way analysis of variance of the paired differences, in percentage points; simulated studies
show the coverage of its interval. Mean squares and variance components are arrays of three: of
seeds, of paragraphs, and of the rest.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from lora_or_full.report.stats import paired
from lora_or_full.report.stats.paired import LEVEL, Array, Interval

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
class AnovaEstimate:
    """A mean difference with its uncertainty over seeds and paragraphs."""

    mean: float
    error: float  # standard error of the mean
    degrees_of_freedom: float
    interval: Interval  # 95 %
    components: Array  # variance components


def anova_estimate(differences: Array, paragraphs: Sequence[Hashable]) -> AnovaEstimate | None:
    """Estimate a mean difference by a two-way analysis of variance without replication.

    Seeds and paragraphs both count as drawn at random.

    Args:
        differences: (seeds, questions).
        paragraphs: Paragraph of each question.

    Returns:
        None with one seed or paragraph, or if nothing varies.
    """
    sums, counts = paired.by_paragraph(differences, paragraphs)
    s, p = sums.shape
    if s < 2 or p < 2:
        return None
    mean = float(differences.mean())
    # Each paragraph's contribution to the mean, as sizes differ: (seeds, paragraphs)
    squares = mean_squares(mean + (sums - mean * counts) * p / counts.sum())
    error, freedom = map(float, anova_standard_error(squares, s, p))
    if error < 1e-9:
        return None
    rest = squares[2]
    components = np.append(np.maximum(0.0, (squares[:2] - rest) / (p, s)), rest)
    half = float(stats.t.ppf((1 + LEVEL) / 2, freedom)) * error
    return AnovaEstimate(mean, error, freedom, (mean - half, mean + half), components)


def seed_by_paragraph_test(
    differences: Array, paragraphs: Sequence[Hashable], margin: float
) -> SeedByParagraphTest | None:
    """Compare two arms over seeds and paragraphs, with a margin of equivalence.

    It takes differences and paragraphs as `anova_estimate`, and gives None where that does.
    """
    found = anova_estimate(differences, paragraphs)
    if found is None:
        return None
    mean, error, freedom = found.mean, found.error, found.degrees_of_freedom
    own, p = len(differences), len(set(paragraphs))

    def spread(seeds: int) -> tuple[float, float]:
        error, freedom = anova_standard_error(expected(found.components, seeds, p), seeds, p)
        return float(error), float(freedom)

    return SeedByParagraphTest(
        mean,
        found.interval,
        float(2 * stats.t.sf(abs(mean) / error, freedom)),
        paired.equivalence_p(mean, error, freedom, margin),
        freedom,
        {s: simulated_coverage(found.components, s, p) for s in sorted({3, 6, 10, own})},
        paired.seeds_needed(margin, spread),
    )


def mean_squares(values: Array) -> Array:
    """Give the mean squares (3) of values (seeds, paragraphs)."""
    s, p = values.shape
    mean = values.mean()
    rows, columns = values.mean(axis=1, keepdims=True), values.mean(axis=0, keepdims=True)
    rest = values - rows - columns + mean
    sums = p * ((rows - mean) ** 2).sum(), s * ((columns - mean) ** 2).sum(), (rest**2).sum()
    return np.array(sums) / _freedoms(s, p)


def expected(components: Array, s: int, p: int) -> Array:
    """Give the mean squares (3) to expect of s seeds and p paragraphs."""
    of_seeds, of_paragraphs, rest = components
    return np.array([rest + p * of_seeds, rest + s * of_paragraphs, rest])


def anova_standard_error(squares: Array, s: int, p: int) -> tuple[Array, Array]:
    """Give the standard error of the mean, and its degrees of freedom (Satterthwaite, 1946).

    The mean squares are (3) of one study, or (3, studies), of s seeds and p paragraphs each.
    """
    of_seeds, of_paragraphs, rest = squares
    # Only by chance is it less than what seeds or paragraphs alone make.
    total = np.maximum(of_seeds + of_paragraphs - rest, np.maximum(of_seeds, of_paragraphs))
    below = (squares.T**2 / _freedoms(s, p)).T.sum(axis=0)
    freedom = np.divide(total**2, below, out=np.ones_like(total), where=below > 0)
    return np.sqrt(total / (s * p)), np.maximum(freedom, 1.0)


def simulated_coverage(components: Array, s: int, p: int) -> float:
    """Simulate studies of s seeds and p paragraphs: the share whose interval holds the truth.

    With normal effects the three mean squares and the mean are independent. The first follow
    chi-squared distributions, the last a normal one, so only these four are drawn.
    """
    rng = np.random.default_rng(0)
    of_seeds, of_paragraphs, rest = squares = expected(components, s, p)
    drawn = [
        value * rng.chisquare(freedom, STUDIES) / freedom
        for value, freedom in zip(squares, _freedoms(s, p), strict=True)
    ]
    mean = rng.normal(0.0, np.sqrt((of_seeds + of_paragraphs - rest) / (s * p)), STUDIES)
    error, freedom = anova_standard_error(np.array(drawn), s, p)
    return float((np.abs(mean) <= stats.t.ppf((1 + LEVEL) / 2, freedom) * error).mean())


def _freedoms(s: int, p: int) -> Array:
    """Degrees of freedom of the mean squares of s seeds and p paragraphs."""
    return np.array([s - 1.0, p - 1.0, (s - 1.0) * (p - 1.0)])
