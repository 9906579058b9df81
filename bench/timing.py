"""The one way times are taken here: all competitors in turn, round by round.

A machine drifts by more than what is compared, so that each round takes every competitor once,
beginning with another one each time, and ratios hold where absolute times don't. In a round no
two competitors share inputs, and there are as many sets of inputs as fill twice the last-level
cache: nobody finds in it what the one before left there. Very small inputs are the exception
(``MOST_SETS``), and a backward finds what its forward has read, as in training.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

WARM_UP = 2  # rounds that aren't counted
LONG = 1.0  # seconds of a round after which everything is warm
FEWEST, MOST = 5, 200  # rounds that are
MOST_SETS, MOST_SET_BYTES = 256, 2**30
UNKNOWN_CACHE = 32 * 2**20

Loss = Callable[[Sequence[Tensor]], Tensor]


class Sample(NamedTuple):
    """Seconds of one forward and of the backward after it."""

    forward: float
    backward: float

    @property
    def both(self) -> float:
        return self.forward + self.backward


def cache_bytes(device: torch.device) -> int:
    """Size of the last-level cache; a guess where the system doesn't say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    units = {"K": 2**10, "M": 2**20}
    found = [path.read_text().strip() for path in sizes]
    return max((int(size[:-1]) * units[size[-1]] for size in found if size[-1:] in units),
               default=UNKNOWN_CACHE)  # fmt: skip


def sets_needed(bytes_of_one: int, competitors: int, device: torch.device) -> int:
    """Sets of inputs to rotate: twice the cache, within memory, one per competitor at least."""
    wanted = math.ceil(2 * cache_bytes(device) / max(bytes_of_one, 1))
    affordable = min(MOST_SETS, MOST_SET_BYTES // max(bytes_of_one, 1))
    return max(competitors, 2, min(wanted, affordable))


def wait(device: torch.device) -> None:
    """Until what a GPU was given is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def elapsed(device: torch.device, *parts: Callable[[], object]) -> list[float]:
    """Seconds of each of some calls, one after the other. On a GPU the marks are events, and the
    host waits before and after but not in between: launches of one may overlap with the last."""
    on_gpu = device.type == "cuda"

    def mark() -> Any:
        if not on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    wait(device)
    marks = [mark()]
    for part in parts:
        part()
        marks.append(mark())
    wait(device)
    return [a.elapsed_time(b) / 1e3 if on_gpu else b - a for a, b in itertools.pairwise(marks)]


def sample(loss: Loss, xs: Sequence[Tensor], device: torch.device) -> Sample:
    """One forward and backward."""
    values: list[Tensor] = []
    return Sample(*elapsed(
        device, lambda: values.append(loss(xs)), lambda: torch.autograd.grad(values, xs)
    ))  # fmt: skip


def interleaved(
    runs: Mapping[str, Callable[[int], object]],
    seconds: float,
    *,
    fewest: int = FEWEST,
    most: int = MOST,
    warm_up: int = WARM_UP,
    drop: Callable[[str, Exception], None] | None = None,
) -> dict[str, list]:
    """What every run returned in each round; run(i) is given the number of its turn.

    Args:
        runs: by name; run(i) measures itself, on the i-th of rotating inputs.
        seconds: about how long to go on, within ``fewest`` and ``most`` rounds.
        warm_up: rounds before that, whose last says how long a round takes; one of a long round.
        drop: is told who failed and why, and raises what is to end the measurement; who failed
            takes part no longer, nor in what is returned. By default every error ends it.
    """
    found: dict[str, list] = {name: [] for name in runs}

    def one_round(index: int, keep: bool) -> float:
        start = time.perf_counter()
        names = list(found)
        first = index % max(len(names), 1)
        for name in names[first:] + names[:first]:
            try:
                result = runs[name](index)
            except Exception as error:
                if drop is None:
                    raise
                drop(name, error)
                del found[name]
                continue
            if keep:
                found[name].append(result)
        return time.perf_counter() - start

    spent, index = math.inf, 0
    while index < warm_up and (index == 0 or spent < LONG):
        spent = one_round(index, keep=False)
        index += 1
    for _ in range(min(max(int(seconds / spent), fewest), most)):
        one_round(index, keep=True)
        index += 1
    return found


def interleaved_losses(
    losses: Mapping[str, Loss],
    sets: Sequence[Sequence[Tensor]],
    seconds: float,
    device: torch.device,
    *,
    fewest: int = FEWEST,
    most: int = MOST,
) -> dict[str, list[Sample]]:
    """Samples of every loss; in a round each takes another set, as far apart as can be."""
    runs = {}
    for position, (name, loss) in enumerate(losses.items()):
        offset = position * len(sets) // len(losses)

        def run(index: int, loss: Loss = loss, offset: int = offset) -> Sample:
            return sample(loss, sets[(index + offset) % len(sets)], device)

        runs[name] = run
    return interleaved(runs, seconds, fewest=fewest, most=most)


def replayed(loss: Loss, sets: Sequence[Sequence[Tensor]], rounds: int) -> float:
    """Seconds of a forward and backward within a CUDA graph of one on each set, a median: what
    the GPU takes, whatever the host does.

    Raises:
        RuntimeError: it can't be captured. Plain PyTorch may copy a list to the device.
    """

    def each() -> list[object]:
        return [torch.autograd.grad(loss(xs), xs) for xs in sets]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        each()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = each()  # whose memory the graph writes to
    graph.replay()
    times = [seconds for _ in range(rounds)
             for seconds in elapsed(torch.device("cuda"), graph.replay)]  # fmt: skip
    del kept
    return statistics.median(times) / len(sets)


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    if len(values) == 1:
        return {"median": values[0], "q1": values[0], "q3": values[0]}
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3}
