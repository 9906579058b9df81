"""What is measured on a GPU: operations, forward and backward, on the shapes of real networks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from imcl_fast import functional as F

from ..shapes import R18_FEATURES, Shapes, resnet18_weights

FUSED = ("triton", "cuda")
COMPETITORS = (*FUSED, "torch", "torch.compile", "reference")
CONSISTENCIES = ((5, 128, 10), (5, 128, 1000), (5, 1024, 1000), (5, 256, 50257))
NAMES = {torch.bfloat16: "bfloat16", torch.float32: "float32"}


class Row(NamedTuple):
    name: str
    dtype: torch.dtype
    inputs: Callable[[], list[Tensor]]
    loss: Callable[[Sequence[Tensor], str], Tensor]  # of the inputs, under an implementation
    least_bytes: int  # that forward and backward move


def rows() -> list[Row]:
    """The most telling ones first, for there may not be time for all."""
    found: list[Row] = []
    for dtype in NAMES:
        found += [kernel(dtype, resnet18_weights())]
        found += [
            representation(dtype, R18_FEATURES, layout, False)
            for layout in (torch.channels_last, torch.contiguous_format)
        ]
        found += [consistency(dtype, *sizes) for sizes in CONSISTENCIES]
    for dtype in NAMES:
        found += [
            representation(dtype, R18_FEATURES, layout, True)
            for layout in (torch.channels_last, torch.contiguous_format)
        ]
    return found


def representation(
    dtype: torch.dtype, shapes: Shapes, layout: torch.memory_format, center: bool
) -> Row:
    def inputs() -> list[Tensor]:
        return [
            torch.randn(s, device="cuda", dtype=dtype).contiguous(memory_format=layout)
            for s in shapes
        ]

    lies = "NHWC" if layout == torch.channels_last else "NCHW"
    return Row(
        f"representation R18 {lies}{' centred' if center else ''}, {NAMES[dtype]}",
        dtype,
        inputs,
        lambda xs, impl: F.representation_similarity(xs, center=center, impl=impl),
        3 * _elements(shapes) * dtype.itemsize,  # read, read again, gradient written
    )


def kernel(dtype: torch.dtype, shapes: Shapes) -> Row:
    return Row(
        f"kernel R18, {NAMES[dtype]}",
        dtype,
        lambda: [torch.randn(s, device="cuda", dtype=dtype) for s in shapes],
        lambda xs, impl: F.kernel_similarity(xs, impl=impl),
        3 * _elements(shapes) * dtype.itemsize,
    )


def consistency(dtype: torch.dtype, heads: int, batch: int, classes: int) -> Row:
    target: list[Tensor] = []

    def inputs() -> list[Tensor]:
        target[:] = [torch.randint(0, classes, (batch,), device="cuda")]
        return [torch.randn(batch, classes, device="cuda", dtype=dtype) for _ in range(heads)]

    return Row(
        f"consistency {heads} x {batch} x {classes}, {NAMES[dtype]}",
        dtype,
        inputs,
        lambda zs, impl: F.collaborative_consistency(zs, target[0], impl=impl),
        2 * heads * batch * classes * dtype.itemsize,  # read, gradient written
    )


def _elements(shapes: Shapes) -> int:
    return sum(torch.Size(s).numel() for s in shapes)
