"""Device functions of the consistency by other divergences than KL, on tiles of logits.

Tiles, states and units are those of consistency_tiles.py; what ``value``, ``head`` and ``teacher``
are stands in docs/math.md, "Other divergences". Of them all but a teacher's -p are in units
of log 2 until they are multiplied with it.

``sums`` of a head are those over the classes seen so far of its value, head and teacher, each [S].
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..algebra import divergences as algebra
from .consistency_tiles import (
    FINAL,
    LN_2,
    MEAN,
    OTHERS,
    PAIRWISE,
    exponent,
    log_p_of,
    named,
    sum_of,
    teacher_of,
    teacher_share,
    times,
)

KL, MIXTURE = tl.constexpr(algebra.KL), tl.constexpr(algebra.MIXTURE)
_REVERSE_KL = tl.constexpr(algebra.REVERSE_KL)


@triton.jit
def _parts(log_q, q, log_p, p, numbers, DIVERGENCE: tl.constexpr):
    """value, head and teacher [S, K] of D(q || p)."""
    if DIVERGENCE == _REVERSE_KL:
        value = times(p, log_p - log_q) * LN_2
        return value, value, -p
    else:
        mixed = numbers.beta * q
        own = numbers.rest * p
        log_m = tl.log2(mixed + own)
        head = times(own, log_p - log_m) * LN_2
        teacher = times(mixed, log_q - log_m) * LN_2
        return head + teacher, head, teacher


@triton.jit
def _log_mixture(tile, numbers, states):
    """log2 m, [S, K], of a label and heads in proportion to their weights; 0 where m is, be it that
    shares of the smallest probabilities round to 0."""
    m = numbers.beta * tile.soft
    rest = numbers.rest / sum_of(numbers.kl)
    for i in tl.static_range(len(tile.z)):
        log_p = log_p_of(tile.z[i], numbers.inverse_t, named(states[i]))
        m += tl.exp2(log_p) * (numbers.kl[i] * rest)
    return tl.log2(tl.where(m == 0, 1.0, m))


@triton.jit
def _of_head(tile, numbers, states, H: tl.constexpr, C: tl.constexpr, G: tl.constexpr):
    """value, head and teacher of head H, its p, and its teacher's q, all [S, K]; of pairwise
    teachers the mean over them, and what H gets as one, of all weights; then q is p."""
    TEACHER: tl.constexpr = C.teachers[G]
    DIVERGENCE: tl.constexpr = C.divergences[G]
    N: tl.constexpr = len(tile.z)
    log_p = log_p_of(tile.z[H], numbers.inverse_t, named(states[H]))
    p = tl.exp2(log_p)
    if DIVERGENCE == MIXTURE:
        log_m = _log_mixture(tile, numbers, states)
        head = times(p, log_p - log_m) * LN_2
        return head, head, tl.zeros_like(p), p, p
    elif TEACHER == PAIRWISE:
        value = tl.zeros_like(p)
        head = tl.zeros_like(p)
        teacher = tl.zeros_like(p)
        for i in tl.static_range(N):
            if i != H:
                log_q = log_p_of(tile.z[i], numbers.inverse_t, named(states[i]))
                q = tl.exp2(log_q)
                of_h = _parts(log_q, q, log_p, p, numbers, DIVERGENCE)
                value += of_h[0]
                head += of_h[1]
                as_one = _parts(log_p, p, log_q, q, numbers, DIVERGENCE)
                teacher += times(numbers.kl[i], as_one[2])
        average: tl.constexpr = 1.0 / (N - 1)  # a variable would be float32
        return value * average, head * average, teacher * average, p, p
    else:
        u = teacher_of(tile, H, TEACHER)
        share = teacher_share(numbers.inverse_t, N, TEACHER)
        state = named(states[H])
        log_q = exponent(u, state.teacher_top, share) - tl.log2(state.teacher)[:, None]
        q = tl.exp2(log_q)
        value, head, teacher = _parts(log_q, q, log_p, p, numbers, DIVERGENCE)
        return value, head, teacher, p, q


@triton.jit
def add_divergences(tile, numbers, states, sums, C: tl.constexpr, G: tl.constexpr):
    """Every head's sums after these classes."""
    N: tl.constexpr = len(tile.z)
    new = ()
    for i in tl.static_range(N):
        of_head = sums[i]
        if not (C.teachers[G] == FINAL and i == N - 1):
            value, head, teacher, _, _ = _of_head(tile, numbers, states, i, C, G)
            of_head = (
                of_head[0] + tl.sum(value, 1), of_head[1] + tl.sum(head, 1),
                of_head[2] + tl.sum(teacher, 1),
            )  # fmt: skip
        new += (of_head,)
    return new


@triton.jit
def add_label(tile, numbers, states, of_label):
    """Add KL(y || m) of these classes, to [S]."""
    log_m = _log_mixture(tile, numbers, states)
    return of_label + tl.sum(times(tile.soft, tl.log2(tile.soft) - log_m), 1) * LN_2


@triton.jit
def _pull(weight, part, p, total):
    """weight (part - p total), [S, K], of weights and totals [S]."""
    return times(weight[:, None], part - times(p, total[:, None]))


@triton.jit
def passed_on(tile, numbers, states, sums, scale, C: tl.constexpr, G: tl.constexpr):
    """What goes into the logits of all teachers together, scaled, [S, K]."""
    total = tl.zeros_like(tile.z[0])
    if C.teachers[G] != PAIRWISE:
        for i in tl.static_range(len(tile.z) - 1 if C.teachers[G] == FINAL else len(tile.z)):
            _, _, teacher, _, q = _of_head(tile, numbers, states, i, C, G)
            total += _pull(scale * numbers.kl[i], teacher, q, sums[i][2])
    return total


@triton.jit
def divergence_gradient(
    tile, numbers, states, sums, scale, into, H: tl.constexpr, C: tl.constexpr, G: tl.constexpr
):  # fmt: skip
    """The gradient of z/T of head H, scaled; ``into`` is what ``passed_on`` says."""
    TEACHER: tl.constexpr = C.teachers[G]
    N: tl.constexpr = len(tile.z)
    dz = tl.zeros_like(tile.z[H])
    if not (TEACHER == FINAL and H == N - 1):
        _, head, teacher, p, q = _of_head(tile, numbers, states, H, C, G)
        dz = _pull(scale * numbers.kl[H], head, p, sums[H][1])
        if not C.detach[G]:
            if TEACHER == PAIRWISE:
                dz += _pull(scale, teacher, p, sums[H][2])
            elif TEACHER == OTHERS:
                mine = _pull(scale * numbers.kl[H], teacher, q, sums[H][2])
                dz += (into - mine) * (1.0 / (N - 1))
            elif TEACHER == MEAN:
                dz += into * (1.0 / N)
    elif not C.detach[G]:
        dz = into
    return dz
