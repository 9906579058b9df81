"""Collaborative consistency with its closed-form gradient, in plain PyTorch.

``loss = sum_h ce_weight_h CE(z_h, y) + kl_weight_h T^2 KL(q_h || p_h)``, p_h = softmax(z_h/T), and
``dz_h = ce_weight_h (softmax(z_h) sum(y) - y)/B + kl_weight_h T (p_h - q_h)/B`` for a mean over B
samples: docs/math.md, "Collaborative consistency", has the teachers q_h, what those learn that
aren't detached, and pairs in linear time. The other divergences are in ``divergences``.

The logit of a masked class is -inf: what is multiplied with its probability of 0 is left
out of sums of p log p.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import dense
from ..dtypes import accumulation, kept
from . import divergences
from .divergences import KL, MIXTURE, pull
from .divergences import times as _times

OTHERS, MEAN, FINAL, PAIRWISE = range(4)
REDUCE_MEAN, REDUCE_SUM, REDUCE_NONE = range(3)


def forward(
    logits: Sequence[Tensor],
    target: Tensor | None,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    ce_weight: Sequence[float],
    kl_weight: Sequence[float],
    groups: Sequence[int],
    temperature: Sequence[float],
    teacher: Sequence[int],
    detach: Sequence[bool],
    divergence: Sequence[int],
    beta: Sequence[float],
    label_smoothing: float,
    ignore_index: int,
    binary: bool,
    reduction: int,
    keep: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Loss () or of the samples' sizes, terms (2, H), and with ``keep`` the gradient of every
    stack of logits, in what ``dtypes.kept`` says.

    Binary logits have one class: that of a second is 0. Of a mixture, whose temperature is 1,
    ``beta`` is the label's part and the heads' are in proportion to their ``kl_weight``; the terms
    of its heads are KL(y || m), which is the same for all, and KL(p_h || m).
    """
    samples = dense.samples(logits[0])
    if target is not None:
        target = target.flatten(0, len(samples) - 1)
    if sample_weight is not None:
        sample_weight = sample_weight.flatten()
    z = _stack(logits, binary)  # [H, B, K]
    heads, batch, classes = z.shape
    share, labels, label_weight = _targets(
        target, weight, sample_weight, label_smoothing, ignore_index, z
    )
    ce = z.new_zeros(heads, batch)
    if target is not None and labels is not None:
        log_p = torch.log_softmax(z, -1)
        if target.is_floating_point() or label_smoothing > 0:
            ce = -_times(labels, log_p).sum(-1)
        else:
            index = target.clamp(0, classes - 1).view(1, batch, 1)
            one = labels.gather(-1, index[0]).squeeze(-1)  # [B]
            ce = -_times(one, log_p.gather(-1, index.expand(heads, batch, 1)).squeeze(-1))

    ce_column, kl_column = _column(ce_weight, z), _column(kl_weight, z)  # [H, 1, 1]
    ce_pull = ce_column.clone()
    kl_terms, kl_gradients, first = [], [], 0
    for size, t, kind, detached, name, b in zip(
        groups, temperature, teacher, detach, divergence, beta, strict=True
    ):
        mine = slice(first, first + size)
        first += size
        if name == MIXTURE:
            assert labels is not None
            total = sum(kl_weight[mine])
            pi = [b, *((1 - b) * w / total for w in kl_weight[mine])]
            log_p = torch.log_softmax(z[mine], -1)
            ce[mine], term, gradient = divergences.mixture(pi, labels, log_p)
            ce_pull[mine] = 0
            gradient = _times(kl_column[mine], gradient)
        else:
            term, gradient = _group(z[mine] / t, kl_column[mine], kind, detached, name, b, keep)
            term, gradient = t * t * term, t * gradient
        kl_terms.append(term)
        kl_gradients.append(gradient)
    ce, kl = _times(share, ce), _times(share, torch.cat(kl_terms))
    ce_mean = kl_mean = _inverse(share.sum())
    if label_weight is not None:
        ce_mean = _inverse((share * label_weight).sum())
    by = (ce_mean, kl_mean) if reduction == REDUCE_MEAN else (1.0, 1.0)
    loss = _times(ce_column[..., 0], ce * by[0]) + _times(kl_column[..., 0], kl * by[1])
    loss = loss.sum(0)  # [B]
    terms = torch.stack([ce.sum(-1), kl.sum(-1)])
    if reduction != REDUCE_SUM:
        terms = terms * torch.stack([ce_mean, kl_mean]).unsqueeze(-1)
    # No view, which autograd would not let be changed in place.
    loss = loss.reshape(samples).clone() if reduction == REDUCE_NONE else loss.sum()
    if not keep:
        return loss, terms, []

    column = share.unsqueeze(-1)
    dz = _times(column, torch.cat(kl_gradients) * by[1])
    if target is not None and labels is not None:
        p = torch.softmax(z, -1)
        if target.is_floating_point() or weight is not None:
            p = _times(labels.sum(-1, keepdim=True), p)
        dz = dz + _times(ce_pull * column, (p - labels) * by[0])
    return loss, terms, _unstack(dz[..., :1] if binary else dz, logits)


def _group(
    z: Tensor, w: Tensor, kind: int, detached: bool, divergence: int, beta: float, keep: bool
) -> tuple[Tensor, Tensor]:
    """D(teacher_h || p_h) [H, B] of one group, from z/T [H, B, K]; and with ``keep``
    d/d(z/T) of the sum of these weighted by w, [H, B, K]."""
    if len(z) == 1:  # nobody teaches it
        return z.new_zeros(z.shape[:2]), torch.zeros_like(z) if keep else z
    log_p = torch.log_softmax(z, -1)
    if divergence == KL:
        gradient = _group_gradient(log_p, z, w, kind, detached) if keep else z
        return _group_kl(log_p, z, kind), gradient
    if kind == PAIRWISE:
        return divergences.pairs(divergence, beta, log_p, w, detached, keep)
    log_q = _teacher_log_probs(log_p, z, kind)
    value, head, teacher = divergences.parts(divergence, beta, log_q, log_p)
    value = value.sum(-1)
    if kind == FINAL:
        value[-1] = 0
        w = torch.cat([w[:-1], torch.zeros_like(w[-1:])])
    dz = _times(w, pull(head, log_p.exp()))
    if not detached:
        dz = dz + _passed_on(_times(w, pull(teacher, log_q.exp())), kind)
    return value, dz


def _group_kl(log_p: Tensor, z: Tensor, kind: int) -> Tensor:
    """KL(teacher_h || p_h) [H, B] of one group, from log p and z/T [H, B, K]."""
    if kind == PAIRWISE:
        p = log_p.exp()
        entropy, total = _times(p, log_p).sum(0), p.sum(0)
        return torch.where(total == 0, 0, entropy - total * log_p).sum(-1) / (len(z) - 1)
    log_q = _teacher_log_probs(log_p, z, kind)
    kl = _times(log_q.exp(), log_q - log_p).sum(-1)
    if kind == FINAL:
        kl = torch.cat([kl[:-1], torch.zeros_like(kl[-1:])])
    return kl


def _group_gradient(log_p: Tensor, z: Tensor, w: Tensor, kind: int, detached: bool) -> Tensor:
    """d/d(z/T) of sum_h w_h KL(teacher_h || p_h), [H, B, K]."""
    p, size = log_p.exp(), len(z)
    if kind == PAIRWISE:
        dz = _times(w, p - (p.sum(0) - p) / (size - 1))
        if not detached:
            toward = w.sum(0) * log_p - _times(w, log_p).sum(0)
            mean = _times(p, toward).sum(-1, keepdim=True)
            dz = dz + _times(p, toward - mean) / (size - 1)
        return dz
    if kind == FINAL:
        w = torch.cat([w[:-1], torch.zeros_like(w[-1:])])
    log_q = _teacher_log_probs(log_p, z, kind)
    q = log_q.exp()
    dz = _times(w, p - q)
    if detached:
        return dz
    gap = log_q - log_p
    mean = _times(q, gap).sum(-1, keepdim=True)
    return dz + _passed_on(_times(_times(w, q), gap - mean), kind)


def _passed_on(into: Tensor, kind: int) -> Tensor:
    """d/d(z/T) [H, B, K] of what is d/d(teacher logits of h)."""
    total = into.sum(0)
    if kind == OTHERS:
        return (total - into) / (len(into) - 1)
    if kind == MEAN:
        return (total / len(into)).expand_as(into)
    return torch.cat([torch.zeros_like(into[:-1]), total.unsqueeze(0)])


def _teacher_log_probs(log_p: Tensor, z: Tensor, kind: int) -> Tensor:
    if kind == OTHERS:
        return torch.log_softmax(_sums_of_others(z / (len(z) - 1)), -1)
    if kind == MEAN:
        return torch.log_softmax(z.mean(0), -1).expand_as(z)
    return log_p[-1:].expand_as(log_p)


def _sums_of_others(z: Tensor) -> Tensor:
    """sum_{j != h} z_j: taken from the sum of all, a large z_h would leave its rounding error."""
    before, after = [torch.zeros_like(z[0])], [torch.zeros_like(z[0])]
    for head in z[:-1]:
        before.append(before[-1] + head)
    for head in z[1:].flip(0):
        after.append(after[-1] + head)
    return torch.stack(before) + torch.stack(after[::-1])


def _targets(
    target: Tensor | None,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    smoothing: float,
    ignore_index: int,
    z: Tensor,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The weight of each sample (B,), 0 of one that doesn't count; what -log p is summed with
    (B, K); and the class weight of each label."""
    _, batch, classes = z.shape
    share = z.new_ones(batch) if sample_weight is None else sample_weight
    if target is None:
        return share, None, None
    if target.is_floating_point():
        labels = target * (1 - smoothing) + smoothing / classes
        return share, labels if weight is None else labels * weight, None
    valid = (target >= 0) & (target < classes)
    index = torch.where(valid, target, 0).unsqueeze(-1)
    labels = z.new_full((batch, classes), smoothing / classes)
    labels.scatter_add_(-1, index, torch.full_like(labels[:, :1], 1 - smoothing))
    if weight is not None:
        labels = labels * weight
    # Waiting for the device to say that a target is out of range would cost more.
    labels = torch.where(valid.unsqueeze(-1), labels, math.nan)
    share = torch.where(target == ignore_index, 0.0, share)
    if weight is None:
        return share, labels, None
    return share, labels, torch.where(valid, weight[index.squeeze(-1)], 0.0)


def _inverse(total: Tensor) -> Tensor:
    """1 / total, the factor of a mean; 0 where nothing has a weight."""
    return torch.where(total == 0, 0.0, 1 / total)


def _column(weights: Sequence[float], z: Tensor) -> Tensor:
    return torch.tensor(list(weights), dtype=z.dtype, device="cpu").to(z.device).view(-1, 1, 1)


def _stack(logits: Sequence[Tensor], binary: bool) -> Tensor:
    """All heads as one [H, B, K] in the accumulation dtype, masked classes -inf."""
    z = torch.cat([stack if stack.dim() > 2 else stack.unsqueeze(0) for stack in logits])
    z = z.flatten(1, -2)
    masked = z <= torch.finfo(z.dtype).min
    z = z.to(accumulation(z.dtype))
    z = torch.where(masked, -math.inf, z)
    return torch.cat([z, torch.zeros_like(z)], -1) if binary else z


def _unstack(dz: Tensor, logits: Sequence[Tensor]) -> list[Tensor]:
    sizes = [len(stack) if stack.dim() > 2 else 1 for stack in logits]
    return [
        torch.empty_like(stack, dtype=kept(stack.dtype)).copy_(part.reshape(stack.shape))
        for part, stack in zip(dz.split(sizes), logits, strict=True)
    ]
