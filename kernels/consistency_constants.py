"""What the consistency's kernel is compiled for."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import triton.language as tl

from ..algebra import consistency as algebra
from ..algebra.divergences import KL, MIXTURE
from .constants import Constants

NO_TARGET, INDICES, PROBABILITIES = (tl.constexpr(i) for i in range(3))


@dataclass(frozen=True, eq=False)
class ConsistencyConstants(Constants):
    """
    Attributes:
        k: classes.
        head_count, group_count: how many there are.
        heads, gradient_heads: of each head its stack, its index in that, and its strides.
        unit: of the strides of heads and samples, a power of 2: so Triton knows, of any batch,
            that 16 bytes can be read at a time.
        binary: there is one class in memory; the logit of the other is 0.
        groups: of each its first head, and how many it has; for each of them too
        teachers, divergences, detach: as algebra.consistency numbers them;
        powers: T, where exp(x) is that power of exp(x/T), or 0;
        plain: whether there are cross entropies;
        summed: whether their labels are of more than one class;
        other: whether heads have a divergence that isn't KL(q || p);
        pairs: whether they have KL of pairs.
        reduction: as algebra.consistency numbers it.
        target: NO_TARGET, INDICES or PROBABILITIES.
        smooth, weighted, shared: whether there are smoothing, weights of classes, of samples.
        soft: whether labels are a tile of numbers.
        split: whether the mean of the cross entropies is by class weights.
        keep: whether gradients are asked for.
        samples, block: samples and classes at a time.
        slices: of those classes where there are more; a thread sums over one.
        side_by_side: whether the classes of a slice are, else those of the same place in all of
            them.
        sums, padded: stored by each program, and that padded to a power of 2.
        lowest: number of the logits' dtype, which masks a class.
        acc: dtype of the sums.
    """

    k: Any
    head_count: Any
    group_count: Any
    heads: Any
    gradient_heads: Any
    unit: Any
    binary: Any
    groups: Any
    teachers: Any
    divergences: Any
    detach: Any
    powers: Any
    plain: Any
    summed: Any
    other: Any
    pairs: Any
    reduction: Any
    target: Any
    smooth: Any
    weighted: Any
    shared: Any
    soft: Any
    split: Any
    keep: Any
    samples: Any
    block: Any
    slices: Any
    side_by_side: Any
    sums: Any
    padded: Any
    lowest: Any
    acc: Any


@functools.lru_cache(maxsize=256)
def constants(
    *,
    groups: tuple[int, ...],
    teachers: tuple[int, ...],
    divergences: tuple[int, ...],
    target: tl.constexpr,
    smooth: bool,
    weighted: bool,
    **others: Any,
) -> ConsistencyConstants:
    """From the sizes of the groups, and what can't be concluded."""
    named = tuple(zip(groups, teachers, divergences, strict=True))
    mixes = [name == MIXTURE for name in divergences]
    other = tuple(name != KL and (size > 1 or name == MIXTURE) for size, _, name in named)
    split = target == INDICES and weighted
    sums = 2 * sum(groups) + (4 if split else 2)
    soft = target == PROBABILITIES or (target == INDICES and (any(mixes) or (weighted and smooth)))
    plain = tuple(target != NO_TARGET and not mixture for mixture in mixes)
    return ConsistencyConstants.of(
        head_count=sum(groups),
        group_count=len(groups),
        groups=tuple((sum(groups[:g]), size) for g, size in enumerate(groups)),
        # A mixture has no teacher: the head is all that is known of its softmaxes.
        teachers=tuple(algebra.PAIRWISE if name == MIXTURE else kind for _, kind, name in named),
        divergences=divergences,
        plain=plain,
        summed=tuple(each and (soft or smooth) for each in plain),
        other=other,
        pairs=tuple(
            size > 1 and kind == algebra.PAIRWISE and not another
            for (size, kind, _), another in zip(named, other, strict=True)
        ),
        target=target,
        smooth=smooth,
        weighted=weighted,
        soft=soft,
        split=split,
        sums=sums,
        padded=1 << (sums - 1).bit_length(),
        **others,
    )
