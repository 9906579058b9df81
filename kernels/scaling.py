"""Gradients multiplied where they lie by a number on the device, and left alone where it is 1.

That is what ``loss.backward()`` hands on. PyTorch's multiplication, which can't look at the number
without waiting for the device, reads and writes the gradient all the same.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import LARGE_GRADIENT, processors_of
from .constants import Constants
from .launch import Launch
from .numerics import rounded
from .plan import Layout, layout

_BLOCK, _PROGRAMS = 2048, 8  # elements at a time; programs of a processor


@dataclass(frozen=True, eq=False)
class _ScalingConstants(Constants):
    block: Any


_CONSTANTS = _ScalingConstants.of(block=_BLOCK)


def scale_(gradient: Tensor, scale: Tensor) -> Tensor:
    """``gradient.mul_(scale)``. A small gradient is left to PyTorch, whose launch is quicker."""
    large = gradient.numel() >= LARGE_GRADIENT
    if not large or scale.numel() != 1 or not gradient.is_contiguous():
        return gradient.mul_(scale)
    count, scale = gradient.numel(), scale.resolve_neg()
    _launch(layout((gradient, scale)), count, gradient.device)(gradient, scale, count)
    return gradient


@functools.lru_cache(maxsize=256)
def _launch(_: Layout, count: int, device: torch.device) -> Launch:
    programs = min(_PROGRAMS * processors_of(device), -(-count // _BLOCK))
    return Launch(_scale_kernel, programs, device, C=_CONSTANTS)


@triton.jit
def _scale_kernel(gradient, scale, count, C: tl.constexpr):
    factor = tl.load(scale)
    if factor != 1.0:
        apart = tl.num_programs(0).to(tl.int64) * C.block
        for first in range(tl.program_id(0).to(tl.int64) * C.block, count, apart):
            i = first + tl.arange(0, C.block)
            x = tl.load(gradient + i, mask=i < count, other=0.0)
            x = rounded(x.to(factor.dtype) * factor, gradient.dtype.element_ty)
            tl.store(gradient + i, x, mask=i < count)
