"""The joint statistics: against scipy where they meet it, and by simulated studies."""

import numpy as np
import pytest
from scipy import stats

from lora_or_full.report.stats.paired import equivalence_p
from lora_or_full.report.stats.seeds_by_paragraphs import (
    anova_standard_error,
    mean_squares,
    seed_by_paragraph_test,
    simulated_coverage,
)

STUDIES = 1000
LOWEST = 0.93  # the share of 1,000 studies lies within 1.8 points of its expectation (99 %)


def test_no_number_of_seeds_is_enough_where_paragraphs_decide() -> None:
    rng = np.random.default_rng(0)
    of_places = rng.normal(0, 10, 50) + rng.normal(0, 0.1, (3, 50))  # error of the mean: 1.4
    few, more = (
        seed_by_paragraph_test(of_places, list(range(50)), margin) for margin in (1.0, 5.0)
    )
    assert few is not None
    assert more is not None
    assert (few.seeds_needed, more.seeds_needed) == (None, 2)


def test_a_joint_interval_needs_two_of_each() -> None:
    rng = np.random.default_rng(0)
    assert seed_by_paragraph_test(rng.normal(size=(1, 4)), list("aabb"), 1.0) is None
    assert seed_by_paragraph_test(rng.normal(size=(3, 4)), list("aaaa"), 1.0) is None
    assert seed_by_paragraph_test(np.zeros((3, 4)), list("aabb"), 1.0) is None


def test_a_joint_interval_is_as_wide_as_what_varies_most() -> None:
    rng = np.random.default_rng(0)
    places = np.repeat(np.arange(50), 2).tolist()
    seeds = rng.normal(size=(3, 1))
    only_seeds = seed_by_paragraph_test(seeds + 1e-6 * rng.normal(size=(3, 100)), places, 1.0)
    assert only_seeds is not None
    low, high = stats.ttest_1samp(seeds[:, 0], 0).confidence_interval()
    assert only_seeds.interval == pytest.approx((low, high), rel=1e-3)
    assert only_seeds.degrees_of_freedom == pytest.approx(2, rel=1e-3)
    of_places = np.repeat(rng.normal(size=50), 2)
    only_places = seed_by_paragraph_test(of_places + 1e-6 * rng.normal(size=(3, 100)), places, 1.0)
    assert only_places is not None
    assert only_places.degrees_of_freedom == pytest.approx(49, rel=1e-3)


@pytest.mark.parametrize("seeds", [3, 6, 10])
@pytest.mark.parametrize("spread", [(0.2, 1.0), (1.0, 1.0), (1.0, 0.1)], ids=str)
def test_the_joint_interval_covers_and_its_test_keeps_its_level(
    seeds: int, spread: tuple[float, float]
) -> None:
    """Whichever of seeds and paragraphs varies more; whole studies are drawn, question by question.

    The coverage that the report prints is found by a shortcut, and has to be the same."""
    rng = np.random.default_rng(0)
    paragraphs = 80
    components = np.array([spread[0] ** 2 / paragraphs, spread[1] ** 2, 1.0])
    of_seeds, of_paragraphs, rest = np.sqrt(components)
    held = equivalent = 0
    for _ in range(STUDIES):
        parts = (
            rng.normal(0, of_seeds, (seeds, 1))
            + rng.normal(0, of_paragraphs, (1, paragraphs))
            + rng.normal(0, rest, (seeds, paragraphs))
        )
        error, freedom = anova_standard_error(mean_squares(parts), seeds, paragraphs)
        held += abs(parts.mean()) <= stats.t.ppf(0.975, freedom) * error
        # The truth, zero, lies on the edge of the margin around `one`.
        equivalent += equivalence_p(1.0 + parts.mean(), float(error), float(freedom), 1.0) < 0.05
    assert held / STUDIES >= LOWEST
    assert equivalent / STUDIES <= 0.07
    assert simulated_coverage(components, seeds, paragraphs) == pytest.approx(
        held / STUDIES, abs=0.02
    )


def test_a_joint_comparison_is_of_its_own_components() -> None:
    rng = np.random.default_rng(0)
    parts = rng.normal(0, 0.3, (3, 1)) + rng.normal(0, 2, 60) + rng.normal(0, 1, (3, 60))
    result = seed_by_paragraph_test(parts, list(range(60)), 1.0)
    assert result is not None
    error, freedom = anova_standard_error(mean_squares(parts), 3, 60)
    assert result.degrees_of_freedom == pytest.approx(float(freedom))
    assert result.p == pytest.approx(2 * stats.t.sf(abs(parts.mean()) / error, freedom))
    assert set(result.coverage) == {3, 6, 10}
