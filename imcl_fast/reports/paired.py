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
    try:
        from scipy.special import stdtrit  # slow to import
    except ImportError as error:
        raise ImportError(
            "the intervals of several seeds need scipy, which isn't installed: pip install scipy"
        ) from error
    half = float(stdtrit(count - 1, 0.975)) * statistics.stdev(values) / math.sqrt(count)
    return Interval(mean, mean - half, mean + half, count)


def in_points(found: Interval) -> str:
    """The interval of a difference between shares, in points."""
    mean = f"{100 * found.mean:+.2f}"
    if found.low is None or found.high is None:
        return mean
    return f"{mean} [{100 * found.low:+.2f}, {100 * found.high:+.2f}]"


def in_percent(shares: Sequence[float], sign: str = "+-") -> str:
    """The mean of one or more shares in percent, with the standard deviation of several."""
    mean, spread = f"{100 * statistics.fmean(shares):.2f}", deviation(shares)
    return mean if spread is None else f"{mean} {sign} {100 * spread:.2f}"


def deviation(values: Sequence[float]) -> float | None:
    """Standard deviation of the sample; None for less than two values."""
    return statistics.stdev(values) if len(values) > 1 else None
