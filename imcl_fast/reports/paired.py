"""Means over seeds, and paired differences with their confidence interval."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

# 97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom.
T_QUANTILES = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)


class Interval(NamedTuple):
    """A mean, its two-sided 95 % confidence interval, and how many numbers it is of.

    ``low`` and ``high`` are None for a single value, which tells nothing of its spread.
    """

    mean: float
    low: float | None
    high: float | None
    values: int


def interval(values: Sequence[float]) -> Interval:
    """Student's interval of the mean of one or more values, taken for normal.

    Raises:
        ValueError: there are none.
    """
    if not values:
        raise ValueError("values: expected at least 1, got none")
    mean, count = statistics.fmean(values), len(values)
    if count == 1:
        return Interval(mean, None, None, 1)
    half = t_quantile(count - 1) * statistics.stdev(values) / math.sqrt(count)
    return Interval(mean, mean - half, mean + half, count)


def t_quantile(degrees: int) -> float:
    """The 97.5 % quantile of Student's t, to four digits.

    Beyond the table by the expansion around the normal distribution's (Abramowitz & Stegun
    26.7.5).
    """
    if degrees <= len(T_QUANTILES):
        return T_QUANTILES[degrees - 1]
    z = statistics.NormalDist().inv_cdf(0.975)
    return (
        z
        + (z**3 + z) / (4 * degrees)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * degrees**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * degrees**4)
    )


def deviation(values: Sequence[float]) -> float | None:
    """Standard deviation of the sample; None for less than two values."""
    return statistics.stdev(values) if len(values) > 1 else None
