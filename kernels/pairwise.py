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
from .config import PairwiseConfig, pairwise_config
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
    def of_plan(self) -> tuple[int, int, int, bool]:
        """What kernels are compiled for of it."""
        return len(self.xs), self.plan.forms, self.plan.paths, self.plan.rows_unit


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
                             typed.config.forward_block, 0,
                             _gram_product(typed.dtype, center, precision), loss_type),
                num_warps=typed.config.num_warps,
                num_stages=typed.config.forward_stages,
                maxnreg=typed.config.registers,
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
                         typed.config.backward_block, typed.config.backward_depth,
                         _gradient_product(typed.dtype, precision), None),
            num_warps=typed.config.num_warps,
            num_stages=typed.config.backward_stages,
            maxnreg=typed.config.registers,
        )
    return gradients


@functools.lru_cache(maxsize=256)
def _constants(
    of_plan: tuple[int, int, int, bool],
    dtype: torch.dtype,
    penalty: int,
    center: bool,
    keep: bool,
    block: int,
    depth: int,
    product: tl.constexpr,
    loss: torch.dtype | None,
) -> PairwiseConstants:
    layers, forms, paths, rows_unit = of_plan
    accumulation = numerics.accumulation(dtype)
    return PairwiseConstants.of(
        layers=layers,
        padded=triton.next_power_of_2(layers),
        forms=forms,
        paths=paths,
        penalty=penalty,
        center=center,
        keep=keep,
        fast=BY_ROWS if rows_unit else BY_COLUMNS,
        vector=16 // dtype.itemsize,
        block=block,
        depth=depth,
        product=product,
        form_product=numerics.careful_product(dtype),
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
        config = pairwise_config(dtype, _gradient_product(dtype, precision) != numerics.IEEE)
        layers = tuple(layer_of(x) for x in mine)
        geometry = plan(
            layers, dtype.itemsize, penalty, center, batched, config.backward_block,
            mine[0].device,
        )
        if capturing(mine[0].device):
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
