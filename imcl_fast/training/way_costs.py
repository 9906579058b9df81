"""What each way costs per training step, measured by leaving it out."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..modes import evaluating

MOST_ROUNDS = 10
FEWEST_ROUNDS = 3


def way_seconds(
    network: nn.Module,
    build: Callable[[nn.Module, str | None], nn.Module],
    ways: Sequence[str],
    step: Callable[[nn.Module, Tensor, Tensor], object],
    images: Tensor,
    labels: Tensor,
    *,
    allowed: float,
) -> dict[str, float] | None:
    """Seconds of forward and backward that each way adds to those of all together.

    The variants take turns, round by round, on copies of the network, so that a machine
    that slows down slows all of them; the difference of medians is given, which can be
    negative where a way costs less than the noise of the measurement.

    Args:
        build: makes an objective of a network, without one way (or None).
        step: runs an objective forward and backward.
        images, labels: a training batch.
        allowed: seconds that all of it may take, about.

    Returns:
        By way; None if ``allowed`` is too little for three rounds.
    """
    with evaluating(network), torch.no_grad():
        network(images[:1])  # a weight made anew in each run, as if pruned, can now be copied
    variants = {name: build(copy.deepcopy(network), name) for name in (None, *ways)}
    seconds: dict[str | None, list[float]] = {name: [] for name in variants}
    start = time.perf_counter()
    for objective in variants.values():
        step(objective, images, labels)  # the first call of each allocates
    rounds = int(allowed / max(time.perf_counter() - start, 1e-9)) - 1
    if rounds < FEWEST_ROUNDS:
        return None
    for _ in range(min(rounds, MOST_ROUNDS)):
        for name, objective in variants.items():
            _finish(images.device)
            start = time.perf_counter()
            step(objective, images, labels)
            _finish(images.device)
            seconds[name].append(time.perf_counter() - start)
    whole = statistics.median(seconds[None])
    return {way: whole - statistics.median(seconds[way]) for way in ways}


def _finish(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
