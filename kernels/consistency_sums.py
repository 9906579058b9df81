"""Device functions of the sums over samples: those of a program, of all programs, and the loss, the
terms and the factors of means that come of them."""

from __future__ import annotations

import triton
import triton.language as tl

from ..algebra import consistency as algebra
from .config import PARTIALS, TARGETS
from .consistency_constants import INDICES
from .consistency_inputs import class_weight, read_samples
from .reduction import totals

REDUCE_MEAN = tl.constexpr(algebra.REDUCE_MEAN)
REDUCE_SUM = tl.constexpr(algebra.REDUCE_SUM)
REDUCE_NONE = tl.constexpr(algebra.REDUCE_NONE)
_TARGETS = tl.constexpr(TARGETS)
_PARTIALS = tl.constexpr(PARTIALS)


@triton.jit
def no_sums(C: tl.constexpr):
    """What a program adds up, before its first sample: a tuple of [S]; of one sample at a time a
    tile of numbers, which every thread has a few of, not all."""
    if C.samples == 1:
        return tl.zeros([C.padded], C.acc)
    else:
        sums = ()
        for _ in tl.static_range(C.sums):
            sums += (tl.zeros([C.samples], C.acc),)
        return sums


@triton.jit
def with_more(sums, more, C: tl.constexpr):
    """Sums and more ones, a tuple of [S]."""
    if C.samples == 1:
        which = tl.arange(0, C.padded)
        for c in tl.static_range(C.sums):
            sums += tl.where(which == c, tl.sum(more[c]), 0.0)
        return sums
    else:
        new = ()
        for c in tl.static_range(C.sums):
            new += (sums[c] + more[c],)
        return new


@triton.jit
def store_sums(place, programs, sums, C: tl.constexpr):
    if C.samples == 1:
        which = tl.arange(0, C.padded)
        tl.store(place + which * programs, sums, mask=which < C.sums)
    else:
        for c in tl.static_range(C.sums):
            tl.store(place + c * programs, tl.sum(sums[c]))


@triton.jit
def add_weights(labels, sizes, batch, ignore_index, C: tl.constexpr):
    """What the means of the cross entropies and of the divergences are divided by."""
    ce = tl.zeros([_TARGETS], C.acc)
    kl = tl.zeros([_TARGETS], C.acc)
    for first in range(0, batch, _TARGETS):
        b = first + tl.arange(0, _TARGETS)
        share, counted, label = read_samples(labels, sizes, b, b < batch, ignore_index, C)
        kl += share
        if C.target == INDICES and C.weighted:
            share *= class_weight(labels, label, counted)
        ce += share
    return tl.sum(ce), tl.sum(kl)


@triton.jit
def finish(partials, programs, loss, terms, C: tl.constexpr):
    """Add up what all programs have stored, and write the loss and the terms."""
    H: tl.constexpr = C.head_count
    which = tl.arange(0, C.padded)
    sums = totals(partials, programs, C.sums, C.padded, _PARTIALS, C.acc)
    by = _one_of(sums, which, 2 * H + 1)
    if C.reduction != REDUCE_NONE:
        whole = _one_of(sums, which, 2 * H)
        if C.reduction == REDUCE_MEAN:
            whole = averaged(whole, by)
        if C.split:
            ce = _one_of(sums, which, 2 * H + 3)
            if C.reduction == REDUCE_MEAN:
                ce = averaged(ce, _one_of(sums, which, 2 * H + 2))
            whole += ce
        tl.store(loss, whole)
    if C.reduction != REDUCE_SUM:
        if C.split:
            by = tl.where(which < H, _one_of(sums, which, 2 * H + 2), by)
        sums = averaged(sums, by)
    tl.store(terms + which, sums, mask=which < 2 * H)  # [2H]


@triton.jit
def _one_of(sums, which, WANTED: tl.constexpr):
    return tl.sum(tl.where(which == WANTED, sums, 0.0))


@triton.jit
def averaged(total, weights):
    """total / weights; of no weights nothing."""
    return tl.where(weights == 0.0, total * 0.0, total / weights)
