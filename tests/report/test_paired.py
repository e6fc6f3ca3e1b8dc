"""The statistics: against values worked out by hand, against scipy, and by simulated studies."""

import math

import numpy as np
import pytest
from scipy import stats

from lora_or_full.report.stats import paired
from lora_or_full.report.stats.paired import (
    equivalence_p,
    holm,
    mcnemar_test,
    mean_over_seeds,
    paired_seed_test,
    paragraph_bootstrap,
)

STUDIES = 1000
# The share of 1,000 studies lies within 1.8 points of its expectation (99 %).
NARROW = (0.93, 0.97)


def test_over_seeds_by_hand() -> None:
    found = paired_seed_test([1.0, 2.0, 3.0, 4.0], margin=5.0)
    assert found.mean == 2.5
    assert found.deviation == pytest.approx(math.sqrt(5 / 3))
    # 2.5 ± 3.182446 · 0.645497, from a table of t with 3 degrees of freedom
    assert found.interval == pytest.approx((0.44574, 4.55426), abs=1e-4)
    assert found.p_t == pytest.approx(0.03047, abs=1e-4)
    assert found.p_sign_flip == 2 / 16  # all plus, all minus, of sixteen
    assert found.smallest_p == 2 / 16
    assert found.p_equivalent == pytest.approx(stats.t.sf((5 - 2.5) / 0.645497, 3), abs=1e-5)


def test_a_sign_flip_test_counts_means_at_least_as_far_from_zero() -> None:
    # Of the eight ways: ±(1+2-0.5), ±(1+2+0.5) reach 2.5.
    assert paired_seed_test([1.0, 2.0, -0.5], 1.0).p_sign_flip == 4 / 8


def test_one_seed_says_nothing_of_the_method() -> None:
    found = paired_seed_test([3.0], 1.0)
    assert (found.mean, found.smallest_p) == (3.0, 1.0)
    nothing = (found.deviation, found.interval, found.p_t, found.p_sign_flip, found.p_equivalent)
    assert nothing == (None,) * 5
    assert mean_over_seeds([3.0]) == (3.0, None, None)


@pytest.mark.parametrize("value", [0.0, 1.5])
def test_seeds_that_all_differ_alike_give_no_t_test(value: float) -> None:
    found = paired_seed_test([value] * 3, 1.0)
    assert (found.deviation, found.p_t, found.seeds_needed) == (0.0, None, None)
    assert found.p_sign_flip == (1.0 if value == 0 else 0.25)


def test_mcnemar_by_hand() -> None:
    first = np.array([100.0] * 8 + [0.0] * 2 + [100.0] * 5)
    second = np.array([0.0] * 8 + [100.0] * 2 + [100.0] * 5)
    found = mcnemar_test(1, first - second)
    assert (found.first_only, found.second_only) == (8, 2)
    assert found.p == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert mcnemar_test(1, first - first).p == 1.0


def test_holm_by_hand() -> None:
    adjusted = holm({"a": 0.01, "b": 0.04, "none": None, "c": 0.03})
    assert adjusted == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}
    assert holm({"none": None}) == {}


def test_equivalence_is_the_larger_of_two_one_sided_t_tests() -> None:
    d = np.array([0.1, -0.3, 0.4, 0.2])
    expected = max(
        stats.ttest_1samp(d, -1.0, alternative="greater").pvalue,
        stats.ttest_1samp(d, 1.0, alternative="less").pvalue,
    )
    error = float(d.std(ddof=1)) / 2
    assert equivalence_p(float(d.mean()), error, 3, 1.0) == pytest.approx(expected)


def test_seeds_needed_are_those_of_a_table_of_power() -> None:
    # Cohen (1988), two-sided 5 %, power 80 %: an effect of 1 deviation needs 10 pairs, of 0.5, 34.
    for deviation, seeds in ((1.0, 10), (2.0, 34)):
        assert paired_seed_test([-deviation, 0.0, deviation], 1.0).seeds_needed == seeds
    assert paired_seed_test([-1000.0, 0.0, 1000.0], 0.01).seeds_needed is None
    assert paired_seed_test([-1e-3, 0.0, 1e-3], 1.0).seeds_needed == 2


@pytest.mark.parametrize(
    ("deviation", "seeds"), [(0.08, 2), (0.12, 3), (0.2, 3), (3.7, 110), (12.0, 1133)]
)
def test_a_tail_that_scipy_cannot_compute_does_not_count(deviation: float, seeds: int) -> None:
    # Expected: the power integrated numerically over the chi distribution of the deviation.
    assert paired_seed_test([-deviation, 0.0, deviation], 1.0).seeds_needed == seeds


def test_a_bootstrap_draws_whole_paragraphs() -> None:
    rng = np.random.default_rng(0)
    of_paragraph = rng.normal(size=60)
    alike = np.repeat(of_paragraph, 5)[None]  # all five questions of a paragraph are alike
    places = np.repeat(np.arange(60), 5)
    found = paragraph_bootstrap(alike, places.tolist())
    apart = paragraph_bootstrap(alike, list(range(300)))
    assert found.paragraphs == 60
    assert found.mean == pytest.approx(of_paragraph.mean())
    width, narrow = (b - a for a, b in (found.interval, apart.interval))
    assert width / narrow == pytest.approx(math.sqrt(5), rel=0.1)
    half = 1.96 * of_paragraph.std() / math.sqrt(60)
    assert width / 2 == pytest.approx(half, rel=0.1)


def test_one_paragraph_says_nothing_of_others() -> None:
    assert paragraph_bootstrap(np.array([[6.0, 0.0]]), ["a", "a"]) == paired.ParagraphBootstrap(
        3.0, None, 1
    )


def test_paragraphs_weigh_by_their_questions() -> None:
    values = np.array([[6.0, 0.0, 0.0, 0.0]] * 2)
    assert paragraph_bootstrap(values, ["a", "b", "b", "b"]).mean == 1.5


# By simulation


@pytest.mark.parametrize("seeds", [3, 6])
def test_over_seeds_keeps_its_level_and_its_intervals_cover(
    seeds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paired, "seeds_needed", lambda *_: None)  # slow, and not looked at
    rng = np.random.default_rng(seeds)
    held = rejected = flipped = equivalent = 0
    for d in rng.normal(1.0, 0.7, size=(STUDIES, seeds)):
        shifted = paired_seed_test(d - 1.0, margin=1.0)
        assert shifted.interval
        assert shifted.p_t is not None
        assert shifted.p_sign_flip is not None
        held += shifted.interval[0] <= 0 <= shifted.interval[1]
        rejected += shifted.p_t < 0.05
        flipped += shifted.p_sign_flip < 0.05
        # The truth lies on the margin: to call it equivalent is wrong.
        equivalent += equivalence_p(
            float(d.mean()), float(d.std(ddof=1)) / math.sqrt(seeds), seeds - 1, 1.0
        ) < 0.05  # fmt: skip
    assert NARROW[0] <= held / STUDIES <= NARROW[1]
    for wrong in (rejected, flipped, equivalent):
        assert wrong / STUDIES <= 0.07
    assert flipped == 0 or seeds > 5  # three seeds can't


def test_mcnemar_and_holm_keep_their_level() -> None:
    rng = np.random.default_rng(0)
    alone = both = 0
    for _ in range(STUDIES):
        first, second = 100.0 * (rng.random((2, 300)) < 0.7)
        alone += mcnemar_test(1, first - second).p < 0.05
        d = rng.normal(size=(6, 1)) + 0.5 * rng.normal(size=(6, 2))  # EM and F1 go together
        p_values = stats.ttest_1samp(d, 0.0).pvalue
        both += min(holm(dict(zip(("EM", "F1"), p_values, strict=True))).values()) < 0.05
    assert alone / STUDIES <= 0.07
    assert both / STUDIES <= 0.07


def test_bootstrap_intervals_over_paragraphs_cover(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paired, "RESAMPLES", 1000)
    rng = np.random.default_rng(0)
    places = np.repeat(np.arange(100), 5).tolist()
    held = 0
    for _ in range(STUDIES):
        values = np.repeat(rng.normal(size=100), 5) + rng.normal(size=(2, 500))
        low, high = paragraph_bootstrap(values, places).interval
        held += low <= 0 <= high
    assert NARROW[0] <= held / STUDIES <= NARROW[1]
