"""The pairwise cosine penalty through its Gram matrix, in plain PyTorch.

For a matrix X (N rows x_i of D columns, norms n_i, c_ij = <x_i,x_j>/(n_i n_j))
and ``penalty = k sum_{i != j} phi(c_ij)``, k = 1/(L B N(N-1)) for one of B
matrices of one of L layers:

primal  G = X X^T;                      dX = A X,
        A_ij = 2k phi'(c_ij)/(n_i n_j), A_ii = -2k sum_j phi'(c_ij) c_ij/n_i^2
dual    M = X^T diag(1/n^2) X;          sum_{i != j} c^2 = |M|^2 - N_live,
        dx_i = 4k/n_i^2 (x_i M - (x_i M x_i^T/n_i^2) x_i)
signed  s = sum_i x_i/n_i;              sum_{i != j} c = |s|^2 - N_live,
        dx_i = 2k/n_i (s - <s, x_i/n_i> x_i/n_i)

A centred matrix is X minus its row means; its gradient needs no correction (docs/math.md, "Centred
rows").
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..dtypes import accumulation
from ..reference import CENTRED_DEAD_RATIO, as_matrices

SQUARE, ABS, SIGNED = range(3)


def is_dual(penalty: int, rows: int, columns: int) -> bool:
    """Whether the D x D form is used: half the work or less, and safe by the Welch bound."""
    return penalty == SQUARE and 2 * columns <= rows


def forward(
    xs: Sequence[Tensor],
    penalty: int,
    center: bool,
    eps: float,
    batched: bool,
    precision: int,
    keep: bool,
) -> tuple[Tensor, list[Tensor]]:
    """The penalty, and per layer what the backward needs: (B, 1 or 2 rows, ...) tensors."""
    losses, state = [], []
    for x in xs:
        rows, inverse_norm = _rows_and_inverse_norms(x, center, eps, batched)
        matrices, n, d = rows.shape
        k = 1.0 / (len(xs) * max(matrices, 1) * n * (n - 1))
        live = (inverse_norm > 0).sum()
        unit = rows * inverse_norm.unsqueeze(-1)
        if penalty == SIGNED:
            s = unit.sum(1)  # [B, D]
            losses.append(k * (s.square().sum() - live))
            state += [s, inverse_norm]
        elif is_dual(penalty, n, d):
            m = unit.transpose(1, 2) @ unit  # [B, D, D]
            losses.append(k * (m.square().sum() - live))
            state += [m, inverse_norm]
        else:
            scale = inverse_norm.unsqueeze(2) * inverse_norm.unsqueeze(1)
            c = (rows @ rows.transpose(1, 2)) * scale  # [B, N, N]
            c.diagonal(dim1=1, dim2=2).zero_()
            if penalty == SQUARE:
                phi, slope = c.square(), 4 * k * c
            else:
                phi, slope = c.abs(), 2 * k * c.sign()
            losses.append(k * phi.sum())
            a = slope * scale
            a.diagonal(dim1=1, dim2=2).copy_(-(slope * c).sum(2) * inverse_norm.square())
            state += [a, inverse_norm]
    return torch.stack(_common_dtype(losses)).sum(), state if keep else []


def backward(
    grad: Tensor,
    xs: Sequence[Tensor],
    state: Sequence[Tensor],
    penalty: int,
    center: bool,
    eps: float,
    batched: bool,
    precision: int,
) -> list[Tensor]:
    """The gradient of every layer, scaled by ``grad`` on its device."""
    gradients = []
    for x, core, inverse_norm in zip(xs, state[0::2], state[1::2], strict=True):
        rows = _rows(x, center, batched)
        matrices, n, d = rows.shape
        dual = is_dual(penalty, n, d)
        if center:
            # What rounding took of the means, in s and M too: nothing takes it off later.
            rows.sub_(rows.mean(dim=-1, keepdim=True))
            if dual or penalty == SIGNED:
                core = core - core.mean(dim=-1, keepdim=True)
            if dual:
                core = core - core.mean(dim=-2, keepdim=True)
        k = 1.0 / (len(xs) * max(matrices, 1) * n * (n - 1))
        inverse = inverse_norm.unsqueeze(-1)
        if penalty == SIGNED:
            unit = rows * inverse
            along = (unit * core.unsqueeze(1)).sum(-1, keepdim=True)
            dx = (2 * k) * inverse * (core.unsqueeze(1) - along * unit)
        elif dual:
            y = rows @ core
            along = (y * rows).sum(-1, keepdim=True) * inverse.square()
            dx = (4 * k) * inverse.square() * (y - along * rows)
        else:
            dx = core @ rows
        gradients.append((dx * grad.to(dx.dtype)).to(x.dtype).reshape(x.shape))
    return [
        g if g.stride() == x.stride() else torch.empty_like(x).copy_(g)
        for g, x in zip(gradients, xs, strict=True)
    ]


def _rows(x: Tensor, center: bool, batched: bool) -> Tensor:
    """Rows [B, N, D] in the accumulation dtype, centred if asked."""
    rows = as_matrices(x, batched)
    rows = rows.to(accumulation(rows.dtype))
    return rows - rows.mean(dim=-1, keepdim=True) if center else rows


def _rows_and_inverse_norms(
    x: Tensor, center: bool, eps: float, batched: bool
) -> tuple[Tensor, Tensor]:
    """Rows [B, N, D] and 1/n_i [B, N], 0 where the row is dead, NaN where a square was too large
    for its dtype."""
    rows = _rows(x, center, batched)
    limit: Tensor | float = eps
    raw = norm = torch.linalg.vector_norm(rows, dim=-1)  # [B, N]
    if center:
        raw = torch.linalg.vector_norm(_rows(x, False, batched), dim=-1)
        limit = torch.clamp(CENTRED_DEAD_RATIO * raw, min=eps)
    inverse = torch.where(norm <= limit, torch.zeros_like(norm), 1 / norm)
    return rows, inverse.masked_fill(~raw.isfinite(), torch.nan)


def _common_dtype(losses: list[Tensor]) -> list[Tensor]:
    wide = any(loss.dtype == torch.float64 for loss in losses)
    return [loss.double() if wide else loss for loss in losses]
