"""Launchers of the pairwise cosine penalty in Triton: all layers in one launch each way.

The signatures are those of ``algebra.pairwise``; the formulas stand in the kernels' files.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dtypes import accumulation
from . import numerics
from .blank import blank
from .config import PairwiseConfig, PassConfig, pairwise_config
from .kept import abandon, hold, scratch
from .launch import Launch
from .pairwise_backward import backward_kernel
from .pairwise_constants import PairwiseConstants
from .pairwise_forward import forward_kernel
from .plan import BY_COLUMNS, BY_ROWS, Layout, Plan, Typed, by_dtype, layout, plan


class _Part(NamedTuple):
    """What the layers of one dtype take of a pass."""

    typed: Typed
    plan: Plan
    launch: Launch


class _Forward(NamedTuple):
    parts: tuple[_Part, ...]
    programs: int  # of all
    loss: Callable[[], Tensor]
    state: tuple[Callable[[], Tensor], ...]  # of each part


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
    device = xs[0].device
    parts, programs, blank_loss, blank_state = _forward(
        layout(xs), penalty, center, batched, precision, keep, device
    )
    loss = blank_loss()
    state = [kept() for kept in blank_state]
    if programs == 0:
        return loss.zero_(), state
    _, partials, ticket = shared = scratch(device, programs, loss.dtype)
    first = 0
    try:
        for i, part in enumerate(parts):
            if part.plan.forward:
                hold(part.plan.table, device)
                part.launch(
                    part.typed.of(xs), part.plan.table, state[i] if keep else partials,
                    (partials, ticket, loss), eps, first, programs, len(xs),
                )  # fmt: skip
                first += part.plan.forward
    except BaseException:  # a kernel that doesn't compile, or Ctrl-C while one does
        abandon(shared)
        raise
    return loss, state


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
    device, grad = xs[0].device, grad.resolve_neg()  # the dispatcher, which would, isn't asked
    gradients = [torch.empty_like(x) for x in xs]
    parts = _backward(
        layout(xs), layout((grad, *state)), penalty, center, batched, precision, device
    )
    for part, kept in zip(parts, state, strict=True):
        if part.plan.backward:
            hold(part.plan.table, device)
            part.launch(
                part.typed.of(xs), part.typed.of(gradients), part.plan.table, kept, grad, len(xs)
            )
    return gradients


@functools.lru_cache(maxsize=256)
def _forward(
    layers: Layout,
    penalty: int,
    center: bool,
    batched: bool,
    precision: int,
    keep: bool,
    device: torch.device,
) -> _Forward:
    typed_layers = by_dtype(layers)
    wide = any(typed.dtype == torch.float64 for typed in typed_layers)
    loss = torch.float64 if wide else torch.float32
    parts, states, programs = [], [], 0
    for typed in typed_layers:
        found, config = _planned(typed, penalty, center, batched, precision, device)
        constants = _constants(
            _of_plan(found, typed), typed.dtype, penalty, center, keep, config.forward,
            _gram_product(typed.dtype, center, precision), loss,
        )  # fmt: skip
        launch = Launch(
            forward_kernel, found.forward, device, C=constants, **_built(config.forward)
        )
        parts.append(_Part(typed, found, launch))
        if keep:
            states.append(blank((found.state,), accumulation(typed.dtype), device))
        programs += found.forward
    return _Forward(tuple(parts), programs, blank((), loss, device), tuple(states))


@functools.lru_cache(maxsize=256)
def _backward(
    layers: Layout,
    _given: Layout,  # the gradient that comes in and the state: the kernel is compiled for them too
    penalty: int,
    center: bool,
    batched: bool,
    precision: int,
    device: torch.device,
) -> tuple[_Part, ...]:
    parts = []
    for typed in by_dtype(layers):
        found, config = _planned(typed, penalty, center, batched, precision, device)
        constants = _constants(
            _of_plan(found, typed), typed.dtype, penalty, center, True, config.backward,
            _gradient_product(typed.dtype, precision), None,
        )  # fmt: skip
        launch = Launch(
            backward_kernel, found.backward, device, C=constants, **_built(config.backward)
        )
        parts.append(_Part(typed, found, launch))
    return tuple(parts)


def _planned(
    typed: Typed, penalty: int, center: bool, batched: bool, precision: int, device: torch.device
) -> tuple[Plan, PairwiseConfig]:
    found = plan(typed.layers, typed.dtype.itemsize, penalty, center, batched, device)
    on_tensor_cores = _gradient_product(typed.dtype, precision) != numerics.IEEE
    return found, pairwise_config(typed.dtype, on_tensor_cores, center, found, device)


def _of_plan(found: Plan, typed: Typed) -> tuple[int, int, int, bool, bool]:
    """What kernels are compiled for of it."""
    return len(typed.layers), found.forms, found.paths, found.narrow, found.rows_unit


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
    acc = accumulation(dtype)
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
        settle=config.settle,
        acc=numerics.TRITON[acc],
        loss=numerics.TRITON[loss or acc],
    )


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
