"""Notices an optimizer that lacks the auxiliary heads, which then never move."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor

MOVES = 3  # of the network, before it is sure that the heads stay
PATIENCE = 100  # calls without one after which nothing more is looked for


class HeadsMove:
    """Whether the heads are trained with the network, seen by what the optimizer writes to.

    Each change of a tensor in place counts up its version, on the host; but for that of an
    optimizer's fused step, which is seen by the gradients that it clears for the next: those of the
    network, and not the heads'. So before anything is said some numbers are looked at.
    """

    def __init__(self) -> None:
        self.seen: int | None = None  # of the network, in the call before
        self.heads = 0  # at the first call
        self.numbers: tuple[Tensor, Tensor] | None = None  # some of a head, and what they were
        self.calls = self.moves = 0
        self.done = False

    def passes_over(self, model: Iterable[Tensor]) -> None:
        """What has changed the network since the last call was no optimizer."""
        if self.seen is not None:
            self.seen = _version(model)

    def look(self, model: Iterable[Tensor], heads: Iterable[Tensor]) -> None:
        """To be called in each training call, before the optimizer's step."""
        model, heads = ([p for p in each if p.requires_grad] for each in (model, heads))
        if torch._C._are_functorch_transforms_active() or not all(p.is_leaf for p in heads):
            return  # the weights of a functional call, which are no optimizer's
        if any(hasattr(p, "full_tensor") for p in [*model, *heads]):
            self.done = True  # FSDP2 writes to what it gathers, and the optimizer to shards
        moved = sum(p._version for p in heads)
        if self.seen is None:
            self.heads, self.done = moved, not heads
            if heads:
                smallest = min(heads, key=Tensor.numel)
                self.numbers = smallest, smallest.detach().clone()
        self.calls += 1
        if moved != self.heads or self.calls > PATIENCE:
            self.done = True
        if self.done:
            self.numbers = None
            return
        version = _version(model)
        written = self.seen is not None and version != self.seen
        cleared = bool(model) and _have_gradients(heads) and not _have_gradients(model)
        if written or cleared:
            self.moves += 1
            self.calls = 0
        self.seen = version
        if self.moves == MOVES:
            self.done = True
            numbers, self.numbers = self.numbers, None
            if numbers is not None and not torch.equal(*numbers):
                return
            warnings.warn(
                f"IMCL: the network has been trained for {MOVES} steps and the auxiliary heads "
                "have not, so they teach what they were drawn as: the optimizer lacks them. Build "
                "it of imcl.parameters(), or add imcl.heads.parameters() to it (load_state_dict "
                "between the steps looks the same)",
                stacklevel=6,  # where the IMCL is called
            )


def _version(model: Iterable[Tensor]) -> int:
    return max((p._version for p in model if p.requires_grad), default=0)


def _have_gradients(parameters: Iterable[Tensor]) -> bool:
    return any(p.grad is not None for p in parameters)
