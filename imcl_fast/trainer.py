"""A small training loop: any classifier, plain or in an ``IMCL``, on images in memory."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import implementations
from .data import Dataset, random_shift
from .imcl import IMCL


class Progress(NamedTuple):
    """Where a training run stands after a step."""

    epoch: int  # from 1
    step: int  # from 1, over the whole run
    steps: int
    loss: Tensor  # detached scalar


@dataclass(frozen=True)
class FitResult:
    """What a training run gave.

    Attributes:
        test_accuracy: share of the test images classified correctly, after the last step.
        seconds_per_step: median time of forward, backward and optimizer step.
        terms: mean over the last epoch's steps of each term of the loss, unweighted.
        implementation: which implementation of the fused losses ran; None without ``IMCL``.
    """

    test_accuracy: float
    seconds_per_step: float
    terms: dict[str, float]
    implementation: str | None


def fit(
    network: nn.Module,
    dataset: Dataset,
    *,
    epochs: int,
    batch_size: int = 64,
    lr: float = 0.05,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    shift: int = 0,
    seed: int = 0,
    progress: Callable[[Progress], None] | None = None,
) -> FitResult:
    """Train by SGD with Nesterov momentum and a one-cycle schedule (arXiv 1708.07120).

    Args:
        network: an ``IMCL``, trained with its objective, or any classifier, trained with
            cross entropy. On the device of ``dataset``.
        dataset: images and labels in memory.
        epochs: at least 1. The last batch of an epoch may be smaller.
        lr: the schedule's peak.
        weight_decay: not applied to biases and normalisation parameters.
        shift: augmentation; images are shifted at random by up to so many pixels.
        seed: of the order and the shifts of the images, the same for every network, and of
            what is random in ``network``. torch's global generator is left as it was.
        progress: called after every step.

    Raises:
        ValueError: ``epochs`` or ``batch_size`` is less than 1.
    """
    for name, value in (("epochs", epochs), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    device = dataset.train_images.device
    steps = epochs * math.ceil(len(dataset.train_labels) / batch_size)
    optimizer = torch.optim.SGD(
        parameter_groups(network, weight_decay), lr=lr, momentum=momentum, nesterov=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    seconds: list[float] = []
    terms: list[dict[str, Tensor]] = []
    training = network.training
    network.train()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for epoch in range(1, epochs + 1):
            terms.clear()
            for images, labels in batches(dataset, batch_size, shift, generator):
                start = time.perf_counter()
                optimizer.zero_grad(set_to_none=True)
                loss, step_terms = objective(network, images, labels)
                loss.backward()
                optimizer.step()
                schedule.step()
                seconds.append(time.perf_counter() - start)
                terms.append(step_terms)
                if progress is not None:
                    progress(Progress(epoch, len(seconds), steps, loss.detach()))
    network.train(training)
    return FitResult(
        test_accuracy=accuracy(network, dataset.test_images, dataset.test_labels),
        seconds_per_step=statistics.median(seconds),
        terms={key: float(torch.stack([t[key] for t in terms]).mean()) for key in terms[0]},
        implementation=(
            implementations.choose(network.impl, device) if isinstance(network, IMCL) else None
        ),
    )


def objective(
    network: nn.Module, images: Tensor, labels: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of one batch and its detached terms."""
    if isinstance(network, IMCL):
        output = network(images, labels)
        return output.loss, output.terms
    loss = F.cross_entropy(network(images), labels)
    return loss, {"cross_entropy": loss.detach()}


def accuracy(
    network: nn.Module, images: Tensor, labels: Tensor, *, batch_size: int = 512
) -> float:
    """Share of images classified correctly, in eval mode."""
    training = network.training
    network.eval()
    with torch.no_grad():
        correct = sum(
            (network(x).argmax(1) == y).sum()
            for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True)
        )
    network.train(training)
    return int(correct) / len(labels)


def parameter_groups(network: nn.Module, weight_decay: float) -> list[dict]:
    """Optimizer groups: weights with decay; biases and normalisation parameters without."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]


def batches(
    dataset: Dataset, batch_size: int, shift: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of training batches, order and shifts drawn from ``generator``."""
    order = torch.randperm(len(dataset.train_labels), generator=generator)
    for index in order.to(dataset.train_labels.device).split(batch_size):
        images = dataset.train_images[index]
        if shift:
            images = random_shift(images, shift, generator)
        yield images, dataset.train_labels[index]
