"""What giving memory back to the system costs a step, and how other figures are free of it.

PyTorch allocates a CPU's tensors with the C library. glibc gives large ones back when they are
freed, and in the next step the system maps and zeroes their pages anew, at a fault each. Which
tensors these are depends on sizes and on the order in which they are freed: one competitor pays for
what another does not, and other ones in the next run. So all are measured with freed memory kept by
the process, as TCMalloc and jemalloc keep it, which PyTorch's tuning guide recommends.
"""

from __future__ import annotations

import ctypes
import resource
from collections.abc import Callable

import torch

from .step import FUSED, METHODS, PLAIN, Step, run_of
from .timing import interleaved, quartiles

STEP = Step("resnet18", 128)
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h
GIVEN_BACK, KEPT = "given back", "kept"


def keep_freed_memory() -> bool:
    """From now on, in this process; False where the C library is not glibc, and nothing changes."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))


def measure(device: torch.device, seconds: float, *, fewest: int = 3) -> dict:
    """Per method: seconds and page faults of a step, with freed memory given back, as where nothing
    is said, and kept. It is kept from then on; without glibc nothing is measured."""
    runs = {
        name: _with_faults(run_of(STEP, METHODS[name], device)) for name in (PLAIN, FUSED)
    }
    found = {GIVEN_BACK: interleaved(runs, seconds, fewest=fewest, most=30, warm_up=1)}
    if not keep_freed_memory():
        return {}
    found[KEPT] = interleaved(runs, seconds, fewest=fewest, most=30, warm_up=1)
    return {
        name: {
            condition: {
                "seconds": quartiles([spent for spent, _ in samples[name]]),
                "faults": quartiles([faults for _, faults in samples[name]]),
            }
            for condition, samples in found.items()
        }
        for name in runs
    }


def _with_faults(run: Callable[[int], float]) -> Callable[[int], tuple[float, int]]:
    def counted(index: int) -> tuple[float, int]:
        before = _faults()
        return run(index), _faults() - before

    return counted


def _faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
