"""The collaborative consistency, value and gradient, of all heads in one launch.

loss = sum_h ce_h CE(z_h, y) + kl_h T^2 KL(q_h || p_h), p_h = softmax(z_h/T), and

others    q_h = softmax(t_h), t_h = sum_{j != h} z_j/(T (n - 1))
mean      q_h = softmax(t), t = sum_j z_j/(T n)
final     q_h = p_n, and no KL for head n itself
pairwise  the mean of KL(p_j || p_h) over j != h; with P = sum_j p_j and
          Q = sum_j p_j log p_j it is sum_k (Q - P log p_h)/(n - 1)

dz_h = ce_h (softmax(z_h) - y) + kl_h T (p_h - q_h), and where a teacher is not detached,
T kl_h q_h (log q_h - log p_h - KL_h) goes into t_h and on to the logits t_h averages.

A program takes some samples at a time, of each all heads, group by group. Classes that
fit into registers are read once. More are taken in chunks, maxima and sums running along
(online softmax), and read a second time for the gradient; a third time for pairwise
teachers that are not detached.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..algebra import consistency as algebra
from .consistency_tiles import (
    FINAL,
    LOG2_E,
    MEAN,
    OTHERS,
    PAIRWISE,
    absorb,
    absorb_alone,
    add_pairwise,
    add_toward,
    cross_entropy,
    divergence,
    initial,
    into_teacher,
    pairwise_gradient,
    plain_gradient,
    taught_gradient,
    teacher_of,
    teacher_share,
    times,
)
from .reduction import draws_last_ticket, totals

_REDUCE_MEAN = tl.constexpr(algebra.REDUCE_MEAN)
_REDUCE_SUM = tl.constexpr(algebra.REDUCE_SUM)
_REDUCE_NONE = tl.constexpr(algebra.REDUCE_NONE)
_TARGETS = tl.constexpr(1024)  # counted at a time
_PARTIALS = tl.constexpr(128)  # of each sum, added at a time


@triton.jit
def _numbers(numbers, rests, FIRST: tl.constexpr, N: tl.constexpr, ACC: tl.constexpr):
    """N of the numbers, of which Triton takes the float32; float64 adds the rest of each."""
    values = ()
    for i in tl.static_range(N):
        if ACC == tl.float64:
            value = tl.cast(numbers[FIRST + i], ACC) + tl.cast(rests[FIRST + i], ACC)
        else:
            value = tl.cast(numbers[FIRST + i], ACC)
        values += (value,)
    return values


@triton.jit
def _row(
    blocks, strides, samples, HEADS: tl.constexpr, H: tl.constexpr, UNIT: tl.constexpr
):  # fmt: skip
    """Where the samples' rows of head H begin, [S].

    The strides of heads and samples are in UNITs, a power of 2: so Triton knows, of any
    batch, that 16 bytes can be read at a time.
    """
    stride = strides[HEADS[H][0]]
    head = tl.full((), HEADS[H][1], tl.int64) * stride[0]
    return blocks[HEADS[H][0]] + (head + samples.to(tl.int64) * stride[1]) * UNIT


@triton.jit
def _masked(z, LOWEST: tl.constexpr, ACC: tl.constexpr):
    """Logits as ACC, -inf where they are the lowest number of their dtype."""
    z = z.to(ACC)
    return tl.where(z <= LOWEST, float("-inf"), z)


@triton.jit
def _read(
    blocks, strides, samples, k, mask, HEADS: tl.constexpr, FIRST: tl.constexpr,
    N: tl.constexpr, UNIT: tl.constexpr, LOWEST: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The logits [S, K] of every head."""
    z = ()
    for i in tl.static_range(N):
        row = _row(blocks, strides, samples, HEADS, FIRST + i, UNIT)
        step = strides[HEADS[FIRST + i][0]][2]
        pointers = row[:, None] + (k.to(tl.int64) * step)[None, :]
        z += (_masked(tl.load(pointers, mask=mask, other=0.0), LOWEST, ACC),)  # [S, K]
    return z


@triton.jit
def _read_labels(
    blocks, strides, samples, label, counted, HEADS: tl.constexpr, FIRST: tl.constexpr,
    N: tl.constexpr, UNIT: tl.constexpr, LOWEST: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The logits [S] of the label of every head, of the first class where it is unknown."""
    z = ()
    for i in tl.static_range(N):
        row = _row(blocks, strides, samples, HEADS, FIRST + i, UNIT)
        offset = tl.maximum(label, 0).to(tl.int64) * strides[HEADS[FIRST + i][0]][2]
        z += (_masked(tl.load(row + offset, mask=counted, other=0.0), LOWEST, ACC),)  # [S]
    return z


@triton.jit
def _write(
    blocks, strides, samples, k, mask, dz, HEADS: tl.constexpr, H: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    row = _row(blocks, strides, samples, HEADS, H, UNIT)
    step = strides[HEADS[H][0]][2]
    tl.store(row[:, None] + (k.to(tl.int64) * step)[None, :], dz, mask=mask)


@triton.jit
def _classes(first, counted, stored, K: tl.constexpr, BLOCK: tl.constexpr):
    """Classes [K] from the first on, whether they exist, are to be read, to be stored."""
    k = first + tl.arange(0, BLOCK)
    inside = (k < K)[None, :]
    return k, inside, counted[:, None] & inside, stored[:, None] & inside


@triton.jit
def _terms(
    z_y, label, counted, state, pairs, temperature, smoothing, N: tl.constexpr,
    H: tl.constexpr, TEACHER: tl.constexpr, PLAIN: tl.constexpr, SMOOTH: tl.constexpr,
):  # fmt: skip
    """CE and T^2 KL of head H of N, each [S]."""
    ce = tl.zeros_like(pairs)
    kl = pairs
    if PLAIN:
        ce = cross_entropy(z_y, state, smoothing, SMOOTH)
        ce = tl.where(label >= 0, ce, float("nan"))
    if N > 1 and TEACHER != PAIRWISE and not (TEACHER == FINAL and H == N - 1):
        kl = divergence(state)
    return tl.where(counted, ce, 0.0), tl.where(counted, kl * temperature * temperature, 0.0)


@triton.jit
def _absorb_heads(
    z, inside, inverse_t, states, TEACHER: tl.constexpr, K: tl.constexpr,
    PLAIN: tl.constexpr, SMOOTH: tl.constexpr, POWER: tl.constexpr,
):  # fmt: skip
    """The states of all heads of a group after these classes."""
    N: tl.constexpr = len(z)
    if N == 1:
        return (absorb_alone(z[0], inside, states[0], K, PLAIN, SMOOTH),)
    else:
        share = teacher_share(inverse_t, N, TEACHER)
        risen = (states[0][0], states[0][0])
        new = ()
        for i in tl.static_range(N):
            u = teacher_of(z, i, TEACHER)
            state, risen = absorb(
                z[i], u, inside, inverse_t, share, states[i], (new + states)[0], risen,
                TEACHER == OTHERS or i == 0, TEACHER != PAIRWISE, K, PLAIN, SMOOTH, POWER,
            )  # fmt: skip
            new += (state,)
        return new


@triton.jit
def _gradients_and_terms(
    z, z_y, k, inside, mask, inverse_t, temperature, smoothing, label, counted, states, zero,
    samples, gradients, strides, ce_weights, kl_weights, scale, HEADS: tl.constexpr,
    FIRST: tl.constexpr, UNIT: tl.constexpr, TEACHER: tl.constexpr, POWER: tl.constexpr,
    K: tl.constexpr, PLAIN: tl.constexpr, SMOOTH: tl.constexpr,
):  # fmt: skip
    """Terms of a group whose classes are all at hand, and whose teachers are detached.

    The gradient of each head is stored while its exponentials are in registers.
    """
    N: tl.constexpr = len(z)
    share = teacher_share(inverse_t, N, TEACHER) if N > 1 else inverse_t
    risen = (zero, zero)
    first = states[0]
    ce_terms = ()
    kl_terms = ()
    for i in tl.static_range(N):
        dz = tl.zeros_like(z[i])
        if N == 1:
            state = absorb_alone(z[i], inside, states[i], K, PLAIN, SMOOTH)
        else:
            u = teacher_of(z, i, TEACHER)
            state, risen = absorb(
                z[i], u, inside, inverse_t, share, states[i], first, risen,
                TEACHER == OTHERS or i == 0, True, K, PLAIN, SMOOTH, POWER,
            )  # fmt: skip
            if i == 0:
                first = state
            if not (TEACHER == FINAL and i == N - 1):
                kl = scale * temperature * kl_weights[i]
                dz = taught_gradient(z[i], u, inside, inverse_t, share, state, kl)
        if PLAIN:
            dz += plain_gradient(
                z[i], k, inside, inverse_t, label, state, scale * ce_weights[i], smoothing, K,
                SMOOTH, POWER if N > 1 else 0,
            )  # fmt: skip
        _write(gradients, strides, samples, k, mask, dz, HEADS, FIRST + i, UNIT)
        ce_term, kl_term = _terms(
            z_y[i], label, counted, state, zero, temperature, smoothing, N, i, TEACHER, PLAIN,
            SMOOTH,
        )  # fmt: skip
        ce_terms += (ce_term,)
        kl_terms += (kl_term,)
    return ce_terms, kl_terms


@triton.jit
def _store_gradients(
    z, k, inside, mask, inverse_t, temperature, smoothing, label, states, toward, samples,
    gradients, strides, ce_weights, kl_weights, scale, HEADS: tl.constexpr,
    FIRST: tl.constexpr, UNIT: tl.constexpr, TEACHER: tl.constexpr, DETACH: tl.constexpr,
    POWER: tl.constexpr, K: tl.constexpr, PLAIN: tl.constexpr, SMOOTH: tl.constexpr,
):  # fmt: skip
    """Store the gradients of a group's heads in these classes, once the states are known."""
    N: tl.constexpr = len(z)
    TAUGHT: tl.constexpr = N > 1 and TEACHER != PAIRWISE
    HEADS_TAUGHT: tl.constexpr = N - 1 if TEACHER == FINAL else N
    share = teacher_share(inverse_t, N, TEACHER) if N > 1 else inverse_t
    into = tl.zeros_like(z[0])
    kl_scale = scale * temperature
    if TAUGHT and not DETACH:
        for i in tl.static_range(HEADS_TAUGHT):
            u = teacher_of(z, i, TEACHER)
            kl = kl_scale * kl_weights[i]
            into += into_teacher(z[i], u, inside, inverse_t, share, states[i], kl)
    for i in tl.static_range(N):
        dz = tl.zeros_like(z[i])
        kl = kl_scale * kl_weights[i]
        if N > 1 and TEACHER == PAIRWISE:
            dz = pairwise_gradient(
                z, inside, inverse_t, states, kl_weights, toward, kl_scale, i, DETACH
            )
        elif TAUGHT:
            u = teacher_of(z, i, TEACHER)
            if i < HEADS_TAUGHT:
                dz = taught_gradient(z[i], u, inside, inverse_t, share, states[i], kl)
            if not DETACH:
                if TEACHER == OTHERS:
                    mine = into_teacher(z[i], u, inside, inverse_t, share, states[i], kl)
                    dz += (into - mine) * (1.0 / (N - 1))
                elif TEACHER == MEAN:
                    dz += into * (1.0 / N)
                elif i == N - 1:
                    dz += into
        if PLAIN:
            dz += plain_gradient(
                z[i], k, inside, inverse_t, label, states[i], scale * ce_weights[i], smoothing,
                K, SMOOTH, POWER if N > 1 else 0,
            )  # fmt: skip
        _write(gradients, strides, samples, k, mask, dz, HEADS, FIRST + i, UNIT)


@triton.jit
def _group(
    logits, strides, gradients, gradient_strides, samples, ce_weights, kl_weights, temperature,
    smoothing, label, counted, stored, scale, HEADS: tl.constexpr,
    GRADIENT_HEADS: tl.constexpr, FIRST: tl.constexpr, N: tl.constexpr, UNIT: tl.constexpr,
    TEACHER: tl.constexpr, DETACH: tl.constexpr, POWER: tl.constexpr, K: tl.constexpr,
    SAMPLES: tl.constexpr, BLOCK: tl.constexpr, PLAIN: tl.constexpr, SMOOTH: tl.constexpr,
    KEEP: tl.constexpr, LOWEST: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """CE and T^2 KL of the heads of a group, tuples of [S]; stores their gradients."""
    PAIRS: tl.constexpr = N > 1 and TEACHER == PAIRWISE
    PULLED: tl.constexpr = KEEP and PAIRS and not DETACH
    inverse_t = 1.0 / temperature * LOG2_E
    zero = tl.zeros([SAMPLES], ACC)
    zeros = ()
    for _ in tl.static_range(N):
        zeros += (zero,)
    z_y = zeros
    if PLAIN:
        z_y = _read_labels(
            logits, strides, samples, label, counted, HEADS, FIRST, N, UNIT, LOWEST, ACC
        )
    states = initial(N, SAMPLES, ACC)
    toward = zeros
    pairs = zeros
    if K <= BLOCK:
        k, inside, mask, stored_mask = _classes(0, counted, stored, K, BLOCK)
        z = _read(logits, strides, samples, k, mask, HEADS, FIRST, N, UNIT, LOWEST, ACC)
        if KEEP and not PAIRS and (DETACH or N == 1):
            return _gradients_and_terms(
                z, z_y, k, inside, stored_mask, inverse_t, temperature, smoothing, label,
                counted, states, zero, samples, gradients, gradient_strides, ce_weights,
                kl_weights, scale, GRADIENT_HEADS, FIRST, UNIT, TEACHER, POWER, K, PLAIN, SMOOTH,
            )  # fmt: skip
        states = _absorb_heads(z, inside, inverse_t, states, TEACHER, K, PLAIN, SMOOTH, POWER)
        if PULLED:
            toward = add_toward(z, inside, inverse_t, states, kl_weights, toward)
        if PAIRS:
            pairs = add_pairwise(z, inside, inverse_t, states, kl_weights, pairs)
        if KEEP:
            _store_gradients(
                z, k, inside, stored_mask, inverse_t, temperature, smoothing, label, states,
                toward, samples, gradients, gradient_strides, ce_weights, kl_weights, scale,
                GRADIENT_HEADS, FIRST, UNIT, TEACHER, DETACH, POWER, K, PLAIN, SMOOTH,
            )  # fmt: skip
    else:
        for first in range(0, K, BLOCK):
            k, inside, mask, stored_mask = _classes(first, counted, stored, K, BLOCK)
            z = _read(logits, strides, samples, k, mask, HEADS, FIRST, N, UNIT, LOWEST, ACC)
            states = _absorb_heads(z, inside, inverse_t, states, TEACHER, K, PLAIN, SMOOTH, POWER)
        if PULLED:
            for first in range(0, K, BLOCK):
                k, inside, mask, stored_mask = _classes(first, counted, stored, K, BLOCK)
                z = _read(logits, strides, samples, k, mask, HEADS, FIRST, N, UNIT, LOWEST, ACC)
                toward = add_toward(z, inside, inverse_t, states, kl_weights, toward)
        if PAIRS or KEEP:
            for first in range(0, K, BLOCK):
                k, inside, mask, stored_mask = _classes(first, counted, stored, K, BLOCK)
                z = _read(logits, strides, samples, k, mask, HEADS, FIRST, N, UNIT, LOWEST, ACC)
                if PAIRS:
                    pairs = add_pairwise(z, inside, inverse_t, states, kl_weights, pairs)
                if KEEP:
                    _store_gradients(
                        z, k, inside, stored_mask, inverse_t, temperature, smoothing, label,
                        states, toward, samples, gradients, gradient_strides, ce_weights,
                        kl_weights, scale, GRADIENT_HEADS, FIRST, UNIT, TEACHER, DETACH, POWER, K,
                        PLAIN, SMOOTH,
                    )  # fmt: skip
    ce_terms = ()
    kl_terms = ()
    for i in tl.static_range(N):
        ce_term, kl_term = _terms(
            z_y[i], label, counted, states[i], pairs[i], temperature, smoothing, N, i, TEACHER,
            PLAIN, SMOOTH,
        )  # fmt: skip
        ce_terms += (ce_term,)
        kl_terms += (kl_term,)
    return ce_terms, kl_terms


@triton.jit
def _count(target, target_stride, batch, ignore_index):
    """Number of samples that are not ignored."""
    counted = tl.zeros([_TARGETS], tl.int32)
    for first in range(0, batch, _TARGETS):
        b = first + tl.arange(0, _TARGETS)
        y = tl.load(target + b.to(tl.int64) * target_stride, mask=b < batch, other=ignore_index)
        counted += (y != ignore_index).to(tl.int32)  # [B]
    return tl.sum(counted)


@triton.jit
def _finish(
    partials, programs, loss, terms, H: tl.constexpr, REDUCTION: tl.constexpr,
    COLUMNS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Add up what all programs have stored, and write the loss and the terms."""
    column = tl.arange(0, COLUMNS)
    sums = totals(partials, programs, 2 * H + 2, COLUMNS, _PARTIALS, ACC)
    counted = tl.maximum(tl.sum(tl.where(column == 2 * H + 1, sums, 0.0)), 1.0)
    if REDUCTION != _REDUCE_NONE:
        whole = tl.sum(tl.where(column == 2 * H, sums, 0.0))
        tl.store(loss, whole / counted if REDUCTION == _REDUCE_MEAN else whole)
    if REDUCTION != _REDUCE_SUM:
        sums = sums / counted
    tl.store(terms + column, sums, mask=column < 2 * H)  # [2H]


@triton.jit(do_not_specialize=["ignore_index", "batch"])
def consistency_kernel(
    logits, strides, target, target_stride, ignore_index, numbers, rests, gradients,
    gradient_strides, partials, tickets, loss, terms, batch, HEADS: tl.constexpr,
    GRADIENT_HEADS: tl.constexpr, UNIT: tl.constexpr, GROUPS: tl.constexpr,
    TEACHERS: tl.constexpr, DETACH: tl.constexpr, POWERS: tl.constexpr,
    REDUCTION: tl.constexpr, HAS_TARGET: tl.constexpr, SMOOTH: tl.constexpr,
    KEEP: tl.constexpr, K: tl.constexpr, SAMPLES: tl.constexpr, BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr, LOWEST: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Numbers are ce_weight (H), kl_weight (H), T (G), label smoothing; partials
    are (2H + 2, programs): CE (H), KL (H), the loss, the samples counted.
    """
    G: tl.constexpr = len(GROUPS)
    H: tl.constexpr = GROUPS[G - 1][1]
    ce_weights = _numbers(numbers, rests, 0, H, ACC)
    kl_weights = _numbers(numbers, rests, H, H, ACC)
    temperatures = _numbers(numbers, rests, 2 * H, G, ACC)
    smoothing = _numbers(numbers, rests, 2 * H + G, 1, ACC)[0]
    share = tl.full((), 1.0, ACC)
    if KEEP and REDUCTION == _REDUCE_MEAN:
        count = batch
        if HAS_TARGET:
            count = _count(target, target_stride, batch, ignore_index)
        share = 1.0 / tl.maximum(count, 1).to(ACC)

    sums = ()
    for _ in tl.static_range(2 * H + 2):
        sums += (tl.zeros([SAMPLES], ACC),)
    programs = tl.num_programs(0)
    for start in range(tl.program_id(0) * SAMPLES, batch, programs * SAMPLES):
        samples = start + tl.arange(0, SAMPLES)
        stored = samples < batch
        counted = stored
        label = tl.zeros([SAMPLES], tl.int32)
        scale = tl.where(counted, share, 0.0)
        if HAS_TARGET:
            y = tl.load(
                target + samples.to(tl.int64) * target_stride, mask=stored, other=ignore_index
            )  # [S]
            counted = y != ignore_index
            known = (y >= 0) & (y < K)
            label = tl.where(known, y, -1).to(tl.int32)
            # No loss is right for an unknown class, and asking for it here would cost a wait.
            scale = tl.where(counted, tl.where(known, share, float("nan")), 0.0)
        ce = ()
        kl = ()
        for g in tl.static_range(G):
            ce_terms, kl_terms = _group(
                logits, strides, gradients, gradient_strides, samples,
                ce_weights[GROUPS[g][0]:GROUPS[g][1]], kl_weights[GROUPS[g][0]:GROUPS[g][1]],
                temperatures[g], smoothing, label, counted, stored, scale,
                HEADS, GRADIENT_HEADS, GROUPS[g][0], GROUPS[g][1] - GROUPS[g][0], UNIT,
                TEACHERS[g], DETACH[g], POWERS[g], K, SAMPLES, BLOCK, HAS_TARGET, SMOOTH, KEEP,
                LOWEST, ACC,
            )  # fmt: skip
            ce += ce_terms
            kl += kl_terms
        sample_loss = tl.zeros([SAMPLES], ACC)
        new = ()
        for h in tl.static_range(H):
            sample_loss += times(ce_weights[h], ce[h]) + times(kl_weights[h], kl[h])
            new += (sums[h] + ce[h],)
        for h in tl.static_range(H):
            new += (sums[H + h] + kl[h],)
        if REDUCTION == _REDUCE_NONE:
            tl.store(loss + samples, sample_loss, mask=stored)  # [S]
        sums = new + (sums[2 * H] + sample_loss, sums[2 * H + 1] + counted.to(ACC))

    place = partials + tl.program_id(0)
    for c in tl.static_range(2 * H + 2):
        tl.store(place + c * programs, tl.sum(sums[c]))
    if draws_last_ticket(tickets, programs):
        _finish(partials, programs, loss, terms, H, REDUCTION, COLUMNS, ACC)
