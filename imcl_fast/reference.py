"""The naive definitions: the sole oracle of tests and benchmarks.

Everything here is written the way a paper would state it, in differentiable
PyTorch, in the dtype of its inputs. Nothing here is fast, and all of it can be
differentiated twice. The definitions reconstruct the four ways of
arXiv 2105.09590, of which only the abstract was available; see the README.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dense

# Relative norm under which a centred row counts as constant: float32 cannot
# tell a smaller deviation from the rounding of the row's mean.
CENTRED_DEAD_RATIO = 1e-5

# What float64 leaves of a difference that is 0, relative to what is subtracted.
_ROUNDED = 1e-12


def as_matrices(x: Tensor, batched: bool) -> Tensor:
    """View features (B, C, *spatial) as (B, C, D) and a weight (N, ...) as (1, N, D)."""
    return x.flatten(2) if batched else x.flatten(1).unsqueeze(0)


def similarity_penalty(c: Tensor, penalty: str) -> Tensor:
    """phi of the cosine similarities: c^2, |c| or c."""
    if penalty == "square":
        return c * c
    return c.abs() if penalty == "abs" else c


def pairwise_penalty(
    xs: Sequence[Tensor], *, penalty: str, center: bool, eps: float, batched: bool
) -> Tensor:
    """Mean over layers and batch of ``1/(N(N-1)) sum_{i != j} phi(cos(x_i, x_j))``."""
    losses = []
    for x in xs:
        rows = as_matrices(x, batched)  # [B, N, D]
        matrices, n, _ = rows.shape
        limit = rows.new_full(rows.shape[:-1], eps)
        too_large = ~_norm(rows.detach()).isfinite().unsqueeze(-1)
        if center:
            limit = torch.clamp(CENTRED_DEAD_RATIO * _norm(rows), min=eps)
            rows = rows - rows.mean(dim=-1, keepdim=True)
        # The norm of a zero row has no gradient, so dead rows are masked before it.
        dead = (_norm(rows.detach()) <= limit).unsqueeze(-1)
        rows = rows.masked_fill(dead, 0)
        norm = _norm(rows.masked_fill(dead, 1)).unsqueeze(-1).masked_fill(too_large, math.nan)
        unit = rows / norm
        c = unit @ unit.transpose(1, 2)  # [B, N, N]
        off_diagonal = ~torch.eye(n, dtype=torch.bool, device=x.device)
        phi = similarity_penalty(c, penalty)
        total = torch.where(off_diagonal, phi, phi.new_zeros(())).sum()
        losses.append(total / max(matrices * n * (n - 1), 1))
    return torch.stack([_loss_dtype(loss) for loss in losses]).mean()


def masked_penalty(
    xs: Sequence[Tensor], masks: Sequence[Tensor | None], *, penalty: str, center: bool, eps: float
) -> Tensor:
    """``pairwise_penalty`` of features, sample by sample over the positions where a mask is set."""
    losses = []
    for x, mask in zip(xs, masks, strict=True):
        samples = [x]
        if mask is not None and len(x):
            samples = [
                rows[..., positions.flatten() != 0]
                for rows, positions in zip(x.flatten(2).split(1), mask, strict=True)
            ]
        losses += [
            pairwise_penalty([rows], penalty=penalty, center=center, eps=eps, batched=True)
            / (len(samples) * len(xs))
            for rows in samples
        ]
    return torch.stack(losses).sum()


def consistency(
    logits: Sequence[Tensor],
    target: Tensor | None,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    *,
    ce_weight: Sequence[float],
    kl_weight: Sequence[float],
    groups: Sequence[int],
    temperature: Sequence[float],
    teacher: Sequence[str],
    detach: Sequence[bool],
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
    divergence: Sequence[str],
    beta: Sequence[float],
    activation: str,
) -> tuple[Tensor, Tensor]:
    """``sum_h ce_weight_h CE_h + kl_weight_h T^2 D(teacher_h || p_h)`` and its terms.

    Logits are (B, K) or (h, *samples, K). Returns the loss, () or (*samples,), and the terms
    (2, H): cross entropy and T^2 D of every head, averaged (summed for ``reduction="sum"``)
    over the samples. The average of the cross entropies is by the class weights of the labels
    as well.
    """
    sigmoid = activation == "sigmoid"
    samples = dense.samples(logits[0])
    heads = _heads(logits)
    if target is not None:
        target = target.flatten(0, len(samples) - 1)
    if sample_weight is not None:
        sample_weight = sample_weight.flatten()
    batch, classes = heads[0].shape
    share = heads[0].new_ones(batch) if sample_weight is None else sample_weight.to(heads[0].dtype)
    zeros = heads[0][:, :0].sum(-1)  # (B,), and depends on the logits as far as autograd can tell
    ce_terms = [zeros for _ in heads]
    kl_terms = [zeros for _ in heads]
    labels = label_weight = None
    if target is not None:
        labels, label_weight, known = (_independent_labels if sigmoid else _labels)(
            target, weight, classes, label_smoothing, ignore_index, heads[0].dtype
        )
        share = share.masked_fill(~known, 0)
    counted = share != 0
    # Autograd would multiply whatever they hold by 0.
    heads = [z.masked_fill(~counted.unsqueeze(-1), 0) for z in heads]
    if labels is not None:
        nothing = (labels == 0).flatten(1).all(-1, keepdim=True)
        for h, z in enumerate(heads):
            log_p = _log_probs(z.masked_fill(nothing, 0), sigmoid).masked_fill(labels == 0, 0)
            ce_terms[h] = -(labels * log_p).flatten(1).sum(-1)

    first = 0
    for size, t, kind, detached, name, b in zip(
        groups, temperature, teacher, detach, divergence, beta, strict=True
    ):
        group = [z / t for z in heads[first : first + size]]
        for h in range(size):
            log_p = _log_probs(group[h], sigmoid)
            kl_terms[first + h] = t * t * sum(
                (
                    part * _divergence(q.detach() if detached else q, log_p, name, b)
                    for part, q in _teachers(group, h, kind, sigmoid)
                ),
                start=zeros,
            )
        first += size

    share = _loss_dtype(share)
    zero = share.new_zeros(())
    ce, kl = (
        # Of a head that has no class left even a gradient of 0 would come back as NaN.
        torch.stack([_loss_dtype(t if w else t.detach()) for w, t in zip(ws, terms, strict=True)])
        for ws, terms in ((ce_weight, ce_terms), (kl_weight, kl_terms))
    )  # [H, B]
    ce, kl = (torch.where(counted, share * term, zero) for term in (ce, kl))
    of_labels = share if label_weight is None else share * _loss_dtype(label_weight)
    ce_mean, kl_mean = _averaged(ce, of_labels), _averaged(kl, share)
    ce_part, kl_part = (ce_mean, kl_mean) if reduction == "mean" else (ce, kl)
    # A term may be infinite, and 0 times it is not what no weight means.
    weighted = zip([*ce_weight, *kl_weight], [*ce_part, *kl_part], strict=True)
    per_sample = sum((w * term for w, term in weighted if w), start=_loss_dtype(zeros))  # [B]
    of_terms = (ce, kl) if reduction == "sum" else (ce_mean, kl_mean)
    terms = torch.stack(of_terms).detach().sum(-1)  # [2, H]
    return per_sample.view(samples) if reduction == "none" else per_sample.sum(), terms


def jensen_shannon(
    logits: Sequence[Tensor],
    target: Tensor,
    sample_weight: Tensor | None,
    *,
    label_weight: float,
    head_weights: Sequence[float],
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
) -> Tensor:
    """``(H(m) - pi_0 H(y) - sum_h pi_h H(p_h))/Z``, ``m = pi_0 y + sum_h pi_h p_h``.

    Logits are as those of ``consistency``, and the weights pi/Z, of which pi sums to 1.
    """
    weights = [label_weight, *head_weights]
    factor = sum(weights)  # 1/Z
    samples = dense.samples(logits[0])
    heads = _heads(logits)
    target = target.flatten(0, len(samples) - 1)
    labels, _, known = _labels(
        target, None, heads[0].shape[1], label_smoothing, ignore_index, heads[0].dtype
    )
    share = torch.ones_like(labels[:, 0])
    if sample_weight is not None:
        share = sample_weight.flatten().to(labels.dtype)
    share = share.masked_fill(~known, 0)
    counted = share != 0
    heads = [F.softmax(z.masked_fill(~counted.unsqueeze(-1), 0), -1) for z in heads]
    parts = torch.stack([w * p for w, p in zip(weights, [labels, *heads], strict=True)])
    entropies = [w * _entropy(p) for w, p in zip(weights, [labels, *heads], strict=True)]
    loss = _loss_dtype(factor * _entropy(parts.sum(0) / factor) - sum(entropies))
    share = _loss_dtype(share)
    loss = torch.where(counted, share * loss, share.new_zeros(()))  # [B]
    if reduction == "none":
        return loss.view(samples)
    return _averaged(loss, share).sum() if reduction == "mean" else loss.sum()


def _labels(
    target: Tensor,
    weight: Tensor | None,
    classes: int,
    smoothing: float,
    ignore_index: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """What -log p is summed with [B, K], the weight of each label in a mean, and which count."""
    if target.is_floating_point():
        labels, label_weight = target.to(dtype), None
        known = target.new_ones(len(target), dtype=torch.bool)
    else:
        known = target != ignore_index
        # Not F.one_hot, which looks at the values: torch.func.vmap has none to show. What is no
        # class, where nobody could check, has no loss that is a number.
        outside = known & ((target < 0) | (target >= classes))
        index = target.masked_fill(outside | ~known, 0)
        every = torch.arange(classes, device=target.device)
        labels = (index.unsqueeze(-1) == every).to(dtype)
        labels = labels.masked_fill(outside.unsqueeze(-1), torch.nan)
        label_weight = None if weight is None else weight.to(dtype)[index]
    labels = labels * (1 - smoothing) + smoothing / classes
    return labels if weight is None else labels * weight.to(dtype), label_weight, known


def _independent_labels(
    target: Tensor,
    weight: Tensor | None,
    classes: int,
    smoothing: float,
    ignore_index: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """As ``_labels``, of each class whether it is one and whether it isn't, [B, K, 2]."""
    both = torch.stack([target, 1 - target], -1)
    weight = None if weight is None else weight.unsqueeze(-1)
    return _labels(both, weight, 2, smoothing, ignore_index, dtype)


def _averaged(terms: Tensor, weights: Tensor) -> Tensor:
    """Terms, ([H,] B), whose sum is their average by these weights, 0 where those sum to 0."""
    total = weights.sum()
    return terms * torch.where(total == 0, 0, 1 / total)


def dependence(
    views: Sequence[Sequence[Tensor]],
    *,
    kernel: str,
    bandwidth: float | None,
    estimator: str,
    normalize: bool,
    layer_weight: Sequence[float],
) -> Tensor:
    """Sum over layers of ``layer_weight`` times the mean over pairs of views of HSIC, or CKA.

    ``views[v][l]`` is layer l of view v, (B, *); ``bandwidth`` None is the median distance.
    """
    total = []
    for weight, layer in zip(layer_weight, zip(*views, strict=True), strict=True):
        kernels = [_sample_kernel(x, kernel, bandwidth) for x in layer]
        if normalize:  # CKA is the same of all their multiples, and variances stay in range
            spreads = [_spread(k, estimator) for k, _ in kernels]
            kernels = [(k / s, d / s) for (k, d), s in zip(kernels, spreads, strict=True)]
        pairs = []
        for v, (k, k_dust) in enumerate(kernels):
            for w, w_dust in kernels[:v]:
                value = _hsic(k, w, estimator)
                if normalize:
                    variance = _hsic(k, k, estimator), _hsic(w, w, estimator)
                    nothing = [_counted(d, estimator).square().mean() for d in (k_dust, w_dust)]
                    degenerate = (variance[0] <= nothing[0]) | (variance[1] <= nothing[1])
                    degenerate = degenerate & ~value.isnan()
                    product = (variance[0] * variance[1]).masked_fill(degenerate, 1)
                    value = (value / product.sqrt()).masked_fill(degenerate, 0)
                pairs.append(value)
        total.append(weight * torch.stack(pairs).mean())
    return torch.stack(total).sum().to(_loss_dtype(views[0][0]).dtype)


def _sample_kernel(x: Tensor, kernel: str, bandwidth: float | None) -> tuple[Tensor, Tensor]:
    """K (B, B) of the samples of x (B, *), and what rounding leaves of an element that is 0; in
    float64 where there is one, for HSIC subtracts nearly equal numbers."""
    rows = x.flatten(1) if x.dim() > 1 else x.unsqueeze(1)
    rows = rows.float() if x.device.type == "mps" else rows.double()
    rounded = _ROUNDED if rows.dtype == torch.float64 else 1e-4
    rows = rows - rows.mean(0)  # HSIC is the same, and less of it cancels
    gram = rows @ rows.T
    norms = gram.detach().diagonal()
    if kernel == "linear":
        return gram, rounded * torch.outer(norms, norms).sqrt()
    norms = gram.diagonal()
    squared = norms.unsqueeze(1) + norms.unsqueeze(0)
    dust = rounded * squared.detach()
    squared = squared - 2 * gram
    squared = squared.masked_fill(squared <= dust, 0)  # of identical samples
    i, j = torch.triu_indices(len(rows), len(rows), 1, device=x.device)
    width = squared.detach()[i, j].median()
    width = width.masked_fill(width == 0, 1)
    if bandwidth is not None:
        width = torch.full_like(width, bandwidth**2 * max(rows.shape[1], 1))
    k = (-squared / (2 * width)).exp()
    return k, k.detach() * (dust / (2 * width) + rounded)


def _counted(k: Tensor, estimator: str) -> Tensor:
    """The elements that the estimator looks at."""
    own = torch.eye(len(k), dtype=torch.bool, device=k.device)
    return k.detach() if estimator == "biased" else k.detach()[~own]


def _spread(k: Tensor, estimator: str) -> float:
    """How far the elements that count are from one another; 1 if that is nothing at all."""
    pairs = _counted(k, estimator)
    spread = float(pairs.max() - pairs.min())
    return spread if not spread < 1e-290 else 1.0


def _hsic(k: Tensor, l: Tensor, estimator: str) -> Tensor:  # noqa: E741
    batch = len(k)
    k, l = (_without_means(m, estimator) for m in (k, l))  # noqa: E741
    if estimator == "biased":
        h = torch.eye(batch, dtype=k.dtype, device=k.device) - 1 / batch
        return (k @ h @ l @ h).trace() / (batch - 1) ** 2
    k, l = (m - m.diagonal().diag() for m in (k, l))  # noqa: E741
    return (
        (k @ l).trace()
        + k.sum() * l.sum() / ((batch - 1) * (batch - 2))
        - 2 * (k @ l).sum() / (batch - 2)
    ) / (batch * (batch - 3))


def _without_means(k: Tensor, estimator: str) -> Tensor:
    """k_ij - a_i - a_j, of which HSIC is the same whatever the constants a are; with these, what it
    sums is as small as can be, and of a kernel of such sums alone next to nothing."""
    batch = len(k)
    k = k - k[0, 1].detach()  # so that of a constant one nothing at all is left
    if estimator == "biased":
        means = k.detach().mean(1) - k.detach().mean() / 2
    else:
        hollow = k.detach() - k.detach().diagonal().diag()
        means = hollow.sum(1) / (batch - 2) - hollow.sum() / (2 * (batch - 1) * (batch - 2))
    return k - means.unsqueeze(0) - means.unsqueeze(1)


def _norm(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=-1)


def _log_probs(z: Tensor, sigmoid: bool) -> Tensor:
    """log softmax(z) [B, K]; or of each class by itself whether it is one and isn't, [B, K, 2]."""
    if sigmoid:
        z = z.masked_fill(z == torch.inf, torch.nan)  # -inf masks a class, and inf is no logit
        return torch.stack([F.logsigmoid(z), F.logsigmoid(-z)], -1)
    return F.log_softmax(z, -1)


def _teachers(
    group: list[Tensor], h: int, kind: str, sigmoid: bool = False
) -> list[tuple[float, Tensor]]:
    """The (share, log-probabilities) of every teacher of head h; logits are z/T."""
    others = [z for j, z in enumerate(group) if j != h]
    if not others or (kind == "final" and h == len(group) - 1):
        return []
    if kind == "others":
        teachers = [torch.stack(others).mean(0)]
    elif kind == "mean":
        teachers = [torch.stack(group).mean(0)]
    else:
        teachers = [group[-1]] if kind == "final" else others
    return [(1.0 / len(teachers), _log_probs(z, sigmoid)) for z in teachers]


def _heads(logits: Sequence[Tensor]) -> list[Tensor]:
    """The logits (B, K) of each head, masked classes -inf."""
    return [
        _masked(z).reshape(-1, z.shape[-1])
        for stack in logits
        for z in (stack.unbind(0) if stack.dim() > 2 else [stack])
    ]


def _masked(z: Tensor) -> Tensor:
    """z with -inf for the lowest finite number, which masks a class as well."""
    mask = torch.zeros_like(z).masked_fill(z <= torch.finfo(z.dtype).min, -torch.inf)
    return z + mask


def _divergence(log_q: Tensor, log_p: Tensor, kind: str, beta: float) -> Tensor:
    """D(q || p) of every sample, from logarithms of probabilities [B, ...]."""
    if kind == "kl":
        return _kl(log_q, log_p)
    if kind == "reverse_kl":
        return _kl(log_p, log_q)
    mixed = beta * log_q.exp() + (1 - beta) * log_p.exp()
    log_m = mixed.masked_fill(mixed == 0, 1).log()
    return beta * _kl(log_q, log_m) + (1 - beta) * _kl(log_p, log_m)


def _kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    """KL(q || p) of every sample; 0 log 0 = 0."""
    absent = log_q.exp() == 0
    # What would be 0 times an infinity is left out before, for autograd multiplies them too.
    log_q, log_p = log_q.masked_fill(absent, 0), log_p.masked_fill(absent, 0)
    return (log_q.exp() * (log_q - log_p)).masked_fill(absent, 0).flatten(1).sum(-1)


def _entropy(p: Tensor) -> Tensor:
    """H(p) of every sample, of probabilities [B, K]; 0 log 0 = 0."""
    return -(p * p.masked_fill(p == 0, 1).log()).sum(-1)


def _loss_dtype(x: Tensor) -> Tensor:
    """Losses are float32, or float64 for float64 inputs."""
    return x if x.dtype == torch.float64 else x.float()
