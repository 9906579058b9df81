"""The collaborative consistency, value and gradient, of all heads in one launch.

loss = sum_h ce_h CE(z_h, y) + kl_h T^2 KL(q_h || p_h), p_h = softmax(z_h/T), q_h = softmax(t_h)
dz_h = ce_h (softmax(z_h) sum(y) - y) + kl_h T (p_h - q_h)

with t_h, what teachers learn that aren't detached, and P and Q of pairwise ones as in docs/math.md,
"Collaborative consistency". Labels y are an index, smoothed or not, or soft: a tile of any numbers,
class weights included. Other divergences than KL, and mixtures of the label and the heads, are in
consistency_divergences.py. Of BINARY logits there is one class in memory; the logit of the other
is 0.

A program takes some samples at a time, of each all heads, group by group. Classes that
fit into registers are read once. More are taken in chunks, maxima and sums running along
(online softmax), those of every thread until there are no more, and read a second time for
the gradient; a third time for pairwise teachers that are not detached. The gradient of the label's
class is then stored once more: to look for it would cost every class two instructions.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..algebra import consistency as algebra
from .config import PARTIALS, TARGETS
from .consistency_constants import INDICES, PROBABILITIES
from .consistency_divergences import (
    KL,
    MIXTURE,
    add_divergences,
    add_label,
    divergence_gradient,
    passed_on,
)
from .consistency_tiles import (
    FINAL,
    LOG2_E,
    MEAN,
    OTHERS,
    PAIRWISE,
    Numbers,
    Samples,
    Tile,
    absorb,
    absorb_alone,
    add_pairwise,
    add_toward,
    cross_entropy,
    divergence,
    initial,
    into_teacher,
    merged,
    pairwise_gradient,
    plain_gradient,
    sums_after,
    taught_gradient,
    times,
)
from .numerics import rounded
from .reduction import draws_last_ticket, totals

_REDUCE_MEAN = tl.constexpr(algebra.REDUCE_MEAN)
_REDUCE_SUM = tl.constexpr(algebra.REDUCE_SUM)
_REDUCE_NONE = tl.constexpr(algebra.REDUCE_NONE)
_TARGETS = tl.constexpr(TARGETS)
_PARTIALS = tl.constexpr(PARTIALS)

# Tuples that every function takes as the kernel got them: ``logits`` and ``gradients`` are stacks,
# the sizes of the axes of the samples, and what strides stacks have, of heads and samples in units;
# ``labels`` a target, its strides of samples, its stride of classes, class weights, their stride,
# weights of the samples, their strides.


@triton.jit
def _numbers(numbers, FIRST: tl.constexpr, N: tl.constexpr, ACC: tl.constexpr):
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
def _places(at, index, k, HEADS: tl.constexpr, H: tl.constexpr, UNIT: tl.constexpr):
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
def _across(k):
    """Classes [K] or [S, K] as (1, K) or [S, K]."""
    if len(k.shape) == 1:
        return k[None, :]
    else:
        return k


@triton.jit
def _read(logits, samples, k, mask, EXACT: tl.constexpr, C: tl.constexpr, G: tl.constexpr):
    """The logits [S, K] of every head of a group; if not exact, those of masked classes are
    numbers whose exponentials are 0."""
    k = _across(k)
    FIRST: tl.constexpr = C.groups[G][0]
    N: tl.constexpr = C.groups[G][1]
    z = ()
    other = tl.where(samples.counted, float("-inf"), 0.0)[:, None]
    if C.binary:
        mask = mask & (k < 1)
        other = tl.where(k < C.k, 0.0, other)
    for i in tl.static_range(N):
        places = _places(logits, samples.index, k, C.heads, FIRST + i, C.unit)
        of_head = tl.load(places, mask=mask, other=other).to(C.acc)  # [S, K]
        z += (_masked(of_head, C) if EXACT or C.lowest > -1e38 else of_head,)
    return z


@triton.jit
def _read_labels(logits, samples, C: tl.constexpr, G: tl.constexpr):
    """The logits [S] of the label of every head, of the first class where it is unknown; 0 where
    labels are no class."""
    FIRST: tl.constexpr = C.groups[G][0]
    N: tl.constexpr = C.groups[G][1]
    z = ()
    for i in tl.static_range(N):
        if C.plain[G] and not C.soft:
            k = tl.maximum(samples.label, 0)[:, None]
            places = _places(logits, samples.index, k, C.heads, FIRST + i, C.unit)
            of_head = tl.load(places, mask=samples.counted[:, None], other=0.0).to(C.acc)
            of_head = _masked(tl.sum(of_head, 1), C)  # [S]
        else:
            of_head = tl.zeros([C.samples], C.acc)
        z += (of_head,)
    return z


@triton.jit
def _soft(labels, sizes, samples, smoothing, k, mask, C: tl.constexpr):
    """Soft labels [S, K], 0 outside of the mask."""
    if C.soft:
        k = _across(k)
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
def _label_size(labels, sizes, samples, smoothing, C: tl.constexpr):
    """The sum of soft labels, or the class weight of an index, NaN of an unknown one; [S]."""
    if C.soft:
        size = tl.zeros(samples.index.shape, C.acc)
        for first in range(0, C.k, C.block):
            k = first + tl.arange(0, C.block)
            mask = samples.counted[:, None] & (k < C.k)[None, :]
            size += tl.sum(_soft(labels, sizes, samples, smoothing, k, mask, C), 1)
        return size
    else:
        weight = _class_weight(labels, samples.label, samples.counted)
        return tl.where(samples.label >= 0, weight, float("nan"))


@triton.jit
def _write(gradients, index, tile, dz, H: tl.constexpr, C: tl.constexpr):
    mask = tile.stored
    if C.binary:
        mask = mask & (_across(tile.k) < 1)
    places = _places(gradients, index, _across(tile.k), C.gradient_heads, H, C.unit)
    tl.store(places, rounded(dz, places.dtype.element_ty), mask=mask)  # [S, K]


@triton.jit
def _tile(first, logits, labels, samples, smoothing, C: tl.constexpr, G: tl.constexpr):
    """The classes from the first on, of every head of a group."""
    k = first + tl.arange(0, C.block)
    inside = (k < C.k)[None, :]
    mask = samples.counted[:, None] & inside
    # With the states known, the gradient of a detached teacher's head is of exponentials alone.
    EXACT: tl.constexpr = C.k <= C.block or C.other[G] or C.pairs[G] or not C.detach[G]
    z = _read(logits, samples, k, mask, EXACT, C, G)
    soft = _soft(labels, logits[1], samples, smoothing, k, mask, C)
    after = () if C.k <= C.block else sums_after(z, C.teachers[G])
    return Tile(z, after, soft, k, inside, samples.stored[:, None] & inside)


@triton.jit
def _tile_of_labels(z_y, samples, C: tl.constexpr, G: tl.constexpr):
    """Of every sample the class of its label, (S, 1)."""
    z = ()
    for i in tl.static_range(len(z_y)):
        z += (z_y[i][:, None],)
    label = samples.label[:, None]
    stored = samples.counted[:, None] & (label >= 0)
    return Tile(z, sums_after(z, C.teachers[G]), 0.0, label, stored, stored)


@triton.jit
def _repeated(x, C: tl.constexpr):
    """What samples have, [S], for each of their slices, [S SLICES]."""
    spread = tl.broadcast_to(x[:, None], [C.samples, C.slices])
    return tl.reshape(spread, [C.samples * C.slices])


@triton.jit
def _sliced(first, logits, labels, samples, smoothing, C: tl.constexpr, G: tl.constexpr):
    """The classes from the first on, of every head of a group, as a tile [S SLICES, K / SLICES]:
    every slice is a sample of its own, and has a thread of its own."""
    EACH: tl.constexpr = C.block // C.slices
    slice_ = tl.arange(0, C.samples * C.slices)
    if C.samples > 1:
        slice_ = slice_ % C.slices
    if C.side_by_side:
        k = first + (slice_ * EACH)[:, None] + tl.arange(0, EACH)[None, :]
    else:
        k = first + slice_[:, None] + (tl.arange(0, EACH) * C.slices)[None, :]
    inside = k < C.k
    mask = samples.counted[:, None] & inside
    z = _read(logits, samples, k, mask, True, C, G)
    soft = _soft(labels, logits[1], samples, smoothing, k, mask, C)
    return Tile(z, sums_after(z, C.teachers[G]), soft, k, inside, mask)


@triton.jit
def _read_states(
    logits, labels, samples, smoothing, inverse_t, C: tl.constexpr, G: tl.constexpr
):  # fmt: skip
    """The states of all heads of a group, after a pass over classes in chunks. Every thread sums
    over its own, for threads that add up wait for one another: so they do once."""
    rows = Samples(
        _repeated(samples.index, C), _repeated(samples.stored, C), _repeated(samples.counted, C),
        _repeated(samples.label, C), samples.size,
    )  # fmt: skip
    states = initial(inverse_t, C.groups[G][1], C.samples * C.slices, C.acc)
    for first in range(0, C.k, C.block):
        tile = _sliced(first, logits, labels, rows, smoothing, C, G)
        states = _absorb_heads(tile, inverse_t, states, C, G)
    return merged(states, inverse_t, C.teachers[G], C.samples, C.slices)


@triton.jit
def _terms(
    z_y, samples, numbers, state, pairs, H: tl.constexpr, C: tl.constexpr, G: tl.constexpr
):  # fmt: skip
    """CE and T^2 KL of head H of a group, each [S]; of a mixture z_y is the label's KL. ``pairs``
    are pairwise divergences, and all that aren't KL."""
    N: tl.constexpr = C.groups[G][1]
    TEACHER: tl.constexpr = C.teachers[G]
    ce = tl.zeros_like(pairs)
    kl = pairs
    if C.plain[G]:
        ce = cross_entropy(z_y, state, numbers.smoothing, samples, C)
        if C.weighted and not C.soft:
            ce = times(samples.size, ce)
        ce = tl.where(samples.label >= 0, ce, float("nan"))
    elif C.divergences[G] == MIXTURE:
        ce = tl.where(samples.label >= 0, z_y, float("nan"))
    TAUGHT: tl.constexpr = N > 1 and TEACHER != PAIRWISE and not (TEACHER == FINAL and H == N - 1)
    if TAUGHT and C.divergences[G] == KL:
        kl = divergence(state)
    t = numbers.temperature
    return tl.where(samples.counted, ce, 0.0), tl.where(samples.counted, kl * t * t, 0.0)


@triton.jit
def _absorb_heads(tile, inverse_t, states, C: tl.constexpr, G: tl.constexpr):
    """The states of all heads of a group after these classes."""
    N: tl.constexpr = C.groups[G][1]
    if N == 1 and C.divergences[G] != MIXTURE:
        return (absorb_alone(tile, states[0], C, G),)
    else:
        risen = (states[0][0], states[0][0])
        new = ()
        for i in tl.static_range(N):
            state, risen = absorb(
                tile, inverse_t, states[i], (new + states)[0], risen, i, C, G
            )
            new += (state,)
        return new


@triton.jit
def _gradients_and_terms(
    tile, z_y, samples, numbers, states, gradients, scales, C: tl.constexpr, G: tl.constexpr
):  # fmt: skip
    """Terms of a group whose classes are all at hand, and whose teachers are detached.

    The gradient of each head is stored while its exponentials are in registers.
    """
    N: tl.constexpr = C.groups[G][1]
    TEACHER: tl.constexpr = C.teachers[G]
    zero = tl.zeros([C.samples], C.acc)
    risen = (zero, zero)
    first = states[0]
    ce_terms = ()
    kl_terms = ()
    for i in tl.static_range(N):
        dz = tl.zeros_like(tile.z[i])
        if N == 1:
            state = absorb_alone(tile, states[i], C, G)
        else:
            state, risen = absorb(tile, numbers.inverse_t, states[i], first, risen, i, C, G)
            if i == 0:
                first = state
            if not (TEACHER == FINAL and i == N - 1):
                kl = scales[1] * numbers.temperature * numbers.kl[i]
                dz = taught_gradient(tile, numbers.inverse_t, state, kl, i, TEACHER)
        if C.plain[G]:
            dz += plain_gradient(
                tile, samples, numbers, state, scales[0] * numbers.ce[i], i, C, G
            )
        _write(gradients, samples.index, tile, dz, C.groups[G][0] + i, C)
        ce_term, kl_term = _terms(z_y[i], samples, numbers, state, zero, i, C, G)
        ce_terms += (ce_term,)
        kl_terms += (kl_term,)
    return ce_terms, kl_terms


@triton.jit
def _store_gradients(
    tile, samples, numbers, states, toward, divergences, gradients, scales, C: tl.constexpr,
    G: tl.constexpr,
):  # fmt: skip
    """Store the gradients of a group's heads in these classes, once the states are known."""
    N: tl.constexpr = C.groups[G][1]
    TEACHER: tl.constexpr = C.teachers[G]
    DETACH: tl.constexpr = C.detach[G]
    TAUGHT: tl.constexpr = N > 1 and TEACHER != PAIRWISE
    HEADS_TAUGHT: tl.constexpr = N - 1 if TEACHER == FINAL else N
    inverse_t = numbers.inverse_t
    into = tl.zeros_like(tile.z[0])
    kl_scale = scales[1] * numbers.temperature
    if C.other[G]:
        if not DETACH:
            into = passed_on(tile, numbers, states, divergences, kl_scale, C, G)
    elif TAUGHT and not DETACH:
        for i in tl.static_range(HEADS_TAUGHT):
            kl = kl_scale * numbers.kl[i]
            into += into_teacher(tile, inverse_t, states[i], kl, i, TEACHER)
    for i in tl.static_range(N):
        dz = tl.zeros_like(tile.z[i])
        kl = kl_scale * numbers.kl[i]
        if C.other[G]:
            dz = divergence_gradient(tile, numbers, states, divergences, kl_scale, into, i, C, G)
        elif C.pairs[G]:
            dz = pairwise_gradient(tile, numbers, states, toward, kl_scale, i, DETACH)
        elif TAUGHT:
            if i < HEADS_TAUGHT:
                dz = taught_gradient(tile, inverse_t, states[i], kl, i, TEACHER)
            if not DETACH:
                if TEACHER == OTHERS:
                    mine = into_teacher(tile, inverse_t, states[i], kl, i, TEACHER)
                    dz += (into - mine) * (1.0 / (N - 1))
                elif TEACHER == MEAN:
                    dz += into * (1.0 / N)
                elif i == N - 1:
                    dz += into
        if C.plain[G]:
            dz += plain_gradient(
                tile, samples, numbers, states[i], scales[0] * numbers.ce[i], i, C, G
            )
        _write(gradients, samples.index, tile, dz, C.groups[G][0] + i, C)


@triton.jit
def _group(
    logits, labels, gradients, samples, numbers, scales, C: tl.constexpr, G: tl.constexpr
):  # fmt: skip
    """CE and T^2 KL of the heads of a group, tuples of [S]; stores their gradients, scaled by those
    of the cross entropies and of the divergences, each [S]."""
    N: tl.constexpr = C.groups[G][1]
    MIXED: tl.constexpr = C.divergences[G] == MIXTURE
    OTHER: tl.constexpr = C.other[G]
    PAIRS: tl.constexpr = C.pairs[G]
    PULLED: tl.constexpr = C.keep and PAIRS and not C.detach[G]
    zero = tl.zeros([C.samples], C.acc)
    zeros = ()
    for _ in tl.static_range(N):
        zeros += (zero,)
    states = initial(numbers.inverse_t, N, C.samples, C.acc)
    toward = zeros
    pairs = zeros
    of_label = zero
    divergences = ()
    for _ in tl.static_range(N):
        divergences += ((zero, zero, zero),)
    smoothing, inverse_t = numbers.smoothing, numbers.inverse_t
    if C.k <= C.block:
        z_y = _read_labels(logits, samples, C, G)
        tile = _tile(0, logits, labels, samples, smoothing, C, G)
        if C.keep and not PAIRS and not OTHER and (C.detach[G] or N == 1):
            return _gradients_and_terms(
                tile, z_y, samples, numbers, states, gradients, scales, C, G
            )
        states = _absorb_heads(tile, inverse_t, states, C, G)
        if OTHER:
            divergences = add_divergences(tile, numbers, states, divergences, C, G)
        if MIXED:
            of_label = add_label(tile, numbers, states, of_label)
        if PULLED:
            toward = add_toward(tile, numbers, states, toward)
        if PAIRS:
            pairs = add_pairwise(tile, numbers, states, pairs)
        if C.keep:
            _store_gradients(
                tile, samples, numbers, states, toward, divergences, gradients, scales, C, G
            )
    else:
        states = _read_states(logits, labels, samples, smoothing, inverse_t, C, G)
        if OTHER:
            for first in range(0, C.k, C.block):
                tile = _tile(first, logits, labels, samples, smoothing, C, G)
                divergences = add_divergences(tile, numbers, states, divergences, C, G)
                if MIXED:
                    of_label = add_label(tile, numbers, states, of_label)
        if PULLED:
            for first in range(0, C.k, C.block):
                tile = _tile(first, logits, labels, samples, smoothing, C, G)
                toward = add_toward(tile, numbers, states, toward)
        if PAIRS or C.keep:
            for first in range(0, C.k, C.block):
                tile = _tile(first, logits, labels, samples, smoothing, C, G)
                if PAIRS:
                    pairs = add_pairwise(tile, numbers, states, pairs)
                if C.keep:
                    _store_gradients(
                        tile, samples, numbers, states, toward, divergences, gradients, scales, C, G
                    )
        z_y = _read_labels(logits, samples, C, G)
        if C.keep and C.plain[G] and not C.soft:
            tl.debug_barrier()  # the gradient without the label's part is stored there already
            tile = _tile_of_labels(z_y, samples, C, G)
            _store_gradients(
                tile, samples, numbers, states, toward, divergences, gradients, scales, C, G
            )
    ce_terms = ()
    kl_terms = ()
    for i in tl.static_range(N):
        ce_term, kl_term = _terms(
            of_label if MIXED else z_y[i], samples, numbers, states[i],
            divergences[i][0] if OTHER else pairs[i], i, C, G,
        )  # fmt: skip
        ce_terms += (ce_term,)
        kl_terms += (kl_term,)
    return ce_terms, kl_terms


@triton.jit
def _samples(labels, sizes, index, stored, ignore_index, C: tl.constexpr):
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
def _class_weight(labels, label, counted):
    """The class weight of each sample's index, 0 of an unknown one, [S]."""
    place = labels[3] + label.to(tl.int64) * labels[4]
    return tl.load(place, mask=counted & (label >= 0), other=0.0)


@triton.jit
def _no_sums(C: tl.constexpr):
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
def _with(sums, more, C: tl.constexpr):
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
def _store_sums(place, programs, sums, C: tl.constexpr):
    if C.samples == 1:
        which = tl.arange(0, C.padded)
        tl.store(place + which * programs, sums, mask=which < C.sums)
    else:
        for c in tl.static_range(C.sums):
            tl.store(place + c * programs, tl.sum(sums[c]))


@triton.jit
def _add_weights(labels, sizes, batch, ignore_index, C: tl.constexpr):
    """What the means of the cross entropies and of the divergences are divided by."""
    ce = tl.zeros([_TARGETS], C.acc)
    kl = tl.zeros([_TARGETS], C.acc)
    for first in range(0, batch, _TARGETS):
        b = first + tl.arange(0, _TARGETS)
        share, counted, label = _samples(labels, sizes, b, b < batch, ignore_index, C)
        kl += share
        if C.target == INDICES and C.weighted:
            share *= _class_weight(labels, label, counted)
        ce += share
    return tl.sum(ce), tl.sum(kl)


@triton.jit
def _finish(partials, programs, loss, terms, C: tl.constexpr):
    """Add up what all programs have stored, and write the loss and the terms."""
    H: tl.constexpr = C.head_count
    which = tl.arange(0, C.padded)
    sums = totals(partials, programs, C.sums, C.padded, _PARTIALS, C.acc)
    by = _one_of(sums, which, 2 * H + 1)
    if C.reduction != _REDUCE_NONE:
        whole = _one_of(sums, which, 2 * H)
        if C.reduction == _REDUCE_MEAN:
            whole = _averaged(whole, by)
        if C.split:
            ce = _one_of(sums, which, 2 * H + 3)
            if C.reduction == _REDUCE_MEAN:
                ce = _averaged(ce, _one_of(sums, which, 2 * H + 2))
            whole += ce
        tl.store(loss, whole)
    if C.reduction != _REDUCE_SUM:
        if C.split:
            by = tl.where(which < H, _one_of(sums, which, 2 * H + 2), by)
        sums = _averaged(sums, by)
    tl.store(terms + which, sums, mask=which < 2 * H)  # [2H]


@triton.jit
def _one_of(sums, which, WANTED: tl.constexpr):
    return tl.sum(tl.where(which == WANTED, sums, 0.0))


@triton.jit
def _averaged(total, weights):
    """total / weights; of no weights nothing."""
    return tl.where(weights == 0.0, total * 0.0, total / weights)


@triton.jit(do_not_specialize=["ignore_index", "batch"])
def consistency_kernel(
    logits, labels, ignore_index, numbers, gradients, results, batch, C: tl.constexpr
):  # fmt: skip
    """Numbers are ce_weight (H), kl_weight (H), T (G), label smoothing and, if a group's divergence
    isn't KL, beta (G), and the rests of all; results the partials, a ticket, the loss and the
    terms. Partials (2H + 2, programs): CE (H), KL (H), the loss, the weight of the samples; where
    class weights have the cross entropies averaged otherwise, two more: the weight of their labels,
    and their part of the loss.
    """
    H: tl.constexpr = C.head_count
    GROUPS: tl.constexpr = C.group_count
    sizes = logits[1]
    ce_weights = _numbers(numbers, 0, H, C.acc)
    kl_weights = _numbers(numbers, H, H, C.acc)
    temperatures = _numbers(numbers, 2 * H, GROUPS, C.acc)
    smoothing = _numbers(numbers, 2 * H + GROUPS, 1, C.acc)[0]
    betas = temperatures
    if len(numbers[0]) > 2 * H + GROUPS + 1:
        betas = _numbers(numbers, 2 * H + GROUPS + 1, GROUPS, C.acc)
    one = tl.full((), 1.0, C.acc)
    ce_mean = one
    kl_mean = one
    if C.keep and C.reduction == _REDUCE_MEAN:
        if C.target == INDICES or C.shared:
            ce_sum, kl_sum = _add_weights(labels, sizes, batch, ignore_index, C)
            kl_mean = _averaged(one, kl_sum)
            ce_mean = _averaged(one, ce_sum) if C.split else kl_mean
        else:
            kl_mean = 1.0 / batch.to(C.acc)
            ce_mean = kl_mean

    sums = _no_sums(C)
    programs = tl.num_programs(0)
    for start in range(tl.program_id(0) * C.samples, batch, programs * C.samples):
        index = start + tl.arange(0, C.samples)
        stored = index < batch
        share, counted, label = _samples(labels, sizes, index, stored, ignore_index, C)
        samples = Samples(index, stored, counted, label, share)
        kl_scale = share * kl_mean
        # No loss is right for an unknown class, and asking for it here would cost a wait.
        kl_scale = tl.where(counted & (label < 0), float("nan"), kl_scale)
        ce_scale = kl_scale
        if C.split or C.soft:
            size = _label_size(labels, sizes, samples, smoothing, C)
            samples = Samples(index, stored, counted, label, size)
        if C.split:
            ce_scale = share * ce_mean
            if not C.soft:
                ce_scale = times(ce_scale, samples.size)
            ce_scale = tl.where(counted & (label < 0), float("nan"), ce_scale)
        ce = ()
        kl = ()
        for g in tl.static_range(GROUPS):
            of_group = Numbers(
                ce_weights[C.groups[g][0]:C.groups[g][0] + C.groups[g][1]],
                kl_weights[C.groups[g][0]:C.groups[g][0] + C.groups[g][1]],
                temperatures[g], 1.0 / temperatures[g] * LOG2_E, betas[g], smoothing,
            )  # fmt: skip
            ce_terms, kl_terms = _group(
                logits, labels, gradients, samples, of_group, (ce_scale, kl_scale), C, g
            )
            ce += ce_terms
            kl += kl_terms
        ce_loss = tl.zeros([C.samples], C.acc)
        kl_loss = ce_loss
        more = ()
        for h in tl.static_range(H):
            term = times(share, ce[h]) if C.shared else ce[h]
            ce_loss += times(ce_weights[h], term)
            more += (term,)
        for h in tl.static_range(H):
            term = times(share, kl[h]) if C.shared else kl[h]
            kl_loss += times(kl_weights[h], term)
            more += (term,)
        if C.reduction == _REDUCE_NONE:
            tl.store(results[2] + index, ce_loss + kl_loss, mask=stored)  # [S]
        if C.split:
            of_label = share * _class_weight(labels, label, counted)
            more += (kl_loss, share, of_label, ce_loss)
        else:
            more += (ce_loss + kl_loss, share)
        sums = _with(sums, more, C)

    _store_sums(results[0] + tl.program_id(0), programs, sums, C)
    if draws_last_ticket(results[1], programs):
        _finish(results[0], programs, results[2], results[3], C)
