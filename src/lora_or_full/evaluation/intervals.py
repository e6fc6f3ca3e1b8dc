"""Intervals of a mean over questions that are clustered in paragraphs."""

import math
from collections.abc import Hashable, Sequence
from statistics import fmean

Z95 = 1.959963984540054  # 97.5 % quantile of the standard normal distribution


def standard_error(values: Sequence[float], clusters: Sequence[Hashable]) -> float:
    """Give the standard error of a mean over values that were sampled in clusters.

    The linearized ratio estimator with k / (k - 1) (Cochran, 1977, Sampling Techniques, ch. 9A).

    Args:
        values: One per question.
        clusters: Paragraph of each question.

    Returns:
        The standard error; infinite with one cluster.
    """
    mean, sums = fmean(values), dict.fromkeys(clusters, 0.0)
    for value, cluster in zip(values, clusters, strict=True):
        sums[cluster] += value - mean
    k = len(sums)
    if k < 2:
        return math.inf
    return math.sqrt(k / (k - 1) * math.fsum(s * s for s in sums.values())) / len(values)


def share_interval(values: Sequence[float], clusters: Sequence[Hashable]) -> tuple[float, float]:
    """Give a 95 % interval (percent) for the mean of values that are 0 or 100, such as EM.

    Wilson's score interval (1927) with the effective number of independent values, which gives the
    clustered standard error.
    """
    p = fmean(values) / 100
    error = standard_error(values, clusters) / 100
    n = p * (1 - p) / error**2 if error > 0 else float(len(set(clusters)))
    if n == 0:
        return 0.0, 100.0
    middle, square = p + Z95**2 / (2 * n), 1 + Z95**2 / n
    half = Z95 * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n * n))
    return 100 * max(0.0, (middle - half) / square), 100 * min(1.0, (middle + half) / square)


def mean_interval(values: Sequence[float], clusters: Sequence[Hashable]) -> tuple[float, float]:
    """Give a 95 % normal interval for the mean of values from 0 to 100, such as F1."""
    mean, half = fmean(values), Z95 * standard_error(values, clusters)
    return max(0.0, mean - half), min(100.0, mean + half)
