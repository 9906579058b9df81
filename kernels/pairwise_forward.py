"""The pairwise cosine penalty, forward, of the matrices of all layers in one launch.

X has N rows x_i of D columns, norms n_i, c_ij = <x_i, x_j>/(n_i n_j); the loss is
k sum_{i != j} phi(c_ij), k = 1/(L B N(N-1)). Dead rows have 1/n_i := 0.

primal  G = X X^T, one program for each 64 x 64 tile (i, j), i <= j:
        A_ij = s_ij/(n_i n_j), s = 2k phi'(c), and -A_ii = sum_j s_ij c_ij/n_i^2, of which
        each tile leaves its part for the backward to add up
dual    M = U^T U, u_i = x_i/n_i, one program for each tile of M;
        sum_{i != j} c^2 = |M|^2 - N_live
signed  s = sum_i u_i, one program for each 64 columns; sum_{i != j} c = |s|^2 - N_live

The norms come from the very values the products are made of, so X is read once per tile.
Centred rows are shifted by the mean a of their first columns while loading, whatever it
is, and what is left is corrected: G_c = G_a - D (m - a)(m - a)^T. The correction takes
away D (m - a)^2 <= D/d |x_c|^2, d the number of those columns, so little cancels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..algebra import pairwise as algebra
from ..reference import CENTERED_DEAD_RATIO
from . import plan
from .matrices import (
    core_mask,
    core_pointers,
    find_layer,
    inverse_norm,
    multiple,
    padded,
    read,
    record_of,
    select,
)
from .numerics import dot
from .reduction import BLOCK as _REDUCTION
from .reduction import draws_last_ticket, total

_TILE, _ROW_BLOCK = tl.constexpr(plan.TILE), tl.constexpr(plan.ROW_BLOCK)
_REDUCE = tl.constexpr(_REDUCTION)
_RATIO = tl.constexpr(CENTERED_DEAD_RATIO)
_SQUARE, _SIGNED = tl.constexpr(algebra.SQUARE), tl.constexpr(algebra.SIGNED)
_BATCH, _ROWS, _COLUMNS = (tl.constexpr(f) for f in (plan.BATCH, plan.ROWS, plan.COLUMNS))
_DUAL, _FAST, _FORWARD = (tl.constexpr(f) for f in (plan.DUAL, plan.FAST, plan.FORWARD))
_X_BATCH, _X_ROW = tl.constexpr(plan.X_BATCH), tl.constexpr(plan.X_ROW)
_X_COLUMN, _X_OFFSETS = tl.constexpr(plan.X_COLUMN), tl.constexpr(plan.X_OFFSETS)
_STATE, _STATE_SIZE = tl.constexpr(plan.STATE), tl.constexpr(plan.STATE_SIZE)


@triton.jit
def _triangle(tile):
    """Row i and column j >= i of a tile of the upper triangle, column by column."""
    j = ((tl.sqrt(8.0 * tile.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    # The root may be off by one after rounding.
    j = tl.where(j * (j + 1) // 2 > tile, j - 1, j)
    j = tl.where((j + 1) * (j + 2) // 2 <= tile, j + 1, j)
    return tile - j * (j + 1) // 2, j


@triton.jit
def _shifted(x, shift, columns, d, CENTER: tl.constexpr, ACC: tl.constexpr):
    """Elements less their row's shift, 0 beyond the last column."""
    if CENTER:
        return tl.where((columns < d)[None, :], x.to(ACC) - shift[:, None], 0.0)
    else:
        return x


@triton.jit
def _first_mean(
    x, rows, n, d, row_stride, column_stride, offsets, FAST: tl.constexpr,
    ROWS_UNIT: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Mean of the first BLOCK columns of each row: the shift of a centred row."""
    block = read(x, rows, tl.arange(0, BLOCK), n, d, row_stride, column_stride, offsets,
                 FAST, ROWS_UNIT, VECTOR)  # fmt: skip
    return tl.sum(block.to(ACC), 1) / tl.minimum(d, BLOCK).to(ACC)


@triton.jit
def _gram(
    x, rows_i, rows_j, n, d, row_stride, column_stride, offsets, DIAGONAL: tl.constexpr,
    FAST: tl.constexpr, ROWS_UNIT: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr,
    CENTER: tl.constexpr, PRODUCT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A tile of the Gram matrix of shifted rows; their squares, sums and shifts."""
    gram = tl.zeros([_TILE, _TILE], ACC)
    square_i, square_j = tl.zeros([_TILE], ACC), tl.zeros([_TILE], ACC)
    sum_i, sum_j = tl.zeros([_TILE], ACC), tl.zeros([_TILE], ACC)
    shift_i, shift_j = tl.zeros([_TILE], ACC), tl.zeros([_TILE], ACC)
    if CENTER:
        shift_i = _first_mean(x, rows_i, n, d, row_stride, column_stride, offsets, FAST,
                              ROWS_UNIT, VECTOR, BLOCK, ACC)  # fmt: skip
        shift_j = shift_i
        if not DIAGONAL:
            shift_j = _first_mean(x, rows_j, n, d, row_stride, column_stride, offsets, FAST,
                                  ROWS_UNIT, VECTOR, BLOCK, ACC)  # fmt: skip
    for k in range(0, d, BLOCK):
        columns = k + tl.arange(0, BLOCK)
        a = read(x, rows_i, columns, n, d, row_stride, column_stride, offsets, FAST,
                 ROWS_UNIT, VECTOR)  # [TILE, BLOCK] # fmt: skip
        a = _shifted(a, shift_i, columns, d, CENTER, ACC)
        exact = a.to(ACC)
        square_i += tl.sum(exact * exact, 1)
        if CENTER:
            sum_i += tl.sum(exact, 1)
        b = a
        if not DIAGONAL:
            b = read(x, rows_j, columns, n, d, row_stride, column_stride, offsets, FAST,
                     ROWS_UNIT, VECTOR)  # [TILE, BLOCK] # fmt: skip
            b = _shifted(b, shift_j, columns, d, CENTER, ACC)
            exact = b.to(ACC)
            square_j += tl.sum(exact * exact, 1)
            if CENTER:
                sum_j += tl.sum(exact, 1)
        gram = dot(a, tl.trans(b), gram, PRODUCT)
    if DIAGONAL:
        square_j, sum_j, shift_j = square_i, sum_i, shift_i
    return gram, square_i, square_j, sum_i, sum_j, shift_i, shift_j


@triton.jit
def _primal(
    x, state, n, d, tile, row_stride, column_stride, offsets, fast, k, eps,
    PENALTY: tl.constexpr, CENTER: tl.constexpr, KEEP: tl.constexpr, ROWS_UNIT: tl.constexpr,
    VECTOR: tl.constexpr, BLOCK: tl.constexpr, PRODUCT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The loss of one tile of the Gram matrix; leaves its part of A in the state."""
    i, j = _triangle(tile)
    rows_i, rows_j = i * _TILE + tl.arange(0, _TILE), j * _TILE + tl.arange(0, _TILE)
    if fast:
        if i == j:
            gram, square_i, square_j, sum_i, sum_j, shift_i, shift_j = _gram(
                x, rows_i, rows_j, n, d, row_stride, column_stride, offsets, True, True,
                ROWS_UNIT, VECTOR, BLOCK, CENTER, PRODUCT, ACC)  # fmt: skip
        else:
            gram, square_i, square_j, sum_i, sum_j, shift_i, shift_j = _gram(
                x, rows_i, rows_j, n, d, row_stride, column_stride, offsets, False, True,
                ROWS_UNIT, VECTOR, BLOCK, CENTER, PRODUCT, ACC)  # fmt: skip
    else:
        gram, square_i, square_j, sum_i, sum_j, shift_i, shift_j = _gram(
            x, rows_i, rows_j, n, d, row_stride, column_stride, offsets, False, False,
            ROWS_UNIT, VECTOR, BLOCK, CENTER, PRODUCT, ACC)  # fmt: skip

    width = d.to(ACC)
    mean_i, mean_j = shift_i, shift_j
    if CENTER:
        sum_i, sum_j = sum_i / width, sum_j / width  # m - a
        square_i = tl.maximum(square_i - width * sum_i * sum_i, 0.0, propagate_nan=_ALL)
        square_j = tl.maximum(square_j - width * sum_j * sum_j, 0.0, propagate_nan=_ALL)
        gram -= width * sum_i[:, None] * sum_j[None, :]
        mean_i, mean_j = shift_i + sum_i, shift_j + sum_j
    inverse_i = inverse_norm(square_i, mean_i, width, eps, CENTER, _RATIO)
    inverse_j = inverse_norm(square_j, mean_j, width, eps, CENTER, _RATIO)
    scale = inverse_i[:, None] * inverse_j[None, :]
    c = tl.where(rows_i[:, None] == rows_j[None, :], 0.0, gram * scale)
    if PENALTY == _SQUARE:
        phi = c * c
        slope = 4.0 * k * c
    else:
        phi = tl.abs(c)
        # c itself where it is neither above nor below 0: 0 stays 0, NaN stays NaN.
        slope = 2.0 * k * tl.where(c > 0, 1.0, tl.where(c < 0, -1.0, c))
    if KEEP:
        length = padded(n)
        a = slope * scale
        mask = core_mask(rows_i, rows_j, n, length)
        tl.store(core_pointers(state, rows_i, rows_j, length), a, mask=mask)
        part = slope * c
        parts = state + n.to(tl.int64) * length
        part_i = tl.sum(part, 1) * inverse_i * inverse_i
        tl.store(parts + j * length + rows_i, part_i, mask=rows_i < n)
        if i == j:
            if CENTER:
                means = parts + (n + _TILE - 1) // _TILE * length
                tl.store(means + rows_i, mean_i, mask=rows_i < n)
        else:
            mask = core_mask(rows_j, rows_i, n, length)
            tl.store(core_pointers(state, rows_j, rows_i, length), tl.trans(a), mask=mask)
            part_j = tl.sum(part, 0) * inverse_j * inverse_j
            tl.store(parts + i * length + rows_j, part_j, mask=rows_j < n)
    return k * tl.sum(phi) * tl.where(i == j, 1.0, 2.0).to(ACC)


_ALL = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def _row_norms(
    x, rows, n, d, row_stride, column_stride, offsets, eps, FAST: tl.constexpr,
    ROWS_UNIT: tl.constexpr, VECTOR: tl.constexpr, CENTER: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Means (0 if not centred) and 1/n of whole rows."""
    square, sums = tl.zeros([_ROW_BLOCK], ACC), tl.zeros([_ROW_BLOCK], ACC)
    shift = tl.zeros([_ROW_BLOCK], ACC)
    if CENTER:
        shift = _first_mean(x, rows, n, d, row_stride, column_stride, offsets, FAST, ROWS_UNIT,
                            VECTOR, _TILE, ACC)  # fmt: skip
    for k in range(0, d, _TILE):
        columns = k + tl.arange(0, _TILE)
        block = read(x, rows, columns, n, d, row_stride, column_stride, offsets, FAST,
                     ROWS_UNIT, VECTOR)  # [ROW_BLOCK, TILE] # fmt: skip
        block = _shifted(block, shift, columns, d, CENTER, ACC).to(ACC)
        square += tl.sum(block * block, 1)
        if CENTER:
            sums += tl.sum(block, 1)
    width = d.to(ACC)
    if CENTER:
        sums = sums / width
        square = tl.maximum(square - width * sums * sums, 0.0, propagate_nan=_ALL)
        shift += sums
    return shift, inverse_norm(square, shift, width, eps, CENTER, _RATIO)


@triton.jit
def _over_rows(
    x, state, n, d, tile, row_stride, column_stride, offsets, k, eps, FAST: tl.constexpr,
    PENALTY: tl.constexpr, CENTER: tl.constexpr, KEEP: tl.constexpr, ROWS_UNIT: tl.constexpr,
    VECTOR: tl.constexpr, FORM_PRODUCT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The loss of one tile of M (dual) or 64 columns of s (signed), summed over all rows."""
    length = padded(d)
    if PENALTY == _SIGNED:
        p, q, inverses = tile, tile, state + length
    else:
        p, q = _triangle(tile)
        inverses = state + d.to(tl.int64) * length
    columns_p, columns_q = p * _TILE + tl.arange(0, _TILE), q * _TILE + tl.arange(0, _TILE)
    m, s = tl.zeros([_TILE, _TILE], ACC), tl.zeros([_TILE], ACC)
    live = tl.zeros([_ROW_BLOCK], ACC)
    for first in range(0, n, _ROW_BLOCK):
        rows = first + tl.arange(0, _ROW_BLOCK)
        mean, inverse = _row_norms(x, rows, n, d, row_stride, column_stride, offsets, eps,
                                   FAST, ROWS_UNIT, VECTOR, CENTER, ACC)  # fmt: skip
        u = read(x, rows, columns_p, n, d, row_stride, column_stride, offsets, FAST, ROWS_UNIT,
                 VECTOR)  # [ROW_BLOCK, TILE] # fmt: skip
        u = _shifted(u, mean, columns_p, d, CENTER, ACC).to(ACC) * inverse[:, None]
        if PENALTY == _SIGNED:
            s += tl.sum(u, 0)
        else:
            v = read(x, rows, columns_q, n, d, row_stride, column_stride, offsets, FAST,
                     ROWS_UNIT, VECTOR)  # [ROW_BLOCK, TILE] # fmt: skip
            v = _shifted(v, mean, columns_q, d, CENTER, ACC).to(ACC) * inverse[:, None]
            m = dot(tl.trans(u), v, m, FORM_PRODUCT)
        if tile == 0:
            live += tl.where(inverse != 0, 1.0, 0.0)
            if KEEP:
                tl.store(inverses + rows, inverse, mask=rows < n)
                if CENTER:
                    tl.store(inverses + padded(n) + rows, mean, mask=rows < n)
    if PENALTY == _SIGNED:
        if KEEP:
            tl.store(state + columns_p, s, mask=columns_p < d)
        return k * tl.sum(s * s) - k * tl.sum(live)
    else:
        if KEEP:
            mask = core_mask(columns_p, columns_q, d, length)
            tl.store(core_pointers(state, columns_p, columns_q, length), m, mask=mask)
            if p != q:
                mask = core_mask(columns_q, columns_p, d, length)
                mirrored = core_pointers(state, columns_q, columns_p, length)
                tl.store(mirrored, tl.trans(m), mask=mask)
        return k * tl.sum(m * m) * tl.where(p == q, 1.0, 2.0).to(ACC) - k * tl.sum(live)


@triton.jit
def forward_kernel(
    xs, table, state, partials, tickets, loss, eps, first_partial, programs, layers,
    LAYERS: tl.constexpr, PADDED: tl.constexpr, PENALTY: tl.constexpr, CENTER: tl.constexpr,
    KEEP: tl.constexpr, ROWS_UNIT: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr,
    PRODUCT: tl.constexpr, FORM_PRODUCT: tl.constexpr, ACC: tl.constexpr, LOSS: tl.constexpr,
):  # fmt: skip
    """One program for one tile of one matrix of one layer."""
    program = tl.program_id(0)
    layer, local = find_layer(table, program, LAYERS, PADDED)
    record = record_of(table, layer, LAYERS)
    n, d = tl.load(record + _ROWS).to(tl.int32), tl.load(record + _COLUMNS).to(tl.int32)
    batch, tiles = tl.load(record + _BATCH), tl.load(record + _FORWARD).to(tl.int32)
    row_stride, column_stride = tl.load(record + _X_ROW), tl.load(record + _X_COLUMN)
    offsets = table + tl.load(record + _X_OFFSETS)
    fast = tl.load(record + _FAST) != 0
    matrix, tile = (local // tiles).to(tl.int64), local % tiles
    x = select(xs, layer, LAYERS)
    if fast:
        x += matrix * multiple(tl.load(record + _X_BATCH), VECTOR)
    else:
        x += matrix * tl.load(record + _X_BATCH)
    mine = state
    if KEEP:
        size = multiple(tl.load(record + _STATE_SIZE), 4)
        mine += multiple(tl.load(record + _STATE), 4) + matrix * size
    rows = n.to(ACC)
    k = 1.0 / (layers * batch.to(ACC)) / rows / (rows - 1.0)

    if PENALTY == _SIGNED:
        over_rows = tl.full([], 1, tl.int64)
    else:
        over_rows = tl.load(record + _DUAL)
    if over_rows != 0:
        if fast:
            part = _over_rows(x, mine, n, d, tile, row_stride, column_stride, offsets, k, eps,
                              True, PENALTY, CENTER, KEEP, ROWS_UNIT, VECTOR, FORM_PRODUCT,
                              ACC)  # fmt: skip
        else:
            part = _over_rows(x, mine, n, d, tile, row_stride, column_stride, offsets, k, eps,
                              False, PENALTY, CENTER, KEEP, ROWS_UNIT, VECTOR, FORM_PRODUCT,
                              ACC)  # fmt: skip
    else:
        part = _primal(x, mine, n, d, tile, row_stride, column_stride, offsets, fast, k, eps,
                       PENALTY, CENTER, KEEP, ROWS_UNIT, VECTOR, BLOCK, PRODUCT,
                       ACC)  # fmt: skip

    tl.store(partials + first_partial + program, part)
    if draws_last_ticket(tickets, programs):
        tl.store(loss, total(partials, programs, 1, LOSS, _REDUCE))
