"""Launchers of the Grams of samples in Triton: all representations in one launch each way.

The signatures are those of ``algebra.dependence``; the formulas stand in the kernels' file.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..dtypes import accumulation
from . import numerics
from .blank import blank
from .config import DependenceConfig, dependence_config
from .dependence_constants import DependenceConstants
from .dependence_kernel import gram_kernel, product_kernel
from .dependence_plan import DependencePlan, dependence_plan
from .kept import hold, tickets
from .launch import Launch
from .plan import BY_COLUMNS, BY_ROWS, TILE, Layout, Typed, by_dtype, layout


class _Part(NamedTuple):
    """What the representations of one dtype take of a pass."""

    typed: Typed
    plan: DependencePlan
    launch: Launch


class _Forward(NamedTuple):
    parts: tuple[_Part, ...]
    grams: Callable[[], Tensor]
    means: tuple[Callable[[], Tensor], ...]  # of each part
    summands: tuple[Callable[[], Tensor], ...]  # of each part


def forward(xs: Sequence[Tensor], scale: Sequence[float]) -> tuple[Tensor, list[Tensor]]:
    """scale X_a X_a^T of every x (B, *) as (n, B, B), and per dtype of the xs the shifts a.

    One launch for each dtype; another where a scale isn't 1.
    """
    device = xs[0].device
    parts, blank_grams, blank_means, blank_summands = _forward(layout(xs), device)
    grams = blank_grams()
    state = [means() for means in blank_means]
    for (typed, plan, launch), means, summands in zip(parts, state, blank_summands, strict=True):
        span, programs = plan.gram
        if programs:
            hold(plan.table, device)
            counters = tickets(device, programs if plan.divided else 0)
            launch(typed.of(xs), plan.table, grams, means, summands(), counters, span)
    if any(factor != 1 for factor in scale):
        torch._foreach_mul_(grams.unbind(), list(scale))
    return grams, state


def backward(s: Tensor, xs: Sequence[Tensor], means: Sequence[Tensor]) -> list[Tensor]:
    """S X_a of every x, shaped and strided like x; S (n, B, B) is symmetric and contiguous, its
    rows sum to 0."""
    device = xs[0].device
    gradients = [torch.empty_like(x) for x in xs]
    parts = _backward(layout(xs), layout((s, *means)), device)
    for (typed, plan, launch), shifts in zip(parts, means, strict=True):
        span, programs = plan.product
        if programs:
            hold(plan.table, device)
            launch(typed.of(xs), typed.of(gradients), plan.table, s, shifts, span)
    return gradients


@functools.lru_cache(maxsize=256)
def _forward(layers: Layout, device: torch.device) -> _Forward:
    (_, (batch, *_), *_), *_ = layers
    dtypes = [dtype for dtype, *_ in layers]
    dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    parts, means, summands = [], [], []
    for typed in by_dtype(layers):
        config, plan, constants = _planned(typed, device)
        launch = Launch(
            gram_kernel, plan.gram.programs, device, C=constants(config.gram_block, 0),
            num_warps=config.gram_warps, num_stages=config.gram_stages,
            maxnreg=config.registers,
        )  # fmt: skip
        parts.append(_Part(typed, plan, launch))
        acc = accumulation(typed.dtype)
        means.append(blank((plan.means,), acc, device))
        tiles = plan.gram.programs if plan.divided else 0
        summands.append(blank((tiles, TILE, TILE), acc, device))
    grams = blank((len(layers), batch, batch), dtype, device)
    return _Forward(tuple(parts), grams, tuple(means), tuple(summands))


@functools.lru_cache(maxsize=256)
def _backward(
    layers: Layout,
    _given: Layout,  # S and the means: the kernel is compiled for them too
    device: torch.device,
) -> tuple[_Part, ...]:
    parts = []
    for typed in by_dtype(layers):
        config, plan, constants = _planned(typed, device)
        launch = Launch(
            product_kernel, plan.product.programs, device,
            C=constants(config.product_block, config.product_depth),
            num_warps=config.product_warps, num_stages=config.product_stages,
            maxnreg=config.registers,
        )  # fmt: skip
        parts.append(_Part(typed, plan, launch))
    return tuple(parts)


def _planned(
    typed: Typed, device: torch.device
) -> tuple[DependenceConfig, DependencePlan, Callable[[int, int], DependenceConstants]]:
    """The configuration, the plan, and what kernels of a block and a depth are compiled for."""
    batch = typed.layers[0].shape[0]
    config = dependence_config(typed.dtype, batch, device)
    plan = dependence_plan(
        typed.layers, typed.indices, typed.dtype.itemsize, config.gram_block,
        config.product_block, config.programs, device,
    )  # fmt: skip
    of_plan = len(typed.layers), plan.paths, plan.rows_unit
    of_batch = batch <= TILE, batch % 4 == 0

    def constants(block: int, depth: int) -> DependenceConstants:
        sizes = block, config.gathered, depth, config.fan
        return _constants(of_plan, of_batch, typed.dtype, sizes)

    return config, plan, constants


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
        acc=numerics.TRITON[accumulation(dtype)],
    )
