"""Dependence between representations (HSIC, CKA) from the Gram matrices of their samples.

X (B, D) holds a sample in each row, X_c = X - its mean over the samples, G = X_c X_c^T (B, B).
A kernel K comes from G: linear K = G, Gaussian K_ij = exp(-d_ij/(2 s)) with the squared distances
d_ij = G_ii + G_jj - 2 G_ij. With K~ the kernel centred over the samples,

biased    K~ = H K H, H = I - 1 1^T/B;     HSIC(K, L) = <K~, L~>/(B - 1)^2
unbiased  K_ii := 0, k = K 1, S = 1^T K 1;  HSIC(K, L) = <K~, L~>/(B(B - 3)),
          K~_ij = K_ij - (k_i + k_j)/(B - 2) + S/((B - 1)(B - 2)) for i != j, K~_ii = 0

(Gretton et al. 2005; Song et al. 2012, JMLR 13:1393; in this form 1310.6101). So the HSIC of all
pairs of V views is one product of V flattened matrices, and what is as large as X is read twice
and written once (docs/math.md, "The gradient of dependence").

G is of rounded sums. Identical samples may therefore be a little apart, and the variance HSIC(K, K)
of a kernel that has none, as where but one sample isn't 0, a little above 0: CKA would divide by
that. What is no larger than rounding leaves is taken for the 0 that it stands for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..dtypes import accumulation

LINEAR, GAUSSIAN = range(2)
BIASED, UNBIASED = range(2)


def gram_forward(xs: Sequence[Tensor], scale: Sequence[float]) -> tuple[Tensor, list[Tensor]]:
    """scale X_c X_c^T of every x (B, *) as (n, B, B), and the means (D,)."""
    grams, means = [], []
    for x, factor in zip(xs, scale, strict=True):
        rows = _rows(x)
        mean = rows.mean(0)
        centred = rows - mean
        grams.append(factor * (centred @ centred.T))
        means.append(mean)
    return torch.stack(grams), means


def gram_backward(s: Tensor, xs: Sequence[Tensor], means: Sequence[Tensor]) -> list[Tensor]:
    """S X_c of every x, shaped and strided like x; S (n, B, B) is symmetric."""
    return [
        dx if dx.stride() == x.stride() else torch.empty_like(x).copy_(dx)
        for dx, x in zip(products(s, xs, means), xs, strict=True)
    ]


def products(s: Tensor, xs: Sequence[Tensor], means: Sequence[Tensor]) -> list[Tensor]:
    """The same, strided anyhow."""
    return [
        (each @ (_rows(x) - mean)).to(x.dtype).reshape(x.shape)
        for each, x, mean in zip(s, xs, means, strict=True)
    ]


def means(xs: Sequence[Tensor]) -> list[Tensor]:
    """Those of ``gram_forward``, for whoever has none."""
    return [_rows(x).mean(0) for x in xs]


def _rows(x: Tensor) -> Tensor:
    """(B, D) in the accumulation dtype."""
    rows = x.flatten(1) if x.dim() > 1 else x.unsqueeze(1)
    return rows.to(accumulation(rows.dtype))


class Kernels(NamedTuple):
    """Attributes:
    values: (..., B, B).
    dust: as much as rounding may have left in each, a constant to autograd.
    """

    values: Tensor
    dust: Tensor


def rounding(xs: Sequence[Tensor], products: bool) -> float:
    """How far elements of the Grams of xs may be off where they should be alike, relative to the
    norms of their two samples. PyTorch's ``products`` sum the D numbers of each in an order of its
    own, so that they differ by as much as such sums err, which grows as the root of D; the kernels
    sum those of all in one. The factors were seen to be enough."""
    unit = max(torch.finfo(accumulation(x.dtype)).eps for x in xs) / 2
    columns = max(x[0].numel() for x in xs) if products else 1
    return unit * max(8.0, columns**0.5)


def kernels(grams: Tensor, kernel: int, median: bool, rounding: float) -> Kernels:
    """From Grams (..., B, B), as exact as ``rounding``; ``median``: the width is the median squared
    distance."""
    norms = grams.diagonal(dim1=-2, dim2=-1)
    if kernel == LINEAR:
        size = norms.detach().clamp(min=0).sqrt()
        return Kernels(grams, rounding * size.unsqueeze(-1) * size.unsqueeze(-2))
    distances = norms.unsqueeze(-1) + norms.unsqueeze(-2)
    dust = rounding * distances.detach()
    distances = distances - 2 * grams
    distances = torch.where(distances <= dust, 0.0, distances)
    if median:
        width = median_of_pairs(distances)
        distances, dust = distances / width, dust.div_(width)
    values = (distances / -2).exp()
    dust = dust.div_(2).add_(torch.finfo(values.dtype).eps).mul_(values.detach())
    return Kernels(values, dust)


def median_of_pairs(distances: Tensor) -> Tensor:
    """The (lower) median over pairs i < j, (..., 1, 1); 1 where it is 0. A constant to autograd."""
    batch = distances.shape[-1]
    i, j = torch.triu_indices(batch, batch, 1, device=distances.device)
    pairs = distances.detach()[..., i, j]
    # Of CUDA tensors median() has no deterministic form.
    ordered = pairs.is_cuda and torch.are_deterministic_algorithms_enabled()
    median = _middle(pairs) if ordered else pairs.median(-1).values
    return torch.where(median == 0, 1.0, median)[..., None, None]


def _middle(x: Tensor) -> Tensor:
    """``x.median(-1).values`` by sorting."""
    return x.sort(-1).values[..., (x.shape[-1] - 1) // 2]


def hsic(kernels: Tensor, estimator: int) -> Tensor:
    """HSIC (..., V, V) of all pairs of V kernels (..., V, B, B)."""
    batch = kernels.shape[-1]
    # HSIC is the same, and that of a constant kernel is 0 and not what rounding leaves.
    kernels = kernels - kernels[..., :1, 1:2].detach()
    if estimator == BIASED:
        rows = kernels.mean(-1, keepdim=True)
        centred = kernels - rows - rows.mT + rows.mean(-2, keepdim=True)
    else:
        off_diagonal = 1 - torch.eye(batch, dtype=kernels.dtype, device=kernels.device)
        hollow = kernels * off_diagonal
        rows = hollow.sum(-1, keepdim=True) / (batch - 2)
        total = rows.sum(-2, keepdim=True) / (batch - 1)
        centred = (hollow - rows - rows.mT + total) * off_diagonal
    flat = centred.flatten(-2)
    return flat @ flat.mT / _count(batch, estimator)


def scaled(kernels: Kernels, estimator: int) -> Kernels:
    """Of the same CKA, as large as 1: products of the variances of narrow ones are too small for
    any number."""
    largest = spread(kernels.values, estimator)
    limits = torch.finfo(kernels.values.dtype)
    largest = torch.where(largest < limits.tiny / limits.eps, 1.0, largest)
    return Kernels(kernels.values / largest, kernels.dust / largest)


def least_hsic(kernels: Kernels, estimator: int, spread: Tensor | float = 1.0) -> Tensor:
    """HSIC(K, K) (..., V) that rounding alone may leave, here and in ``hsic``; ``spread`` is the
    kernels', 1 of scaled ones."""
    dust = kernels.dust + torch.finfo(kernels.values.dtype).eps * spread
    if estimator == UNBIASED:
        dust.diagonal(dim1=-2, dim2=-1).zero_()
    return dust.square_().sum((-2, -1)) / _count(dust.shape[-1], estimator)


def spread(kernels: Tensor, estimator: int) -> Tensor:
    """How far what counts is from a number, at most, (..., 1, 1)."""
    apart = (kernels - kernels[..., :1, 1:2]).detach().abs()
    if estimator == UNBIASED:
        apart.diagonal(dim1=-2, dim2=-1).zero_()
    return apart.amax((-2, -1), keepdim=True)


def _count(batch: int, estimator: int) -> int:
    return (batch - 1) ** 2 if estimator == BIASED else batch * (batch - 3)


def cka(hsic: Tensor, least: Tensor) -> Tensor:
    """HSIC_vw / sqrt(HSIC_vv HSIC_ww) (..., V, V); 0, and its gradient, where one of these is not
    above ``least`` (..., V)."""
    own = hsic.diagonal(dim1=-2, dim2=-1)
    none = own <= least
    bad = none.unsqueeze(-1) | none.unsqueeze(-2)
    bad = bad & ~hsic.isnan()  # which one stays, also beside a side that is constant
    product = own.unsqueeze(-1) * own.unsqueeze(-2)
    ratio = hsic / torch.where(bad, 1.0, product).sqrt()
    return torch.where(bad, 0.0, ratio)
