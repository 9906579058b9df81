"""Means over seeds, and paired differences with their confidence interval."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple


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
    from scipy.special import stdtrit  # slow to import

    half = float(stdtrit(count - 1, 0.975)) * statistics.stdev(values) / math.sqrt(count)
    return Interval(mean, mean - half, mean + half, count)


def deviation(values: Sequence[float]) -> float | None:
    """Standard deviation of the sample; None for less than two values."""
    return statistics.stdev(values) if len(values) > 1 else None
