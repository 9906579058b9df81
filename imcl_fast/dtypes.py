"""The dtypes that follow from an operation's inputs."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def accumulation(dtype: torch.dtype) -> torch.dtype:
    """What sums, losses and states are made in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def widest(xs: Iterable[Tensor]) -> torch.dtype:
    """The accumulation dtype of inputs whose dtypes may differ."""
    return torch.float64 if any(x.dtype == torch.float64 for x in xs) else torch.float32


def kept(logits: torch.dtype) -> torch.dtype:
    """What a gradient of logits is kept in until its factor is known: their own, but that of
    float16 would underflow where a scaled loss is all that keeps it from doing so."""
    return torch.float32 if logits == torch.float16 else logits
