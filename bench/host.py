"""What IMCL costs on the host: Python, dispatch and autograd, with next to nothing to compute.

On a GPU this is what a small batch waits for, and on a CPU what a narrow network pays.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

from .step import FUSED, MAIN, PLAIN, SCHEDULED, Step, training
from .timing import Sample, interleaved, quartiles

STEP = Step("resnet18", 2, width=4, size=8)
PERIOD = 16  # calls of every competitor in a round, those of the schedule's period
SCHEDULE = "four ways, representation every 8th, kernel every 16th"
ONE_AND_TWO = "ways 1 and 2, torch"  # which a schedule leaves in every step
METHODS = {
    PLAIN: MAIN[PLAIN],
    "four ways, every step": MAIN[FUSED],
    SCHEDULE: MAIN[SCHEDULED],
    ONE_AND_TWO: {"method": "imcl", "ways": ("output", "multilayer"), "impl": "torch"},
}


def name() -> str:
    return f"{STEP.name}, 1 thread"


def measure(device: torch.device, seconds: float, *, fewest: int = 9) -> dict:
    """Per method: seconds of the forward and of the whole step, and what they are over the plain
    ones of the same round: for each place in a period the median over rounds, of these the mean
    (``average``), the largest (``fullest``) and the smallest (``least``)."""
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
    return {
        "average": statistics.mean(places),
        "fullest": max(places),
        "least": min(places),
        "ratio": ratio,
    }


def _run(options: dict, device: torch.device) -> Callable[[int], list[Sample]]:
    """A period of training steps."""
    step, _ = training(STEP, options, device)

    def run(_: int) -> list[Sample]:
        step(0)  # after another's turn the caches are cold
        return [step(0) for _ in range(PERIOD)]

    return run
