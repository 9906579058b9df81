"""How accurate a result must be: within ``ROUNDINGS`` roundings, relative to the truth.

The truth is ``impl="reference"`` in float64, on the very values the implementation was
given. A result g is judged by |g - truth| / |truth|, norms over the whole tensor and over
each of its rows (a row of a matrix, one head's logits of one sample, one loss), which no
wrong factor, sign or missing part gets past, however small its elements.

Correct implementations round, and where the terms of a sum cancel, what they rounded is
large beside the sum. The noise of a row is the norm of what rounding each step once leaves
there, computed in float64: the result is rounded to its dtype, sums are to float32, and
factors of products to 16 bits or TensorFloat-32 where they may be. So noise over the unit
of the dtype and over |truth| is the condition number, 1 where nothing cancels, and

    |g - truth| <= ROUNDINGS * noise.

``ROUNDINGS`` is over twice the worst ratio of all tests and correct implementations, 2.2:
where a kernel rounds both its factors and its result to float16. float64 must be within
1e-10. What has no noise (dead rows, ignored samples) is exact.

A bound wider than ``BITE`` of the truth would let wrong results pass. Hypothesis then draws
again; a given case (of a single class, say, which has no gradient) is held to the wider bound.
"""

from __future__ import annotations

from collections.abc import Sequence

import hypothesis
import torch
from torch import Tensor

from imcl_fast import reference

ROUNDINGS = 5
SUM = 4  # roundings on the way to a term of a sum, and into it
BITE = 1 / 16  # of a gradient, and a fourth of that of a loss
FLOAT64_BOUND = 1e-10


def unit(dtype: torch.dtype) -> float:
    """The relative error of rounding to dtype: its root mean square, eps / 2 at most."""
    return torch.finfo(dtype).eps / 12**0.5


def loss_dtype(dtype: torch.dtype) -> torch.dtype:
    """What losses are in, and sums are accumulated in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def assert_accurate(
    what: str, got: Tensor, truth: Tensor, noise: Tensor, dtype: torch.dtype
) -> None:
    """``got``, of the accuracy of ``dtype``, is as near to ``truth`` as the module says.

    ``noise`` has the shape of the rows, the first dimensions of ``truth``; where it is 0, got
    is 0, and where it is infinite, a row is left out. An infinite truth wants the same infinity.
    """
    noise = noise.reshape(-1)
    rows = len(noise), truth.numel() // max(len(noise), 1)
    got, truth = (t.detach().cpu().double().reshape(rows) for t in (got, truth))
    assert not truth.isnan().any() and not noise.isnan().any(), f"{what}: the truth is NaN"
    infinite = truth.isinf()
    assert torch.equal(got[infinite], truth[infinite]), f"{what}: another infinity"
    got, truth = got.masked_fill(infinite, 0), truth.masked_fill(infinite, 0)
    assert torch.isfinite(got).all(), f"{what}: not finite"
    assert (got[noise == 0] == 0).all(), f"{what}: not exactly 0"
    noisy = noise > 0
    judged = noisy & torch.isfinite(noise)
    got, truth, noise = got[judged], truth[judged], noise[judged]
    size = truth.norm(dim=-1)
    relative = FLOAT64_BOUND / ROUNDINGS if dtype == torch.float64 else unit(dtype)
    least = torch.finfo(dtype).smallest_normal * unit(dtype) * truth.shape[-1] ** 0.5
    noise = (noise.square() + (relative * size).square() + least**2).sqrt()
    worst = ratio((got - truth).norm(dim=-1), noise)
    assert worst <= ROUNDINGS, f"{what}: {worst:.3g} roundings off, {ROUNDINGS} allowed"
    bite = BITE if truth.shape[-1] > 1 else BITE / 4
    bites = ROUNDINGS * noise <= bite * size
    enough = 2 * bites.sum() > noisy.sum() and ROUNDINGS * noise.norm() <= bite * size.norm()
    if noisy.any() and not enough:
        if hypothesis.currently_in_test_context():
            hypothesis.reject()
        assert 2 * judged.sum() > noisy.sum(), f"{what}: most rows are in doubt, draw others"


def ratio(error: Tensor, noise: Tensor) -> float:
    """The worst error in roundings, of all rows together or of one."""
    if not error.numel():
        return 0.0
    return max((error.norm() / noise.norm()).item(), (error / noise).max().item())


def pairwise_noise(
    x: Tensor,
    *,
    share: float,
    batched: bool,
    factor: float,
    penalty: str = "square",
    center: bool = False,
    eps: float = 1e-12,
) -> tuple[Tensor, Tensor]:
    """The noise of one layer's part of the penalty (), and of its gradient (matrices, rows).

    ``share`` is the weight of one pair in the loss, ``factor`` the unit that factors of
    products may be rounded to.

    With unit rows u_i, row i of the gradient is 2 share/n_i times the part orthogonal to u_i
    of sum_j phi'(c_ij) u_j: the whole sum is rounded, and so is each c_ij and phi'(c_ij). The
    dual and signed forms sum over j = i, too. Centring rounds relative to what it
    subtracts. Under "abs" a row is left out where rounding can turn the sign of a cosine.
    """
    rows = reference.as_matrices(x.detach().cpu().double(), batched)
    _, n, d = rows.shape
    # A sum of m numbers of one sign, as in a norm, is rounded m times.
    once = SUM * unit(loss_dtype(x.dtype)) * max(n, d) ** 0.5
    dual = penalty == "square" and 2 * d <= n
    if dual or penalty == "signed":  # they subtract nearly equal numbers: nothing is rounded
        factor = 0.0
    gram_factor = 0.0 if x.dtype != torch.float32 and not center else factor
    raw = rows.norm(dim=-1)
    limit = torch.full_like(raw, eps)
    if center:
        rows = rows - rows.mean(-1, keepdim=True)
        limit = (reference.CENTRED_DEAD_RATIO * raw).clamp(min=eps)
    norm = rows.norm(dim=-1)
    live = norm > limit
    inverse = torch.where(live, 1 / norm, 0.0)
    u = rows * inverse.unsqueeze(-1)
    offset = raw * inverse  # 1 unless centred
    sums = once * torch.maximum(offset.unsqueeze(1), offset.unsqueeze(2))  # of each pair
    same = torch.eye(n, dtype=torch.float64) * live.unsqueeze(-1)
    pairs = (live.unsqueeze(1) & live.unsqueeze(2)).double() - same
    c = u @ u.transpose(1, 2) * pairs
    spread = (u.square() @ u.square().transpose(1, 2)).sqrt()  # of c, when factors are rounded
    c_noise = (sums + gram_factor * spread) * pairs
    if penalty == "square":
        phi, slope, bend, own = c * c, 2 * c, 2 * pairs, 2 * same * dual
    else:
        phi, slope, bend, own = c.abs(), c.sign(), 0 * pairs, 0 * same
        if penalty == "signed":
            slope, own = pairs, same
    along = (slope * c).sum(-1)
    along_noise = 2 * gram_factor * spread.diagonal(dim1=1, dim2=2) * along  # of the norms
    parts = [(slope * c_noise).norm(), along_noise.norm(), (bend * c_noise.square()).sum(),
             once * (phi.sum() + own.sum())]
    loss = share * torch.stack(parts).norm()
    slope = slope + own
    gradient = 2 * share * inverse * (
        once * (slope @ u).norm(dim=-1)
        + (slope * (sums + factor)).norm(dim=-1)
        + factor * along.abs()
        + (bend * c_noise).norm(dim=-1)
    )
    if penalty == "abs":
        doubt = c.abs() < ROUNDINGS * (sums + 2 * gram_factor) * spread * pairs
        gradient = gradient.masked_fill(doubt.any(-1), torch.inf)
    return loss, gradient


def consistency_noise(
    logits: Sequence[Tensor],
    target: Tensor | None,
    *,
    temperature: Sequence[float],
    teacher: Sequence[str],
    groups: Sequence[int],
    detach_teacher: Sequence[bool],
    ce_weight: Sequence[float],
    kl_weight: Sequence[float],
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    divergence: Sequence[str] | None = None,
    beta: Sequence[float] | None = None,
    activation: str = "softmax",
) -> tuple[Tensor, Tensor, Tensor]:
    """The noise of the loss () or (B,), of its terms (2, H), and of dz (H, B).

    A logit is rounded relative to the largest one of its sample, and so is the logarithm of
    every probability: ``spread``. Of cross entropies it is rounded less its head's maximum, for
    what logits have in common is none of their business. A masked class, of -inf or the lowest
    number, has neither.
    Independent labels are as many samples of two classes.
    """

    def stacked(stacks) -> Tensor:
        return torch.cat([z.cpu().reshape(-1, *z.shape[-2:]) for z in stacks])

    sums = SUM * min(unit(loss_dtype(z.dtype)) for z in logits)  # the dtype all promote to
    masked = stacked(z <= torch.finfo(z.dtype).min for z in logits)
    z = stacked(z.detach().double() for z in logits)
    heads, batch, classes = z.shape
    share = torch.ones(batch, dtype=torch.float64)
    if sample_weight is not None:
        share = sample_weight.cpu().double().abs()
    independent = activation == "sigmoid"
    many = classes if independent else 1  # samples of one
    labels_of = reference._independent_labels if independent else reference._labels
    given = None
    if target is not None:
        given = labels_of(
            target.cpu(), None if weight is None else weight.cpu(), classes, label_smoothing,
            ignore_index, torch.float64,
        )  # fmt: skip
    if independent:
        z, masked = (
            torch.stack([x, torch.zeros_like(x)], -1).flatten(1, 2) for x in (z, masked)
        )
        share = share.repeat_interleave(many)
        batch, classes = batch * many, 2
        if given is not None:
            given = given[0].flatten(0, 1), None, given[2].repeat_interleave(many)
    size, of_labels = torch.zeros(batch, dtype=torch.float64), share  # of a label, all its classes
    if given is not None:
        labels, label_weight, known = given
        share, size = torch.where(known, share, 0.0), labels.abs().sum(-1)
        of_labels = share if label_weight is None else share * label_weight
    largest = z.abs().masked_fill(masked, 0).amax((0, 2)) if batch else z.new_zeros(0)
    base = 1 + torch.tensor(float(classes)).log()
    ce_weight, kl_weight = (torch.tensor(w).double().abs() for w in (ce_weight, kl_weight))

    below = (z.masked_fill(masked, -torch.inf).amax(-1, keepdim=True) - z).masked_fill(masked, 0)
    below = below.amax(-1) if z.numel() else z.new_zeros(heads, batch)
    ce = (base + below) * size
    kl = torch.zeros(heads, batch, dtype=torch.float64)
    dz_ce = (ce_weight.view(-1, 1) * ce).unsqueeze(-1) * z.softmax(-1)
    dz_kl = torch.zeros_like(z)
    first = 0
    for size, t, kind, detached, name, b in zip(
        groups, temperature, teacher, detach_teacher, divergence or ["kl"] * len(groups),
        beta or [0.5] * len(groups), strict=True,
    ):  # fmt: skip
        group = list(z[first : first + size] / t)
        spread = (base + largest / t).unsqueeze(-1)
        for h, w in enumerate(kl_weight[first : first + size], first):
            log_p = group[h - first].log_softmax(-1)
            for part, log_q in reference._teachers(group, h - first, kind):
                value, head, into = _divergence_noise(log_q, log_p, name, b)
                kl[h] += part * t * t * (spread * value).sum(-1)
                dz_kl[h] += part * w * t * spread * head
                if not detached:
                    teachers = slice(first + (size - 1) * (kind == "final"), first + size)
                    dz_kl[teachers] += part * w * t * spread * into
        first += size

    def times(scale: Tensor, noise: Tensor) -> Tensor:  # ignored samples may hold anything
        return torch.where(scale == 0, 0.0, sums * scale * noise)

    ce_mean, kl_mean = (share / max(w.sum(), 1e-300) * bool(w.sum()) for w in (of_labels, share))
    ce_mean, kl_mean = many * ce_mean, many * kl_mean
    ce_by, kl_by = (share, share) if reduction == "sum" else (ce_mean, kl_mean)
    terms = torch.stack([times(ce_by, ce).sum(-1), times(kl_by, kl).sum(-1)])
    if reduction == "none":
        ce_by = kl_by = share
    loss = ce_weight @ times(ce_by, ce) + kl_weight @ times(kl_by, kl)
    dz = times(ce_by.unsqueeze(-1), dz_ce) + times(kl_by.unsqueeze(-1), dz_kl)
    if independent:
        loss, dz = loss.view(-1, many).sum(-1), dz[..., 0].view(heads, -1, many)
    return loss if reduction == "none" else loss.sum(), terms, dz.norm(dim=-1)


def _divergence_noise(
    log_q: Tensor, log_p: Tensor, name: str, beta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What the noise of logarithms of probabilities is multiplied with: in the value, in the
    gradient of the head's logits, and in that of the teacher's; of every class."""

    def away(p: Tensor, log_p: Tensor, log_m: Tensor) -> tuple[Tensor, Tensor]:
        """p (1 + |log p/m|), and the same of that less its mean."""
        gap = torch.where((p > 0) & (log_m > -torch.inf), log_p - log_m, 0.0)
        return p * (1 + gap.abs()), p * (1 + (gap - (p * gap).sum(-1, keepdim=True)).abs())

    p, q = log_p.exp(), log_q.exp()
    if name == "kl":
        value, into = away(q, log_q, log_p)
        return value, p + q, into
    if name == "reverse_kl":
        value, into = away(p, log_p, log_q)
        return value, into, p + q
    log_m = (beta * q + (1 - beta) * p).log()
    of_q, teacher = away(q, log_q, log_m)
    of_p, head = away(p, log_p, log_m)
    return beta * of_q + (1 - beta) * of_p, (1 - beta) * head, beta * teacher


def mixture_noise(
    logits: Sequence[Tensor],
    target: Tensor,
    *,
    pi: Sequence[float],
    factor: float,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    sample_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The noise of ``factor`` times the generalised Jensen-Shannon divergence, () or (B,), and of
    its gradient (H, B); as ``consistency_noise``."""
    sums = SUM * min(unit(loss_dtype(z.dtype)) for z in logits)
    z = torch.cat([z.detach().cpu().double().reshape(-1, *z.shape[-2:]) for z in logits])
    masked = torch.cat([
        (z <= torch.finfo(z.dtype).min).cpu().reshape(-1, *z.shape[-2:]) for z in logits
    ])  # fmt: skip
    labels, _, known = reference._labels(
        target.cpu(), None, z.shape[-1], label_smoothing, ignore_index, torch.float64
    )
    share = known.double()
    if sample_weight is not None:
        share = share * sample_weight.cpu().double().abs()
    z = z.masked_fill((share == 0).unsqueeze(-1), 0)
    log_p = z.masked_fill(masked, -torch.inf).log_softmax(-1)
    p = torch.cat([labels.unsqueeze(0), log_p.exp()])  # [1 + H, B, K]
    weights = torch.tensor(pi).double().view(-1, 1, 1)
    m = (weights * p).sum(0)
    gap = torch.where(p > 0, p.log() - m.log(), 0.0)
    largest = z.abs().masked_fill(masked, 0).amax((0, 2)).view(-1, 1)
    spread = sums * factor * (1 + torch.tensor(float(z.shape[-1])).log() + largest) * weights
    off = gap - (p * gap).sum(-1, keepdim=True)
    by = share if reduction != "mean" else share / max(share.sum(), 1e-300) * bool(share.sum())
    loss = by * (spread * p * (1 + gap.abs())).sum((0, 2))
    dz = by * (spread * p * (1 + off.abs()))[1:].norm(dim=-1)
    return loss if reduction == "none" else loss.sum(), dz
