"""The collaborative consistency, value and gradient, of all heads in one launch.

loss = sum_h ce_h CE(z_h, y) + kl_h T^2 KL(q_h || p_h), p_h = softmax(z_h/T), and

others    q_h = softmax(t_h), t_h = sum_{j != h} z_j/(T (n - 1))
mean      q_h = softmax(t), t = sum_j z_j/(T n)
final     q_h = p_n, and no KL for head n itself
pairwise  the mean of KL(p_j || p_h) over j != h; with P = sum_j p_j and
          Q = sum_j p_j log p_j it is sum_k (Q - P log p_h)/(n - 1)

dz_h = ce_h (softmax(z_h) - y) + kl_h T (p_h - q_h), and where a teacher is not detached,
T kl_h q_h (log q_h - log p_h - KL_h) goes into t_h and on to the logits t_h averages.

Labels y are an index, smoothed or not, or soft: a tile of any numbers, class weights included;
then it is ce_h (softmax(z_h) sum(y) - y). Other divergences than KL, and mixtures of the label
and the heads, are in consistency_divergences.py. Of BINARY logits there is one class in memory;
the logit of the other is 0.

A program takes some samples at a time, of each all heads, group by group. Classes that
fit into registers are read once. More are taken in chunks, maxima and sums running along
(online softmax), and read a second time for the gradient; a third time for pairwise
teachers that are not detached.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..algebra import consistency as algebra
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
NO_TARGET, INDICES, PROBABILITIES = (tl.constexpr(i) for i in range(3))
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
def _offsets(samples, sizes, strides):
    """Where the samples lie, [S]; the last of their axes runs fastest."""
    rest = samples.to(tl.int64)
    offsets = tl.zeros_like(rest)
    for i in tl.static_range(len(strides) - 1):
        offsets += rest % sizes[len(strides) - 1 - i] * strides[len(strides) - 1 - i]
        rest = rest // sizes[len(strides) - 1 - i]
    return offsets + rest * strides[0]


@triton.jit
def _row(
    blocks, sizes, strides, samples, HEADS: tl.constexpr, H: tl.constexpr, UNIT: tl.constexpr
):  # fmt: skip
    """Where the samples' rows of head H begin, [S].

    The strides of heads and samples are in UNITs, a power of 2: so Triton knows, of any
    batch, that 16 bytes can be read at a time.
    """
    stride = strides[HEADS[H][0]]
    head = tl.full((), HEADS[H][1], tl.int64) * stride[0]
    return blocks[HEADS[H][0]] + (head + _offsets(samples, sizes, stride[1])) * UNIT


@triton.jit
def _masked(z, LOWEST: tl.constexpr, ACC: tl.constexpr):
    """Logits as ACC, -inf where they are the lowest number of their dtype."""
    z = z.to(ACC)
    return tl.where(z <= LOWEST, float("-inf"), z)


@triton.jit
def _read(
    blocks, sizes, strides, samples, k, mask, HEADS: tl.constexpr, FIRST: tl.constexpr,
    N: tl.constexpr, UNIT: tl.constexpr, BINARY: tl.constexpr, LOWEST: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """The logits [S, K] of every head."""
    z = ()
    if BINARY:
        mask = mask & (k < 1)[None, :]
    for i in tl.static_range(N):
        row = _row(blocks, sizes, strides, samples, HEADS, FIRST + i, UNIT)
        step = strides[HEADS[FIRST + i][0]][2]
        pointers = row[:, None] + (k.to(tl.int64) * step)[None, :]
        z += (_masked(tl.load(pointers, mask=mask, other=0.0), LOWEST, ACC),)  # [S, K]
    return z


@triton.jit
def _read_labels(
    blocks, sizes, strides, samples, label, counted, HEADS: tl.constexpr, FIRST: tl.constexpr,
    N: tl.constexpr, UNIT: tl.constexpr, LOWEST: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The logits [S] of the label of every head, of the first class where it is unknown."""
    z = ()
    for i in tl.static_range(N):
        row = _row(blocks, sizes, strides, samples, HEADS, FIRST + i, UNIT)
        offset = tl.maximum(label, 0).to(tl.int64) * strides[HEADS[FIRST + i][0]][2]
        z += (_masked(tl.load(row + offset, mask=counted, other=0.0), LOWEST, ACC),)  # [S]
    return z


@triton.jit
def _soft(
    labels, sizes, samples, label, smoothing, k, mask, K: tl.constexpr, TARGET: tl.constexpr,
    WEIGHTED: tl.constexpr, SOFT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Soft labels [S, K], 0 outside of the mask; labels are a target, its strides, class weights
    and their stride."""
    if SOFT:
        if TARGET == PROBABILITIES:
            rows = labels[0] + _offsets(samples, sizes, labels[1])
            soft = tl.load(
                rows[:, None] + (k.to(tl.int64) * labels[2])[None, :], mask=mask, other=0.0
            )  # [S, K]
            soft = soft.to(ACC) * (1 - smoothing)
        else:
            soft = tl.where(k[None, :] == label[:, None], 1 - smoothing, 0.0)
        soft += smoothing * (1.0 / K)
        if WEIGHTED:
            weight = tl.load(labels[3] + k.to(tl.int64) * labels[4], mask=k < K, other=0.0)  # [K]
            soft *= weight[None, :]
        return tl.where(mask, soft, 0.0)
    else:
        return 0.0


@triton.jit
def _label_size(
    labels, sizes, samples, label, counted, smoothing, K: tl.constexpr, BLOCK: tl.constexpr,
    TARGET: tl.constexpr, WEIGHTED: tl.constexpr, SOFT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The sum of soft labels, or the class weight of an index, NaN of an unknown one; [S]."""
    if SOFT:
        size = tl.zeros(samples.shape, ACC)
        for first in range(0, K, BLOCK):
            k, _, mask, _ = _classes(first, counted, counted, K, BLOCK)
            soft = _soft(
                labels, sizes, samples, label, smoothing, k, mask, K, TARGET, WEIGHTED, SOFT, ACC
            )
            size += tl.sum(soft, 1)
        return size
    else:
        return tl.where(label >= 0, _class_weight(labels, label, counted), float("nan"))


@triton.jit
def _write(
    blocks, sizes, strides, samples, k, mask, dz, HEADS: tl.constexpr, H: tl.constexpr,
    UNIT: tl.constexpr, BINARY: tl.constexpr,
):  # fmt: skip
    if BINARY:
        mask = mask & (k < 1)[None, :]
    row = _row(blocks, sizes, strides, samples, HEADS, H, UNIT)
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
    z_y, label, label_size, counted, state, pairs, temperature, smoothing, N: tl.constexpr,
    H: tl.constexpr, TEACHER: tl.constexpr, DIVERGENCE: tl.constexpr, PLAIN: tl.constexpr,
    SMOOTH: tl.constexpr, WEIGHTED: tl.constexpr, SOFT: tl.constexpr,
):  # fmt: skip
    """CE and T^2 KL of head H of N, each [S]; of a mixture z_y is the label's KL. ``pairs`` are
    pairwise divergences, and all that aren't KL."""
    ce = tl.zeros_like(pairs)
    kl = pairs
    if PLAIN:
        ce = cross_entropy(z_y, state, smoothing, label_size, SMOOTH, SOFT)
        if WEIGHTED and not SOFT:
            ce = times(label_size, ce)
        ce = tl.where(label >= 0, ce, float("nan"))
    elif DIVERGENCE == MIXTURE:
        ce = tl.where(label >= 0, z_y, float("nan"))
    TAUGHT: tl.constexpr = N > 1 and TEACHER != PAIRWISE and not (TEACHER == FINAL and H == N - 1)
    if TAUGHT and DIVERGENCE == KL:
        kl = divergence(state)
    return tl.where(counted, ce, 0.0), tl.where(counted, kl * temperature * temperature, 0.0)


@triton.jit
def _absorb_heads(
    z, soft, inside, inverse_t, states, TEACHER: tl.constexpr, DIVERGENCE: tl.constexpr,
    K: tl.constexpr, PLAIN: tl.constexpr, SMOOTH: tl.constexpr, SOFT: tl.constexpr,
    POWER: tl.constexpr,
):  # fmt: skip
    """The states of all heads of a group after these classes."""
    N: tl.constexpr = len(z)
    if N == 1 and DIVERGENCE != MIXTURE:
        return (absorb_alone(z[0], soft, inside, states[0], K, PLAIN, SMOOTH, SOFT),)
    else:
        share = teacher_share(inverse_t, N, TEACHER)
        risen = (states[0][0], states[0][0])
        new = ()
        for i in tl.static_range(N):
            u = teacher_of(z, i, TEACHER)
            state, risen = absorb(
                z[i], u, soft, inside, inverse_t, share, states[i], (new + states)[0], risen,
                TEACHER == OTHERS or i == 0, TEACHER != PAIRWISE, K, PLAIN, SMOOTH, SOFT, POWER,
            )  # fmt: skip
            new += (state,)
        return new


@triton.jit
def _gradients_and_terms(
    z, z_y, soft, k, inside, mask, inverse_t, temperature, smoothing, label, label_size,
    counted, states, zero, samples, gradients, sizes, strides, ce_weights, kl_weights, ce_scale,
    kl_scale, HEADS: tl.constexpr, FIRST: tl.constexpr, UNIT: tl.constexpr,
    BINARY: tl.constexpr, TEACHER: tl.constexpr, POWER: tl.constexpr, K: tl.constexpr,
    PLAIN: tl.constexpr, SMOOTH: tl.constexpr, WEIGHTED: tl.constexpr, SOFT: tl.constexpr,
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
            state = absorb_alone(z[i], soft, inside, states[i], K, PLAIN, SMOOTH, SOFT)
        else:
            u = teacher_of(z, i, TEACHER)
            state, risen = absorb(
                z[i], u, soft, inside, inverse_t, share, states[i], first, risen,
                TEACHER == OTHERS or i == 0, True, K, PLAIN, SMOOTH, SOFT, POWER,
            )  # fmt: skip
            if i == 0:
                first = state
            if not (TEACHER == FINAL and i == N - 1):
                kl = kl_scale * temperature * kl_weights[i]
                dz = taught_gradient(z[i], u, inside, inverse_t, share, state, kl)
        if PLAIN:
            dz += plain_gradient(
                z[i], soft, k, inside, inverse_t, label, state, ce_scale * ce_weights[i],
                label_size, smoothing, K, SMOOTH, SOFT, POWER if N > 1 else 0,
            )  # fmt: skip
        _write(gradients, sizes, strides, samples, k, mask, dz, HEADS, FIRST + i, UNIT, BINARY)
        ce_term, kl_term = _terms(
            z_y[i], label, label_size, counted, state, zero, temperature, smoothing, N, i,
            TEACHER, KL, PLAIN, SMOOTH, WEIGHTED, SOFT,
        )  # fmt: skip
        ce_terms += (ce_term,)
        kl_terms += (kl_term,)
    return ce_terms, kl_terms


@triton.jit
def _store_gradients(
    z, soft, k, inside, mask, inverse_t, temperature, smoothing, label, label_size, states,
    toward, divergences, beta, samples, gradients, sizes, strides, ce_weights, kl_weights, ce_scale,
    kl_scale, HEADS: tl.constexpr, FIRST: tl.constexpr, UNIT: tl.constexpr, BINARY: tl.constexpr,
    TEACHER: tl.constexpr, DIVERGENCE: tl.constexpr, DETACH: tl.constexpr, POWER: tl.constexpr,
    K: tl.constexpr, PLAIN: tl.constexpr, SMOOTH: tl.constexpr, SOFT: tl.constexpr,
):  # fmt: skip
    """Store the gradients of a group's heads in these classes, once the states are known."""
    N: tl.constexpr = len(z)
    OTHER: tl.constexpr = DIVERGENCE != KL and (N > 1 or DIVERGENCE == MIXTURE)
    TAUGHT: tl.constexpr = N > 1 and TEACHER != PAIRWISE
    HEADS_TAUGHT: tl.constexpr = N - 1 if TEACHER == FINAL else N
    share = teacher_share(inverse_t, N, TEACHER) if N > 1 else inverse_t
    into = tl.zeros_like(z[0])
    kl_scale = kl_scale * temperature
    if OTHER:
        if not DETACH:
            into = passed_on(
                z, soft, inside, inverse_t, states, divergences, beta, kl_weights, kl_scale,
                TEACHER, DIVERGENCE,
            )  # fmt: skip
    elif TAUGHT and not DETACH:
        for i in tl.static_range(HEADS_TAUGHT):
            u = teacher_of(z, i, TEACHER)
            kl = kl_scale * kl_weights[i]
            into += into_teacher(z[i], u, inside, inverse_t, share, states[i], kl)
    for i in tl.static_range(N):
        dz = tl.zeros_like(z[i])
        kl = kl_scale * kl_weights[i]
        if OTHER:
            dz = divergence_gradient(
                z, soft, inside, inverse_t, states, divergences, beta, kl_weights, kl_scale, into,
                i, TEACHER, DIVERGENCE, DETACH,
            )  # fmt: skip
        elif N > 1 and TEACHER == PAIRWISE:
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
                z[i], soft, k, inside, inverse_t, label, states[i], ce_scale * ce_weights[i],
                label_size, smoothing, K, SMOOTH, SOFT, POWER if N > 1 else 0,
            )  # fmt: skip
        _write(gradients, sizes, strides, samples, k, mask, dz, HEADS, FIRST + i, UNIT, BINARY)


@triton.jit
def _group(
    logits, sizes, strides, labels, gradients, gradient_strides, samples, ce_weights, kl_weights,
    temperature, beta, smoothing, label, label_size, counted, stored, ce_scale, kl_scale,
    HEADS: tl.constexpr, GRADIENT_HEADS: tl.constexpr, FIRST: tl.constexpr, N: tl.constexpr,
    UNIT: tl.constexpr, BINARY: tl.constexpr, TEACHER: tl.constexpr, DIVERGENCE: tl.constexpr,
    DETACH: tl.constexpr, POWER: tl.constexpr, K: tl.constexpr, SAMPLES: tl.constexpr,
    BLOCK: tl.constexpr, TARGET: tl.constexpr, SMOOTH: tl.constexpr, WEIGHTED: tl.constexpr,
    SOFT: tl.constexpr, KEEP: tl.constexpr, LOWEST: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """CE and T^2 KL of the heads of a group, tuples of [S]; stores their gradients."""
    MIXED: tl.constexpr = DIVERGENCE == MIXTURE
    PLAIN: tl.constexpr = TARGET != NO_TARGET and not MIXED
    OTHER: tl.constexpr = DIVERGENCE != KL and (N > 1 or MIXED)
    PAIRS: tl.constexpr = N > 1 and TEACHER == PAIRWISE and not OTHER
    PULLED: tl.constexpr = KEEP and PAIRS and not DETACH
    inverse_t = 1.0 / temperature * LOG2_E
    zero = tl.zeros([SAMPLES], ACC)
    zeros = ()
    for _ in tl.static_range(N):
        zeros += (zero,)
    z_y = zeros
    if PLAIN and not SOFT:
        z_y = _read_labels(
            logits, sizes, strides, samples, label, counted, HEADS, FIRST, N, UNIT, LOWEST, ACC
        )
    states = initial(N, SAMPLES, ACC)
    toward = zeros
    pairs = zeros
    of_label = zero
    divergences = ()
    for _ in tl.static_range(N):
        divergences += ((zero, zero, zero),)
    if K <= BLOCK:
        k, inside, mask, stored_mask = _classes(0, counted, stored, K, BLOCK)
        z = _read(
            logits, sizes, strides, samples, k, mask, HEADS, FIRST, N, UNIT, BINARY, LOWEST, ACC
        )
        soft = _soft(
            labels, sizes, samples, label, smoothing, k, mask, K, TARGET, WEIGHTED, SOFT, ACC
        )
        if KEEP and not PAIRS and not OTHER and (DETACH or N == 1):
            return _gradients_and_terms(
                z, z_y, soft, k, inside, stored_mask, inverse_t, temperature, smoothing, label,
                label_size, counted, states, zero, samples, gradients, sizes, gradient_strides,
                ce_weights, kl_weights, ce_scale, kl_scale, GRADIENT_HEADS, FIRST, UNIT, BINARY,
                TEACHER, POWER, K, PLAIN, SMOOTH, WEIGHTED, SOFT,
            )  # fmt: skip
        states = _absorb_heads(
            z, soft, inside, inverse_t, states, TEACHER, DIVERGENCE, K, PLAIN, SMOOTH, SOFT, POWER
        )
        if OTHER:
            divergences = add_divergences(
                z, soft, inside, inverse_t, states, beta, kl_weights, divergences, TEACHER,
                DIVERGENCE,
            )  # fmt: skip
        if MIXED:
            of_label = add_label(
                z, soft, inside, inverse_t, states, beta, kl_weights, of_label
            )
        if PULLED:
            toward = add_toward(z, inside, inverse_t, states, kl_weights, toward)
        if PAIRS:
            pairs = add_pairwise(z, inside, inverse_t, states, kl_weights, pairs)
        if KEEP:
            _store_gradients(
                z, soft, k, inside, stored_mask, inverse_t, temperature, smoothing, label,
                label_size, states, toward, divergences, beta, samples, gradients, sizes,
                gradient_strides, ce_weights, kl_weights, ce_scale, kl_scale, GRADIENT_HEADS, FIRST,
                UNIT, BINARY, TEACHER, DIVERGENCE, DETACH, POWER, K, PLAIN, SMOOTH, SOFT,
            )  # fmt: skip
    else:
        for first in range(0, K, BLOCK):
            k, inside, mask, stored_mask = _classes(first, counted, stored, K, BLOCK)
            z = _read(
                logits, sizes, strides, samples, k, mask, HEADS, FIRST, N, UNIT, BINARY, LOWEST, ACC
            )
            soft = _soft(
                labels, sizes, samples, label, smoothing, k, mask, K, TARGET, WEIGHTED, SOFT, ACC
            )
            states = _absorb_heads(
                z, soft, inside, inverse_t, states, TEACHER, DIVERGENCE, K, PLAIN, SMOOTH, SOFT,
                POWER,
            )  # fmt: skip
        if OTHER:
            for first in range(0, K, BLOCK):
                k, inside, mask, stored_mask = _classes(first, counted, stored, K, BLOCK)
                z = _read(
                    logits, sizes, strides, samples, k, mask, HEADS, FIRST, N, UNIT, BINARY, LOWEST,
                    ACC,
                )  # fmt: skip
                soft = _soft(
                    labels, sizes, samples, label, smoothing, k, mask, K, TARGET, WEIGHTED, SOFT,
                    ACC,
                )  # fmt: skip
                divergences = add_divergences(
                    z, soft, inside, inverse_t, states, beta, kl_weights, divergences, TEACHER,
                    DIVERGENCE,
                )  # fmt: skip
                if MIXED:
                    of_label = add_label(
                        z, soft, inside, inverse_t, states, beta, kl_weights, of_label
                    )
        if PULLED:
            for first in range(0, K, BLOCK):
                k, inside, mask, stored_mask = _classes(first, counted, stored, K, BLOCK)
                z = _read(
                    logits, sizes, strides, samples, k, mask, HEADS, FIRST, N, UNIT, BINARY, LOWEST,
                    ACC,
                )  # fmt: skip
                toward = add_toward(z, inside, inverse_t, states, kl_weights, toward)
        if PAIRS or KEEP:
            for first in range(0, K, BLOCK):
                k, inside, mask, stored_mask = _classes(first, counted, stored, K, BLOCK)
                z = _read(
                    logits, sizes, strides, samples, k, mask, HEADS, FIRST, N, UNIT, BINARY, LOWEST,
                    ACC,
                )  # fmt: skip
                if PAIRS:
                    pairs = add_pairwise(z, inside, inverse_t, states, kl_weights, pairs)
                if KEEP:
                    soft = _soft(
                        labels, sizes, samples, label, smoothing, k, mask, K, TARGET, WEIGHTED,
                        SOFT, ACC,
                    )  # fmt: skip
                    _store_gradients(
                        z, soft, k, inside, stored_mask, inverse_t, temperature, smoothing, label,
                        label_size, states, toward, divergences, beta, samples, gradients, sizes,
                        gradient_strides, ce_weights, kl_weights, ce_scale, kl_scale,
                        GRADIENT_HEADS, FIRST, UNIT, BINARY, TEACHER, DIVERGENCE, DETACH, POWER, K,
                        PLAIN, SMOOTH, SOFT,
                    )  # fmt: skip
    ce_terms = ()
    kl_terms = ()
    for i in tl.static_range(N):
        ce_term, kl_term = _terms(
            of_label if MIXED else z_y[i], label, label_size, counted, states[i],
            divergences[i][0] if OTHER else pairs[i], temperature, smoothing, N, i, TEACHER,
            DIVERGENCE, PLAIN, SMOOTH, WEIGHTED, SOFT,
        )  # fmt: skip
        ce_terms += (ce_term,)
        kl_terms += (kl_term,)
    return ce_terms, kl_terms


@triton.jit
def _samples(
    labels, sizes, sample_weight, sample_weight_strides, samples, stored, ignore_index,
    K: tl.constexpr, TARGET: tl.constexpr, SHARED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The weight of each sample, 0 of one that doesn't count; whether it does; its index, -1 of
    an unknown one. All [S]."""
    counted = stored
    share = tl.where(counted, 1.0, 0.0).to(ACC)
    label = tl.zeros(samples.shape, tl.int32)
    if SHARED:
        share = tl.load(
            sample_weight + _offsets(samples, sizes, sample_weight_strides), mask=stored,
            other=0.0,
        )  # [S]
        counted = share != 0.0
    if TARGET == INDICES:
        y = tl.load(
            labels[0] + _offsets(samples, sizes, labels[1]), mask=stored, other=ignore_index
        )  # [S]
        counted = counted & (y != ignore_index)
        share = tl.where(counted, share, 0.0)
        label = tl.where((y >= 0) & (y < K), y, -1).to(tl.int32)
    return share, counted, label


@triton.jit
def _class_weight(labels, label, counted):
    """The class weight of each sample's index, 0 of an unknown one, [S]."""
    place = labels[3] + label.to(tl.int64) * labels[4]
    return tl.load(place, mask=counted & (label >= 0), other=0.0)


@triton.jit
def _add_weights(
    labels, sizes, sample_weight, sample_weight_strides, batch, ignore_index, K: tl.constexpr,
    TARGET: tl.constexpr, WEIGHTED: tl.constexpr, SHARED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """What the means of the cross entropies and of the divergences are divided by."""
    ce = tl.zeros([_TARGETS], ACC)
    kl = tl.zeros([_TARGETS], ACC)
    for first in range(0, batch, _TARGETS):
        b = first + tl.arange(0, _TARGETS)
        share, counted, label = _samples(
            labels, sizes, sample_weight, sample_weight_strides, b, b < batch, ignore_index, K,
            TARGET, SHARED, ACC,
        )  # fmt: skip
        kl += share
        if TARGET == INDICES and WEIGHTED:
            share *= _class_weight(labels, label, counted)
        ce += share
    return tl.sum(ce), tl.sum(kl)


@triton.jit
def _finish(
    partials, programs, loss, terms, H: tl.constexpr, REDUCTION: tl.constexpr,
    SPLIT: tl.constexpr, COLUMNS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Add up what all programs have stored, and write the loss and the terms."""
    column = tl.arange(0, COLUMNS)
    SUMS: tl.constexpr = 2 * H + (4 if SPLIT else 2)
    sums = totals(partials, programs, SUMS, COLUMNS, _PARTIALS, ACC)
    by = _column(sums, column, 2 * H + 1)
    if REDUCTION != _REDUCE_NONE:
        whole = _column(sums, column, 2 * H)
        if REDUCTION == _REDUCE_MEAN:
            whole = _averaged(whole, by)
        if SPLIT:
            part = _column(sums, column, 2 * H + 3)
            if REDUCTION == _REDUCE_MEAN:
                part = _averaged(part, _column(sums, column, 2 * H + 2))
            whole += part
        tl.store(loss, whole)
    if REDUCTION != _REDUCE_SUM:
        if SPLIT:
            by = tl.where(column < H, _column(sums, column, 2 * H + 2), by)
        sums = _averaged(sums, by)
    tl.store(terms + column, sums, mask=column < 2 * H)  # [2H]


@triton.jit
def _column(sums, column, C: tl.constexpr):
    return tl.sum(tl.where(column == C, sums, 0.0))


@triton.jit
def _averaged(total, weights):
    """total / weights; of no weights nothing."""
    return tl.where(weights == 0.0, total * 0.0, total / weights)


@triton.jit(do_not_specialize=["ignore_index", "batch"])
def consistency_kernel(
    logits, sizes, strides, labels, sample_weight, sample_weight_strides, ignore_index, numbers,
    rests, gradients, gradient_strides, partials, tickets, loss, terms, batch, HEADS: tl.constexpr,
    GRADIENT_HEADS: tl.constexpr, UNIT: tl.constexpr, BINARY: tl.constexpr, GROUPS: tl.constexpr,
    TEACHERS: tl.constexpr, DIVERGENCES: tl.constexpr, DETACH: tl.constexpr, POWERS: tl.constexpr,
    REDUCTION: tl.constexpr, TARGET: tl.constexpr, SMOOTH: tl.constexpr, WEIGHTED: tl.constexpr,
    SHARED: tl.constexpr, MIXES: tl.constexpr, KEEP: tl.constexpr, K: tl.constexpr,
    SAMPLES: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, LOWEST: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Sizes are those of the axes of the samples, which all strides of samples are of.

    Labels are a target, its strides, class weights if WEIGHTED, and their stride; numbers
    ce_weight (H), kl_weight (H), T (G), label smoothing and, if a group's divergence isn't KL,
    beta (G); partials (2H + 2, programs): CE (H), KL (H), the loss, the weight of the samples;
    where class weights have the cross entropies averaged otherwise (SPLIT), two more: the weight of
    their labels, and their part of the loss. One of the groups MIXES heads and label.
    """
    G: tl.constexpr = len(GROUPS)
    H: tl.constexpr = GROUPS[G - 1][1]
    SUMMED: tl.constexpr = MIXES or (WEIGHTED and SMOOTH)
    SOFT: tl.constexpr = TARGET == PROBABILITIES or (TARGET == INDICES and SUMMED)
    SPLIT: tl.constexpr = TARGET == INDICES and WEIGHTED
    SUMS: tl.constexpr = 2 * H + (4 if SPLIT else 2)
    ce_weights = _numbers(numbers, rests, 0, H, ACC)
    kl_weights = _numbers(numbers, rests, H, H, ACC)
    temperatures = _numbers(numbers, rests, 2 * H, G, ACC)
    smoothing = _numbers(numbers, rests, 2 * H + G, 1, ACC)[0]
    betas = temperatures
    if len(numbers) > 2 * H + G + 1:
        betas = _numbers(numbers, rests, 2 * H + G + 1, G, ACC)
    one = tl.full((), 1.0, ACC)
    ce_mean = one
    kl_mean = one
    if KEEP and REDUCTION == _REDUCE_MEAN:
        if TARGET == INDICES or SHARED:
            ce_sum, kl_sum = _add_weights(
                labels, sizes, sample_weight, sample_weight_strides, batch, ignore_index, K, TARGET,
                WEIGHTED, SHARED, ACC,
            )  # fmt: skip
            kl_mean = _averaged(one, kl_sum)
            ce_mean = _averaged(one, ce_sum) if SPLIT else kl_mean
        else:
            kl_mean = 1.0 / batch.to(ACC)
            ce_mean = kl_mean

    sums = ()
    for _ in tl.static_range(SUMS):
        sums += (tl.zeros([SAMPLES], ACC),)
    programs = tl.num_programs(0)
    for start in range(tl.program_id(0) * SAMPLES, batch, programs * SAMPLES):
        samples = start + tl.arange(0, SAMPLES)
        stored = samples < batch
        share, counted, label = _samples(
            labels, sizes, sample_weight, sample_weight_strides, samples, stored, ignore_index, K,
            TARGET, SHARED, ACC,
        )  # fmt: skip
        kl_scale = share * kl_mean
        # No loss is right for an unknown class, and asking for it here would cost a wait.
        kl_scale = tl.where(counted & (label < 0), float("nan"), kl_scale)
        ce_scale = kl_scale
        label_size = share
        if SPLIT or SOFT:
            label_size = _label_size(
                labels, sizes, samples, label, counted, smoothing, K, BLOCK, TARGET, WEIGHTED,
                SOFT, ACC,
            )  # fmt: skip
        if SPLIT:
            ce_scale = share * ce_mean
            if not SOFT:
                ce_scale = times(ce_scale, label_size)
            ce_scale = tl.where(counted & (label < 0), float("nan"), ce_scale)
        ce = ()
        kl = ()
        for g in tl.static_range(G):
            ce_terms, kl_terms = _group(
                logits, sizes, strides, labels, gradients, gradient_strides, samples,
                ce_weights[GROUPS[g][0]:GROUPS[g][1]], kl_weights[GROUPS[g][0]:GROUPS[g][1]],
                temperatures[g], betas[g], smoothing, label, label_size, counted, stored, ce_scale,
                kl_scale, HEADS, GRADIENT_HEADS, GROUPS[g][0], GROUPS[g][1] - GROUPS[g][0], UNIT,
                BINARY, TEACHERS[g], DIVERGENCES[g], DETACH[g], POWERS[g], K, SAMPLES, BLOCK,
                TARGET, SMOOTH, WEIGHTED, SOFT, KEEP, LOWEST, ACC,
            )  # fmt: skip
            ce += ce_terms
            kl += kl_terms
        ce_loss = tl.zeros([SAMPLES], ACC)
        kl_loss = ce_loss
        new = ()
        for h in tl.static_range(H):
            term = times(share, ce[h]) if SHARED else ce[h]
            ce_loss += times(ce_weights[h], term)
            new += (sums[h] + term,)
        for h in tl.static_range(H):
            term = times(share, kl[h]) if SHARED else kl[h]
            kl_loss += times(kl_weights[h], term)
            new += (sums[H + h] + term,)
        if REDUCTION == _REDUCE_NONE:
            tl.store(loss + samples, ce_loss + kl_loss, mask=stored)  # [S]
        if SPLIT:
            of_label = share * _class_weight(labels, label, counted)
            new += (sums[2 * H] + kl_loss, sums[2 * H + 1] + share, sums[2 * H + 2] + of_label,
                    sums[2 * H + 3] + ce_loss)  # fmt: skip
        else:
            new += (sums[2 * H] + (ce_loss + kl_loss), sums[2 * H + 1] + share)
        sums = new

    place = partials + tl.program_id(0)
    for c in tl.static_range(SUMS):
        tl.store(place + c * programs, tl.sum(sums[c]))
    if draws_last_ticket(tickets, programs):
        _finish(partials, programs, loss, terms, H, REDUCTION, SPLIT, COLUMNS, ACC)
