"""The auxiliary classifiers of multi-layer consistency, on the features of inner layers.

All take features (B, C, *positions) and a mask (B, 1, *positions), False where a position is
padding, or None. The output of dense ones is (B, K, *positions), at the layer's own resolution.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from . import padding
from .layers import Trace

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}  # by spatial dimensions


def head_for(trace: Trace, layer: str) -> nn.Module:
    """A classifier on a layer's features that gives logits like the network's own."""
    features = trace.calls[layer][0].output
    assert features is not None and trace.logits is not None  # or it would have no head
    tokens = layer in trace.channels_last
    # Of a network of several dtypes the layer's own; but autocast's is none of a parameter.
    dtypes = [p.dtype for p in trace.model.parameters() if p.is_floating_point()]
    kind = features.device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    own = features.dtype in dtypes and not autocast
    dtype = features.dtype if own or not dtypes else dtypes[0]
    made: Any = {"device": features.device, "dtype": dtype}
    sizes = features.shape[-1 if tokens else 1], trace.logits.shape[trace.class_dim or 1]
    if trace.class_dim is None:
        return AuxiliaryHead(*sizes, **made)
    if tokens:
        return TokenHead(*sizes, **made)
    return MapHead(*sizes, features.dim() - 2, **made)


class AuxiliaryHead(nn.Module):
    r"""Classifier on intermediate features: (B, C, \*spatial) -> average -> linear -> (B, K)."""

    def __init__(self, channels: int, classes: int, *, device=None, dtype=None) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, classes, device=device, dtype=dtype)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is None:
            return self.linear(average(features))
        return self.linear(padding.mean(padding.zeroed(features, mask), mask))


class TokenHead(nn.Module):
    r"""Classifier of each token: (B, C, \*positions), a view of (B, \*positions, C), -> linear
    -> (B, K, \*positions)."""

    def __init__(self, channels: int, classes: int, *, device=None, dtype=None) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, classes, device=device, dtype=dtype)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is not None:
            features = padding.zeroed(features, mask)
        return self.linear(features.movedim(1, -1)).movedim(-1, 1)


class MapHead(nn.Module):
    r"""Classifier of each pixel: (B, C, \*spatial) -> 1x1 convolution -> (B, K, \*spatial)."""

    def __init__(
        self, channels: int, classes: int, spatial: int, *, device=None, dtype=None
    ) -> None:
        super().__init__()
        self.convolution = CONVOLUTIONS[spatial](channels, classes, 1, device=device, dtype=dtype)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.convolution(features if mask is None else padding.zeroed(features, mask))


def average(features: Tensor) -> Tensor:
    """(B, C, *spatial) -> (B, C), with a gradient of one number for all pixels.

    That of ``Tensor.mean`` is as large as the features, and contiguous where they are
    channels_last, which makes adding it to their other gradients ten times as slow.
    """
    if features.dtype not in (torch.float32, torch.float64):
        if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
            return features.mean(dim=tuple(range(2, features.dim())))  # they take no Function
        return _Average.apply(features)
    # The same in fewer microseconds. In half precision a sum can be out of range, and autocast
    # would have a gradient as large as the features after all.
    pixels = math.prod(features.shape[2:])
    return features.sum(dim=tuple(range(2, features.dim()))) / pixels


class _Average(Function):

    @staticmethod
    def forward(ctx, features: Tensor) -> Tensor:
        ctx.shape = features.shape
        ctx.rows = _comes_in_rows(features)
        positions = tuple(range(2, features.dim()))
        if features.device.type == "cpu" and features.dtype == torch.bfloat16:
            # The mean would be that of a float32 copy of them all. The sum is as exact, and no
            # larger than the range.
            return features.sum(dim=positions) / math.prod(features.shape[2:])
        return features.mean(dim=positions)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        batch, channels, *spatial = ctx.shape
        each = (grad / math.prod(spatial)).reshape(batch, channels, *[1] * len(spatial))
        if ctx.rows:
            row = each.expand(-1, -1, *[1] * (len(spatial) - 1), spatial[-1])
            each = row.movedim(1, -1).contiguous().movedim(-1, 1)
        return each.expand(ctx.shape)


def _comes_in_rows(features: Tensor) -> bool:
    """Whether the gradient holds a row of pixels (B, C, 1, W), and not only one (B, C, 1, 1).

    The CPU adds up vectors of numbers that lie side by side, in channels_last those of a pixel.
    Few channels of half precision, or an odd number of them, fill none, and are added number by
    number.
    """
    _, channels, *spatial = features.shape
    if features.device.type != "cpu" or len(spatial) < 2 or channels % 64 == 0:
        return False
    return features.stride(1) == 1 and features.stride(-1) == channels
