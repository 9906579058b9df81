"""Device functions with which kernels find their matrices, read them and write their gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..reference import CENTRED_DEAD_RATIO
from . import plan
from .numerics import rounded

_FIELDS = tl.constexpr(plan.FIELDS)
_BATCH, _ROWS = tl.constexpr(plan.BATCH), tl.constexpr(plan.ROWS)
_COLUMNS = tl.constexpr(plan.COLUMNS)
_RATIO = tl.constexpr(CENTRED_DEAD_RATIO)
_BY_ROWS, _BY_COLUMNS = tl.constexpr(plan.BY_ROWS), tl.constexpr(plan.BY_COLUMNS)


class Matrix(NamedTuple):
    """One matrix of a layer, as a kernel reads or writes it, in one of plan.py's layouts."""

    start: Any  # pointer to its first element
    n: Any  # rows
    d: Any  # columns
    row: Any  # strides
    column: Any
    offsets: Any  # of its columns, where they are gathered


@triton.jit
def find_layer(starts, program, LAYERS: tl.constexpr, PADDED: tl.constexpr):
    """The layer a program works on, and its number among that layer's programs."""
    i = tl.arange(0, PADDED)
    start = tl.load(starts + i, mask=i < LAYERS, other=1 << 62)  # [PADDED]
    # Layers without programs start where the next one does: the last start counts.
    layer = tl.sum((start <= program).to(tl.int32)) - 1
    return layer, program - tl.load(starts + layer).to(tl.int32)


@triton.jit
def record_of(table, layer, LAYERS: tl.constexpr):
    return table + 2 * LAYERS + layer * _FIELDS


@triton.jit
def matrix_of(
    x, table, record, geometry, index, LAYOUT: tl.constexpr, VECTOR: tl.constexpr
):  # fmt: skip
    """Matrix ``index`` of the layer at ``x``; ``geometry`` is the field of x's or dx's.

    Made where its layout is known, for what a compiler knows of the alignment of a pointer
    it forgets where two of them join: every load would then be of a single element.
    """
    n, d = tl.load(record + _ROWS).to(tl.int32), tl.load(record + _COLUMNS).to(tl.int32)
    batch = tl.load(record + geometry)
    row, column = tl.load(record + geometry + 1), tl.load(record + geometry + 2)
    if LAYOUT == _BY_ROWS:
        batch, n, column = multiple(batch, VECTOR), multiple(n, VECTOR), multiple(column, VECTOR)
    elif LAYOUT == _BY_COLUMNS:
        batch, d, row = multiple(batch, VECTOR), multiple(d, VECTOR), multiple(row, VECTOR)
    offsets = table + tl.load(record + geometry + 3)
    return Matrix(x + index * batch, n, d, row, column, offsets)


@triton.jit
def multiple(value, of: tl.constexpr):
    """A value known to be a multiple of ``of``, said so that the compiler sees it too.

    A hint (tl.multiple_of) on a value that was loaded doesn't survive inlining.
    """
    return value // of * of


@triton.jit
def padded(count):
    """Elements of a row of the state: see plan.state_size."""
    return (count + 3) // 4 * 4


@triton.jit
def core_pointers(state, rows, columns, length):
    """Pointers to [rows, columns] of A or M, whose rows take ``length`` elements."""
    return state + (rows.to(tl.int64) * length)[:, None] + columns[None, :]


@triton.jit
def core_mask(rows, columns, count, length):
    return (rows < count)[:, None] & (columns < length)[None, :]


@triton.jit
def select(tensors, layer, LAYERS: tl.constexpr):
    """The pointer to tensor ``layer`` of a tuple."""
    chosen = tensors[0]
    for i in tl.static_range(1, LAYERS):
        chosen = tl.where(layer == i, tensors[i], chosen)
    return chosen


@triton.jit
def pointers(m, rows, columns, LAYOUT: tl.constexpr):
    """Pointers to the elements [rows, columns] of a matrix."""
    if LAYOUT == _BY_ROWS:
        return m.start + (columns.to(tl.int64) * m.column)[None, :] + rows[:, None]
    elif LAYOUT == _BY_COLUMNS:
        return m.start + (rows.to(tl.int64) * m.row)[:, None] + columns[None, :]
    else:
        column = tl.load(m.offsets + columns, mask=columns < m.d, other=0)  # [columns]
        return m.start + (rows.to(tl.int64) * m.row)[:, None] + column[None, :]


@triton.jit
def inside(m, rows, columns):
    """Which of [rows, columns] exist; of a fast layer whole vectors do or don't."""
    return (rows < m.n)[:, None] & (columns < m.d)[None, :]


@triton.jit
def read(m, rows, columns, LAYOUT: tl.constexpr):
    """Elements [rows, columns] of a matrix, 0 beyond it."""
    where = pointers(m, rows, columns, LAYOUT)
    return tl.load(where, mask=inside(m, rows, columns), other=0.0)


@triton.jit
def write(m, value, rows, columns, LAYOUT: tl.constexpr):
    """Store elements [rows, columns] of a matrix, rounded to its dtype."""
    value = rounded(value, m.start.dtype.element_ty)
    tl.store(pointers(m, rows, columns, LAYOUT), value, mask=inside(m, rows, columns))


@triton.jit
def triangle(tile):
    """Row i and column j >= i of a tile of the upper triangle, column by column."""
    j = ((tl.sqrt(8.0 * tile.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    # The root may be off by one after rounding.
    j = tl.where(j * (j + 1) // 2 > tile, j - 1, j)
    j = tl.where((j + 1) * (j + 2) // 2 <= tile, j + 1, j)
    return tile - j * (j + 1) // 2, j


@triton.jit
def scale_of(record, layers, ACC: tl.constexpr):
    """k = 1/(L B N (N - 1)), of one of ``layers`` layers."""
    batch, rows = tl.load(record + _BATCH).to(ACC), tl.load(record + _ROWS).to(ACC)
    return 1.0 / (layers * batch) / rows / (rows - 1.0)


@triton.jit
def inverse_norm(square, mean, d, eps, CENTER: tl.constexpr):
    """1/n of rows from n^2, 0 where the row is dead, NaN where a square was too large; all [rows],
    but for d and eps."""
    norm = tl.sqrt(square)
    limit = eps
    raw = norm
    if CENTER:
        raw = tl.sqrt(square + d * mean * mean)
        limit = tl.maximum(eps, raw * _RATIO)
    dead = norm <= limit
    nothing = raw - raw  # or NaN
    return tl.where(dead, nothing, 1.0 / tl.where(dead, 1.0, norm) + nothing)
