"""Peak memory of one call: on a GPU by its allocator, on the CPU by the resident set.

The resident set counts all there is, the working memory of compiled code too (of which the C++
kernels keep up to 8 MiB per thread from call to call; that is not in it). It is exact to some
hundred KiB. Linux only: elsewhere there is no figure.

Of a whole training step it isn't: what malloc finds free in between varies, and with it the peak
of one and the same step, by a quarter. There the tensors are counted, to the byte.
"""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch._C._profiler import _EventType

RESET_PEAK = "5"  # to /proc/self/clear_refs, see proc(5)
STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
MEMINFO = Path("/proc/meminfo")


def peak_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that ``run()`` takes at its peak above what was taken before."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        # Free memory that malloc holds back would hide what is allocated from it.
        ctypes.CDLL(None).malloc_trim(0)
        CLEAR_REFS.write_text(RESET_PEAK)
    except (AttributeError, OSError):
        return None
    before = _kibibytes(STATUS, "VmRSS")
    run()
    return max(_kibibytes(STATUS, "VmHWM") - before, 0)


def peak_of_tensors(run: Callable[[], object], device: torch.device) -> int:
    """Bytes that the tensors made by ``run()`` hold at their peak, in all threads.

    It runs twice. What it frees first was made before, as the gradients of the last step are, and
    isn't counted; a profiler may take it for a tensor that one before saw at the same address, so
    that its sums of what is held can't be used.
    """
    if device.type == "cuda":
        return cast(int, peak_bytes(run, device))
    run()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run()
    held: dict[int, int] = {}  # bytes at an address
    now = peak = 0
    for _, address, change in sorted(_allocations(profile)):
        now -= held.pop(address, 0)
        if change > 0:
            held[address] = change
            now += change
            peak = max(peak, now)
    return peak


def _allocations(profile: torch.profiler.profile) -> Iterator[tuple[int, int, int]]:
    """Of what was allocated and freed: when, at which address, and bytes (freed ones negative)."""
    events = cast(Any, profile.profiler).kineto_results.experimental_event_tree()
    while events:
        event = events.pop()
        events += event.children
        if event.tag == _EventType.Allocation:
            found = event.extra_fields
            yield event.start_time_ns, found.ptr, found.alloc_size


def available_bytes(device: torch.device) -> int:
    """Memory that is free to be taken; where the system doesn't say, half of what it has."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if MEMINFO.exists():
        return _kibibytes(MEMINFO, "MemAvailable")
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _kibibytes(path: Path, key: str) -> int:
    """The bytes of a line "key:   123 kB"."""
    return 1024 * int(path.read_text().partition(f"{key}:")[2].split()[0])
