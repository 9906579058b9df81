"""Device memory that outlives calls and CUDA graphs: tickets, and the tables of plans.

What is made within a call may lie in the private pool of a CUDA graph that is captured or
warmed up just then, and such a pool is taken back. So it is made by another thread, whose
memory no capture and no pool of the caller's claims; and never while capturing, where
nothing can be copied to the device.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

_TICKETS = 4096  # of a device; one for every stream, and one for every launch in a graph
_APART = 4  # int32: every ticket starts at a multiple of 16 bytes, as every tensor does

_FEWEST = 1024  # of the counters that a stream has for its launches

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


def keep_for_graph(memory: Tensor) -> None:
    """Hold on to memory that a graph being captured will read."""
    _of_graphs[memory.data_ptr()] = memory


class _Tickets:
    """Those of a device: free ones, and those that streams have."""

    def __init__(self, device: torch.device) -> None:
        memory = on_device(torch.zeros(_TICKETS, _APART, dtype=torch.int32), device)
        self.free = list(memory[:, 0].unbind())
        self.of_stream: dict[int, Tensor] = {}


_tickets: dict[torch.device, _Tickets] = {}


def ticket(device: torch.device) -> Tensor:
    """A counter () int32 that is 0, for one launch, whose last program leaves it at 0.

    The launches of a stream follow one another and share one. A graph may be replayed
    beside any stream, so each launch captured has its own; where none is left, or none was
    made before the capture, one that the graph sets to 0 itself.
    """
    mine = _tickets.get(device)
    if capturing(device):
        if mine is None or not mine.free:
            return torch.zeros((), dtype=torch.int32, device=device)
        return mine.free.pop()
    if mine is None:
        mine = _tickets[device] = _Tickets(device)
    stream = _stream(device)
    if stream not in mine.of_stream:
        if not mine.free:
            return torch.zeros((), dtype=torch.int32, device=device)
        mine.of_stream[stream] = mine.free.pop()
    return mine.of_stream[stream]


_counters: dict[tuple[torch.device, int], list[Tensor]] = {}


def tickets(device: torch.device, count: int) -> Tensor:
    """At least ``count`` counters, int32, that are 0, for one launch, which leaves them at 0."""
    if capturing(device):  # the graph sets them to 0 itself
        return torch.zeros(count, dtype=torch.int32, device=device)
    # Those that were too few are kept: launches on their way may still use them.
    mine = _counters.setdefault((device, _stream(device)), [])
    if not mine or len(mine[-1]) < count:
        size = max(_FEWEST, 1 << (count - 1).bit_length())
        mine.append(on_device(torch.zeros(size, dtype=torch.int32), device))
    return mine[-1]


def _stream(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.current_stream(device).cuda_stream
    if device.type == "xpu":
        return torch.xpu.current_stream(device).sycl_queue
    return threading.get_ident()  # under the interpreter
