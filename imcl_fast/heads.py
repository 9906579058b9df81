"""The auxiliary classifiers of multi-layer consistency, on the features of inner layers."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.autograd import Function

from .layers import Trace


def head_for(trace: Trace, layer: str) -> AuxiliaryHead:
    features = trace.calls[layer][0].output
    assert features is not None and trace.logits is not None  # or it would have no head
    channels = features.shape[-1 if layer in trace.channels_last else 1]
    # Of a network of several dtypes the layer's own; but autocast's is none of a parameter.
    dtypes = [p.dtype for p in trace.model.parameters() if p.is_floating_point()]
    kind = features.device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    own = features.dtype in dtypes and not autocast
    return AuxiliaryHead(
        channels,
        trace.logits.shape[1],
        device=features.device,
        dtype=features.dtype if own or not dtypes else dtypes[0],
    )


class AuxiliaryHead(nn.Module):
    r"""Classifier on intermediate features: (B, C, \*spatial) -> average -> linear -> (B, K)."""

    def __init__(self, channels: int, classes: int, *, device=None, dtype=None) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, classes, device=device, dtype=dtype)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear(average(features))


def average(features: Tensor) -> Tensor:
    """(B, C, *spatial) -> (B, C), with a gradient of one number for all pixels.

    That of ``Tensor.mean`` is as large as the features, and contiguous where they are
    channels_last, which makes adding it to their other gradients ten times as slow.
    """
    if features.dtype not in (torch.float32, torch.float64):
        return _Average.apply(features)
    # The same in fewer microseconds. In half precision a sum can be out of range, and autocast
    # would have a gradient as large as the features after all.
    pixels = math.prod(features.shape[2:])
    return features.sum(dim=tuple(range(2, features.dim()))) / pixels


class _Average(Function):

    @staticmethod
    def forward(ctx, features: Tensor) -> Tensor:
        ctx.shape = features.shape
        return features.mean(dim=tuple(range(2, features.dim())))

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        pixels = math.prod(ctx.shape[2:])
        return (grad / pixels).reshape(*grad.shape, *[1] * (len(ctx.shape) - 2)).expand(ctx.shape)
