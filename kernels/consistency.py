"""Launcher of the collaborative consistency in Triton: value and gradient in one launch.

The signature is that of ``algebra.consistency``; the formulas stand in the kernel's file.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from .. import dense
from ..algebra.consistency import PAIRWISE, REDUCE_NONE, kept_dtype
from ..algebra.divergences import KL
from . import autotune
from .config import ConsistencyConfig, consistency_candidates, consistency_config, power_of_2
from .consistency_constants import INDICES, NO_TARGET, PROBABILITIES, constants
from .consistency_kernel import consistency_kernel
from .constants import plain
from .launch import launch

_POWERS = (1.0, 2.0, 3.0, 4.0)  # temperatures T at which exp(x) is a power of exp(x/T)
_UNIT = 16  # elements


def forward(
    logits: Sequence[Tensor],
    target: Tensor | None,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    ce_weight: Sequence[float],
    kl_weight: Sequence[float],
    groups: Sequence[int],
    temperature: Sequence[float],
    teacher: Sequence[int],
    detach: Sequence[bool],
    divergence: Sequence[int],
    beta: Sequence[float],
    label_smoothing: float,
    ignore_index: int,
    binary: bool,
    reduction: int,
    keep: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Loss () or (B,), terms (2, H), and with ``keep`` the gradients, scaled completely, in the
    ``kept_dtype``: one (H, B, K) if all logits are contiguous, else one like each stack of logits.
    """
    device, dtype = logits[0].device, logits[0].dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    heads, given_classes = len(ce_weight), logits[0].shape[-1]
    classes = 2 if binary else given_classes
    other = any(name != KL for name in divergence)
    samples = dense.samples(logits[0])
    batch = math.prod(samples)
    given = [x.stride()[: len(samples)] for x in (target, sample_weight) if x is not None]
    geometry = _geometry(tuple((z.shape, z.stride()) for z in logits), tuple(given))
    gradients: list[Tensor] = []
    if keep and geometry.packed:
        shape = (heads, *samples, given_classes)
        gradients = [torch.empty(shape, dtype=kept_dtype(dtype), device=device)]
    elif keep:
        gradients = [torch.empty_like(z, dtype=kept_dtype(dtype)) for z in logits]
    per_sample = reduction == REDUCE_NONE
    if batch == 0:
        loss = torch.zeros(samples if per_sample else (), dtype=wide, device=device)
        return loss, torch.zeros((2, heads), dtype=wide, device=device), gradients

    numbers = tuple(map(float, (*ce_weight, *kl_weight, *temperature, label_smoothing)))
    if other:
        numbers += tuple(map(float, beta))
    rests = _rests(numbers) if wide == torch.float64 else ()
    loss = torch.empty(samples if per_sample else (), dtype=wide, device=device)
    terms = torch.empty((2, heads), dtype=wide, device=device)

    kind, labels = _labels(target, weight, sample_weight, geometry.given)
    of_groups = {
        "groups": tuple(groups), "teachers": tuple(teacher), "divergences": tuple(divergence),
        "detach": tuple(detach),
        "powers": tuple(int(t) if t in _POWERS else 0 for t in temperature),
    }  # fmt: skip

    def run(config: ConsistencyConfig) -> None:
        compiled_for = constants(
            **of_groups, k=classes, heads=geometry.heads, gradient_heads=geometry.gradient_heads,
            unit=geometry.unit, binary=binary, reduction=reduction, target=kind,
            smooth=label_smoothing > 0, weighted=weight is not None,
            shared=sample_weight is not None, keep=keep, samples=config.samples,
            block=config.block, **_slices(config, geometry, classes, dtype),
            lowest=torch.finfo(dtype).min,
            acc=tl.float64 if wide == torch.float64 else tl.float32,
        )  # fmt: skip
        sums = plain(compiled_for.sums)
        partials = torch.empty((sums, config.programs), dtype=wide, device=device)
        launch(
            consistency_kernel,
            config.programs,
            device,
            (tuple(logits), geometry.sizes, geometry.strides),
            labels,
            ignore_index,
            (numbers, rests),
            (tuple(gradients), geometry.sizes, geometry.gradient_strides),
            (partials, torch.zeros((), dtype=torch.int32, device=device), loss, terms),
            batch,
            C=compiled_for,
            num_warps=config.num_warps,
            maxnreg=config.registers,
        )

    heavy = other or any(
        size > 1 and (kind == PAIRWISE or not fixed)
        for size, kind, fixed in zip(groups, teacher, detach, strict=True)
    )
    rich = kind == PROBABILITIES or weight is not None or len(geometry.sizes) > 1
    config = consistency_config(max(groups), heavy and keep, rich, batch, classes, device)
    if autotune.wanted(device):
        candidates = consistency_candidates(config, batch)
        bucket = (heads, heavy and keep, rich, power_of_2(batch), power_of_2(classes))
        config = autotune.best("consistency", bucket, dtype, device, candidates, run)
    run(config)
    return loss, terms, gradients


def _slices(
    config: ConsistencyConfig, geometry: _Geometry, classes: int, dtype: torch.dtype
) -> dict[str, Any]:
    """How the classes of a chunk are shared out to threads: as many side by side as one load takes,
    or else, where rows don't begin on a multiple of them, one after the other."""
    if classes <= config.block:  # there is one, and no kernel is made for how it might be shared
        return {"slices": 1, "side_by_side": False}
    each = max(1, config.block // (32 * config.num_warps))
    vector = min(each, 16 // dtype.itemsize)
    side_by_side = geometry.unit % vector == 0 and all(step == 1 for *_, step in geometry.strides)
    return {"slices": config.block // (vector if side_by_side else each),
            "side_by_side": side_by_side}  # fmt: skip


class _Geometry(NamedTuple):
    """Where heads lie: of each its stack, its index in that, and which of the strides it has.

    Strides are (head, samples, class); those of heads and of samples, one for each axis of
    them, are in units of ``unit`` elements. Stacks that lie alike share theirs, and the kernel
    has one offset for all of them.
    """

    sizes: tuple[int, ...]  # of the axes of samples; () if it is one, which no kernel is made for
    heads: tuple[tuple[int, int, int], ...]
    strides: tuple[tuple[int, tuple[int, ...], int], ...]
    gradient_heads: tuple[tuple[int, int, int], ...]
    gradient_strides: tuple[tuple[int, tuple[int, ...], int], ...]
    given: tuple[tuple[int, ...], ...]  # strides of what each sample has, in elements
    unit: int
    packed: bool  # whether the gradients are one (H, *samples, K)


@functools.lru_cache(maxsize=256)
def _geometry(
    layouts: tuple[tuple[torch.Size, tuple[int, ...]], ...], given: tuple[tuple[int, ...], ...]
) -> _Geometry:
    """The geometry of stacks of logits of some shapes and strides, and of the strides of
    targets and weights."""
    stacks = [torch.empty_strided(shape, stride, device="meta") for shape, stride in layouts]
    heads = tuple(
        (s, i) for s, z in enumerate(stacks) for i in range(len(z) if z.dim() > 2 else 1)
    )
    packed = all(z.is_contiguous() for z in stacks)
    samples = dense.samples(stacks[0])
    gradient_heads, gradients = heads, [torch.empty_like(z) for z in stacks]
    if packed:
        whole = (len(heads), *samples, stacks[0].shape[-1])
        gradient_heads = tuple((0, h) for h in range(len(heads)))
        gradients = [torch.empty(whole, device="meta")]
    of_samples = [z.stride()[-len(samples) - 1 : -1] for z in (*stacks, *gradients)]
    sizes, axes = _axes(samples, (*of_samples, *given))
    count = len(stacks) + len(gradients)
    of_heads = [z.stride(0) if z.dim() > 2 else 0 for z in (*stacks, *gradients)]
    unit = math.gcd(_UNIT, *of_heads, *(n for strides in axes[:count] for n in strides))
    strides = tuple(
        (head // unit, tuple(n // unit for n in own), z.stride(-1))
        for head, own, z in zip(of_heads, axes, (*stacks, *gradients), strict=False)
    )
    of_logits, of_gradients = strides[: len(stacks)], strides[len(stacks) :]
    return _Geometry(
        sizes if len(sizes) > 1 else (), *_shared(heads, of_logits),
        *_shared(gradient_heads, of_gradients), axes[count:], unit, packed,
    )  # fmt: skip


def _shared(heads: Sequence[tuple[int, int]], strides: Sequence[tuple]) -> tuple[tuple, tuple]:
    """Heads, each with the place of its stack's strides among those that differ; and these."""
    different = tuple(dict.fromkeys(strides))
    return tuple((s, i, different.index(strides[s])) for s, i in heads), different


def _axes(
    sizes: Sequence[int], strides: Sequence[Sequence[int]]
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """As few axes as the strides of all stacks let these dimensions become, and their strides."""
    kept: list[int] = []
    axes: list[list[int]] = [[] for _ in strides]
    for d, size in enumerate(sizes):
        if size == 1 and len(sizes) > 1:
            continue
        if kept and all(of[-1] == size * own[d] for of, own in zip(axes, strides, strict=True)):
            kept[-1] *= size
            for of, own in zip(axes, strides, strict=True):
                of[-1] = own[d]
        else:
            kept.append(size)
            for of, own in zip(axes, strides, strict=True):
                of.append(own[d])
    if not kept:
        return (1,), tuple((0,) for _ in strides)
    return tuple(kept), tuple(map(tuple, axes))


def _labels(
    target: Tensor | None,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    given: tuple[tuple[int, ...], ...],
) -> tuple[tl.constexpr, tuple]:
    """What kind of target it is; and what the kernel calls labels: the target, its strides, class
    weights and their stride, weights of the samples and theirs."""
    of_weights = (weight, 0 if weight is None else weight.stride(0), sample_weight,
                  None if sample_weight is None else given[-1])  # fmt: skip
    if target is None:
        return NO_TARGET, (None, None, 0, *of_weights)
    if target.is_floating_point():
        return PROBABILITIES, (target, given[0], target.stride(-1), *of_weights)
    return INDICES, (target, given[0], 0, *of_weights)


def _rests(numbers: Sequence[float]) -> tuple[float, ...]:
    """What is lost of the numbers when Triton takes them as float32."""
    exact = torch.tensor(numbers, dtype=torch.float64)
    return tuple((exact - exact.float()).tolist())
