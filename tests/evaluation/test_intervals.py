"""Intervals of means over questions: by hand, and their coverage."""

import math
import random
from statistics import fmean

import pytest

from lora_or_full.evaluation.intervals import mean_interval, share_interval, standard_error


def test_the_standard_error_by_hand() -> None:
    values, clusters = [0.0, 100.0, 50.0, 50.0], ["a", "a", "b", "c"]
    # mean 50; sums of deviations: a 0, b 0, c 0
    assert standard_error(values, clusters) == 0.0
    # mean 50; a -50+50=0 ... with b alone at 100 and c at 0: sums 0, 50, -50; k=3
    values = [0.0, 100.0, 100.0, 0.0]
    assert standard_error(values, clusters) == pytest.approx(math.sqrt(3 / 2 * 5000) / 4)


def test_one_value_per_cluster_gives_the_usual_standard_error() -> None:
    values = [3.0, 7.0, 1.0, 9.0, 4.0]
    centre = fmean(values)
    usual = math.sqrt(sum((v - centre) ** 2 for v in values) / 4 / 5)
    assert standard_error(values, range(5)) == pytest.approx(usual)


def test_wilson_by_hand() -> None:
    """Two of five: 12 % to 77 %, the interval of the report that this project replaces."""
    low, high = share_interval([100.0, 100.0, 0.0, 0.0, 0.0], range(5))
    # independent values with k/(k-1): four degrees stand for five values
    assert 10 < low < 13
    assert 76 < high < 80


def test_no_hit_is_not_certainty() -> None:
    low, high = share_interval([0.0] * 20, range(20))
    assert low == 0.0
    assert high == pytest.approx(16.1, abs=0.05)  # Wilson for 0 of 20


def test_one_paragraph_gives_no_information() -> None:
    assert share_interval([0.0, 100.0], [1, 1]) == (0.0, 100.0)
    assert mean_interval([0.0, 100.0], [1, 1]) == (0.0, 100.0)


@pytest.mark.parametrize("interval", [share_interval, mean_interval])
def test_intervals_over_paragraphs_cover_the_truth(interval: object) -> None:
    """1,000 studies of 80 paragraphs of five questions that share their difficulty."""
    rng = random.Random(0)
    covered = 0
    for _ in range(1000):
        values, clusters = [], []
        for paragraph in range(80):
            ease = rng.betavariate(2, 2)
            values += [100.0 * (rng.random() < ease) for _ in range(5)]
            clusters += [paragraph] * 5
        low, high = interval(values, clusters)  # type: ignore[operator]
        covered += low <= 50 <= high
    assert 930 <= covered <= 970
