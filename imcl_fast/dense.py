"""Dense and token outputs: which dimension of logits holds the classes, told by the target.

Beside (B, K) and (h, B, K), logits may be (B, K, *spatial), as PyTorch has them, or
(B, *tokens, K), and either with heads in front. All become views (h, B, *samples, K).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

RANKS = "(B, K), (h, B, K), or dense: (B, K, *spatial) or (B, *tokens, K)"


def samples(stack: Tensor) -> torch.Size:
    """The sizes of the samples of logits (B, K) or (h, *samples, K)."""
    return stack.shape[:-1] if stack.dim() == 2 else stack.shape[1:-1]


def classes_last(
    stacks: list[Tensor], target: Any, class_dim: int | None, stacked: bool
) -> tuple[list[Tensor], Any]:
    """Logits, and probabilities, with the classes in their last dimension; no data is moved.

    What is not dense stays as it is, also what is wrong with a target that it may be.

    Args:
        stacked: whether ``stacks`` was given as one Tensor. Without a target that has the heads in
            front, and of a sequence the entries of fewest dimensions have none.
    """
    check_class_dim(class_dim)
    stacks, target = _classes_last(stacks, target, class_dim, stacked)
    expected = (*samples(stacks[0]), stacks[0].shape[-1])
    for i, stack in enumerate(stacks):
        if (*samples(stack), stack.shape[-1]) != expected:
            raise ValueError(
                f"logits[{i}]: expected {expected} in its last dimensions, as logits[0], got shape "
                f"{tuple(stack.shape)}"
            )
    return stacks, target


def check_class_dim(value: Any) -> None:
    """Raises a ValueError unless it is 1, -1 or None."""
    if value not in (None, 1, -1) or isinstance(value, bool):
        raise ValueError(f"class_dim: expected 1, -1 or None, got {value!r}")


def _classes_last(
    stacks: list[Tensor], target: Any, class_dim: int | None, stacked: bool
) -> tuple[list[Tensor], Any]:
    if not isinstance(target, Tensor):
        if class_dim is None:
            _plain(stacks, "without a target; say where the classes are by class_dim")
            return stacks, target
        axes = min(stack.dim() for stack in stacks) - (2 if stacked else 1)
        if class_dim == 1 and stacked and axes < 2:
            raise ValueError(
                "logits: expected heads in front, (h, B, K, *spatial), or a sequence of them, with "
                f"class_dim=1 and no target, got shape {tuple(stacks[0].shape)}"
            )
    else:
        axes = target.dim() - target.is_floating_point()
    if axes < 2 or any(stack.dim() not in (axes + 1, axes + 2) for stack in stacks):
        _plain(stacks, "with such a target" if isinstance(target, Tensor) else "of several ranks")
        return stacks, target
    shapes = [stack.shape[-axes - 1 :] for stack in stacks]  # without heads
    for i, shape in enumerate(shapes):
        if shape != shapes[0] and len(shape) > 3:
            raise ValueError(
                f"logits[{i}]: expected {tuple(shapes[0])}, as logits[0], got shape {tuple(shape)}"
            )
    if isinstance(target, Tensor):
        class_dim = _told(shapes, target, class_dim)
        if class_dim is None:
            _plain(stacks, f"with a target of shape {tuple(target.shape)}")
            return stacks, target
    stacks = [stack if stack.dim() == axes + 2 else stack.unsqueeze(0) for stack in stacks]
    if class_dim == -1:
        return stacks, target
    if isinstance(target, Tensor) and target.is_floating_point():
        target = target.movedim(1, -1)
    return [stack.movedim(2, -1) for stack in stacks], target


def _told(shapes: Sequence[torch.Size], target: Tensor, class_dim: int | None) -> int | None:
    """Where the classes are, None if the target fits neither."""
    if target.is_floating_point():
        if any(shape != target.shape for shape in shapes):
            return None
        if class_dim is None and target.dim() == 3:
            raise ValueError(
                f"class_dim: expected 1 for logits and probabilities (B, K, T), -1 for (B, T, K), "
                f"which shape {tuple(target.shape)} doesn't tell, got None"
            )
        return class_dim or 1
    fits = {
        1: all((shape[:1] + shape[2:]) == target.shape for shape in shapes),
        -1: all(shape[:-1] == target.shape for shape in shapes),
    }
    if class_dim is not None:
        return class_dim if fits[class_dim] else None
    if fits[1] and fits[-1]:
        raise ValueError(
            f"class_dim: expected 1 for logits (B, K, *spatial), -1 for (B, *tokens, K), which "
            f"logits {tuple(shapes[0])} and a target {tuple(target.shape)} don't tell, got None"
        )
    return 1 if fits[1] else -1 if fits[-1] else None


def _plain(stacks: Sequence[Tensor], why: str) -> None:
    for i, stack in enumerate(stacks):
        if stack.dim() > 3:
            raise ValueError(
                f"logits: expected (B, K) or (h, B, K) {why}; or (B, K, *spatial) with a target "
                f"(B, *spatial), or (B, *tokens, K) with one of (B, *tokens); got shape "
                f"{tuple(stack.shape)}{f' at {i}' if i else ''}"
            )
