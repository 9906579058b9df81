"""The operations for pytest-benchmark: ``pytest bench --benchmark-enable``, and then
``pytest-benchmark compare --group-by=group``.

pytest-benchmark times one function after the other, and a machine that drifts meanwhile makes
the comparison worthless. Here a row's competitors are timed in turn (timing.py) when the first
of them is asked for, and each test then plays its samples to pytest-benchmark: its timer is a
clock that a playback moves on by the sample that was measured.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import pytest
import torch

from imcl_fast.implementations import IMPLEMENTATIONS

from .allocator import keep_freed_memory
from .competitors import THIRD_PARTY
from .operations import Measured, measure
from .rows import Row, rows

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SECONDS = 1.0  # a row
PASSES = ("forward", "backward", "both")
ROWS = {row.name: row for row in rows(quick=False)}


class Clock:
    """Time that passes only when a sample is played."""

    def __init__(self) -> None:
        self.now = 0.0

    def read(self) -> float:
        return self.now

    def play(self, samples: list[float]) -> None:
        self.now += samples.pop(0)


CLOCK = Clock()


@functools.lru_cache(maxsize=1)  # tests of a row follow one another
def measured(name: str) -> Measured:
    if DEVICE.type == "cpu":
        keep_freed_memory()
    return measure(ROWS[name], DEVICE, SECONDS)


def competitors_of(row: Row) -> Sequence[str]:
    """Names that may compete, whether or not they can here."""
    compiled = ["torch.compile(torch)", "torch.compile(reference)"] if row.compiled else []
    published = [name for name, operation, _ in THIRD_PARTY if operation == row.implemented_by]
    return [*IMPLEMENTATIONS[1:], *compiled, *published]


@pytest.mark.benchmark(timer=CLOCK.read)
@pytest.mark.parametrize("direction", PASSES)
@pytest.mark.parametrize(
    ("row", "competitor"),
    [(name, who) for name, row in ROWS.items() for who in competitors_of(row)],
)
def test_operation(benchmark, row: str, competitor: str, direction: str) -> None:
    if not benchmark.enabled:
        pytest.skip("pass --benchmark-enable to measure")
    found = measured(row)
    if competitor in found.left_out:
        pytest.skip(f"{competitor}: {found.left_out[competitor]}")
    samples = [getattr(sample, direction) for sample in found.samples[competitor]]
    benchmark.group = f"{row}, {direction}"
    benchmark.name = competitor
    benchmark.extra_info["peak_bytes"] = found.peaks[competitor]
    benchmark.pedantic(CLOCK.play, args=(samples,), rounds=len(samples))
