"""An H100, and how long what its processors are given should take: see docs/gpu.md."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Any, NamedTuple

# Bytes and cycles a second, processors, schedulers of each, cycles from one instruction of a warp
# to the next that needs its result; products a second of float32, and of bfloat16 and
# TensorFloat-32 on tensor cores (multiplications and additions both); second-level cache.
BANDWIDTH, CLOCK, PROCESSORS, SCHEDULERS, LATENCY = 3.0e12, 1.98e9, 132, 4, 4
FLOAT32, BFLOAT16, SPLIT_TF32 = 67e12, 989e12, 495e12 / 3
CACHE = 50e6


class Launch(NamedTuple):
    """One kernel, and what it takes."""

    programs: int
    warps: int  # on a processor at a time
    waves: float
    bytes: float
    slots: int  # instructions that are issued, by all warps
    cycles: float

    @property
    def seconds(self) -> float:
        return max(self.bytes / BANDWIDTH, self.cycles / CLOCK)


def launch(counts: Sequence[int], moved: float, kernel: dict[str, Any]) -> Launch:
    """Of programs of so many instructions a warp; ``kernel`` is of code.json."""
    slots, warps = PROCESSORS * kernel["blocks"], kernel["blocks"] * kernel["warps"]
    # What a scheduler needs for an instruction of each of its warps.
    round_of_warps = max(LATENCY, warps / SCHEDULERS)
    return Launch(len(counts), warps, len(counts) / slots, moved, sum(counts) * kernel["warps"],
                  makespan([c * round_of_warps for c in counts], slots))  # fmt: skip


def copied(moved: float) -> Launch:
    """A kernel of PyTorch's that does little more than read and write."""
    return Launch(0, 0, 0, moved, 0, 0)


def makespan(durations: Sequence[float], slots: int) -> float:
    """When the last is done, if each starts, in their order, where one has ended first."""
    ends = [0.0] * slots
    for duration in durations:
        heapq.heapreplace(ends, ends[0] + duration)
    return max(ends)
