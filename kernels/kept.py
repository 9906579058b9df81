"""Device memory that outlives calls and CUDA graphs: scratch, tickets, and the tables of plans.

What is made within a call may lie in the private pool of a CUDA graph that is captured or
warmed up just then, and such a pool is taken back. So it is made by another thread, whose
memory no capture and no pool of the caller's claims; and never while capturing, where
nothing can be copied to the device.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

_TICKETS = 4096  # of a device, one for every launch in a graph
_APART = 16  # bytes: every ticket starts at a multiple of them, as every tensor does

_FEWEST = 1024  # of the elements that a launch has, or counters

_of_graphs: dict[int, Tensor] = {}  # by address; a graph may read them as long as it lives


def capturing(device: torch.device) -> bool:
    """Whether what is launched now goes into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def on_device(values: Tensor, device: torch.device) -> Tensor:
    """The values (on the CPU) copied to the device, and there when this returns.

    Raises:
        RuntimeError: a CUDA graph is being captured.
    """
    if device.type == "cpu":
        return values
    if capturing(device):
        raise RuntimeError(
            'imcl_fast: impl="triton" meets tensors of these shapes and strides for the first '
            "time while a CUDA graph is captured; run the step once before, as for any graph"
        )
    with ThreadPoolExecutor(1) as other:
        return other.submit(values.to, device).result()


def hold(memory: Tensor, device: torch.device) -> None:
    """Keep the memory, made by ``on_device``, for what is launched now, though it be let go of:
    as long as a graph being captured may read it, or until another stream than its own has."""
    if capturing(device):
        _of_graphs[memory.data_ptr()] = memory
    elif device.type == "cuda" and _stream(device):
        memory.record_stream(torch.cuda.current_stream(device))


class Scratch(NamedTuple):
    """What the programs of a launch leave for the last of them."""

    size: int
    partials: Tensor  # (size,)
    ticket: Tensor  # () int32, 0 before a launch and after


_scratch: dict[tuple, list[Scratch]] = {}
_abandoned: list[list[Scratch]] = []
_tickets: dict[torch.device, list[Tensor]] = {}  # that no graph has yet


def scratch(device: torch.device, size: int, dtype: torch.dtype) -> Scratch:
    """At least ``size`` elements and a counter that is 0, for one call, whose last program leaves
    that at 0.

    The launches of a stream follow one another and share one, but for those of other threads, for
    a call may have several launches. A graph may be replayed beside any stream, so each call
    captured has its own; where no counter is left, or none was made before the capture, one that
    the graph sets to 0 itself.
    """
    if capturing(device):
        free = _tickets.get(device)
        ticket = free.pop() if free else torch.zeros((), dtype=torch.int32, device=device)
        return Scratch(size, torch.empty(size, dtype=dtype, device=device), ticket)
    key = device, _stream(device), threading.get_ident(), dtype
    mine = _scratch.get(key)
    if mine is None or mine[-1].size < size:
        # Those that were too small are kept: launches on their way may still use them.
        new = _new_scratch(device, max(_FEWEST, 1 << (size - 1).bit_length()), dtype)
        mine = _scratch.setdefault(key, [])  # now that there is memory, which may have been lacking
        mine.append(new)
    return mine[-1]


def abandon(memory: Scratch) -> None:
    """Hand ``memory`` out no more: a call of several launches has ended after some of them, and the
    counter isn't at 0. It is kept, for these may be under way."""
    for key, mine in list(_scratch.items()):
        if any(one is memory for one in mine):
            _abandoned.append(_scratch.pop(key))


def _new_scratch(device: torch.device, size: int, dtype: torch.dtype) -> Scratch:
    if device not in _tickets:
        counters = torch.zeros(_TICKETS, _APART // 4, dtype=torch.int32, device="cpu")
        _tickets[device] = list(on_device(counters, device)[:, 0].unbind())
    memory = torch.zeros(_APART + size * dtype.itemsize, dtype=torch.uint8, device="cpu")
    memory = on_device(memory, device)
    ticket = memory[:4].view(torch.int32).squeeze()
    return Scratch(size, memory[_APART:].view(dtype), ticket)


_counters: dict[tuple[torch.device, int], list[Tensor]] = {}


def tickets(device: torch.device, count: int) -> Tensor:
    """At least ``count`` counters, int32, that are 0, for one launch, which leaves them at 0."""
    if capturing(device):  # the graph sets them to 0 itself
        return torch.zeros(count, dtype=torch.int32, device=device)
    # Those that were too few are kept: launches on their way may still use them.
    mine = _counters.setdefault((device, _stream(device)), [])
    if not mine or len(mine[-1]) < count:
        size = max(_FEWEST, 1 << (count - 1).bit_length())
        mine.append(on_device(torch.zeros(size, dtype=torch.int32, device="cpu"), device))
    return mine[-1]


def _stream(device: torch.device) -> int:
    if device.type == "cuda":
        # As torch.cuda.current_stream has it, but for the object around it.
        return torch._C._cuda_getCurrentRawStream(device.index)
    if device.type == "xpu":
        return torch.xpu.current_stream(device).sycl_queue
    return threading.get_ident()  # under the interpreter
