"""What IMCL costs on the host: Python, dispatch and autograd, with next to nothing to compute.

On a GPU this is what a small batch waits for, and on a CPU what a narrow network pays.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from imcl_fast import models, objectives

from .step import EVERY_STEP, SCHEDULE
from .timing import Sample, interleaved, quartiles

NETWORK, WIDTH, SIZE, BATCH, CLASSES = "resnet18", 4, 8, 2, 10
PERIOD = 16  # calls of every competitor in a round, those of the schedule's period
PLAIN = "plain cross entropy"
METHODS: dict[str, dict] = {
    PLAIN: {"ways": ()},
    "four ways, every step": EVERY_STEP,
    "four ways, representation every 8th, kernel every 16th": SCHEDULE,
}


def name() -> str:
    return f"{NETWORK}, width {WIDTH}, {SIZE}x{SIZE}, batch {BATCH}, 1 thread"


def measure(device: torch.device, seconds: float, *, fewest: int = 9) -> dict:
    """Per method: seconds of the forward and of the whole step, and what they are over the plain
    ones of the same round: for each place in a period the median over rounds, of these the mean
    (``average``) and the largest (``fullest``)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        runs = {title: _run(options, device) for title, options in METHODS.items()}
        found = interleaved(runs, seconds, fewest=fewest)
    finally:
        torch.set_num_threads(threads)
    return {
        title: {
            what: {"seconds": _seconds(rounds, what), **_over(rounds, found[PLAIN], what)}
            for what in ("forward", "both")
        }
        for title, rounds in found.items()
    }


Rounds = list[list[Sample]]


def _seconds(rounds: Rounds, what: str) -> dict[str, float]:
    return quartiles([statistics.mean(getattr(s, what) for s in period) for period in rounds])


def _over(rounds: Rounds, plain: Rounds, what: str) -> dict[str, float]:
    places = [
        statistics.median(
            getattr(ours[place], what) - getattr(theirs[place], what)
            for ours, theirs in zip(rounds, plain, strict=True)
        )
        for place in range(PERIOD)
    ]
    ratio = statistics.median(
        sum(getattr(s, what) for s in ours) / sum(getattr(s, what) for s in theirs)
        for ours, theirs in zip(rounds, plain, strict=True)
    )
    return {"average": statistics.mean(places), "fullest": max(places), "ratio": ratio}


def _run(options: dict, device: torch.device) -> Callable[[int], list[Sample]]:
    """A period of training steps; the optimizer's counts as backward."""
    torch.manual_seed(0)
    x = torch.randn(BATCH, 3, SIZE, SIZE, device=device)
    y = torch.randint(CLASSES, (BATCH,), device=device)
    network = models.build(NETWORK, CLASSES, width=WIDTH, image_size=SIZE).to(device)
    objective = objectives.build("imcl", network, x, **options).to(device)
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.01, momentum=0.9)

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def step() -> Sample:
        wait()
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        loss = objective(x, y).loss
        middle = time.perf_counter()
        loss.backward()
        optimizer.step()
        wait()
        return Sample(middle - start, time.perf_counter() - middle)

    def run(_: int) -> list[Sample]:
        step()  # after another's turn the caches are cold
        return [step() for _ in range(PERIOD)]

    return run
