"""What a training step takes while another process keeps one core busy.

A parallel region ends when its last thread does, and that thread waits for the core. So
everything takes several times as long, PyTorch's own as ours; the question is whether the
four ways lose more than the plain step.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

from .step import FUSED, METHODS, PLAIN, Step, run_of
from .timing import interleaved, quartiles

STEP = Step("resnet18", 64, width=32)


def measure(device: torch.device, seconds: float, *, fewest: int = 5) -> dict:
    """Per method: seconds of a step on a quiet machine and beside a busy process, and their
    ratio. ``over plain`` is what the method adds to the plain step of the same round."""
    runs = {name: run_of(STEP, METHODS[name], device) for name in (PLAIN, FUSED)}
    found = {}
    for condition, around in (("quiet", nullcontext), ("busy", busy_process)):
        with around():
            found[condition] = interleaved(runs, seconds, fewest=fewest, most=30)
    return {
        name: {
            **{condition: quartiles(times[name]) for condition, times in found.items()},
            "ratio": statistics.median(found["busy"][name])
            / statistics.median(found["quiet"][name]),
            "over plain": {
                condition: statistics.median(
                    ours / plain for ours, plain in zip(times[name], times[PLAIN], strict=True)
                )
                - 1
                for condition, times in found.items()
            },
        }
        for name in runs
    }


@contextmanager
def busy_process() -> Iterator[None]:
    """A process that never waits."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()
