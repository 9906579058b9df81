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

from .consistency_constants import INDICES
from .consistency_divergences import (
    KL,
    MIXTURE,
    add_divergences,
    add_label,
    divergence_gradient,
    passed_on,
)
from .consistency_inputs import (
    across,
    class_weight,
    numbers_of,
    places_of,
    read_label_logits,
    read_logits,
    read_samples,
    soft_labels,
)
from .consistency_sums import (
    REDUCE_MEAN,
    REDUCE_NONE,
    add_weights,
    averaged,
    finish,
    no_sums,
    store_sums,
    with_more,
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
    named,
    pairwise_gradient,
    plain_gradient,
    sums_after,
    taught_gradient,
    times,
)
from .numerics import rounded
from .reduction import draws_last_ticket


@triton.jit
def _write(gradients, index, tile, dz, H: tl.constexpr, C: tl.constexpr):
    mask = tile.stored
    if C.binary:
        mask = mask & (across(tile.k) < 1)
    places = places_of(gradients, index, across(tile.k), C.gradient_heads, H, C.unit)
    tl.store(places, rounded(dz, places.dtype.element_ty), mask=mask)  # [S, K]


@triton.jit
def _tile(first, logits, labels, samples, smoothing, C: tl.constexpr, G: tl.constexpr):
    """The classes from the first on, of every head of a group."""
    k = first + tl.arange(0, C.block)
    inside = (k < C.k)[None, :]
    mask = samples.counted[:, None] & inside
    # With the states known, the gradient of a detached teacher's head is of exponentials alone.
    EXACT: tl.constexpr = C.k <= C.block or C.other[G] or C.pairs[G] or not C.detach[G]
    z = read_logits(logits, samples, k, mask, EXACT, C, G)
    soft = soft_labels(labels, logits[1], samples, smoothing, k, mask, C)
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
    z = read_logits(logits, samples, k, mask, True, C, G)
    soft = soft_labels(labels, logits[1], samples, smoothing, k, mask, C)
    return Tile(z, sums_after(z, C.teachers[G]), soft, k, inside, mask)


@triton.jit
def _read_states(
    logits, labels, samples, numbers, C: tl.constexpr, G: tl.constexpr
):  # fmt: skip
    """The states of all heads of a group, after a pass over classes in chunks. Every thread sums
    over its own, for threads that add up wait for one another: so they do once."""
    rows = Samples(
        _repeated(samples.index, C), _repeated(samples.stored, C), _repeated(samples.counted, C),
        _repeated(samples.label, C), samples.weight,
    )  # fmt: skip
    states = initial(C.groups[G][1], C.samples * C.slices, C.acc)
    for first in range(0, C.k, C.block):
        tile = _sliced(first, logits, labels, rows, numbers.smoothing, C, G)
        states = _absorb_heads(tile, numbers, states, C, G)
    return merged(states, numbers, C, G)


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
        ce = cross_entropy(z_y, state, numbers, C)
        if C.weighted and not C.soft:
            ce = times(samples.weight, ce)
        ce = tl.where(samples.label >= 0, ce, float("nan"))
    elif C.divergences[G] == MIXTURE:
        ce = tl.where(samples.label >= 0, z_y, float("nan"))
    TAUGHT: tl.constexpr = N > 1 and TEACHER != PAIRWISE and not (TEACHER == FINAL and H == N - 1)
    if TAUGHT and C.divergences[G] == KL:
        kl = divergence(state)
    t = numbers.temperature
    return tl.where(samples.counted, ce, 0.0), tl.where(samples.counted, kl * t * t, 0.0)


@triton.jit
def _absorb_heads(tile, numbers, states, C: tl.constexpr, G: tl.constexpr):
    """The states of all heads of a group after these classes."""
    N: tl.constexpr = C.groups[G][1]
    if N == 1 and C.divergences[G] != MIXTURE:
        return (absorb_alone(tile, numbers, named(states[0]), C, G),)
    else:
        risen = (states[0][0], states[0][0])
        new = ()
        for i in tl.static_range(N):
            state, first = named(states[i]), named((new + states)[0])
            state, risen = absorb(tile, numbers, state, first, risen, i, C, G)
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
    first = named(states[0])
    ce_terms = ()
    kl_terms = ()
    for i in tl.static_range(N):
        dz = tl.zeros_like(tile.z[i])
        if N == 1:
            state = absorb_alone(tile, numbers, named(states[i]), C, G)
        else:
            state, risen = absorb(tile, numbers, named(states[i]), first, risen, i, C, G)
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
            into += into_teacher(tile, inverse_t, named(states[i]), kl, i, TEACHER)
    for i in tl.static_range(N):
        dz = tl.zeros_like(tile.z[i])
        kl = kl_scale * numbers.kl[i]
        if C.other[G]:
            dz = divergence_gradient(tile, numbers, states, divergences, kl_scale, into, i, C, G)
        elif C.pairs[G]:
            dz = pairwise_gradient(tile, numbers, states, toward, kl_scale, i, DETACH)
        elif TAUGHT:
            if i < HEADS_TAUGHT:
                dz = taught_gradient(tile, inverse_t, named(states[i]), kl, i, TEACHER)
            if not DETACH:
                if TEACHER == OTHERS:
                    mine = into_teacher(tile, inverse_t, named(states[i]), kl, i, TEACHER)
                    dz += (into - mine) * (1.0 / (N - 1))
                elif TEACHER == MEAN:
                    dz += into * (1.0 / N)
                elif i == N - 1:
                    dz += into
        if C.plain[G]:
            dz += plain_gradient(
                tile, samples, numbers, named(states[i]), scales[0] * numbers.ce[i], i, C, G
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
    states = initial(N, C.samples, C.acc)
    toward = zeros
    pairs = zeros
    of_label = zero
    divergences = ()
    for _ in tl.static_range(N):
        divergences += ((zero, zero, zero),)
    smoothing = numbers.smoothing
    if C.k <= C.block:
        z_y = read_label_logits(logits, samples, C, G)
        tile = _tile(0, logits, labels, samples, smoothing, C, G)
        if C.keep and not PAIRS and not OTHER and (C.detach[G] or N == 1):
            return _gradients_and_terms(
                tile, z_y, samples, numbers, states, gradients, scales, C, G
            )
        states = _absorb_heads(tile, numbers, states, C, G)
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
        states = _read_states(logits, labels, samples, numbers, C, G)
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
        z_y = read_label_logits(logits, samples, C, G)
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
            of_label if MIXED else z_y[i], samples, numbers, named(states[i]),
            divergences[i][0] if OTHER else pairs[i], i, C, G,
        )  # fmt: skip
        ce_terms += (ce_term,)
        kl_terms += (kl_term,)
    return ce_terms, kl_terms


@triton.jit(do_not_specialize=["ignore_index", "batch"])
def consistency_kernel(
    logits, labels, ignore_index, numbers, gradients, results, batch, C: tl.constexpr
):  # fmt: skip
    """Numbers are ce_weight (H), kl_weight (H), T (G), label smoothing and, if a group's divergence
    isn't KL, beta (G) and 1 - beta (G), and the rests of all; results the partials, a ticket, the
    loss and the terms. Partials (2H + 2, programs): CE (H), KL (H), the loss, the weight of the
    samples; where class weights have the cross entropies averaged otherwise, two more: the weight
    of their labels, and their part of the loss.
    """
    H: tl.constexpr = C.head_count
    GROUPS: tl.constexpr = C.group_count
    sizes = logits[1]
    ce_weights = numbers_of(numbers, 0, H, C.acc)
    kl_weights = numbers_of(numbers, H, H, C.acc)
    temperatures = numbers_of(numbers, 2 * H, GROUPS, C.acc)
    smoothing = numbers_of(numbers, 2 * H + GROUPS, 1, C.acc)[0]
    betas = temperatures
    others = temperatures
    if len(numbers[0]) > 2 * H + GROUPS + 1:
        betas = numbers_of(numbers, 2 * H + GROUPS + 1, GROUPS, C.acc)
        others = numbers_of(numbers, 2 * H + 2 * GROUPS + 1, GROUPS, C.acc)
    one = tl.full((), 1.0, C.acc)
    ce_mean = one
    kl_mean = one
    if C.keep and C.reduction == REDUCE_MEAN:
        if C.target == INDICES or C.shared:
            ce_sum, kl_sum = add_weights(labels, sizes, batch, ignore_index, C)
            kl_mean = averaged(one, kl_sum)
            ce_mean = averaged(one, ce_sum) if C.split else kl_mean
        else:
            kl_mean = 1.0 / batch.to(C.acc)
            ce_mean = kl_mean

    sums = no_sums(C)
    programs = tl.num_programs(0)
    for start in range(tl.program_id(0) * C.samples, batch, programs * C.samples):
        index = start + tl.arange(0, C.samples)
        stored = index < batch
        share, counted, label = read_samples(labels, sizes, index, stored, ignore_index, C)
        weight = share
        if C.split and not C.soft:
            weight = class_weight(labels, label, counted)
        samples = Samples(index, stored, counted, label, weight)
        kl_scale = share * kl_mean
        # No loss is right for an unknown class, and asking for it here would cost a wait.
        kl_scale = tl.where(counted & (label < 0), float("nan"), kl_scale)
        ce_scale = kl_scale
        if C.split:
            ce_scale = share * ce_mean
            if not C.soft:
                ce_scale = times(ce_scale, weight)
            ce_scale = tl.where(counted & (label < 0), float("nan"), ce_scale)
        ce = ()
        kl = ()
        for g in tl.static_range(GROUPS):
            of_group = Numbers(
                ce_weights[C.groups[g][0]:C.groups[g][0] + C.groups[g][1]],
                kl_weights[C.groups[g][0]:C.groups[g][0] + C.groups[g][1]],
                temperatures[g], 1.0 / temperatures[g] * LOG2_E, betas[g], others[g], smoothing,
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
        if C.reduction == REDUCE_NONE:
            tl.store(results[2] + index, ce_loss + kl_loss, mask=stored)  # [S]
        if C.split:
            of_label = share * class_weight(labels, label, counted)
            more += (kl_loss, share, of_label, ce_loss)
        else:
            more += (ce_loss + kl_loss, share)
        sums = with_more(sums, more, C)

    store_sums(results[0] + tl.program_id(0), programs, sums, C)
    if draws_last_ticket(results[1], programs):
        finish(results[0], programs, results[2], results[3], C)
