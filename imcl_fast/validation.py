"""Checks of what a user passes in; every message names the argument and what to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def tensors(name: str, value: Any, rank: str, allowed: range) -> list[Tensor]:
    """``value``, a tensor or a sequence of them, as a non-empty list on one device."""
    items = [value] if isinstance(value, Tensor) else value
    if not isinstance(items, Sequence) or isinstance(items, (str, bytes)):
        raise TypeError(
            f"{name}: expected a Tensor or a sequence of Tensors, got {type(value).__name__}"
        )
    if len(items) == 0:
        raise ValueError(f"{name}: expected at least one Tensor, got an empty sequence")
    for i, x in enumerate(items):
        if (
            isinstance(x, Tensor)
            and x.dtype in FLOATS
            and x.layout is torch.strided
            and x.dim() in allowed
            and x.device == items[0].device
        ):
            continue
        label = name if isinstance(value, Tensor) else f"{name}[{i}]"
        if not isinstance(x, Tensor):
            raise TypeError(f"{label}: expected a Tensor, got {type(x).__name__}")
        if x.dtype not in FLOATS:
            raise TypeError(
                f"{label}: expected float16, bfloat16, float32 or float64, got {x.dtype}; "
                "convert it with .float()"
            )
        if x.layout != torch.strided:
            raise TypeError(f"{label}: expected a dense (strided) Tensor, got {x.layout}")
        if x.dim() not in allowed:
            raise ValueError(f"{label}: expected {rank}, got shape {tuple(x.shape)}")
        raise ValueError(
            f"{label}: expected all tensors on one device ({items[0].device}, as {name}[0]), "
            f"got {x.device}"
        )
    return list(items)


def choice(name: str, value: Any, allowed: Sequence[str]) -> int:
    """The index of ``value`` in ``allowed``."""
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected a str, got {type(value).__name__}")
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")
    return list(allowed).index(value)


def number(name: str, value: Any, *, low: float, high: float, open_low: bool = False) -> float:
    """``value`` as a finite float in [low, high), or (low, high) if ``open_low``."""
    if type(value) is float and low < value < high:
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    inside = value < high and (value > low if open_low else value >= low)
    if not inside:  # also true of NaN
        bracket = "(" if open_low else "["
        raise ValueError(f"{name}: expected a number in {bracket}{low:g}, {high:g}), got {value}")
    return float(value)


def boolean(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")
    return value


def integer(name: str, value: Any, low: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {value!r} ({type(value).__name__})")
    if low is not None and value < low:
        raise ValueError(f"{name}: expected an int of at least {low}, got {value}")
    return value


def partition(name: str, value: Any, total: int) -> list[int]:
    """``value`` as positive sizes that sum to ``total``."""
    if isinstance(value, (str, Tensor)) or not isinstance(value, Sequence):
        raise TypeError(f"{name}: expected a sequence of ints, got {type(value).__name__}")
    sizes = [integer(name, size) for size in value]
    if any(size < 1 for size in sizes) or sum(sizes) != total:
        raise ValueError(
            f"{name}: expected positive sizes that sum to the {total} heads of logits, got {sizes}"
        )
    return sizes


def per(name: str, value: Any, count: int, what: str) -> list[Any]:
    """``value`` repeated for each of ``count`` things, or the sequence of one for each."""
    if isinstance(value, (str, bool, int, float)):
        return [value] * count
    if isinstance(value, Tensor) or not isinstance(value, Sequence):
        raise TypeError(
            f"{name}: expected one value or a sequence of one per {what}, "
            f"got {type(value).__name__}"
        )
    if len(value) != count:
        raise ValueError(f"{name}: expected {count} values, one per {what}, got {len(value)}")
    return list(value)


def rows(name: str, xs: Sequence[Tensor], dim: int, kind: str) -> None:
    """At least two rows in every matrix: a penalty between pairs needs a pair."""
    for i, x in enumerate(xs):
        if x.shape[dim] < 2:
            raise ValueError(
                f"{name}[{i}]: expected at least 2 {kind} (dimension {dim}), "
                f"got shape {tuple(x.shape)}"
            )


def target(value: Any, logits: Sequence[Tensor], ignore_index: int) -> None:
    """Class indices (B,), int64, in [0, K) or ``ignore_index``, on the logits' device."""
    if value is None:
        return
    batch, classes = logits[0].shape[-2:]
    if not isinstance(value, Tensor):
        raise TypeError(f"target: expected a Tensor or None, got {type(value).__name__}")
    if value.dtype != torch.int64:
        raise TypeError(
            f"target: expected class indices of dtype torch.int64, got {value.dtype}; "
            "convert them with .long()"
        )
    if tuple(value.shape) != (batch,):
        raise ValueError(
            f"target: expected shape ({batch},), one class per row of the logits, "
            f"got {tuple(value.shape)}"
        )
    if value.device != logits[0].device:
        raise ValueError(
            f"target: expected a Tensor on {logits[0].device}, as the logits, got {value.device}"
        )
    # On other devices the check would have to wait for the device; kernels answer
    # with a NaN loss there instead.
    if value.device.type != "cpu" or torch.compiler.is_compiling() or batch == 0:
        return
    low, high = torch.aminmax(value)
    if low.item() >= 0 and high.item() < classes:
        return
    outside = ((value < 0) | (value >= classes)) & (value != ignore_index)
    if outside.any():
        raise ValueError(
            f"target: expected classes in [0, {classes}) or ignore_index={ignore_index}, "
            f"got {int(value[outside][0])}"
        )
