"""Launchers of the pairwise cosine penalty in Triton: all layers in one launch each way.

The signatures are those of ``algebra.pairwise``; the formulas stand in the kernels' files.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import numerics
from .config import PairwiseConfig, PassConfig, pairwise_config
from .kept import capturing, keep_for_graph, ticket
from .launch import launch
from .pairwise_backward import backward_kernel
from .pairwise_constants import PairwiseConstants
from .pairwise_forward import forward_kernel
from .plan import BY_COLUMNS, BY_ROWS, Plan, layer_of, plan


class _TypedLayers(NamedTuple):
    """The layers of one dtype, which share a launch."""

    dtype: torch.dtype
    indices: list[int]
    xs: tuple[Tensor, ...]
    plan: Plan
    config: PairwiseConfig

    @property
    def of_plan(self) -> tuple[int, int, int, bool, bool]:
        """What kernels are compiled for of it."""
        of = self.plan
        return len(self.xs), of.forms, of.paths, of.narrow, of.rows_unit


def forward(
    xs: Sequence[Tensor],
    penalty: int,
    center: bool,
    eps: float,
    batched: bool,
    precision: int,
    keep: bool,
) -> tuple[Tensor, list[Tensor]]:
    """The penalty (), and per dtype of the layers what the backward needs."""
    types = _by_dtype(xs, penalty, center, batched, precision)
    wide = any(typed.dtype == torch.float64 for typed in types)
    loss_type = torch.float64 if wide else torch.float32
    device = xs[0].device
    programs = sum(typed.plan.forward for typed in types)
    if programs == 0:
        loss = torch.zeros((), dtype=loss_type, device=device)
    else:
        loss = torch.empty((), dtype=loss_type, device=device)
    partials = torch.empty(programs, dtype=loss_type, device=device)
    tickets = ticket(device) if programs else partials
    state, first = [], 0
    for typed in types:
        accumulation = numerics.accumulation(typed.dtype)
        kept = torch.empty(typed.plan.state if keep else 0, dtype=accumulation, device=device)
        state.append(kept)
        if typed.plan.forward:
            launch(
                forward_kernel,
                typed.plan.forward,
                device,
                typed.xs,
                typed.plan.table,
                kept if keep else partials,
                (partials, tickets, loss),
                eps,
                first,
                programs,
                len(xs),
                C=_constants(typed.of_plan, typed.dtype, penalty, center, keep,
                             typed.config.forward, _gram_product(typed.dtype, center, precision),
                             loss_type),
                **_built(typed.config.forward),
            )
        first += typed.plan.forward
    return loss, state if keep else []


def backward(
    grad: Tensor,
    xs: Sequence[Tensor],
    state: Sequence[Tensor],
    penalty: int,
    center: bool,
    eps: float,
    batched: bool,
    precision: int,
) -> list[Tensor]:
    """The gradient of every layer, scaled by ``grad`` () on its device."""
    gradients = [torch.empty_like(x) for x in xs]
    for typed, kept in zip(_by_dtype(xs, penalty, center, batched, precision), state, strict=True):
        if not typed.plan.backward:
            continue
        launch(
            backward_kernel,
            typed.plan.backward,
            xs[0].device,
            typed.xs,
            tuple(gradients[i] for i in typed.indices),
            typed.plan.table,
            kept,
            grad,
            len(xs),
            C=_constants(typed.of_plan, typed.dtype, penalty, center, True,
                         typed.config.backward, _gradient_product(typed.dtype, precision), None),
            **_built(typed.config.backward),
        )
    return gradients


def _built(config: PassConfig) -> dict[str, int]:
    """The compiler's options."""
    return {
        "num_warps": config.num_warps,
        "num_stages": config.stages,
        "maxnreg": config.registers,
    }


@functools.lru_cache(maxsize=256)
def _constants(
    of_plan: tuple[int, int, int, bool, bool],
    dtype: torch.dtype,
    penalty: int,
    center: bool,
    keep: bool,
    config: PassConfig,
    product: tl.constexpr,
    loss: torch.dtype | None,
) -> PairwiseConstants:
    layers, forms, paths, narrow, rows_unit = of_plan
    accumulation = numerics.accumulation(dtype)
    return PairwiseConstants.of(
        layers=layers,
        padded=triton.next_power_of_2(layers),
        forms=forms,
        paths=paths,
        narrow=narrow,
        penalty=penalty,
        center=center,
        keep=keep,
        fast=BY_ROWS if rows_unit else BY_COLUMNS,
        vector=16 // dtype.itemsize,
        depth=config.depth,
        product=product,
        form_product=_form_product(dtype, center),
        acc=numerics.TRITON[accumulation],
        loss=numerics.TRITON[loss or accumulation],
    )


def _by_dtype(
    xs: Sequence[Tensor], penalty: int, center: bool, batched: bool, precision: int
) -> list[_TypedLayers]:
    indices: dict[torch.dtype, list[int]] = {}
    for i, x in enumerate(xs):
        indices.setdefault(x.dtype, []).append(i)
    types = []
    for dtype, members in indices.items():
        mine = tuple(xs[i] for i in members)
        layers = tuple(layer_of(x) for x in mine)
        device = mine[0].device
        geometry = plan(layers, dtype.itemsize, penalty, center, batched, device)
        on_tensor_cores = _gradient_product(dtype, precision) != numerics.IEEE
        config = pairwise_config(dtype, on_tensor_cores, center, geometry, device)
        if capturing(device):
            keep_for_graph(geometry.table)
        types.append(_TypedLayers(dtype, members, mine, geometry, config))
    return types


# The primal products follow the dtype and, for float32, torch's precision switch.
_FLOAT32 = (numerics.IEEE, numerics.TF32, numerics.BFLOAT16)  # highest, high, medium


def _gram_product(dtype: torch.dtype, center: bool, precision: int) -> tl.constexpr:
    if dtype == torch.float16:
        # A centred float16 may lie beyond float16's range.
        return numerics.TF32 if center else numerics.FLOAT16
    return _gradient_product(dtype, precision)


def _gradient_product(dtype: torch.dtype, precision: int) -> tl.constexpr:
    if dtype == torch.float32:
        return _FLOAT32[precision]
    if dtype == torch.float16:
        return numerics.TF32  # A would underflow in float16
    return numerics.BFLOAT16 if dtype == torch.bfloat16 else numerics.IEEE


def _form_product(dtype: torch.dtype, center: bool) -> tl.constexpr:
    """Of the dual form, which subtracts nearly equal numbers."""
    if dtype.itemsize > 2 or center:
        return numerics.careful_product(dtype)
    return numerics.BFLOAT16X3 if dtype == torch.bfloat16 else numerics.TF32X2
