"""Whole training steps: what the four ways cost a network that is being trained."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from imcl_fast import models, objectives
from imcl_fast.imcl import IMCL
from imcl_fast.implementations import why_not
from imcl_fast.schedule import Schedule, Turn

from . import networks
from .facts import why_no_bfloat16
from .memory import peak_of_tensors
from .operations import lost, reason_of
from .timing import Sample, interleaved, quartiles, wait

PLAIN, FUSED = "plain cross entropy", "four ways, fused"
PLAIN_COMPILED = "plain cross entropy, compiled"
SCHEDULED = "four ways, fused, ways 3 and 4 every 8th and 16th step"
EVERY_STEP = {"representation_interval": 1, "kernel_interval": 1}
SCHEDULE = {"representation_interval": 8, "kernel_interval": 16}  # the defaults
BATCHES = 3  # of images, taken in turn
CLASSES = 10

# Method, and arguments of objectives.build. "compiled" ones are compared among themselves.
MAIN: dict[str, dict] = {
    PLAIN: {"method": "imcl", "ways": ()},
    "four ways, naive": {"method": "imcl", "impl": "reference", **EVERY_STEP},
    "four ways, torch": {"method": "imcl", "impl": "torch", **EVERY_STEP},
    FUSED: {"method": "imcl", **EVERY_STEP},
    SCHEDULED: {"method": "imcl", **SCHEDULE},
}
ANCESTORS: dict[str, dict] = {
    "Song & Chai, 2 heads": {"method": "song-chai-2"},
    "Song & Chai, 4 heads": {"method": "song-chai-4"},
}
COMPILED: dict[str, dict] = {
    PLAIN_COMPILED: {"method": "imcl", "ways": ()},
    "four ways, naive, compiled": {"method": "imcl", "impl": "reference", **EVERY_STEP},
    "four ways, fused, compiled": {"method": "imcl", **EVERY_STEP},
    f"{SCHEDULED}, compiled": {"method": "imcl", **SCHEDULE},
}
ON_GPU: dict[str, dict] = {
    f"four ways, {impl}": {"method": "imcl", "impl": impl, **EVERY_STEP}
    for impl in ("triton", "cuda")
}
METHODS = {**MAIN, **ANCESTORS, **COMPILED, **ON_GPU}


@dataclass(frozen=True)
class Step:
    """A network, its batch, and whom to compare."""

    network: str
    batch: int
    width: int = 64
    size: int = 32
    bfloat16: bool = False  # autocast
    methods: tuple[str, ...] = tuple(MAIN)
    rounds: int = 5  # at least

    @property
    def name(self) -> str:
        dtype = "bfloat16 autocast" if self.bfloat16 else "float32"
        compiled = ", compiled" if PLAIN_COMPILED in self.methods else ""
        return (
            f"{self.network}, width {self.width}, {self.size}x{self.size}, "
            f"batch {self.batch}, {dtype}{compiled}"
        )


def steps(quick: bool) -> list[Step]:
    if quick:
        return [Step("resnet18", 32, width=32)]
    few = (PLAIN, "four ways, torch", FUSED, SCHEDULED)
    return [
        # What is quoted: with fewer rounds its overhead varies by several points.
        Step("resnet18", 128, rounds=8),
        Step("resnet18", 64, width=32, methods=(*few, *ANCESTORS)),
        Step("resnet18", 64, width=32, methods=tuple(COMPILED)),
        Step("resnet18", 128, bfloat16=True, methods=few),
        Step("resnet18", 128, width=16, bfloat16=True, methods=few),
        Step("vgg16_bn", 64, methods=(*few, *ANCESTORS)),
        Step("vgg16_bn", 64, bfloat16=True, methods=few),
        Step("resnet50", 32, methods=few),
        Step("resnet50", 32, bfloat16=True, methods=few),
        Step("vit", 64, width=128, methods=few),
        Step("vit", 64, width=128, bfloat16=True, methods=few),
        Step("fcn_resnet18", 32, methods=few),
        Step("fcn_resnet18", 32, bfloat16=True, methods=few),
    ]


def measure(
    step: Step,
    device: torch.device,
    seconds: float,
    *,
    fewest: int | None = None,
    strict: bool = False,
) -> dict:
    """Per method: seconds, images per second, and what it adds to the plain step.

    ``overhead`` is the median over rounds of the method's time over the plain one's in the
    same round, less 1: the machine drifts by more than what is measured. Of a schedule each
    kind of step is timed once in a round; seconds and overhead are the period's mean, ``kinds``
    the overheads by what a step computes, ``fullest`` the largest of them. ``extra_memory``
    compares what the tensors that a step makes hold at their peak. ``kernels`` is the number of
    layers that way 4 takes. A method that fails, built or in any round, is left out with its
    reason; a ``strict`` measurement ends with its error.
    """
    if PLAIN_COMPILED in step.methods:
        torch.compiler.reset()
    kinds: dict[str, dict[str, float]] = {}  # competitors of every method, and their shares
    runs: dict[str, Callable[[int], float]] = {}
    left_out: dict[str, str] = {}

    def leave_out(name: str, error: Exception) -> None:
        if strict or lost(error):
            raise error
        left_out[name] = reason_of(error)

    for name in step.methods:
        reason = why_no_bfloat16(device) if step.bfloat16 else None
        impl = METHODS[name].get("impl")
        if reason is None and impl is not None:
            reason = why_not(impl, device.type)
        if reason is not None:
            left_out[name] = reason
            continue
        try:
            found = runs_of(step, METHODS[name], device, compiled=name in COMPILED)
        except Exception as error:  # the reason goes into the report
            leave_out(name, error)
            continue
        kinds[name] = {f"{name} {kind}": share for kind, (share, _) in found.items()}
        runs |= {f"{name} {kind}": run for kind, (_, run) in found.items()}

    def drop(kind: str, error: Exception) -> None:
        leave_out(next(name for name in kinds if kind in kinds[name]), error)

    times = interleaved(runs, seconds, fewest=fewest or step.rounds, most=30, warm_up=1, drop=drop)
    kinds = {name: of for name, of in kinds.items() if name not in left_out}
    base = PLAIN_COMPILED if PLAIN_COMPILED in step.methods else PLAIN
    if base not in kinds:  # which all others are compared with
        return {"base": base, "methods": {}, "left_out": left_out, "kernels": 0}
    (plain,) = kinds[base]
    peaks = {
        kind: peak_of_tensors(lambda run=runs[kind]: run(0), device)
        for shares_of in kinds.values() for kind in shares_of
    }  # fmt: skip
    methods = {}
    for name, shares_of in kinds.items():
        spent = [
            sum(share * t for share, t in zip(shares_of.values(), each, strict=True))
            for each in zip(*(times[kind] for kind in shares_of), strict=True)
        ]
        over = quartiles(_over(spent, times[plain]))
        of_kinds = {
            kind.removeprefix(name).strip(): statistics.median(_over(times[kind], times[plain]))
            for kind in shares_of
        }
        peak = max(peaks[kind] for kind in shares_of)
        methods[name] = {
            "seconds": quartiles(spent),
            "rounds": len(spent),
            "images_per_second": step.batch / statistics.median(spent),
            "overhead": over["median"],
            "overhead_quartiles": [over["q1"], over["q3"]],
            "kinds": of_kinds,
            "fullest": max(of_kinds.values()),
            "peak_bytes": peak,
            "extra_memory": peak / peaks[plain] - 1,
        }
    return {
        "base": base, "methods": methods, "left_out": left_out,
        "kernels": _kernels(step),
    }  # fmt: skip


def _over(spent: Iterable[float], plain: Iterable[float]) -> list[float]:
    return [a / b - 1 for a, b in zip(spent, plain, strict=True)]


def _kernels(step: Step) -> int:
    off = dict.fromkeys(("output_weight", "multilayer_weight", "representation_weight"), 0.0)
    return len(IMCL(network_of(step), torch.zeros(1, 3, step.size, step.size), **off).kernels)


def network_of(step: Step) -> nn.Module:
    """The network of a step."""
    if step.network in networks.NETWORKS:
        return networks.NETWORKS[step.network](CLASSES, step.width, step.size)
    return models.build(step.network, CLASSES, width=step.width, image_size=step.size)


def kinds_of_steps(schedule: Schedule) -> dict[str, tuple[float, Turn]]:
    """The different calls of a period: how many of all they are, and one of them."""
    turns = [schedule.turn]
    while turns[-1].next is not turns[0]:
        turns.append(turns[-1].next)
    found: dict[str, tuple[float, Turn]] = {}
    for turn in turns:
        ways = {"representation": turn.representation, "kernel": turn.kernel}
        kind = " and ".join(way for way, on in ways.items() if on) or "neither"
        share, _ = found.get(kind, (0.0, turn))
        found[kind] = share + 1 / len(turns), turn
    return found


def training(
    step: Step, options: dict, device: torch.device, *, compiled: bool = False
) -> tuple[Callable[[int], Sample], Schedule | None]:
    """A training step of one method on the i-th batch, which takes its own time (the optimizer's
    counts as backward), and the schedule of its ways. ``options`` are those of
    ``objectives.build``."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(BATCHES, step.batch, 3, step.size, step.size, generator=generator)
    samples = (step.size, step.size) if step.network in networks.DENSE else ()
    labels = torch.randint(CLASSES, (BATCHES, step.batch, *samples), generator=generator)
    images, labels = images.to(device), labels.to(device)
    network = network_of(step).to(device)
    layout = torch.channels_last if step.bfloat16 else torch.contiguous_format
    network = network.to(memory_format=layout)
    objective = objectives.build(model=network, example_input=images[0, :2], **options).to(device)
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.01, momentum=0.9)

    def loss_of(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if not step.bfloat16:
            return objective(x, y).loss
        with torch.autocast(device.type, dtype=torch.bfloat16):
            return objective(x, y).loss

    loss = torch.compile(loss_of) if compiled else loss_of

    def run(index: int) -> Sample:
        x = images[index % BATCHES].contiguous(memory_format=layout)
        y = labels[index % BATCHES]
        wait(device)
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        value = loss(x, y)
        middle = time.perf_counter()
        value.backward()
        optimizer.step()
        wait(device)
        return Sample(middle - start, time.perf_counter() - middle)

    return run, objective._schedule if isinstance(objective, IMCL) else None


def run_of(step: Step, options: dict, device: torch.device) -> Callable[[int], float]:
    """The seconds of a step of a method whose steps are all of one kind."""
    ((_, run),) = runs_of(step, options, device).values()
    return run


def runs_of(
    step: Step, options: dict, device: torch.device, *, compiled: bool = False
) -> dict[str, tuple[float, Callable[[int], float]]]:
    """By kind of step: its share of a period, and the seconds of a ``training`` step of it."""
    train, schedule = training(step, options, device, compiled=compiled)

    if schedule is None:
        return {"": (1.0, lambda index: train(index).both)}

    def run(turn: Turn, index: int) -> float:
        schedule.turn = turn
        return train(index).both

    return {
        kind: (share, partial(run, turn))
        for kind, (share, turn) in kinds_of_steps(schedule).items()
    }
