"""How one implementation of one row is measured on a GPU.

An implementation whose gradients are off is not timed.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from imcl_fast.implementations import why_not

from .. import operations
from ..competitors import Competitor
from ..memory import peak_bytes
from ..rows import Row
from ..step import EVERY_STEP, Step, runs_of
from .rows import FUSED

DEVICE = torch.device("cuda")
TRAINED = Step("resnet18", 128, bfloat16=True)
WARM_UP = 5  # training steps
ROTATED = 6  # input sets a row alternates between, more than the cache holds


class NotTimed(Exception):
    """Why an implementation has no figure: a sentence."""


def median_ms(run: Callable[[], object], rounds: int) -> float:
    """Median time on the device of one run, by events."""
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def competitor(row: Row, name: str) -> Competitor:
    """One implementation of a row.

    Raises:
        NotTimed: it can't run here.
    """
    if name in FUSED and (reason := why_not(name, "cuda", [row.dtype])) is not None:
        raise NotTimed(reason)
    if name == "torch.compile":
        torch.compiler.reset()
        return Competitor(name, torch.compile(row.loss("torch", DEVICE)))
    # The naive form rounds every step to its dtype, and is timed for all that.
    return Competitor(name, row.loss(name, DEVICE), same=name != "reference")


def prepare(row: Row, name: str) -> None:
    """One step: what it compiles stays in the caches on disk."""
    operations.step(competitor(row, name).loss, row.inputs(0, DEVICE))
    torch.cuda.synchronize()


def operation(row: Row, name: str, rounds: int) -> dict[str, float | str | None]:
    """Milliseconds from Python and on the device, and the bytes a step needs at its peak.

    Raises:
        NotTimed: it can't run here, or its loss or gradients are off.
    """
    one = competitor(row, name)
    sets = [row.inputs(seed, DEVICE) for seed in range(ROTATED)]
    truth = operations.truth_of(row, sets[0], DEVICE)
    step(one, sets[0])  # an error is a failure, and no reason to leave it out
    if (wrong := operations.fault(one, sets[0], truth, row)) is not None:
        raise NotTimed(wrong)
    del truth
    found: dict[str, float | str | None] = {"called_ms": called_ms(one, sets, rounds)}
    found["peak_bytes"] = peak_bytes(lambda: step(one, sets[0]), DEVICE)
    try:
        found["device_ms"] = graph_ms(one, sets, rounds)
    except RuntimeError as error_of_capture:
        # Plain PyTorch may copy a list to the device, which a graph can't hold.
        found["no_graph"] = str(error_of_capture).splitlines()[0]
    return found


def step(one: Competitor, xs: Sequence[Tensor]) -> object:
    return operations.step(one.loss, xs)


def called_ms(one: Competitor, sets: Sequence[Sequence[Tensor]], rounds: int) -> float:
    for xs in sets[:3]:
        step(one, xs)
    turn = iter(range(rounds))
    return median_ms(lambda: step(one, sets[next(turn) % len(sets)]), rounds)


def graph_ms(one: Competitor, sets: Sequence[Sequence[Tensor]], rounds: int) -> float:
    """Median time of one step within a CUDA graph of one step on each input set."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for xs in sets:
            step(one, xs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [step(one, xs) for xs in sets]
    graph.replay()
    spent = median_ms(graph.replay, rounds) / len(sets)
    del kept
    return spent


def training_step(name: str, rounds: int) -> dict[str, float | None]:
    """A ResNet-18 step, bfloat16 autocast, channels_last, 32x32, batch 128; "plain" is without
    any way of IMCL."""
    if name in FUSED and (reason := why_not(name, "cuda")) is not None:
        raise NotTimed(reason)
    options = {"ways": ()} if name == "plain" else {"impl": name, **EVERY_STEP}
    ((_, run),) = runs_of(TRAINED, {"method": "imcl", **options}, DEVICE).values()
    times = [1e3 * run(index) for index in range(WARM_UP + rounds)][WARM_UP:]
    return {"ms": statistics.median(times), "peak_bytes": peak_bytes(lambda: run(0), DEVICE)}
