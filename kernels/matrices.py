"""Device functions with which the pairwise kernels find and read their matrices."""

from __future__ import annotations

import triton
import triton.language as tl

from . import plan

_FIELDS = tl.constexpr(plan.FIELDS)


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
def pointers(
    x, rows, columns, d, row_stride, column_stride, offsets,
    FAST: tl.constexpr, ROWS_UNIT: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Pointers to the elements [rows, columns] of a matrix.

    What makes a layer fast is told to the compiler here. No test looks at whether it then reads
    16 bytes at once; in code compiled for sm_90 it did not.
    """
    if FAST and ROWS_UNIT:
        stride = multiple(column_stride, VECTOR)
        return x + (columns.to(tl.int64) * stride)[None, :] + rows[:, None]
    elif FAST:
        stride = multiple(row_stride, VECTOR)
        return x + (rows.to(tl.int64) * stride)[:, None] + columns[None, :]
    else:
        column = tl.load(offsets + columns, mask=columns < d, other=0)  # [columns]
        return x + (rows.to(tl.int64) * row_stride)[:, None] + column[None, :]


@triton.jit
def inside(
    rows, columns, n, d, FAST: tl.constexpr, ROWS_UNIT: tl.constexpr, VECTOR: tl.constexpr
):
    """Which of [rows, columns] exist; of a fast layer whole vectors do or don't."""
    if FAST and ROWS_UNIT:
        n = multiple(n, VECTOR)
    elif FAST:
        d = multiple(d, VECTOR)
    return (rows < n)[:, None] & (columns < d)[None, :]


@triton.jit
def read(
    x, rows, columns, n, d, row_stride, column_stride, offsets,
    FAST: tl.constexpr, ROWS_UNIT: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Elements [rows, columns] of a matrix, 0 beyond it."""
    where = pointers(x, rows, columns, d, row_stride, column_stride, offsets, FAST, ROWS_UNIT,
                     VECTOR)  # fmt: skip
    mask = inside(rows, columns, n, d, FAST, ROWS_UNIT, VECTOR)
    return tl.load(where, mask=mask, other=0.0)


@triton.jit
def inverse_norm(square, mean, d, eps, CENTER: tl.constexpr, RATIO: tl.constexpr):
    """1/n of rows from n^2, 0 where the row is dead; a NaN norm stays NaN."""
    norm = tl.sqrt(square)
    limit = eps
    if CENTER:
        limit = tl.maximum(eps, tl.sqrt(square + d * mean * mean) * RATIO)
    dead = norm <= limit
    return tl.where(dead, 0.0, 1.0 / tl.where(dead, 1.0, norm))
