"""Device functions of the collaborative consistency, on tiles of logits.

A tile is [S, K]: samples, classes; what is known of a head is [S]. The logit of a masked
class is -inf, and so it is past the last class; of samples that aren't counted logits are 0.
Of a product with a probability of 0 ``times`` makes 0. A maximum is finite from the beginning,
by far lower than logits are: so of masked classes alone all exponents are -inf too, and no sum
needs a condition.

Exponents are in units of log 2, so that an exponential is one instruction on top of the
multiplication by 1/T: ``inverse_t`` is log2(e)/T. The logits of a teacher are u ``share``,
u [S, K] and share a number, so that its maximum needs no multiplications. In the ``State`` of a
head, over the classes seen so far,

x = z inverse_t - top, top = max z inverse_t, y = u share - teacher_top, teacher_top = max u share.

Both x and y are small where 2^y (y - x) weighs most: nothing large cancels. What was rounded of a
top, all exponents have in common: it is gone where the logarithm of their sum is subtracted.
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
_LOWEST = tl.constexpr(-(2.0**126))  # of an exponent


class Samples(NamedTuple):
    """What a program knows of its samples, each [S]."""

    index: Any
    stored: Any  # whether there is such a sample
    counted: Any  # whether it counts
    label: Any  # class, -1 of an unknown one
    weight: Any  # of the class of the index


class Numbers(NamedTuple):
    """What a group weighs with."""

    ce: Any  # of each head
    kl: Any
    temperature: Any
    inverse_t: Any
    beta: Any  # what a mixture has of a teacher or a label
    rest: Any  # and of heads, 1 - beta, where a beta near 1 has all of its digits
    smoothing: Any


class State(NamedTuple):
    """What is known of a head after some classes, each [S]."""

    top: Any  # max z inverse_t
    plain: Any  # sum 2^(T x)
    tempered: Any  # sum 2^x
    labels: Any  # sum of soft labels, or of 1/K
    label_exponent: Any  # sum of that times T x
    teacher_top: Any  # max u share
    teacher: Any  # sum 2^y
    gap: Any  # sum 2^y (y - x)


class Tile(NamedTuple):
    """Some classes of a program's samples."""

    z: Any  # the logits of each head of a group, [S, K]
    after: Any  # of others as teachers, what the heads behind each but the last sum up to; or ()
    soft: Any  # soft labels, [S, K]
    k: Any  # [K], or [S, K]
    inside: Any  # (1, K), or [S, K]
    stored: Any  # where a gradient is stored, [S, K]


@triton.jit
def named(state):
    """One of a tuple of states, which in Triton 3.6 lose their names as they are added to it."""
    return State(
        state[0], state[1], state[2], state[3], state[4], state[5], state[6], state[7]
    )  # fmt: skip


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
def _joined(tiles):
    """Tiles [S, K] as one [S, K, 2, ..., 2], filled up with the last of them."""
    for _ in tl.static_range(16):
        if len(tiles) > 1:
            if len(tiles) % 2 == 1:
                tiles += (tiles[len(tiles) - 1],)
            pairs = ()
            for i in tl.static_range(len(tiles) // 2):
                pairs += (tl.join(tiles[2 * i], tiles[2 * i + 1]),)
            tiles = pairs
    return tiles[0]


@triton.jit
def _parted(joined, N: tl.constexpr):
    """What ``_joined`` made one, and more, after its axis of classes is gone: at least N [S]."""
    parts = (joined,)
    for _ in tl.static_range(16):
        if len(parts) < N:
            more = ()
            for i in tl.static_range(len(parts)):
                more += tl.split(parts[i])
            parts = more
    return parts


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
    """z factor - top, in one instruction."""
    return tl.fma(z, factor, -top[:, None])


@triton.jit
def _power(root, EXPONENT: tl.constexpr):
    power = root
    for _ in tl.static_range(EXPONENT - 1):
        power *= root
    return power


@triton.jit
def _plain(x, root, temperature, POWER: tl.constexpr):
    """2^(T x): where T = POWER, a power of the root 2^x, which is needed too."""
    if POWER > 0:
        return _power(root, POWER)
    else:
        return tl.exp2(x * temperature)


@triton.jit
def initial(N: tl.constexpr, S: tl.constexpr, ACC: tl.constexpr):
    """The states of N heads before their first class."""
    low = tl.full([S], _LOWEST, ACC)
    zero = tl.zeros([S], ACC)
    states = ()
    for _ in tl.static_range(N):
        states += (State(low, zero, zero, zero, zero, low, zero, zero),)
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
def sums_after(z, TEACHER: tl.constexpr):
    """``Tile.after``: with it teachers take three additions a head, however many heads there are,
    and as many registers as the logits."""
    N: tl.constexpr = len(z)
    after = ()
    if TEACHER == OTHERS and N > 2:
        after = (z[N - 1],)
        for i in tl.static_range(2, N):
            after = (z[N - i] + after[0],) + after
    return after


@triton.jit
def teacher_of(tile, H: tl.constexpr, TEACHER: tl.constexpr):
    """u [S, K] of head H. Of its own large logit, a sum of all heads would keep the rounding."""
    z = tile.z
    if TEACHER == OTHERS:
        if len(tile.after) == 0:
            return sum_of(z[:H] + z[H + 1 :])
        elif H == 0:
            return tile.after[0]
        elif H == len(z) - 1:
            return sum_of(z[:H])
        else:
            return sum_of(z[:H]) + tile.after[H]
    elif TEACHER == MEAN:
        return sum_of(z)
    else:
        return z[len(z) - 1]


@triton.jit
def _absorb_labels(
    tile, x, drop, state, temperature, C: tl.constexpr, G: tl.constexpr
):  # fmt: skip
    """What a state has of labels that are more than one class, after their next; by ``drop`` its
    top was less."""
    labels, label_exponent = state.labels, state.label_exponent
    if C.summed[G]:
        y = tile.soft
        if not C.soft:
            y = tl.where(tile.inside, 1.0 / C.k, tl.zeros_like(x))
        more, more_exponent = _sums((y, times(y, x * temperature)))
        if C.k > C.block:
            label_exponent += times(labels, drop * temperature)
        label_exponent += more_exponent
        labels += more
    return labels, label_exponent


@triton.jit
def absorb_alone(tile, numbers, state, C: tl.constexpr, G: tl.constexpr):
    """The state of a head without KL after its next classes; its temperature is 1."""
    z = tile.z[0]
    top, plain = state.top, state.plain
    labels, label_exponent = state.labels, state.label_exponent
    if C.plain[G]:
        # A NaN may be passed over here: 2^(z - maximum) is NaN all the same.
        top = tl.maximum(top, tl.max(z, 1) * numbers.inverse_t)
        x = exponent(z, top, numbers.inverse_t)
        drop = state.top - top
        plain = plain * tl.exp2(drop) + tl.sum(tl.exp2(x), 1)
        labels, label_exponent = _absorb_labels(tile, x, drop, state, numbers.temperature, C, G)
    return State(
        top, plain, state.tempered, labels, label_exponent, state.teacher_top, state.teacher,
        state.gap,
    )  # fmt: skip


@triton.jit
def absorb(
    tile, numbers, state, shared, risen, H: tl.constexpr, C: tl.constexpr, G: tl.constexpr
):  # fmt: skip
    """The state of head H after its next classes.

    A teacher that is not its own was absorbed by a head before: ``shared`` is the state
    of that head after it, ``risen`` what this function returned of it.
    """
    TEACHER: tl.constexpr = C.teachers[G]
    TAUGHT: tl.constexpr = TEACHER != PAIRWISE
    OWN: tl.constexpr = TEACHER == OTHERS or H == 0
    # Of no cross entropy the sum is that of 2^x, and isn't looked at.
    POWER: tl.constexpr = C.powers[G] if C.plain[G] else 1
    z = tile.z[H]
    u = teacher_of(tile, H, TEACHER)
    share = teacher_share(numbers.inverse_t, len(tile.z), TEACHER)
    teacher_top, teacher, gap = state.teacher_top, state.teacher, state.gap
    if TAUGHT and OWN:
        top, teacher_top = _maxima(z, u)
        teacher_top = tl.maximum(state.teacher_top, teacher_top * share)
    else:
        top = tl.max(z, 1)
    # A NaN may be passed over here: 2^(z - maximum) is NaN all the same.
    top = tl.maximum(state.top, top * numbers.inverse_t)
    drop = state.top - top
    x = exponent(z, top, numbers.inverse_t)
    root = tl.exp2(x)
    power = _plain(x, root, numbers.temperature, POWER)
    if TAUGHT:
        if OWN:
            risen = (state.teacher_top - teacher_top, teacher)
        else:
            teacher_top = shared.teacher_top
        y = exponent(u, teacher_top, share)
        q = tl.exp2(y)
        more, more_plain, more_teacher, more_gap = _sums((root, power, q, times(q, y - x)))
        shrunk = tl.exp2(risen[0])
        gap = times(shrunk, gap + (risen[0] - drop) * risen[1]) + more_gap
        teacher = teacher * shrunk + more_teacher
    else:
        more, more_plain = _sums((root, power))
    shrunk = tl.exp2(drop)
    tempered = state.tempered * shrunk + more
    plain = state.plain * _plain(drop, shrunk, numbers.temperature, POWER) + more_plain
    labels, label_exponent = _absorb_labels(tile, x, drop, state, numbers.temperature, C, G)
    return (
        State(top, plain, tempered, labels, label_exponent, teacher_top, teacher, gap), risen
    )  # fmt: skip


@triton.jit
def merged(sliced, numbers, C: tl.constexpr, G: tl.constexpr):
    """The states [S] of all heads, from those [S SLICES] of slices of each sample's classes.

    Joined, all maxima wait for the other warps once, and so do all sums.
    """
    N: tl.constexpr = len(sliced)
    TAUGHT: tl.constexpr = N > 1 and C.teachers[G] != PAIRWISE
    EACH: tl.constexpr = 6 if C.summed[G] else 4  # addends of a head
    of = ()
    maxima = ()
    for i in tl.static_range(N):
        of_head = ()
        for j in tl.static_range(8):
            of_head += (tl.reshape(sliced[i][j], [C.samples, C.slices]),)
        of_head = named(of_head)
        of += (of_head,)
        maxima += (of_head.top, of_head.teacher_top)
    tops = _parted(tl.max(_joined(maxima), 1), 2 * N)
    addends = ()
    for i in tl.static_range(N):
        state = named(of[i])
        drop = state.top - tops[2 * i][:, None]
        plain = state.plain * tl.exp2(drop * numbers.temperature)
        tempered = state.tempered * tl.exp2(drop)
        teacher, gap = state.teacher, state.gap
        if TAUGHT:
            rise = state.teacher_top - tops[2 * i + 1][:, None]
            shrunk = tl.exp2(rise)
            gap = times(shrunk, gap + (rise - drop) * teacher)
            teacher = teacher * shrunk
        addends += (plain, tempered, teacher, gap)
        if C.summed[G]:
            labels = state.labels
            addends += (
                labels, state.label_exponent + times(labels, drop * numbers.temperature)
            )  # fmt: skip
    sums = _parted(tl.sum(_joined(addends), 1), EACH * N)
    states = ()
    for i in tl.static_range(N):
        plain, tempered, teacher, gap = sums[EACH * i : EACH * i + 4]
        labels, label_exponent = plain, plain  # nobody asks
        if C.summed[G]:
            labels, label_exponent = sums[EACH * i + 4 : EACH * i + 6]
        states += (
            State(
                tops[2 * i], plain, tempered, labels, label_exponent, tops[2 * i + 1], teacher, gap
            ),
        )  # fmt: skip
    return states


@triton.jit
def cross_entropy(z_y, state, numbers, C: tl.constexpr):
    """CE [S]: of soft labels from their sum; else from the logit of the label [S], smoothed if
    asked."""
    log_sum = tl.log2(state.plain)
    if C.soft:
        ce = times(state.labels, log_sum) - state.label_exponent
    else:
        ce = log_sum - tl.fma(z_y, numbers.inverse_t, -state.top) * numbers.temperature
        if C.smooth:
            uniform = log_sum - state.label_exponent
            ce = (1 - numbers.smoothing) * ce + numbers.smoothing * uniform
    return ce * LN_2


@triton.jit
def _divergence(state):
    return state.gap / state.teacher + tl.log2(state.tempered / state.teacher)


@triton.jit
def divergence(state):
    """KL(q || p) [S] of a head that has one teacher."""
    return _divergence(state) * LN_2


@triton.jit
def plain_gradient(
    tile, samples, numbers, state, ce, H: tl.constexpr, C: tl.constexpr, G: tl.constexpr
):  # fmt: skip
    """ce (softmax(z) sum(y) - y) of head H, [S, K], of weights ce [S]."""
    x = exponent(tile.z[H], state.top, numbers.inverse_t)
    plain = _plain(x, tl.exp2(x), numbers.temperature, C.powers[G])
    if C.soft:
        return plain * _per(ce * state.labels, state.plain)[:, None] - ce[:, None] * tile.soft
    else:
        dz = plain * _per(ce, state.plain)[:, None]
        if C.smooth:
            dz -= (ce * numbers.smoothing * (1.0 / C.k))[:, None]
        part = (ce * (1 - numbers.smoothing))[:, None]
        if len(tile.k.shape) == 2:
            dz -= part
        elif C.k <= C.block:  # else there is a tile of labels
            dz -= tl.where(tile.k[None, :] == samples.label[:, None], part, 0.0)
        return dz


@triton.jit
def taught_gradient(tile, inverse_t, state, kl, H: tl.constexpr, TEACHER: tl.constexpr):
    """kl (p - q) of head H, [S, K], of weights kl [S]."""
    share = teacher_share(inverse_t, len(tile.z), TEACHER)
    p = tl.exp2(exponent(tile.z[H], state.top, inverse_t))
    q = tl.exp2(exponent(teacher_of(tile, H, TEACHER), state.teacher_top, share))
    return p * _per(kl, state.tempered)[:, None] - q * _per(kl, state.teacher)[:, None]


@triton.jit
def log_p_of(z, inverse_t, state):
    return exponent(z, state.top, inverse_t) - tl.log2(state.tempered)[:, None]


@triton.jit
def into_teacher(tile, inverse_t, state, kl, H: tl.constexpr, TEACHER: tl.constexpr):
    """kl q (log q - log p - KL) of head H, [S, K]: the gradient of its teacher's logits."""
    share = teacher_share(inverse_t, len(tile.z), TEACHER)
    y = exponent(teacher_of(tile, H, TEACHER), state.teacher_top, share)
    gap = y - (tl.log2(state.teacher) + _divergence(state))[:, None]
    gap -= log_p_of(tile.z[H], inverse_t, state)
    return times(tl.exp2(y) * (_per(kl, state.teacher) * LN_2)[:, None], gap)


@triton.jit
def _pairwise_sums(tile, inverse_t, states, weights):
    """sum_j p_j, sum_j p_j log p_j and sum_j w_j log p_j, each [S, K]."""
    total = tl.zeros_like(tile.z[0])
    entropy = tl.zeros_like(tile.z[0])
    weighted = tl.zeros_like(tile.z[0])
    for i in tl.static_range(len(tile.z)):
        log_p = log_p_of(tile.z[i], inverse_t, named(states[i]))
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
        log_p = log_p_of(tile.z[i], numbers.inverse_t, named(states[i]))
        pull = times(tl.exp2(log_p), log_p * weight - weighted)
        new += (toward[i] + tl.sum(pull, 1),)
    return new


@triton.jit
def add_pairwise(tile, numbers, states, divergences):
    """Add sum_k (Q - P log p_h)/(n - 1) to every head's [S]."""
    total, entropy, _ = _pairwise_sums(tile, numbers.inverse_t, states, numbers.kl)
    new = ()
    for i in tl.static_range(len(tile.z)):
        log_p = log_p_of(tile.z[i], numbers.inverse_t, named(states[i]))
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
    log_p = log_p_of(tile.z[H], numbers.inverse_t, named(states[H]))
    p = tl.exp2(log_p)
    dz = times(weights[H], p - (total - p) * (1.0 / others))
    if not DETACH:
        pull = log_p * sum_of(weights) - weighted - toward[H][:, None]
        dz += times(p, pull) * (LN_2 / others)
    return dz * scale[:, None]
