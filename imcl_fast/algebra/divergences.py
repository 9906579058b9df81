"""The divergences of the consistency but for KL(q || p), with their closed-form gradients.

Each is a sum over the classes of ``value``; its gradient of the logits z/T of p is ``head - p
sum(head)``, of those of q ``teacher - q sum(teacher)`` (docs/math.md, "Other divergences"):

reverse_kl  value = head = p log(p/q), teacher = -p
jsd         head = (1 - beta) p log(p/m), teacher = beta q log(q/m), value = head + teacher,
            m = beta q + (1 - beta) p
mixture     of a label y and heads, m = pi_0 y + sum_h pi_h p_h: ``sum_h pi_h KL(p_h || m)`` and
            ``pi_0 KL(y || m)``; the head is pi_h p_h log(p_h/m)

Logits of masked classes are -inf: what is multiplied with a probability of 0 is left out. Shares
of the smallest probabilities round to 0, so that m can be 0 where p isn't: its logarithm counts as
0, and what p times it should have been is below the smallest number too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

KL, REVERSE_KL, JSD, MIXTURE = range(4)


def times(weight: Tensor, x: Tensor) -> Tensor:
    """weight * x, and 0 where the weight is 0, whatever x is."""
    return torch.where(weight == 0, 0, weight * x)


def _log(m: Tensor) -> Tensor:
    return torch.where(m == 0, 1, m).log()


def parts(
    divergence: int, beta: float, log_q: Tensor, log_p: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """value, head and teacher of every class."""
    p = log_p.exp()
    if divergence == REVERSE_KL:
        value = times(p, log_p - log_q)
        return value, value, -p
    q = log_q.exp()
    log_m = _log(beta * q + (1 - beta) * p)
    head = (1 - beta) * times(p, log_p - log_m)
    teacher = beta * times(q, log_q - log_m)
    return head + teacher, head, teacher


def pull(parts: Tensor, p: Tensor) -> Tensor:
    """The gradient of logits whose softmax is p, from what p times the derivatives by p are."""
    return parts - times(p, parts.sum(-1, keepdim=True))


def pairs(
    divergence: int, beta: float, log_p: Tensor, w: Tensor, detached: bool, keep: bool
) -> tuple[Tensor, Tensor]:
    """The mean over j != h of D(p_j || p_h) [H, B], and with ``keep`` d/d(z/T) of the sum of
    these weighted by w [H, 1, 1], [H, B, K]."""
    others = len(log_p) - 1
    p = log_p.exp()
    values, heads, teachers = [], [], []
    for j in range(len(log_p)):
        value, head, teacher = parts(divergence, beta, log_p[j], log_p)
        for part in (value, head, teacher):
            part[j] = 0
        values.append(value.sum(-1))
        if keep:
            heads.append(head)
            teachers.append(times(w, teacher).sum(0))
    mean = torch.stack(values).sum(0) / others
    if not keep:
        return mean, p
    dz = times(w, pull(torch.stack(heads).sum(0), p))
    if not detached:
        dz = dz + pull(torch.stack(teachers), p)
    return mean, dz / others


def mixture(
    pi: Sequence[float], labels: Tensor, log_p: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """KL(y || m) [B], KL(p_h || m) [H, B], and d/dz [H, B, K] of the sum of pi_h KL(p_h || m) and
    pi_0 KL(y || m), over pi_h."""
    p = log_p.exp()
    of_heads = torch.tensor(pi[1:], dtype=p.dtype, device="cpu").to(p.device).view(-1, 1, 1)
    log_m = _log(pi[0] * labels + (of_heads * p).sum(0))
    of_label = times(labels, labels.log() - log_m).sum(-1)
    heads = times(p, log_p - log_m)
    return of_label, heads.sum(-1), pull(heads, p)
