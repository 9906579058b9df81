"""Kernel similarity shared out to the processes of data-parallel training.

Every process has the same weights, so the penalty need be computed once, not once per
process. The processes' gradients are averaged anyway: if each computes the share of some
layers, times the number of processes, the average is the whole, without communication.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from torch import Tensor, distributed, nn

from . import kernel_choice, kernel_weights


@dataclass(frozen=True)
class KernelShare:
    """The layers of one process, and what their mean similarity is to be multiplied with.

    Attributes:
        kernels: paths of the modules; may be none.
        roles: of those whose rows have several, how many.
        scale: W n / L, for n of L layers and W processes, so that the mean over processes
            is the mean over all layers; each role counts as one.
        place: the process's rank, and how many there are; None if nothing is shared out.
    """

    kernels: tuple[str, ...]
    roles: dict[str, int]
    scale: float
    place: tuple[int, int] | None = None

    @classmethod
    def of(cls, kernels: Sequence[str], model: nn.Module, shard: bool) -> KernelShare:
        """This process's share of ``kernels``; all of them if ``shard`` is False.

        Raises:
            RuntimeError: ``shard`` without an initialised ``torch.distributed``.
        """
        counts = {kernel: kernel_choice.roles(model, kernel) for kernel in kernels}
        roles = {kernel: count for kernel, count in counts.items() if count > 1}
        if not shard or not kernels:
            return cls(tuple(kernels), roles, 1.0)
        if not initialised():
            raise RuntimeError(
                "shard_kernels: expected torch.distributed to be initialised; call "
                "torch.distributed.init_process_group first, or pass shard_kernels=False"
            )
        shapes = {
            kernel: cast(Tensor, getattr(*kernel_weights.locate(model, kernel))).shape
            for kernel in kernels
        }
        # N rows of D columns: each of the two passes takes N^2 D multiplications.
        costs = [
            shape[0] * shape.numel() // counts[kernel] for kernel, shape in shapes.items()
        ]
        world = distributed.get_world_size()
        mine = [kernels[i] for i in balance(costs, world)[distributed.get_rank()]]
        share = sum(counts[kernel] for kernel in mine) / sum(counts.values())
        return cls(tuple(mine), roles, world * share, place())


def balance(costs: Sequence[int], parts: int) -> list[list[int]]:
    """Indices of ``costs`` in ``parts`` lists of about equal sums, the same on every machine.

    The largest that is left goes to the list with the smallest sum (Graham 1969), which
    is at most 4/3 times the best possible.
    """
    shares: list[list[int]] = [[] for _ in range(parts)]
    sums = [0] * parts
    for index in sorted(range(len(costs)), key=lambda i: -costs[i]):
        least = sums.index(min(sums))
        shares[least].append(index)
        sums[least] += costs[index]
    return shares


def initialised() -> bool:
    """Whether ``torch.distributed`` is, be it of one process."""
    return distributed.is_available() and distributed.is_initialized()


def place() -> tuple[int, int] | None:
    """This process's rank and the number of processes; None without ``torch.distributed``."""
    return (distributed.get_rank(), distributed.get_world_size()) if initialised() else None


def world_size() -> int:
    """Number of processes that train together; 1 without ``torch.distributed``."""
    return distributed.get_world_size() if initialised() else 1
