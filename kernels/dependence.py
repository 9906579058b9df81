"""Launchers of the Grams of samples in Triton: all representations in one launch each way.

The signatures are those of ``algebra.dependence``; the formulas stand in the kernels' file.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from . import numerics
from .config import DependenceConfig, dependence_config
from .dependence_constants import DependenceConstants
from .dependence_kernel import gram_kernel, product_kernel
from .dependence_plan import DependencePlan, dependence_plan
from .kept import capturing, keep_for_graph, tickets
from .launch import launch
from .plan import BY_COLUMNS, BY_ROWS, TILE, layer_of


class _TypedLayers(NamedTuple):
    """The representations of one dtype, which share a launch."""

    dtype: torch.dtype
    indices: tuple[int, ...]
    xs: tuple[Tensor, ...]
    plan: DependencePlan
    config: DependenceConfig

    def constants(self, block: int, depth: int) -> DependenceConstants:
        batch = self.xs[0].shape[0]
        of_plan = len(self.xs), self.plan.paths, self.plan.rows_unit
        of_batch = batch <= TILE, batch % 4 == 0
        sizes = block, self.config.gathered, depth, self.config.fan
        return _constants(of_plan, of_batch, self.dtype, sizes)


def forward(xs: Sequence[Tensor], scale: Sequence[float]) -> tuple[Tensor, list[Tensor]]:
    """scale X_a X_a^T of every x (B, *) as (n, B, B), and per dtype of the xs the shifts a.

    One launch for each dtype; another where a scale isn't 1.
    """
    batch, device = xs[0].shape[0], xs[0].device
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in xs) else torch.float32
    grams = torch.empty(len(xs), batch, batch, dtype=dtype, device=device)
    state = []
    for typed in _by_dtype(xs):
        accumulation = numerics.accumulation(typed.dtype)
        means = torch.empty(typed.plan.means, dtype=accumulation, device=device)
        state.append(means)
        span, programs = typed.plan.gram
        if not programs:
            continue
        summands = programs if typed.plan.divided else 0
        launch(
            gram_kernel,
            programs,
            device,
            typed.xs,
            typed.plan.table,
            grams,
            means,
            torch.empty(summands, TILE, TILE, dtype=accumulation, device=device),
            tickets(device, summands),
            span,
            C=typed.constants(typed.config.gram_block, 0),
            num_warps=typed.config.gram_warps,
            num_stages=typed.config.gram_stages,
            maxnreg=typed.config.registers,
        )
    if any(factor != 1 for factor in scale):
        torch._foreach_mul_(grams.unbind(), list(scale))
    return grams, state


def backward(s: Tensor, xs: Sequence[Tensor], means: Sequence[Tensor]) -> list[Tensor]:
    """S X_a of every x, shaped and strided like x; S (n, B, B) is symmetric and contiguous, its
    rows sum to 0."""
    gradients = [torch.empty_like(x) for x in xs]
    for typed, shifts in zip(_by_dtype(xs), means, strict=True):
        span, programs = typed.plan.product
        if not programs:
            continue
        launch(
            product_kernel,
            programs,
            xs[0].device,
            typed.xs,
            tuple(gradients[i] for i in typed.indices),
            typed.plan.table,
            s,
            shifts,
            span,
            C=typed.constants(typed.config.product_block, typed.config.product_depth),
            num_warps=typed.config.product_warps,
            num_stages=typed.config.product_stages,
            maxnreg=typed.config.registers,
        )
    return gradients


@functools.lru_cache(maxsize=256)
def _constants(
    of_plan: tuple[int, int, bool],
    of_batch: tuple[bool, bool],
    dtype: torch.dtype,
    sizes: tuple[int, int, int, int],
) -> DependenceConstants:
    layers, paths, rows_unit = of_plan
    single, aligned = of_batch
    block, gathered, depth, fan = sizes
    return DependenceConstants.of(
        layers=layers,
        padded=triton.next_power_of_2(layers),
        paths=paths,
        fast=BY_ROWS if rows_unit else BY_COLUMNS,
        vector=16 // dtype.itemsize,
        single=single,
        block=block,
        gathered=gathered,
        depth=depth,
        aligned=aligned,
        fan=fan,
        product=numerics.careful_product(dtype),
        acc=numerics.TRITON[numerics.accumulation(dtype)],
    )


def _by_dtype(xs: Sequence[Tensor]) -> list[_TypedLayers]:
    indices: dict[torch.dtype, list[int]] = {}
    for i, x in enumerate(xs):
        indices.setdefault(x.dtype, []).append(i)
    types = []
    for dtype, members in indices.items():
        mine, device = tuple(xs[i] for i in members), xs[0].device
        config = dependence_config(dtype, xs[0].shape[0], device)
        made = dependence_plan(
            tuple(layer_of(x) for x in mine), tuple(members), dtype.itemsize, config.gram_block,
            config.product_block, config.programs, device,
        )
        if capturing(device):
            keep_for_graph(made.table)
        types.append(_TypedLayers(dtype, tuple(members), mine, made, config))
    return types
