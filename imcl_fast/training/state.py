"""All that a training run carries from one step to the next, and so what a checkpoint holds."""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from .distributed import Processes


@dataclass
class EpochSums:
    """What this process has added up since the epoch began.

    Attributes:
        batches: number of batches the sums are over.
        names: of what is summed: the loss and its terms.
        totals: (n,) float64 on the device, where they are added up without waiting for it;
            None before the first batch. What is not finite stays so.
        seconds, data_seconds: wall time, and the part of it spent waiting for a batch.
    """

    batches: int = 0
    names: list[str] = field(default_factory=list)
    totals: Tensor | None = None
    seconds: float = 0.0
    data_seconds: float = 0.0

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Count one batch with these detached scalars."""
        stacked = torch.stack([value.float() for value in values.values()]).double()
        self.batches += 1
        self.names = list(values)
        self.totals = stacked if self.totals is None else self.totals + stacked

    def means(self, processes: Processes) -> dict[str, float]:
        """The mean of each over the batches of all processes, read on the host at once."""
        assert self.totals is not None
        batches = self.totals.new_tensor([self.batches])
        *totals, count = processes.sum(torch.cat([self.totals, batches])).tolist()
        return {name: total / count for name, total in zip(self.names, totals, strict=True)}


@dataclass
class TrainingState:
    """The parts that change while a run trains.

    Attributes:
        objective: the network in what it is trained with, auxiliary heads included.
        averaged: the moving average of the plain network, if there is one.
        epoch: finished epochs.
        step_in_epoch, step: optimizer steps done in this epoch and in the whole run.
        sums: of the epoch under way.
        rows: those of metrics.csv, one per finished epoch; what was not measured is missing.
    """

    objective: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler
    averaged: AveragedModel | None
    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0
    sums: EpochSums = field(default_factory=EpochSums)
    rows: list[dict[str, float]] = field(default_factory=list)

    def state_dict(self, processes: Processes) -> dict[str, Any]:
        """Tensors and plain values only; the same from every process."""
        own = {
            "random": random_state(processes.device),
            "sums": dict(vars(self.sums)),
        }
        return {
            "objective": self.objective.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "averaged": None if self.averaged is None else self.averaged.state_dict(),
            "position": {
                "epoch": self.epoch,
                "step_in_epoch": self.step_in_epoch,
                "step": self.step,
            },
            "rows": self.rows,
            "processes": processes.gather(own),
        }

    def load_state_dict(self, stored: Mapping[str, Any], processes: Processes) -> bool:
        """Become what was stored, and set the generators of this process.

        Returns:
            Whether the generators were those of as many processes on such a device; if not,
            they are left as they are, and the run goes on with other random numbers.
        """
        self.objective.load_state_dict(stored["objective"])
        self.optimizer.load_state_dict(stored["optimizer"])
        self.schedule.load_state_dict(stored["schedule"])
        self.scaler.load_state_dict(stored["scaler"])
        if self.averaged is not None:
            self.averaged.load_state_dict(stored["averaged"])
        for name, value in stored["position"].items():
            setattr(self, name, value)
        self.rows = list(stored["rows"])
        shares = stored["processes"]
        same = len(shares) == processes.world
        if same:
            self.sums = _sums(shares[processes.rank]["sums"], processes.device)
        else:
            self.sums = _joint_sums([share["sums"] for share in shares], processes)
        return same and set_random_state(shares[processes.rank]["random"], processes.device)


def random_state(device: torch.device) -> dict[str, Any]:
    """The states of this process's generators, as tensors and plain values."""
    state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if "numpy" in sys.modules:
        import numpy

        name, keys, *rest = cast(tuple, numpy.random.get_state())
        state["numpy"] = (name, keys.tolist(), *rest)
    if device.type != "cpu":
        state[device.type] = torch.get_device_module(device).get_rng_state(device)
    return state


def set_random_state(state: Mapping[str, Any], device: torch.device) -> bool:
    """Undo ``random_state``; False, and nothing done, if it was that of another device."""
    if device.type != "cpu" and device.type not in state:
        return False
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    if "numpy" in state:
        import numpy

        numpy.random.set_state(state["numpy"])
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(state[device.type], device)
    return True


def _sums(stored: Mapping[str, Any], device: torch.device) -> EpochSums:
    sums = EpochSums(**stored)
    if sums.totals is not None:
        sums.totals = sums.totals.to(device)
    return sums


def _joint_sums(shares: list[dict[str, Any]], processes: Processes) -> EpochSums:
    """The sums of other processes than these: their total counts, and the first takes it."""
    sums = _sums(shares[0], processes.device)
    if sums.totals is None:
        return sums
    if processes.first:
        sums.batches = sum(share["batches"] for share in shares)
        sums.totals = torch.stack([share["totals"].cpu() for share in shares]).sum(0)
        sums.totals = sums.totals.to(processes.device)
    else:
        sums.batches, sums.totals = 0, torch.zeros_like(sums.totals)
    return sums
