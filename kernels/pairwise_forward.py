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
Centred rows are shifted by the mean a of some columns while loading, and what is left is
corrected (docs/math.md, "Centred rows"): G_c = G_a - D (m - a)(m - a)^T.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..algebra import pairwise as algebra
from . import plan
from .matrices import (
    core_mask,
    core_pointers,
    find_layer,
    inverse_norm,
    matrix_of,
    multiple,
    padded,
    read,
    record_of,
    scale_of,
    select,
    triangle,
)
from .numerics import dot, settled
from .reduction import BLOCK as _REDUCTION
from .reduction import draws_last_ticket, total

_TILE, _ROW_BLOCK = tl.constexpr(plan.TILE), tl.constexpr(plan.ROW_BLOCK)
_REDUCE = tl.constexpr(_REDUCTION)
_ALL = tl.constexpr(tl.PropagateNan.ALL)
_SQUARE, _SIGNED = tl.constexpr(algebra.SQUARE), tl.constexpr(algebra.SIGNED)
_FORWARD = tl.constexpr(plan.FORWARD)
_OVER_ROWS, _FAST = tl.constexpr(plan.OVER_ROWS), tl.constexpr(plan.FAST)
_BY_COLUMNS = tl.constexpr(plan.BY_COLUMNS)
_GATHERED_BLOCK = tl.constexpr(16)  # columns: each element has a pointer of its own
_SOME, _EVERY, _GATHERED = (tl.constexpr(f) for f in (plan.SOME, plan.EVERY, plan.GATHERED))
_X_BATCH = tl.constexpr(plan.X_BATCH)
_STATE, _STATE_SIZE = tl.constexpr(plan.STATE), tl.constexpr(plan.STATE_SIZE)


@triton.jit
def _shifted(x, shift, columns, d, C: tl.constexpr):
    """Elements less their row's shift, 0 beyond the last column."""
    if C.center:
        return tl.where((columns < d)[None, :], x.to(C.acc) - shift[:, None], 0.0)
    else:
        return x


@triton.jit
def _some_mean(m, rows, LAYOUT: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """Mean of some columns of each row: the shift of a centred row. They are of four blocks all
    over it, for the first pixels of a map may be unlike the others, and what its correction takes
    away is as large as a shift is wrong, with the rounding of the product in it."""
    total = tl.zeros([rows.shape[0]], ACC)
    count = 0
    for part in range(4):
        first = m.d // 4 * part // BLOCK * BLOCK
        block = read(m, rows, first + tl.arange(0, BLOCK), LAYOUT)  # [rows, BLOCK]
        total += tl.sum(block.to(ACC), 1)
        count += tl.minimum(m.d - first, BLOCK)
    return total / tl.cast(count, ACC)


@triton.jit
def _shares(x, LAYOUT: tl.constexpr, VECTOR: tl.constexpr):
    """[rows, columns] summed to fewer columns, of what a thread holds: nothing is exchanged."""
    ROWS: tl.constexpr = x.shape[0]
    COLUMNS: tl.constexpr = x.shape[1]
    if LAYOUT == _BY_COLUMNS:
        return tl.sum(tl.reshape(x, [ROWS, COLUMNS // VECTOR, VECTOR]), 2)
    elif COLUMNS > 32:
        return tl.sum(tl.reshape(x, [ROWS, COLUMNS // 32, 32]), 1)
    else:
        return x


@triton.jit
def _gram(
    m, rows_i, rows_j, LAYOUT: tl.constexpr, DIAGONAL: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    """A tile of the Gram matrix of shifted rows; their squares, sums and shifts.

    Threads add up what they hold themselves, and each other's sums after the last column.
    """
    BLOCK: tl.constexpr = _GATHERED_BLOCK if LAYOUT == _GATHERED else C.depth
    gram = tl.zeros([_TILE, _TILE], C.acc)
    none = _shares(tl.zeros([_TILE, BLOCK], C.acc), LAYOUT, C.vector)  # [TILE, shares]
    square_i, square_j, sum_i, sum_j = none, none, none, none
    shift_i, shift_j = tl.zeros([_TILE], C.acc), tl.zeros([_TILE], C.acc)
    if C.center:
        shift_i = _some_mean(m, rows_i, LAYOUT, BLOCK, C.acc)
        if not DIAGONAL:
            shift_j = _some_mean(m, rows_j, LAYOUT, BLOCK, C.acc)
    for k in range(0, m.d, BLOCK):
        columns = k + tl.arange(0, BLOCK)
        a = _shifted(read(m, rows_i, columns, LAYOUT), shift_i, columns, m.d, C)
        exact = a.to(C.acc)
        square_i += _shares(exact * exact, LAYOUT, C.vector)
        if C.center:
            sum_i += _shares(exact, LAYOUT, C.vector)
        b = a
        if not DIAGONAL:
            b = _shifted(read(m, rows_j, columns, LAYOUT), shift_j, columns, m.d, C)
            exact = b.to(C.acc)
            square_j += _shares(exact * exact, LAYOUT, C.vector)
            if C.center:
                sum_j += _shares(exact, LAYOUT, C.vector)
        gram = settled(dot(a, tl.trans(b), gram, C.product), C.settle)
    squares_i, sums_i = tl.sum(square_i, 1), tl.sum(sum_i, 1)  # [TILE]
    if DIAGONAL:
        return gram, squares_i, squares_i, sums_i, sums_i, shift_i, shift_i
    else:
        return gram, squares_i, tl.sum(square_j, 1), sums_i, tl.sum(sum_j, 1), shift_i, shift_j


@triton.jit
def _primal(m, state, tile, k, eps, LAYOUT: tl.constexpr, C: tl.constexpr):
    """The loss of one tile of the Gram matrix; leaves its part of A in the state."""
    n = m.n
    i, j = triangle(tile)
    rows_i, rows_j = i * _TILE + tl.arange(0, _TILE), j * _TILE + tl.arange(0, _TILE)
    if LAYOUT != _GATHERED:
        if i == j:
            gram, square_i, square_j, sum_i, sum_j, shift_i, shift_j = _gram(
                m, rows_i, rows_j, LAYOUT, True, C
            )
        else:
            gram, square_i, square_j, sum_i, sum_j, shift_i, shift_j = _gram(
                m, rows_i, rows_j, LAYOUT, False, C
            )
    else:
        gram, square_i, square_j, sum_i, sum_j, shift_i, shift_j = _gram(
            m, rows_i, rows_j, LAYOUT, False, C
        )

    width = m.d.to(C.acc)
    mean_i, mean_j = shift_i, shift_j
    if C.center:
        sum_i, sum_j = sum_i / width, sum_j / width  # m - a
        square_i = tl.maximum(square_i - width * sum_i * sum_i, 0.0, propagate_nan=_ALL)
        square_j = tl.maximum(square_j - width * sum_j * sum_j, 0.0, propagate_nan=_ALL)
        gram -= width * sum_i[:, None] * sum_j[None, :]
        mean_i, mean_j = shift_i + sum_i, shift_j + sum_j
    inverse_i = inverse_norm(square_i, mean_i, width, eps, C.center)
    inverse_j = inverse_norm(square_j, mean_j, width, eps, C.center)
    scale = inverse_i[:, None] * inverse_j[None, :]
    c = tl.where(rows_i[:, None] == rows_j[None, :], 0.0, gram * scale)
    if C.penalty == _SQUARE:
        phi = c * c
        slope = 4.0 * k * c
    else:
        phi = tl.abs(c)
        # c itself where it is neither above nor below 0: 0 stays 0, NaN stays NaN.
        slope = 2.0 * k * tl.where(c > 0, 1.0, tl.where(c < 0, -1.0, c))
    if C.keep:
        length = padded(n)
        a = slope * scale
        mask = core_mask(rows_i, rows_j, n, length)
        tl.store(core_pointers(state, rows_i, rows_j, length), a, mask=mask)
        diagonal = slope * c
        diagonals = state + n.to(tl.int64) * length
        diagonal_i = tl.sum(diagonal, 1) * inverse_i * inverse_i
        tl.store(diagonals + j * length + rows_i, diagonal_i, mask=rows_i < n)
        if i == j:
            if C.center:
                means = diagonals + (n + _TILE - 1) // _TILE * length
                tl.store(means + rows_i, mean_i, mask=rows_i < n)
        else:
            mask = core_mask(rows_j, rows_i, n, length)
            tl.store(core_pointers(state, rows_j, rows_i, length), tl.trans(a), mask=mask)
            diagonal_j = tl.sum(diagonal, 0) * inverse_j * inverse_j
            tl.store(diagonals + i * length + rows_j, diagonal_j, mask=rows_j < n)
    return k * tl.sum(phi) * tl.where(i == j, 1.0, 2.0).to(C.acc)


@triton.jit
def _row_norms(m, rows, eps, LAYOUT: tl.constexpr, C: tl.constexpr):
    """Means (0 if not centred) and 1/n of whole rows."""
    square, sums = tl.zeros([_ROW_BLOCK, _TILE], C.acc), tl.zeros([_ROW_BLOCK, _TILE], C.acc)
    shift = tl.zeros([_ROW_BLOCK], C.acc)
    if C.center:
        shift = _some_mean(m, rows, LAYOUT, _TILE, C.acc)
    for k in range(0, m.d, _TILE):
        columns = k + tl.arange(0, _TILE)
        block = _shifted(read(m, rows, columns, LAYOUT), shift, columns, m.d, C)
        block = block.to(C.acc)  # [ROW_BLOCK, TILE]
        square += block * block
        if C.center:
            sums += block
    width = m.d.to(C.acc)
    squares = tl.sum(square, 1)
    if C.center:
        over = tl.sum(sums, 1) / width
        squares = tl.maximum(squares - width * over * over, 0.0, propagate_nan=_ALL)
        shift += over
    return shift, inverse_norm(squares, shift, width, eps, C.center)


@triton.jit
def _whole_rows(m, rows, columns, eps, LAYOUT: tl.constexpr, C: tl.constexpr):
    """The same of rows of one tile, and the elements themselves, centred: each is read once."""
    x = read(m, rows, columns, LAYOUT)  # [ROW_BLOCK, TILE]
    width = m.d.to(C.acc)
    mean = tl.zeros([_ROW_BLOCK], C.acc)
    if C.center:
        mean = tl.sum(x.to(C.acc), 1) / width
        x = _shifted(x, mean, columns, m.d, C)
    exact = x.to(C.acc)
    return mean, inverse_norm(tl.sum(exact * exact, 1), mean, width, eps, C.center), x


@triton.jit
def _over_rows(m, state, tile, k, eps, LAYOUT: tl.constexpr, C: tl.constexpr):
    """The loss of one tile of M (dual) or 64 columns of s (signed), summed over all rows."""
    n, d = m.n, m.d
    length = padded(d)
    if C.penalty == _SIGNED:
        p, q, inverses = tile, tile, state + length
    else:
        p, q = triangle(tile)
        inverses = state + d.to(tl.int64) * length
    columns_p, columns_q = p * _TILE + tl.arange(0, _TILE), q * _TILE + tl.arange(0, _TILE)
    form, s = tl.zeros([_TILE, _TILE], C.acc), tl.zeros([_TILE], C.acc)
    live = tl.zeros([_ROW_BLOCK], C.acc)
    for first in range(0, n, _ROW_BLOCK):
        rows = first + tl.arange(0, _ROW_BLOCK)
        if C.narrow:
            mean, inverse, x = _whole_rows(m, rows, columns_p, eps, LAYOUT, C)
        else:
            mean, inverse = _row_norms(m, rows, eps, LAYOUT, C)
            x = _shifted(read(m, rows, columns_p, LAYOUT), mean, columns_p, d, C)
        if C.center:
            x = x * inverse[:, None]  # u; otherwise x as it lies: see numerics.py
        if C.penalty == _SIGNED:
            s += tl.sum(x if C.center else x.to(C.acc) * inverse[:, None], 0)
        else:
            y = x
            if not C.narrow:
                y = _shifted(read(m, rows, columns_q, LAYOUT), mean, columns_q, d, C)
                if C.center:
                    y = y * inverse[:, None]
            if not C.center:
                y = y.to(C.acc) * inverse[:, None] * inverse[:, None]  # [ROW_BLOCK, TILE]
            form = dot(tl.trans(x), y, form, C.form_product)
        if tile == 0:
            live += tl.where(inverse != 0, 1.0, 0.0)
            if C.keep:
                tl.store(inverses + rows, inverse, mask=rows < n)
                if C.center:
                    tl.store(inverses + padded(n) + rows, mean, mask=rows < n)
    if C.penalty == _SIGNED:
        if C.keep:
            tl.store(state + columns_p, s, mask=columns_p < d)
        return k * tl.sum(s * s) - k * tl.sum(live)
    else:
        if C.keep:
            mask = core_mask(columns_p, columns_q, d, length)
            tl.store(core_pointers(state, columns_p, columns_q, length), form, mask=mask)
            if p != q:
                mask = core_mask(columns_q, columns_p, d, length)
                mirrored = core_pointers(state, columns_q, columns_p, length)
                tl.store(mirrored, tl.trans(form), mask=mask)
        total_of_tile = tl.sum(form * form) * tl.where(p == q, 1.0, 2.0).to(C.acc)
        return k * total_of_tile - k * tl.sum(live)


@triton.jit
def _tile(m, state, tile, over_rows, k, eps, LAYOUT: tl.constexpr, C: tl.constexpr):
    if C.forms == _SOME:
        if over_rows:
            partial = _over_rows(m, state, tile, k, eps, LAYOUT, C)
        else:
            partial = _primal(m, state, tile, k, eps, LAYOUT, C)
    elif C.forms == _EVERY:
        partial = _over_rows(m, state, tile, k, eps, LAYOUT, C)
    else:
        partial = _primal(m, state, tile, k, eps, LAYOUT, C)
    return partial


@triton.jit(do_not_specialize=["first_partial", "programs", "layers"])
def forward_kernel(
    xs, table, state, results, eps, first_partial, programs, layers, C: tl.constexpr
):  # fmt: skip
    """One program for one tile of one matrix of one layer. Results are the partials, a ticket and
    the loss."""
    program = tl.program_id(0)
    layer, local = find_layer(table, program, C.layers, C.padded)
    record = record_of(table, layer, C.layers)
    tiles = tl.load(record + _FORWARD).to(tl.int32)
    over_rows = tl.load(record + _OVER_ROWS) != 0
    index, tile = (local // tiles).to(tl.int64), local % tiles
    x = select(xs, layer, C.layers)
    mine = state
    if C.keep:
        size = multiple(tl.load(record + _STATE_SIZE), 4)
        mine += multiple(tl.load(record + _STATE), 4) + index * size
    k = scale_of(record, layers, C.acc)

    if C.paths == _SOME:
        fast = tl.load(record + _FAST) != 0
    else:
        fast = C.paths == _EVERY
    if fast:
        m = matrix_of(x, table, record, _X_BATCH, index, C.fast, C.vector)
        partial = _tile(m, mine, tile, over_rows, k, eps, C.fast, C)
    else:
        m = matrix_of(x, table, record, _X_BATCH, index, _GATHERED, C.vector)
        partial = _tile(m, mine, tile, over_rows, k, eps, _GATHERED, C)

    partials, tickets, loss = results
    tl.store(partials + first_partial + program, partial)
    if draws_last_ticket(tickets, programs):
        tl.store(loss, total(partials, programs, 1, C.loss, _REDUCE))
