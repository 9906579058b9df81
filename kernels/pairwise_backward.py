"""The pairwise cosine penalty, backward, of the matrices of all layers in one launch.

primal  dX = A X, one program for 64 rows and BLOCK columns; A_ij lies in the state, and
        A_ii is the sum of what the tiles of row i left there
dual    dx_i = 4k/n_i (y_i - <y_i, u_i> u_i),  y_i = u_i M,  u_i = x_i/n_i
signed  dx_i = 2k/n_i (s - <s, u_i> u_i)
        one program for 32 rows: <y_i, u_i> takes all columns

all times the incoming gradient, which is read where it lies. Row means are subtracted
while loading; nothing else comes of centring, because A 1 = 0 for centred rows as well.
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
    inside,
    multiple,
    padded,
    pointers,
    read,
    record_of,
    select,
)
from .numerics import dot, rounded

_TILE, _ROW_BLOCK = tl.constexpr(plan.TILE), tl.constexpr(plan.ROW_BLOCK)
_SIGNED = tl.constexpr(algebra.SIGNED)
_BATCH, _ROWS, _COLUMNS = (tl.constexpr(f) for f in (plan.BATCH, plan.ROWS, plan.COLUMNS))
_DUAL, _FAST, _BACKWARD = (tl.constexpr(f) for f in (plan.DUAL, plan.FAST, plan.BACKWARD))
_X_BATCH, _X_ROW = tl.constexpr(plan.X_BATCH), tl.constexpr(plan.X_ROW)
_X_COLUMN, _X_OFFSETS = tl.constexpr(plan.X_COLUMN), tl.constexpr(plan.X_OFFSETS)
_DX_BATCH, _DX_ROW = tl.constexpr(plan.DX_BATCH), tl.constexpr(plan.DX_ROW)
_DX_COLUMN, _DX_OFFSETS = tl.constexpr(plan.DX_COLUMN), tl.constexpr(plan.DX_OFFSETS)
_STATE, _STATE_SIZE = tl.constexpr(plan.STATE), tl.constexpr(plan.STATE_SIZE)


@triton.jit
def _centred(
    x, rows, columns, n, d, row_stride, column_stride, offsets, means, FAST: tl.constexpr,
    ROWS_UNIT: tl.constexpr, VECTOR: tl.constexpr, CENTER: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Elements [rows, columns] less their row's mean, 0 beyond the matrix."""
    block = read(x, rows, columns, n, d, row_stride, column_stride, offsets, FAST, ROWS_UNIT,
                 VECTOR)  # fmt: skip
    if CENTER:
        mean = tl.load(means + rows, mask=rows < n, other=0.0)  # [rows]
        block = tl.where((columns < d)[None, :], block.to(ACC) - mean[:, None], 0.0)
    return block


@triton.jit
def _write(
    dx, value, rows, columns, n, d, row_stride, column_stride, offsets, FAST: tl.constexpr,
    ROWS_UNIT: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    where = pointers(dx, rows, columns, d, row_stride, column_stride, offsets, FAST, ROWS_UNIT,
                     VECTOR)  # fmt: skip
    mask = inside(rows, columns, n, d, FAST, ROWS_UNIT, VECTOR)
    tl.store(where, rounded(value, dx.dtype.element_ty), mask=mask)


@triton.jit
def _primal(
    x, dx, state, grad, n, d, tile, x_row, x_column, x_offsets, dx_row, dx_column, dx_offsets,
    FAST: tl.constexpr, CENTER: tl.constexpr, ROWS_UNIT: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK: tl.constexpr, DEPTH: tl.constexpr, PRODUCT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    tiles = (n + _TILE - 1) // _TILE
    i = tile % tiles  # the programs of one column block run together: they share X
    rows = i * _TILE + tl.arange(0, _TILE)
    columns = tile // tiles * BLOCK + tl.arange(0, BLOCK)
    length = padded(n)
    parts = state + n.to(tl.int64) * length
    diagonal = tl.zeros([_TILE], ACC)
    for t in range(0, tiles):
        diagonal -= tl.load(parts + t * length + rows, mask=rows < n, other=0.0)  # [TILE]
    y = tl.zeros([_TILE, BLOCK], ACC)
    for first in range(0, n, DEPTH):
        others = first + tl.arange(0, DEPTH)
        mask = core_mask(rows, others, n, length)
        a = tl.load(core_pointers(state, rows, others, length), mask=mask, other=0.0)
        a = tl.where(rows[:, None] == others[None, :], diagonal[:, None], a)  # [TILE, DEPTH]
        block = _centred(x, others, columns, n, d, x_row, x_column, x_offsets,
                         parts + tiles * length, FAST, ROWS_UNIT, VECTOR, CENTER,
                         ACC)  # [DEPTH, BLOCK] # fmt: skip
        y = dot(a, block, y, PRODUCT)
    _write(dx, y * grad, rows, columns, n, d, dx_row, dx_column, dx_offsets, FAST, ROWS_UNIT,
           VECTOR)  # fmt: skip


@triton.jit
def _product(
    x, state, rows, columns, inverse, means, n, d, x_row, x_column, x_offsets,
    FAST: tl.constexpr, PENALTY: tl.constexpr, CENTER: tl.constexpr, ROWS_UNIT: tl.constexpr,
    VECTOR: tl.constexpr, FORM_PRODUCT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """y = U M (dual) or s (signed), and U itself, [rows, columns]."""
    u = _centred(x, rows, columns, n, d, x_row, x_column, x_offsets, means, FAST, ROWS_UNIT,
                 VECTOR, CENTER, ACC).to(ACC) * inverse[:, None]  # fmt: skip
    y = tl.zeros([_ROW_BLOCK, _TILE], ACC)
    if PENALTY == _SIGNED:
        y += tl.load(state + columns, mask=columns < d, other=0.0)[None, :]
    else:
        for first in range(0, d, _ROW_BLOCK):
            others = first + tl.arange(0, _ROW_BLOCK)
            v = _centred(x, rows, others, n, d, x_row, x_column, x_offsets, means, FAST,
                         ROWS_UNIT, VECTOR, CENTER, ACC)  # [ROW_BLOCK, ROW_BLOCK] # fmt: skip
            length = padded(d)
            mask = core_mask(others, columns, d, length)
            m = tl.load(core_pointers(state, others, columns, length), mask=mask, other=0.0)
            y = dot(v.to(ACC) * inverse[:, None], m, y, FORM_PRODUCT)
    return y, u


@triton.jit
def _over_rows(
    x, dx, state, grad, k, n, d, tile, x_row, x_column, x_offsets, dx_row, dx_column, dx_offsets,
    FAST: tl.constexpr, PENALTY: tl.constexpr, CENTER: tl.constexpr, ROWS_UNIT: tl.constexpr,
    VECTOR: tl.constexpr, FORM_PRODUCT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    rows = tile * _ROW_BLOCK + tl.arange(0, _ROW_BLOCK)
    if PENALTY == _SIGNED:
        inverses, factor = state + padded(d), 2.0 * k * grad
    else:
        inverses, factor = state + d.to(tl.int64) * padded(d), 4.0 * k * grad
    inverse = tl.load(inverses + rows, mask=rows < n, other=0.0)  # [ROW_BLOCK]
    means = inverses + padded(n)
    # Wide matrices make y twice, once for <y, u> and once to write it, and keep none of it.
    along = tl.zeros([_ROW_BLOCK], ACC)
    for first in range(0, d, _TILE):
        columns = first + tl.arange(0, _TILE)
        y, u = _product(x, state, rows, columns, inverse, means, n, d, x_row, x_column,
                        x_offsets, FAST, PENALTY, CENTER, ROWS_UNIT, VECTOR, FORM_PRODUCT,
                        ACC)  # fmt: skip
        along += tl.sum(y * u, 1)
    for first in range(0, d, _TILE):
        columns = first + tl.arange(0, _TILE)
        y, u = _product(x, state, rows, columns, inverse, means, n, d, x_row, x_column,
                        x_offsets, FAST, PENALTY, CENTER, ROWS_UNIT, VECTOR, FORM_PRODUCT,
                        ACC)  # fmt: skip
        value = (factor * inverse)[:, None] * (y - along[:, None] * u)
        _write(dx, value, rows, columns, n, d, dx_row, dx_column, dx_offsets, FAST, ROWS_UNIT,
               VECTOR)  # fmt: skip


@triton.jit
def backward_kernel(
    xs, dxs, table, state, grad, layers,
    LAYERS: tl.constexpr, PADDED: tl.constexpr, PENALTY: tl.constexpr, CENTER: tl.constexpr,
    ROWS_UNIT: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr,
    PRODUCT: tl.constexpr, FORM_PRODUCT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One program for one block of rows (primal: and columns) of one matrix of one layer."""
    layer, local = find_layer(table + LAYERS, tl.program_id(0), LAYERS, PADDED)
    record = record_of(table, layer, LAYERS)
    n, d = tl.load(record + _ROWS).to(tl.int32), tl.load(record + _COLUMNS).to(tl.int32)
    batch, tiles = tl.load(record + _BATCH), tl.load(record + _BACKWARD).to(tl.int32)
    x_row, x_column = tl.load(record + _X_ROW), tl.load(record + _X_COLUMN)
    dx_row, dx_column = tl.load(record + _DX_ROW), tl.load(record + _DX_COLUMN)
    x_offsets = table + tl.load(record + _X_OFFSETS)
    dx_offsets = table + tl.load(record + _DX_OFFSETS)
    fast = tl.load(record + _FAST) != 0
    matrix, tile = (local // tiles).to(tl.int64), local % tiles
    x, dx = select(xs, layer, LAYERS), select(dxs, layer, LAYERS)
    if fast:
        x += matrix * multiple(tl.load(record + _X_BATCH), VECTOR)
        dx += matrix * multiple(tl.load(record + _DX_BATCH), VECTOR)
    else:
        x += matrix * tl.load(record + _X_BATCH)
        dx += matrix * tl.load(record + _DX_BATCH)
    size = multiple(tl.load(record + _STATE_SIZE), 4)
    state += multiple(tl.load(record + _STATE), 4) + matrix * size
    scale = tl.load(grad).to(ACC)
    rows = n.to(ACC)
    k = 1.0 / (layers * batch.to(ACC)) / rows / (rows - 1.0)

    if PENALTY == _SIGNED:
        over_rows = tl.full([], 1, tl.int64)
    else:
        over_rows = tl.load(record + _DUAL)
    if over_rows != 0:
        if fast:
            _over_rows(x, dx, state, scale, k, n, d, tile, x_row, x_column, x_offsets, dx_row,
                       dx_column, dx_offsets, True, PENALTY, CENTER, ROWS_UNIT, VECTOR,
                       FORM_PRODUCT, ACC)  # fmt: skip
        else:
            _over_rows(x, dx, state, scale, k, n, d, tile, x_row, x_column, x_offsets, dx_row,
                       dx_column, dx_offsets, False, PENALTY, CENTER, ROWS_UNIT, VECTOR,
                       FORM_PRODUCT, ACC)  # fmt: skip
    else:
        if fast:
            _primal(x, dx, state, scale, n, d, tile, x_row, x_column, x_offsets, dx_row,
                    dx_column, dx_offsets, True, CENTER, ROWS_UNIT, VECTOR, BLOCK, DEPTH, PRODUCT,
                    ACC)  # fmt: skip
        else:
            _primal(x, dx, state, scale, n, d, tile, x_row, x_column, x_offsets, dx_row,
                    dx_column, dx_offsets, False, CENTER, ROWS_UNIT, VECTOR, BLOCK, DEPTH, PRODUCT,
                    ACC)  # fmt: skip
