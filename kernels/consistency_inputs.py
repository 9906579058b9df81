"""Device functions that read what the consistency is given: logits, labels and weights."""

from __future__ import annotations

import triton
import triton.language as tl

from .consistency_constants import INDICES, PROBABILITIES

# Tuples that every function takes as the kernel got them: ``logits`` and ``gradients`` are stacks,
# the sizes of the axes of the samples, and what strides stacks have, of heads and samples in units;
# ``labels`` a target, its strides of samples, its stride of classes, class weights, their stride,
# weights of the samples, their strides.


@triton.jit
def numbers_of(numbers, FIRST: tl.constexpr, N: tl.constexpr, ACC: tl.constexpr):
    """N of the numbers, of which Triton takes the float32; float64 adds the rest of each."""
    values = ()
    for i in tl.static_range(N):
        if ACC == tl.float64:
            value = tl.cast(numbers[0][FIRST + i], ACC) + tl.cast(numbers[1][FIRST + i], ACC)
        else:
            value = tl.cast(numbers[0][FIRST + i], ACC)
        values += (value,)
    return values


@triton.jit
def _offsets(index, sizes, strides):
    """Where the samples lie, [S]; the last of their axes runs fastest."""
    rest = index.to(tl.int64)
    offsets = tl.zeros_like(rest)
    for i in tl.static_range(len(strides) - 1):
        offsets += rest % sizes[len(strides) - 1 - i] * strides[len(strides) - 1 - i]
        rest = rest // sizes[len(strides) - 1 - i]
    return offsets + rest * strides[0]


@triton.jit
def places_of(at, index, k, HEADS: tl.constexpr, H: tl.constexpr, UNIT: tl.constexpr):
    """Where the classes k, [S, K] or (1, K), of the samples lie in head H, [S, K]. Heads that lie
    alike share all but a number, and the registers for it."""
    stride = at[2][HEADS[H][2]]
    head = at[0][HEADS[H][0]] + tl.full((), HEADS[H][1], tl.int64) * stride[0] * UNIT
    rows = _offsets(index, at[1], stride[1]) * UNIT
    return head + (rows[:, None] + k.to(tl.int64) * stride[2])


@triton.jit
def _masked(z, C: tl.constexpr):
    """Logits as they are summed, -inf where they are the lowest number of their dtype."""
    return tl.where(z <= C.lowest, float("-inf"), z)


@triton.jit
def across(k):
    """Classes [K] or [S, K] as (1, K) or [S, K]."""
    if len(k.shape) == 1:
        return k[None, :]
    else:
        return k


@triton.jit
def read_logits(logits, samples, k, mask, EXACT: tl.constexpr, C: tl.constexpr, G: tl.constexpr):
    """The logits [S, K] of every head of a group; if not exact, those of masked classes are
    numbers whose exponentials are 0."""
    k = across(k)
    FIRST: tl.constexpr = C.groups[G][0]
    N: tl.constexpr = C.groups[G][1]
    z = ()
    other = tl.where(samples.counted, float("-inf"), 0.0)[:, None]
    if C.binary:
        mask = mask & (k < 1)
        other = tl.where(k < C.k, 0.0, other)
    for i in tl.static_range(N):
        places = places_of(logits, samples.index, k, C.heads, FIRST + i, C.unit)
        of_head = tl.load(places, mask=mask, other=other).to(C.acc)  # [S, K]
        # The exponential of float16's lowest number, -65504, is not 0 at every temperature.
        z += (_masked(of_head, C) if EXACT or C.lowest > -1e38 else of_head,)
    return z


@triton.jit
def read_label_logits(logits, samples, C: tl.constexpr, G: tl.constexpr):
    """The logits [S] of the label of every head, of the first class where it is unknown; 0 where
    labels are no class."""
    FIRST: tl.constexpr = C.groups[G][0]
    N: tl.constexpr = C.groups[G][1]
    z = ()
    for i in tl.static_range(N):
        if C.plain[G] and not C.soft:
            k = tl.maximum(samples.label, 0)[:, None]
            places = places_of(logits, samples.index, k, C.heads, FIRST + i, C.unit)
            of_head = tl.load(places, mask=samples.counted[:, None], other=0.0).to(C.acc)
            of_head = _masked(tl.sum(of_head, 1), C)  # [S]
        else:
            of_head = tl.zeros([C.samples], C.acc)
        z += (of_head,)
    return z


@triton.jit
def soft_labels(labels, sizes, samples, smoothing, k, mask, C: tl.constexpr):
    """Soft labels [S, K], 0 outside of the mask."""
    if C.soft:
        k = across(k)
        if C.target == PROBABILITIES:
            rows = labels[0] + _offsets(samples.index, sizes, labels[1])
            soft = tl.load(rows[:, None] + k.to(tl.int64) * labels[2], mask=mask, other=0.0)
            soft = soft.to(C.acc) * (1 - smoothing)  # [S, K]
        else:
            soft = tl.where(k == samples.label[:, None], 1 - smoothing, 0.0)
        soft += smoothing * (1.0 / C.k)
        if C.weighted:
            weight = tl.load(labels[3] + k.to(tl.int64) * labels[4], mask=k < C.k, other=0.0)
            soft *= weight  # (1, K), or [S, K]
        return tl.where(mask, soft, 0.0)
    else:
        return 0.0


@triton.jit
def read_samples(labels, sizes, index, stored, ignore_index, C: tl.constexpr):
    """The weight of each sample, 0 of one that doesn't count; whether it does; its index, -1 of
    an unknown one. All [S]."""
    counted = stored
    share = tl.where(counted, 1.0, 0.0).to(C.acc)
    label = tl.zeros(index.shape, tl.int32)
    if C.shared:
        place = labels[5] + _offsets(index, sizes, labels[6])
        share = tl.load(place, mask=stored, other=0.0)  # [S]
        counted = share != 0.0
    if C.target == INDICES:
        place = labels[0] + _offsets(index, sizes, labels[1])
        y = tl.load(place, mask=stored, other=ignore_index)  # [S]
        counted = counted & (y != ignore_index)
        share = tl.where(counted, share, 0.0)
        label = tl.where((y >= 0) & (y < C.k), y, -1).to(tl.int32)
    return share, counted, label


@triton.jit
def class_weight(labels, label, counted):
    """The class weight of each sample's index, 0 of an unknown one, [S]."""
    place = labels[3] + label.to(tl.int64) * labels[4]
    return tl.load(place, mask=counted & (label >= 0), other=0.0)
