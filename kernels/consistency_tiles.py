"""Device functions of the collaborative consistency, on tiles of logits.

A tile is [S, K]: samples, classes; what is known of a head is [S]. Past the last class,
and of samples that aren't counted, logits are 0; ``inside`` (1, K) tells the classes. The
logit of a masked class is -inf: of a product with its probability of 0, ``times`` makes 0.

Exponents are in units of log 2, so that an exponential is one instruction on top of the
multiplication by 1/T: ``inverse_t`` is log2(e)/T. The logits of a teacher are u ``share``,
u [S, K] and share a number, so that its maximum needs no multiplications. The state of a
head, over the classes seen so far:

(max z, sum exp(z - max z), sum 2^x, sum z / K, max u, sum 2^y, sum 2^y (y - x)),
of soft labels, a tile t, sum t z in place of sum z / K;
x = (z - max z) inverse_t, y = (u - max u) share

Both x and y are small where 2^y (y - x) weighs most: nothing large cancels.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..algebra import consistency as algebra

OTHERS, MEAN = tl.constexpr(algebra.OTHERS), tl.constexpr(algebra.MEAN)
FINAL, PAIRWISE = tl.constexpr(algebra.FINAL), tl.constexpr(algebra.PAIRWISE)
LOG2_E, LN_2 = tl.constexpr(math.log2(math.e)), tl.constexpr(math.log(2))


class Samples(NamedTuple):
    """What a program knows of its samples, each [S]."""

    index: Any
    stored: Any  # whether there is such a sample
    counted: Any  # whether it counts
    label: Any  # class, -1 of an unknown one
    size: Any  # of the label: the sum of soft labels, the class weight of an index


class Numbers(NamedTuple):
    """What a group weighs with."""

    ce: Any  # of each head
    kl: Any
    temperature: Any
    inverse_t: Any
    beta: Any
    smoothing: Any


class Tile(NamedTuple):
    """Some classes of a program's samples."""

    z: Any  # the logits of each head of a group, [S, K]
    soft: Any  # soft labels, [S, K]
    k: Any  # [K], or [S, K]
    inside: Any  # (1, K), or [S, K]
    stored: Any  # where a gradient is stored, [S, K]


@triton.jit
def sum_of(tiles):
    total = tiles[0]
    for i in tl.static_range(1, len(tiles)):
        total += tiles[i]
    return total


@triton.jit
def _maxima(a, b):
    """The maxima [S] of two tiles. Joined, they wait for the other warps once."""
    return tl.split(tl.max(tl.join(a, b), 1))


@triton.jit
def _sums(tiles):
    """The sums [S] of two or four tiles, as ``_maxima``."""
    if len(tiles) == 2:
        return tl.split(tl.sum(tl.join(tiles[0], tiles[1]), 1))
    else:
        joined = tl.join(tl.join(tiles[0], tiles[1]), tl.join(tiles[2], tiles[3]))
        even, odd = tl.split(tl.sum(joined, 1))
        a, b = tl.split(even)
        c, d = tl.split(odd)
        return a, b, c, d


@triton.jit
def padded(z, inside):
    return tl.where(inside, z, float("-inf"))


@triton.jit
def times(weight, x):
    """weight x, and 0 where the weight is 0, whatever x is."""
    return tl.where(weight == 0.0, 0.0, weight * x)


@triton.jit
def _per(weight, total):
    """weight / total, and no weight also of nothing."""
    return tl.where(weight == 0.0, 0.0, weight / total)


@triton.jit
def exponent(z, top, factor):
    """(z - top) factor, in one instruction; where all classes are masked so far, z factor."""
    shift = tl.where(top == float("-inf"), 0.0, top * factor)
    return tl.fma(z, factor, -shift[:, None])


@triton.jit
def _plain(z, x, top, POWER: tl.constexpr):
    """exp(z - top): where T = POWER, a power of 2^x, which is needed too."""
    if POWER > 0:
        root = tl.exp2(x)
        power = root
        for _ in tl.static_range(POWER - 1):
            power *= root
        return power
    else:
        return tl.exp2(exponent(z, top, tl.full((), LOG2_E, z.dtype)))


@triton.jit
def _risen(old, new):
    """By how much a maximum rose, negated; 0 if there was none."""
    return tl.where(old == float("-inf"), 0.0, old - new)


@triton.jit
def initial(N: tl.constexpr, S: tl.constexpr, ACC: tl.constexpr):
    """The states of N heads before their first class."""
    low = tl.full([S], float("-inf"), ACC)
    zero = tl.zeros([S], ACC)
    states = ()
    for _ in tl.static_range(N):
        states += ((low, zero, zero, zero, low, zero, zero),)
    return states


@triton.jit
def teacher_share(inverse_t, N: tl.constexpr, TEACHER: tl.constexpr):
    if TEACHER == OTHERS:
        return inverse_t * (1.0 / (N - 1))
    elif TEACHER == MEAN:
        return inverse_t * (1.0 / N)
    else:
        return inverse_t


@triton.jit
def teacher_of(z, H: tl.constexpr, TEACHER: tl.constexpr):
    """u [S, K] of head H. Of its own large logit, a sum of all heads would keep the rounding."""
    if TEACHER == OTHERS:
        return sum_of(z[:H] + z[H + 1 :])
    elif TEACHER == MEAN:
        return sum_of(z)
    else:
        return z[len(z) - 1]


@triton.jit
def of_labels(z, soft, C: tl.constexpr):
    """What the state sums of the logits for labels that are more than one class, [S, K]."""
    if C.soft:
        return times(soft, z)
    else:
        return z * (1.0 / C.k)


@triton.jit
def absorb_alone(tile, state, C: tl.constexpr, G: tl.constexpr):
    """The state of a head without KL after its next classes."""
    z = tile.z[0]
    top, plain, raw = state[0], state[1], state[3]
    if C.plain[G]:
        z_low = padded(z, tile.inside)
        # A NaN may be passed over here: 2^(z - maximum) is NaN all the same.
        top = tl.maximum(top, tl.max(z_low, 1))
        e = _plain(z_low, z_low, top, 0)
        if C.smooth or C.soft:
            more, more_raw = _sums((e, of_labels(z, tile.soft, C)))
            raw += more_raw
        else:
            more = tl.sum(e, 1)
        plain = plain * tl.exp2(_risen(state[0], top) * LOG2_E) + more
    return (top, plain, state[2], raw, state[4], state[5], state[6])


@triton.jit
def absorb(
    tile, inverse_t, state, shared, risen, H: tl.constexpr, C: tl.constexpr, G: tl.constexpr
):  # fmt: skip
    """The state of head H after its next classes.

    A teacher that is not its own was absorbed by a head before: ``shared`` is the state
    of that head after it, ``risen`` what this function returned of it.
    """
    TEACHER: tl.constexpr = C.teachers[G]
    TAUGHT: tl.constexpr = TEACHER != PAIRWISE
    OWN: tl.constexpr = TEACHER == OTHERS or H == 0
    z = tile.z[H]
    share = teacher_share(inverse_t, len(tile.z), TEACHER)
    z_low = padded(z, tile.inside)
    u_low = padded(teacher_of(tile.z, H, TEACHER), tile.inside)
    raw, teacher_top, teacher, gap = state[3], state[4], state[5], state[6]
    if TAUGHT and OWN:
        top, teacher_top = _maxima(z_low, u_low)
        teacher_top = tl.maximum(state[4], teacher_top)
    else:
        top = tl.max(z_low, 1)
    # A NaN may be passed over here: 2^(z - maximum) is NaN all the same.
    top = tl.maximum(state[0], top)
    drop = _risen(state[0], top)
    x = exponent(z_low, top, inverse_t)
    root = tl.exp2(x)
    power = root
    if C.plain[G]:
        power = _plain(z_low, x, top, C.powers[G])
    if TAUGHT:
        if OWN:
            risen = (_risen(state[4], teacher_top) * share, teacher)
        else:
            teacher_top = shared[4]
        y = exponent(u_low, teacher_top, share)
        q = tl.exp2(y)
        more, more_plain, more_teacher, more_gap = _sums((root, power, q, times(q, y - x)))
        shrunk = tl.exp2(risen[0])
        gap = times(shrunk, gap + (risen[0] - drop * inverse_t) * risen[1]) + more_gap
        teacher = teacher * shrunk + more_teacher
    else:
        more, more_plain = _sums((root, power))
    tempered = state[2] * tl.exp2(drop * inverse_t) + more
    plain = state[1] * tl.exp2(drop * LOG2_E) + more_plain
    if C.plain[G] and (C.smooth or C.soft):
        raw += tl.sum(of_labels(z, tile.soft, C), 1)
    return (top, plain, tempered, raw, teacher_top, teacher, gap), risen


@triton.jit
def merged(sliced, inverse_t, TEACHER: tl.constexpr, S: tl.constexpr, SLICES: tl.constexpr):
    """The states [S] of all heads, from those [S SLICES] of slices of each sample's classes."""
    TAUGHT: tl.constexpr = len(sliced) > 1 and TEACHER != PAIRWISE
    states = ()
    for i in tl.static_range(len(sliced)):
        of = ()
        for j in tl.static_range(7):
            of += (tl.reshape(sliced[i][j], [S, SLICES]),)
        top, teacher_top = tl.max(of[0], 1), tl.max(of[4], 1)
        drop = _risen(of[0], top[:, None])
        plain, tempered = of[1] * tl.exp2(drop * LOG2_E), of[2] * tl.exp2(drop * inverse_t)
        teacher, gap = of[5], of[6]
        if TAUGHT:
            share = teacher_share(inverse_t, len(sliced), TEACHER)
            rise = _risen(of[4], teacher_top[:, None]) * share
            shrunk = tl.exp2(rise)
            gap = times(shrunk, gap + (rise - drop * inverse_t) * teacher)
            teacher = teacher * shrunk
        plain, tempered, teacher, gap = _sums((plain, tempered, teacher, gap))
        raw = tl.sum(of[3], 1)
        states += ((top, plain, tempered, raw, teacher_top, teacher, gap),)
    return states


@triton.jit
def cross_entropy(z_y, state, smoothing, samples, C: tl.constexpr):
    """CE [S]: of soft labels from their sum; else from the logit of the label [S], smoothed if
    asked."""
    log_sum = tl.log(state[1])
    if C.soft:
        ce = samples.size * log_sum - (state[3] - samples.size * state[0])
    else:
        ce = log_sum - (z_y - state[0])
        if C.smooth:
            uniform = log_sum - (state[3] - state[0])
            ce = (1 - smoothing) * ce + smoothing * uniform
    return ce


@triton.jit
def _divergence(state):
    return state[6] / state[5] + tl.log2(state[2] / state[5])


@triton.jit
def divergence(state):
    """KL(q || p) [S] of a head that has one teacher."""
    return _divergence(state) * LN_2


@triton.jit
def plain_gradient(
    tile, samples, numbers, state, ce, H: tl.constexpr, C: tl.constexpr, G: tl.constexpr
):  # fmt: skip
    """ce (softmax(z) sum(y) - y) of head H, [S, K], of weights ce [S]."""
    POWER: tl.constexpr = C.powers[G] if len(tile.z) > 1 else 0
    z_low = padded(tile.z[H], tile.inside)
    x = exponent(z_low, state[0], numbers.inverse_t)
    plain = _plain(z_low, x, state[0], POWER)
    if C.soft:
        return plain * _per(ce * samples.size, state[1])[:, None] - ce[:, None] * tile.soft
    else:
        dz = plain * _per(ce, state[1])[:, None]
        if C.smooth:
            dz -= (ce * numbers.smoothing * (1.0 / C.k))[:, None]
        own = tile.k[None, :] == samples.label[:, None]
        return dz - tl.where(own, (ce * (1 - numbers.smoothing))[:, None], 0.0)


@triton.jit
def taught_gradient(tile, inverse_t, state, kl, H: tl.constexpr, TEACHER: tl.constexpr):
    """kl (p - q) of head H, [S, K], of weights kl [S]."""
    u, share = teacher_of(tile.z, H, TEACHER), teacher_share(inverse_t, len(tile.z), TEACHER)
    p = tl.exp2(exponent(padded(tile.z[H], tile.inside), state[0], inverse_t))
    q = tl.exp2(exponent(padded(u, tile.inside), state[4], share))
    return p * _per(kl, state[2])[:, None] - q * _per(kl, state[5])[:, None]


@triton.jit
def log_p_of(z, inside, inverse_t, state):
    return exponent(padded(z, inside), state[0], inverse_t) - tl.log2(state[2])[:, None]


@triton.jit
def into_teacher(tile, inverse_t, state, kl, H: tl.constexpr, TEACHER: tl.constexpr):
    """kl q (log q - log p - KL) of head H, [S, K]: the gradient of its teacher's logits."""
    u, share = teacher_of(tile.z, H, TEACHER), teacher_share(inverse_t, len(tile.z), TEACHER)
    y = exponent(padded(u, tile.inside), state[4], share)
    gap = y - (tl.log2(state[5]) + _divergence(state))[:, None]
    gap -= log_p_of(tile.z[H], tile.inside, inverse_t, state)
    return times(tl.exp2(y) * (_per(kl, state[5]) * LN_2)[:, None], gap)


@triton.jit
def _pairwise_sums(tile, inverse_t, states, weights):
    """sum_j p_j, sum_j p_j log p_j and sum_j w_j log p_j, each [S, K]."""
    total = tl.zeros_like(tile.z[0])
    entropy = tl.zeros_like(tile.z[0])
    weighted = tl.zeros_like(tile.z[0])
    for i in tl.static_range(len(tile.z)):
        log_p = log_p_of(tile.z[i], tile.inside, inverse_t, states[i])
        p = tl.exp2(log_p)
        total += p
        entropy += times(p, log_p)
        weighted += times(weights[i], log_p)
    return total, entropy, weighted


@triton.jit
def add_toward(tile, numbers, states, toward):
    """Add sum_k p_h (W log p_h - sum_j w_j log p_j), W = sum_j w_j, to every head's [S]."""
    _, _, weighted = _pairwise_sums(tile, numbers.inverse_t, states, numbers.kl)
    weight = sum_of(numbers.kl)
    new = ()
    for i in tl.static_range(len(tile.z)):
        log_p = log_p_of(tile.z[i], tile.inside, numbers.inverse_t, states[i])
        pull = times(tl.exp2(log_p), log_p * weight - weighted)
        new += (toward[i] + tl.sum(pull, 1),)
    return new


@triton.jit
def add_pairwise(tile, numbers, states, divergences):
    """Add sum_k (Q - P log p_h)/(n - 1) to every head's [S]."""
    total, entropy, _ = _pairwise_sums(tile, numbers.inverse_t, states, numbers.kl)
    new = ()
    for i in tl.static_range(len(tile.z)):
        log_p = log_p_of(tile.z[i], tile.inside, numbers.inverse_t, states[i])
        kl = entropy - times(total, log_p)
        new += (divergences[i] + tl.sum(kl, 1) * (LN_2 / (len(tile.z) - 1)),)
    return new


@triton.jit
def pairwise_gradient(
    tile, numbers, states, toward, scale, H: tl.constexpr, DETACH: tl.constexpr
):  # fmt: skip
    """w (p_h - sum_{j != h} p_j/(n - 1)) of head H, and what it gets as a teacher, scaled."""
    weights = numbers.kl
    others: tl.constexpr = len(tile.z) - 1
    total, _, weighted = _pairwise_sums(tile, numbers.inverse_t, states, weights)
    log_p = log_p_of(tile.z[H], tile.inside, numbers.inverse_t, states[H])
    p = tl.exp2(log_p)
    dz = times(weights[H], p - (total - p) * (1.0 / others))
    if not DETACH:
        pull = log_p * sum_of(weights) - weighted - toward[H][:, None]
        dz += times(p, pull) * (LN_2 / others)
    return dz * scale[:, None]
