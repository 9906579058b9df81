"""The processes of a run: one alone, or those that torchrun starts."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..runs.errors import TrainingError, UsageError

T = TypeVar("T")

THREADS_END = 0.1  # seconds


class Processes:
    """This process among those of the run; alone, every exchange is with itself.

    Attributes:
        rank, world: this process's number and how many there are.
        device: the device of this process.
    """

    def __init__(self, rank: int, world: int, device: torch.device) -> None:
        self.rank, self.world, self.device = rank, world, device
        self._agreed: tuple[Tensor, Any] | None = None
        self._parallel: Any = None

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def wrap(self, objective: nn.Module) -> nn.Module:
        """``objective`` with gradients averaged over the processes."""
        if self.world == 1:
            return objective
        devices = [self.device.index] if self.device.type == "cuda" else None
        self._parallel = DistributedDataParallel(objective, device_ids=devices)
        return self._parallel

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes of ``values``, which is left as it was."""
        if self.world > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def gather(self, value: T) -> list[T]:
        """What each process passes in, by rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def on_first(self, task: Callable[[], T]) -> T:
        """What ``task`` returns in the first process, which alone runs it.

        Raises:
            TrainingError: it raised there, in every process.
        """
        if self.world == 1:
            return task()
        outcome: list[Any] = [None, None]
        if self.first:
            try:
                outcome[0] = task()
            except TrainingError as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, 0)
        if outcome[1] is not None:
            outcome[1].told = not self.first
            raise outcome[1]
        return outcome[0]

    def agree_on_buffers(self, module: nn.Module) -> None:
        """Give every process the first one's buffers, such as running statistics."""
        if self.world > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, 0)

    def agree(self, *wishes: int) -> list[int]:
        """The largest of every process's wish, by what was known one call earlier.

        A step never waits for it: the exchange runs on the host, over gloo, while the step
        computes. Every process gets the same answers from its n-th call.
        """
        if self.world == 1:
            return list(wishes)
        previous = self._agreed
        flags = torch.tensor(wishes)  # on the CPU, whose part of the process group is gloo
        self._agreed = (flags, dist.all_reduce(flags, dist.ReduceOp.MAX, async_op=True))
        if previous is None:
            return [0] * len(wishes)
        answers, work = previous
        work.wait()
        return answers.tolist()

    def settle(self) -> None:
        """Finish the last ``agree`` that is under way."""
        if self._agreed is not None:
            self._agreed[1].wait()
            self._agreed = None

    def release(self) -> None:
        """Let go of the process group, before it is destroyed.

        Were its last reference that of the wrapped objective's reducer, the group's destructor
        would wait for gloo's threads without releasing Python's lock, which they may need to
        end: https://github.com/pytorch/pytorch/issues/56297.
        """
        if self._parallel is not None:
            del self._parallel.reducer, self._parallel.logger
            self._parallel = None
        # What the last exchange has used gloo's threads free after it, and need the lock.
        # One that still waits for it when the interpreter ends aborts the process, and they live
        # until then, for PyTorch keeps the group once a network was wrapped.
        time.sleep(THREADS_END)


@contextlib.contextmanager
def joined(device: str) -> Iterator[Processes]:
    """The processes of this run, for as long as the context lasts.

    Args:
        device: such as "cpu" or "cuda"; "auto" takes an accelerator if there is one.

    Raises:
        UsageError: the device isn't there, or the environment variables aren't torchrun's.
    """
    world = _variable("WORLD_SIZE", 1, low=1)
    place = choose_device(device, _variable("LOCAL_RANK", 0), world)
    if world == 1:
        yield Processes(0, 1, place)
        return
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if (rank := _variable("RANK", 0)) >= world:  # which would wait for the others for long
        raise UsageError(f"RANK: expected less than WORLD_SIZE ({world}), got {rank}; unset both")
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo")
    except (RuntimeError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise UsageError(
            f"WORLD_SIZE: {world} processes of one run can't find each other ({reason}); start "
            "them with torchrun, or unset it"
        ) from error
    processes = Processes(dist.get_rank(), world, place)
    try:
        yield processes
    finally:
        processes.release()
        dist.destroy_process_group()


def _variable(name: str, default: int, low: int = 0) -> int:
    """A number that torchrun sets in the environment."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal() or int(text) < low:
        raise UsageError(
            f"{name}: expected the number, at least {low}, that torchrun sets, got {text!r}; unset "
            "it"
        )
    return int(text)


def choose_device(name: str, local_rank: int, world: int) -> torch.device:
    """The device called ``name``; of several processes on a GPU machine each gets its own.

    Raises:
        UsageError: it isn't there.
    """
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        name = "cpu" if accelerator is None else accelerator.type
    try:
        device = torch.device(name)
        if device.type != "cpu" and world > 1:
            device = torch.device(device.type, local_rank)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).split("\n")[0]
        raise UsageError(f"device: expected one that is there, got {name!r} ({reason})") from error
    return device
