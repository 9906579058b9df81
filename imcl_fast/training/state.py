"""All that a training run carries from one step to the next, and so what a checkpoint holds."""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
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
        counts: the number of those with the same values, the loss and its terms, by their names:
            a way on a schedule has a term in some batches only.
        totals: by the same names their sums, (n,) float64 on the device, where they are added up
            without waiting for it. What is not finite stays so.
        seconds, data_seconds: wall time, and the part of it spent waiting for a batch.
    """

    batches: int = 0
    counts: dict[tuple[str, ...], int] = field(default_factory=dict)
    totals: dict[tuple[str, ...], Tensor] = field(default_factory=dict)
    seconds: float = 0.0
    data_seconds: float = 0.0

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Count one batch with these detached scalars."""
        names = tuple(values)
        stacked = torch.stack([value.float() for value in values.values()]).double()
        self.batches += 1
        self.counts[names] = self.counts.get(names, 0) + 1
        self.totals[names] = self.totals[names] + stacked if names in self.totals else stacked

    def means(self, processes: Processes) -> dict[str, float]:
        """The mean of each over those batches of all processes that have it, read on the host
        at once. All processes have the same values in the same order, being at the same place
        of a schedule."""
        totals = list(self.totals.values())
        counts = totals[0].new_tensor(list(self.counts.values()))
        numbers = iter(processes.sum(torch.cat([counts, *totals])).tolist())
        total, count = dict[str, float](), dict[str, float]()
        for names, batches in zip(self.totals, list(islice(numbers, len(counts))), strict=True):
            for name in names:
                total[name] = total.get(name, 0.0) + next(numbers)
                count[name] = count.get(name, 0.0) + batches
        return {name: total[name] / count[name] for name in total}


@dataclass
class TrainingState:
    """The parts that change while a run trains.

    Attributes:
        objective: the network in what it is trained with, auxiliary heads included.
        averaged: the moving average of the plain network, if there is one.
        epoch: finished epochs.
        step_in_epoch, step: optimizer steps done in this epoch and in the whole run.
        sums: of the epoch under way.
        latest: of each value in ``sums`` the latest one, detached scalars.
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
    latest: dict[str, Tensor] = field(default_factory=dict)
    rows: list[dict[str, float]] = field(default_factory=list)

    def state_dict(self, processes: Processes) -> dict[str, Any]:
        """Tensors and plain values only; the same from every process."""
        own = {
            "random": random_state(processes.device),
            "sums": dict(vars(self.sums)),
            "latest": self.latest,
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
        self.latest = {}
        if same:
            own = shares[processes.rank]
            self.sums = _sums(own["sums"], processes.device)
            for name, value in own.get("latest", {}).items():
                self.latest[name] = value.to(processes.device)
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
    if state.keys() - {"python", "torch", "numpy"} != {device.type} - {"cpu"}:
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
    stored = dict(stored)
    if "names" in stored:  # by a version whose batches all had the same values
        names, totals = tuple(stored.pop("names")), stored["totals"]
        stored["counts"] = {names: stored["batches"]} if names else {}
        stored["totals"] = {names: totals} if names else {}
    stored["counts"] = dict(stored["counts"])
    stored["totals"] = {names: total.to(device) for names, total in stored["totals"].items()}
    return EpochSums(**stored)


def _joint_sums(shares: list[dict[str, Any]], processes: Processes) -> EpochSums:
    """The sums of other processes than these: their total counts, and the first takes it."""
    all_sums = [_sums(share, processes.device) for share in shares]
    sums = all_sums[0]
    for other in all_sums[1:]:  # of as many batches, each a share of one
        for names, total in other.totals.items():
            sums.counts[names] += other.counts[names]
            sums.totals[names] = sums.totals[names] + total
    if not processes.first:
        sums.counts = dict.fromkeys(sums.counts, 0)
        sums.totals = {names: torch.zeros_like(total) for names, total in sums.totals.items()}
    return sums
