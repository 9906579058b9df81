"""The Grams of samples and their gradients, of all representations in one launch each way.

X has B rows, the samples, of D columns, the features; a_k is the mean of column k over the first
64 samples and X_a = X - 1 a^T.

gram     G = X_a X_a^T    (B, B)   one program for a 64 x 64 tile (i, j), i <= j, and a part of the
                                   columns; the tiles of all parts are added up as in reduction.py
product  dX = S X_a       (B, D)   one program for 64 rows and a part of the columns

Of up to 64 samples a is the mean. Of more it isn't quite, which nothing that is made of G sees:
distances and centred kernels are those of samples at any origin, and S 1 = 0. But for rounding: so
the origin is where the samples are, |a_k - m_k|^2 <= B/64 times the variance of column k, and
mostly below a 64th of it. Every program that needs a makes it by the same instructions from the
same tile: all of them must take off the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import plan
from .matrices import (
    find_layer,
    matrix_of,
    multiple,
    read,
    record_of,
    select,
    triangle,
    write,
)
from .numerics import dot
from .reduction import added_up

_TILE = tl.constexpr(plan.TILE)
_ROWS, _PLACE, _STATE = (tl.constexpr(f) for f in (plan.ROWS, plan.PLACE, plan.STATE))
_FORWARD, _FAST = tl.constexpr(plan.FORWARD), tl.constexpr(plan.FAST)
_X_BATCH, _DX_BATCH = tl.constexpr(plan.X_BATCH), tl.constexpr(plan.DX_BATCH)
_SOME, _EVERY, _GATHERED = (tl.constexpr(f) for f in (plan.SOME, plan.EVERY, plan.GATHERED))


@triton.jit
def _gram(m, means, tile, first, span, LAYOUT: tl.constexpr, C: tl.constexpr):
    """A tile of the Gram matrix of some columns; what it has of samples beyond the last is for
    nobody to read."""
    BLOCK: tl.constexpr = C.gathered if LAYOUT == _GATHERED else C.block
    i, j = triangle(tile)
    begin = tl.arange(0, _TILE)
    rows_i, rows_j = i * _TILE + begin, j * _TILE + begin
    gram = tl.zeros([_TILE, _TILE], C.acc)
    for k in range(first, tl.minimum(first + span, m.d), BLOCK):
        columns = k + tl.arange(0, BLOCK)
        x = read(m, begin, columns, LAYOUT).to(C.acc)  # [TILE, BLOCK]
        shift = tl.sum(x, 0) / tl.minimum(m.n, _TILE).to(C.acc)
        # Not `& (tile == 0)`: of a scalar Triton's interpreter makes no bools, which 3.9 asks for.
        tl.store(means + columns, shift, mask=tl.where(tile == 0, columns < m.d, False))
        if C.single:
            a = x - shift[None, :]
            b = a
        else:
            a = read(m, rows_i, columns, LAYOUT).to(C.acc) - shift[None, :]
            b = read(m, rows_j, columns, LAYOUT).to(C.acc) - shift[None, :]
        gram = dot(a, tl.trans(b), gram, C.product)
    return gram


@triton.jit
def gram_kernel(xs, table, grams, means, partials, tickets, span, C: tl.constexpr):
    """One program for one tile of one Gram, over a part of the columns."""
    program = tl.program_id(0)
    layer, local = find_layer(table, program, C.layers, C.padded)
    record = record_of(table, layer, C.layers)
    count = tl.load(record + _FORWARD).to(tl.int32)
    x = select(xs, layer, C.layers)
    means += multiple(tl.load(record + _STATE), 4)
    rows = tl.load(record + _ROWS).to(tl.int32)
    row_tiles = (rows + _TILE - 1) // _TILE
    tiles = row_tiles * (row_tiles + 1) // 2
    tile, part = local % tiles, local // tiles  # tiles of the same columns run together
    if C.paths == _SOME:
        fast = tl.load(record + _FAST) != 0
    else:
        fast = C.paths == _EVERY
    if fast:
        m = matrix_of(x, table, record, _X_BATCH, 0, C.fast, C.vector)
        gram = _gram(m, means, tile, part * span, span, C.fast, C)
    else:
        m = matrix_of(x, table, record, _X_BATCH, 0, _GATHERED, C.vector)
        gram = _gram(m, means, tile, part * span, span, _GATHERED, C)

    mine = program - local + tile * count  # the first of this tile
    gram, last = added_up(
        gram, partials + mine.to(tl.int64) * _TILE * _TILE, tickets + mine, part, count, C.fan
    )
    if last:
        i, j = triangle(tile)
        begin = tl.arange(0, _TILE)
        rows_i, rows_j = i * _TILE + begin, j * _TILE + begin
        mask = (rows_i < rows)[:, None] & (rows_j < rows)[None, :]
        grams += tl.load(record + _PLACE) * rows * rows
        tl.store(grams + (rows_i.to(tl.int64) * rows)[:, None] + rows_j[None, :], gram, mask=mask)
        if i != j:
            mirrored = (rows_j.to(tl.int64) * rows)[None, :] + rows_i[:, None]
            tl.store(grams + mirrored, gram, mask=mask)


@triton.jit
def _symmetric(s, rows, others, n, C: tl.constexpr):
    """S [rows, others], 0 beyond it."""
    if C.aligned:
        n = multiple(n, 4)
    where = s + (rows.to(tl.int64) * n)[:, None] + others[None, :]
    return tl.load(where, mask=(rows < n)[:, None] & (others < n)[None, :], other=0.0)


@triton.jit
def _product(m, dm, s, means, i, first, span, LAYOUT: tl.constexpr, C: tl.constexpr):
    """64 rows of some columns of the gradient."""
    BLOCK: tl.constexpr = C.gathered if LAYOUT == _GATHERED else C.block
    rows = i * _TILE + tl.arange(0, _TILE)
    for k in range(first, tl.minimum(first + span, m.d), BLOCK):
        columns = k + tl.arange(0, BLOCK)
        shift = tl.load(means + columns, mask=columns < m.d, other=0.0)  # [BLOCK]
        y = tl.zeros([_TILE, BLOCK], C.acc)
        for r in range(0, m.n, C.depth):
            others = r + tl.arange(0, C.depth)
            x = read(m, others, columns, LAYOUT).to(C.acc) - shift[None, :]  # [DEPTH, BLOCK]
            # Beyond the last sample S is 0, and x is finite.
            y = dot(_symmetric(s, rows, others, m.n, C), x, y, C.product)
        write(dm, y, rows, columns, LAYOUT)


@triton.jit
def product_kernel(xs, dxs, table, s, means, span, C: tl.constexpr):
    """One program for 64 rows of one gradient, over a part of the columns."""
    layer, local = find_layer(table + C.layers, tl.program_id(0), C.layers, C.padded)
    record = record_of(table, layer, C.layers)
    x, dx = select(xs, layer, C.layers), select(dxs, layer, C.layers)
    means += multiple(tl.load(record + _STATE), 4)
    rows = tl.load(record + _ROWS)
    if C.aligned:
        rows = multiple(rows, 4)
    s += tl.load(record + _PLACE) * rows * rows
    row_tiles = (rows.to(tl.int32) + _TILE - 1) // _TILE
    i, first = local % row_tiles, local // row_tiles * span
    if C.paths == _SOME:
        fast = tl.load(record + _FAST) != 0
    else:
        fast = C.paths == _EVERY
    if fast:
        m = matrix_of(x, table, record, _X_BATCH, 0, C.fast, C.vector)
        dm = matrix_of(dx, table, record, _DX_BATCH, 0, C.fast, C.vector)
        _product(m, dm, s, means, i, first, span, C.fast, C)
    else:
        m = matrix_of(x, table, record, _X_BATCH, 0, _GATHERED, C.vector)
        dm = matrix_of(dx, table, record, _DX_BATCH, 0, _GATHERED, C.vector)
        _product(m, dm, s, means, i, first, span, _GATHERED, C)
