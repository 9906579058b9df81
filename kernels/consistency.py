"""Launcher of the collaborative consistency in Triton: value and gradient in one launch.

The signature is that of ``algebra.consistency``; the formulas stand in the kernel's file.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import dense
from ..algebra.consistency import PAIRWISE, REDUCE_NONE
from ..algebra.divergences import KL
from ..dtypes import accumulation, kept
from . import autotune
from .blank import blank
from .config import ConsistencyConfig, consistency_candidates, consistency_config, power_of_2
from .consistency_constants import INDICES, NO_TARGET, PROBABILITIES, constants
from .consistency_kernel import consistency_kernel
from .constants import plain
from .kept import scratch
from .launch import Launch
from .numerics import TRITON
from .plan import Layout, layout

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
    """Loss () or of the samples' sizes, terms (2, H), and with ``keep`` the gradients, scaled
    completely, in what ``dtypes.kept`` says: one (H, *samples, K) if all logits are contiguous,
    else one like each stack of logits."""
    device = logits[0].device
    # A head alone has no teacher.
    temperature = [t if size > 1 else 1.0 for t, size in zip(temperature, groups, strict=True)]
    given = [x for x in (target, weight, sample_weight) if x is not None]
    options = _Options(
        tuple(groups), tuple(teacher), tuple(detach), tuple(divergence),
        tuple([int(t) if t in _POWERS else 0 for t in temperature]), label_smoothing > 0,
        ignore_index, binary, reduction, keep,
    )  # fmt: skip
    has = target is not None, weight is not None
    call = _call(layout(logits), layout(given), has, options, device)
    geometry = call.geometry
    loss, terms = call.loss(), call.terms()
    gradients: list[Tensor] = []
    if call.gradient is not None:
        gradients = [call.gradient()]
    elif keep:
        gradients = [torch.empty_like(z, dtype=call.kept) for z in logits]
    if call.batch == 0:
        return loss.zero_(), terms.zero_(), gradients

    numbers = (*ce_weight, *kl_weight, *temperature, label_smoothing)
    if call.other:
        numbers += (*beta, *(1 - b for b in beta))
    numbers = tuple(map(float, numbers))
    rests = _rests(numbers) if loss.dtype == torch.float64 else ()
    of_target, of_classes, of_weight, of_samples = call.label_strides

    def run(config: ConsistencyConfig) -> None:
        launch, size = call.launch(config)
        _, partials, ticket = scratch(device, size, loss.dtype)
        launch(
            (tuple(logits), geometry.sizes, geometry.strides),
            (target, of_target, of_classes, weight, of_weight, sample_weight, of_samples),
            ignore_index,
            (numbers, rests),
            (tuple(gradients), geometry.sizes, geometry.gradient_strides),
            (partials, ticket, loss, terms),
            call.batch,
        )

    config = call.config
    if autotune.wanted(device):
        candidates = consistency_candidates(config, call.batch)
        config = autotune.best(
            "consistency", call.bucket, logits[0].dtype, device, candidates, run
        )
    run(config)
    return loss, terms, gradients


class _Options(NamedTuple):
    """Those of a call, but for numbers: of these only what kernels are made for."""

    groups: tuple[int, ...]
    teachers: tuple[int, ...]
    detach: tuple[bool, ...]
    divergences: tuple[int, ...]
    powers: tuple[int, ...]
    smooth: bool
    ignore_index: int
    binary: bool
    reduction: int
    keep: bool


class _Call:
    """All of a call but its tensors and its numbers."""

    def __init__(
        self,
        logits: Layout,
        given: Layout,  # of the target, the weights of classes and of samples, of those there are
        has: tuple[bool, bool],  # whether there are the first two
        options: _Options,
        device: torch.device,
    ) -> None:
        dtype, shape, *_ = logits[0]
        left = list(given)
        target = left.pop(0) if has[0] else None
        weight = left.pop(0) if has[1] else None
        sample_weight = left.pop(0) if left else None
        geometry = _geometry(logits, [x for x in (target, sample_weight) if x is not None])
        kind = NO_TARGET
        if target is not None:
            kind = PROBABILITIES if target[0].is_floating_point else INDICES
        wide = accumulation(dtype)
        heads, classes = sum(options.groups), 2 if options.binary else shape[-1]
        per_sample = options.reduction == REDUCE_NONE

        self.geometry, self.batch = geometry, math.prod(geometry.samples)
        self.loss = blank(geometry.samples if per_sample else (), wide, device)
        self.terms = blank((2, heads), wide, device)
        self.kept = kept(dtype)
        packed = (heads, *geometry.samples, shape[-1])
        self.gradient = None
        if options.keep and geometry.packed:
            self.gradient = blank(packed, self.kept, device)
        self.label_strides = (
            None if target is None else geometry.given[0],
            0 if target is None or kind == INDICES else target[2][-1],
            0 if weight is None else weight[2][0],
            None if sample_weight is None else geometry.given[-1],
        )
        self.other = any(name != KL for name in options.divergences)
        each = zip(options.groups, options.teachers, options.detach, strict=True)
        heavy = options.keep and (self.other or any(
            size > 1 and (teacher == PAIRWISE or not fixed) for size, teacher, fixed in each
        ))  # fmt: skip
        rich = kind == PROBABILITIES or weight is not None or len(geometry.sizes) > 1
        self.bucket = heads, heavy, rich, power_of_2(self.batch), power_of_2(classes)
        if self.batch:
            self.config = consistency_config(
                max(options.groups), heavy, rich, self.batch, classes, device
            )
        self._device = device
        self._slices = functools.partial(_slices, geometry=geometry, classes=classes, dtype=dtype)
        compiled_for = options._asdict()
        del compiled_for["ignore_index"]  # that is an argument
        self._constants = functools.partial(
            constants, **compiled_for, k=classes, heads=geometry.heads,
            gradient_heads=geometry.gradient_heads, unit=geometry.unit, target=kind,
            weighted=weight is not None, shared=sample_weight is not None,
            lowest=torch.finfo(dtype).min,
            acc=TRITON[wide],
        )  # fmt: skip
        self._launches: dict[ConsistencyConfig, tuple[Launch, int]] = {}

    def launch(self, config: ConsistencyConfig) -> tuple[Launch, int]:
        """With that configuration; and how many sums its programs store."""
        if config not in self._launches:
            found = self._constants(
                samples=config.samples, block=config.block, **self._slices(config)
            )
            launch = Launch(
                consistency_kernel, config.programs, self._device, C=found,
                num_warps=config.num_warps, maxnreg=config.registers,
            )  # fmt: skip
            self._launches[config] = launch, plain(found.sums) * config.programs
        return self._launches[config]


_call = functools.lru_cache(maxsize=256)(_Call)


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
    samples: torch.Size


def _geometry(logits: Layout, given: Iterable[tuple]) -> _Geometry:
    """The geometry of stacks of logits, and of what each sample has: targets and weights."""
    stacks = [
        torch.empty_strided(shape, stride, device="meta") for _, shape, stride, _ in logits
    ]
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
    of_given = [stride[: len(samples)] for _, _, stride, _ in given]
    sizes, axes = _axes(samples, (*of_samples, *of_given))
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
        samples,
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


def _rests(numbers: Sequence[float]) -> tuple[float, ...]:
    """What is lost of the numbers when Triton takes them as float32."""
    exact = torch.tensor(numbers, dtype=torch.float64)
    return tuple((exact - exact.float()).tolist())
