"""The optimizer, and what changes from step to step: the learning rate, the ways' weights."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.optim import lr_scheduler

from ..imcl import IMCL, WEIGHTS
from ..quality_agnostic import QualityAgnostic
from ..runs.config import TrainConfig


def parameter_groups(network: nn.Module, weight_decay: float) -> list[dict]:
    """Optimizer groups: weights with decay; biases and normalisation parameters without."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]


def build_optimizer(network: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum, or AdamW (arXiv 1711.05101)."""
    groups = parameter_groups(network, config.weight_decay)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=(config.momentum, 0.999))
    return torch.optim.SGD(
        groups, lr=config.lr, momentum=config.momentum, nesterov=config.momentum > 0
    )


def build_schedule(
    optimizer: torch.optim.Optimizer, config: TrainConfig, steps_per_epoch: int
) -> lr_scheduler.LRScheduler:
    """The schedule, to be stepped after every optimizer step.

    "onecycle" is that of arXiv 1708.07120 and moves the momentum too, by up to 0.05 around
    ``config.momentum``; the others multiply ``config.lr`` by a factor of the step alone.
    """
    steps = config.epochs * steps_per_epoch
    warmup = round(config.warmup_epochs * steps_per_epoch)
    if config.schedule == "onecycle":
        # It divides by the number of steps between its turning points, the highest of which is
        # after pct_start * total - 1 steps: neither on the first step nor on the last.
        total = max(steps, 2)
        # As far as torch's own bounds are from 0.9.
        swing = min(0.05, config.momentum / 2, (1 - config.momentum) / 2)
        return lr_scheduler.OneCycleLR(
            optimizer,
            max_lr=config.lr,
            total_steps=total,
            pct_start=min(max(warmup, 1.5), total - 0.5) / total if warmup else 0.3,
            cycle_momentum=config.momentum > 0,
            base_momentum=round(config.momentum - swing, 12),
            max_momentum=round(config.momentum + swing, 12),
        )

    def factor(step: int) -> float:
        if step < warmup:
            return _risen(step, warmup)
        done = (step - warmup) / max(steps - warmup, 1)
        if config.schedule == "cosine":
            return (1 + math.cos(math.pi * min(done, 1))) / 2
        if config.schedule == "step":
            return 0.01 if done >= 0.75 else 0.1 if done >= 0.5 else 1.0
        return 1.0

    return lr_scheduler.LambdaLR(optimizer, factor)


def go_on(optimizer: torch.optim.Optimizer, schedule: lr_scheduler.LRScheduler) -> float:
    """Take the learning rate from a schedule whose state is that of one for fewer steps.

    Returns:
        The learning rate of the next step.

    Raises:
        ValueError: it is "onecycle", which ends with its steps.
    """
    if not isinstance(schedule, lr_scheduler.LambdaLR):
        raise ValueError(
            "epochs: expected no more than the run had, whose schedule onecycle ends with its "
            "last step; train in another folder"
        )
    rates = [
        float(base) * factor(schedule.last_epoch)
        for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    ]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule._last_lr = list(rates)
    return rates[0]


class WaysWarmup:
    """Lets the weights of an ``IMCL``'s ways rise linearly to what they are now.

    They are a function of the step alone, so that there is nothing to save. They are never
    0, for then the ways' terms would be missing from a step's output.

    Args:
        objective: an ``IMCL`` or what has one; one without ways is left as it is.
        steps: that the rise takes; with 0 the weights stay as they are.
    """

    def __init__(self, objective: nn.Module, steps: int) -> None:
        found = objective.ways if isinstance(objective, QualityAgnostic) else objective
        self._objective, self._steps = found, steps
        ways = WEIGHTS if isinstance(found, IMCL) else ()
        self._full = {name: getattr(found, name) for name in ways}

    def before(self, step: int) -> None:
        """Set the weights for a step, counted from 0."""
        share = _risen(step, self._steps)
        for name, weight in self._full.items():
            setattr(self._objective, name, share * weight)


def _risen(step: int, steps: int) -> float:
    """The height, at most 1, of a linear rise that takes ``steps`` steps."""
    return min((step + 1) / (steps + 1), 1.0)
