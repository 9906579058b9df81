"""How one implementation of one row is measured on a GPU.

An implementation whose gradients are off is not timed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import imcl_fast
from imcl_fast.implementations import why_not

from .rows import FUSED, Row

COPIED, EDGE = 2**28, 8192  # elements of the copy, edge of the products that rate a machine
BATCH, WIDTH = 128, 64  # of the training step
WARM_UP = 5  # of its steps
ROTATED = 6  # input sets a row alternates between, more than the cache holds
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2}

Step = Callable[[Sequence[Tensor]], Sequence[Tensor]]


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


def rates(rounds: int) -> dict[str, float]:
    """Copy bandwidth (bytes read and written) and the rates of square products."""
    source = torch.empty(COPIED, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    copy = median_ms(lambda: target.copy_(source), rounds)
    found = {"copy_GB_per_s": 2 * source.numel() * 4 / copy / 1e6}
    for name, dtype, precision in (
        ("bf16", torch.bfloat16, "highest"),
        ("tf32", torch.float32, "high"),
        ("fp32", torch.float32, "highest"),
    ):
        torch.set_float32_matmul_precision(precision)
        a = torch.randn(EDGE, EDGE, dtype=dtype, device="cuda")
        found[f"{name}_TFLOP_per_s"] = 2 * EDGE**3 / median_ms(lambda a=a: a @ a, rounds) / 1e9
    torch.set_float32_matmul_precision("highest")
    return found


def step_of(row: Row, name: str) -> Step:
    """Forward and backward of one implementation: the gradients of leaves.

    Raises:
        NotTimed: it can't run here.
    """
    reason = why_not(name, "cuda", [row.dtype]) if name in FUSED else None
    if reason is not None:
        raise NotTimed(reason)
    grad = torch.ones((), device="cuda")
    loss_of = lambda xs: row.loss(xs, name)  # noqa: E731
    if name == "torch.compile":
        torch.compiler.reset()
        loss_of = torch.compile(lambda xs: row.loss(xs, "torch"))
    return lambda xs: torch.autograd.grad(loss_of(xs), xs, grad)


def prepare(row: Row, name: str) -> None:
    """One step: what it compiles stays in the caches on disk."""
    step_of(row, name)([x.requires_grad_() for x in row.inputs()])
    torch.cuda.synchronize()


def operation(row: Row, name: str, rounds: int) -> dict[str, float | str]:
    """Milliseconds from Python and on the device, and the bytes a step needs at its peak.

    Raises:
        NotTimed: it can't run here, or its gradients are off.
    """
    step = step_of(row, name)
    torch.manual_seed(0)
    sets = [[x.requires_grad_() for x in row.inputs()] for _ in range(ROTATED)]
    # Of the values that the implementation is given, in float32: other inputs, other leaves.
    wide = [x.detach().float().requires_grad_() for x in sets[0]]
    truth = torch.autograd.grad(row.loss(wide, "reference"), wide)
    error = max(
        float((g.float() - t).abs().max() / t.abs().max())
        for g, t in zip(step(sets[0]), truth, strict=True)
    )
    # The naive form rounds every step to its dtype, and is timed for all that.
    if name != "reference" and not error <= TOLERANCE[row.dtype]:
        raise NotTimed(f"its gradients are off by {error:.1e}")
    del wide, truth
    found: dict[str, float | str] = {"called_ms": called_ms(step, sets, rounds)}
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(sets[0])
    torch.cuda.synchronize()
    found["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    try:
        found["device_ms"] = graph_ms(step, sets, rounds)
    except RuntimeError as error_of_capture:
        # Plain PyTorch may copy a list to the device, which a graph can't hold.
        found["no_graph"] = str(error_of_capture).splitlines()[0]
    return found


def called_ms(step: Step, sets: Sequence[Sequence[Tensor]], rounds: int) -> float:
    for xs in sets[:3]:
        step(xs)
    turn = iter(range(rounds))
    return median_ms(lambda: step(sets[next(turn) % len(sets)]), rounds)


def graph_ms(step: Step, sets: Sequence[Sequence[Tensor]], rounds: int) -> float:
    """Median time of one step within a CUDA graph of one step on each input set."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for xs in sets:
            step(xs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [step(xs) for xs in sets]
    graph.replay()
    spent = median_ms(graph.replay, rounds) / len(sets)
    del kept
    return spent


def training_step(name: str, rounds: int) -> dict[str, float]:
    """A ResNet-18 step, bfloat16 autocast, channels_last, 32x32, batch 128; "plain" is without
    any way of IMCL."""
    from imcl_fast.models import resnet18

    if name in FUSED and (reason := why_not(name, "cuda")) is not None:
        raise NotTimed(reason)
    torch.manual_seed(0)
    x = torch.randn(ROTATED, BATCH, 3, 32, 32, device="cuda")
    y = torch.randint(0, 10, (ROTATED, BATCH), device="cuda")
    network = resnet18(width=WIDTH, classes=10).cuda().to(memory_format=torch.channels_last)
    module = network if name == "plain" else imcl_fast.IMCL(network, x[0, :2], impl=name)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9)

    def run(index: int) -> None:
        batch = x[index].contiguous(memory_format=torch.channels_last)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            if name == "plain":
                loss = torch.nn.functional.cross_entropy(network(batch).float(), y[index])
            else:
                loss = module(batch, y[index]).loss
        loss.backward()
        optimizer.step()

    times = []
    for index in range(-WARM_UP, rounds):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        start = time.perf_counter()
        run(index % ROTATED)
        torch.cuda.synchronize()
        if index >= 0:
            times.append(1e3 * (time.perf_counter() - start))
    peak = torch.cuda.max_memory_allocated() - before
    return {"ms": statistics.median(times), "peak_bytes": peak}
