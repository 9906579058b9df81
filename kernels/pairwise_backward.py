"""The pairwise cosine penalty, backward, of the matrices of all layers in one launch.

primal  dX = A X, one program for 64 rows and 64 columns; A_ij lies in the state, and
        A_ii is minus the sum of what the tiles of row i left there
dual    dx_i = 4k/n_i (y_i - <y_i, u_i> u_i),  y_i = u_i M,  u_i = x_i/n_i
signed  dx_i = 2k/n_i (s - <s, u_i> u_i)
        one program for 32 rows, or 64 narrow ones: <y_i, u_i> takes all columns

all times the incoming gradient, which is read where it lies. Row means are subtracted
while loading; nothing else comes of centring (docs/math.md, "Centred rows").
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
    matrix_of,
    multiple,
    padded,
    read,
    record_of,
    scale_of,
    select,
    write,
)
from .numerics import dot

_TILE, _ROW_BLOCK = tl.constexpr(plan.TILE), tl.constexpr(plan.ROW_BLOCK)
_SIGNED = tl.constexpr(algebra.SIGNED)
_BACKWARD = tl.constexpr(plan.BACKWARD)
_OVER_ROWS, _FAST = tl.constexpr(plan.OVER_ROWS), tl.constexpr(plan.FAST)
_SOME, _EVERY, _GATHERED = (tl.constexpr(f) for f in (plan.SOME, plan.EVERY, plan.GATHERED))
_X_BATCH, _DX_BATCH = tl.constexpr(plan.X_BATCH), tl.constexpr(plan.DX_BATCH)
_STATE, _STATE_SIZE = tl.constexpr(plan.STATE), tl.constexpr(plan.STATE_SIZE)


@triton.jit
def _centred(m, rows, columns, means, LAYOUT: tl.constexpr, C: tl.constexpr):
    """Elements [rows, columns] less their row's mean, 0 beyond the matrix."""
    block = read(m, rows, columns, LAYOUT)
    if C.center:
        mean = tl.load(means + rows, mask=rows < m.n, other=0.0)  # [rows]
        block = tl.where((columns < m.d)[None, :], block.to(C.acc) - mean[:, None], 0.0)
    return block


@triton.jit
def _primal(m, dm, state, grad, tile, LAYOUT: tl.constexpr, C: tl.constexpr):
    n = m.n
    # Gathered elements each have a pointer of their own.
    STEP: tl.constexpr = 16 if LAYOUT == _GATHERED else C.depth
    tiles = (n + _TILE - 1) // _TILE
    i = tile % tiles  # the programs of one column block run together: they share X
    rows = i * _TILE + tl.arange(0, _TILE)
    columns = tile // tiles * _TILE + tl.arange(0, _TILE)
    length = padded(n)
    diagonals = state + n.to(tl.int64) * length
    means = diagonals + tiles * length
    y = tl.zeros([_TILE, _TILE], C.acc)
    for first in range(0, n, STEP):
        others = first + tl.arange(0, STEP)
        mask = core_mask(rows, others, n, length)
        a = tl.load(core_pointers(state, rows, others, length), mask=mask, other=0.0)
        block = _centred(m, others, columns, means, LAYOUT, C)  # [STEP, TILE]
        y = dot(a, block, y, C.product)  # A's diagonal is 0 in the state
    diagonal = tl.zeros([_TILE], C.acc)
    for t in range(0, tiles):
        diagonal -= tl.load(diagonals + t * length + rows, mask=rows < n, other=0.0)  # [TILE]
    y += diagonal[:, None] * _centred(m, rows, columns, means, LAYOUT, C).to(C.acc)
    write(dm, y * grad, rows, columns, LAYOUT)


@triton.jit
def _form(state, rows, columns, d):
    """Elements [rows, columns] of M."""
    length = padded(d)
    mask = core_mask(rows, columns, d, length)
    return tl.load(core_pointers(state, rows, columns, length), mask=mask, other=0.0)


@triton.jit
def _product(m, state, rows, columns, inverse, means, LAYOUT: tl.constexpr, C: tl.constexpr):
    """y = U M (dual) or s (signed), and U itself, [rows, columns]."""
    d = m.d
    ROWS: tl.constexpr = rows.shape[0]
    x = _centred(m, rows, columns, means, LAYOUT, C)
    y = tl.zeros([ROWS, _TILE], C.acc)
    if C.penalty == _SIGNED:
        y += tl.load(state + columns, mask=columns < d, other=0.0)[None, :]
    else:
        if C.narrow:
            y = dot(x, _form(state, columns, columns, d), y, C.form_product)
        else:
            for first in tl.range(0, d, ROWS, num_stages=1):
                others = first + tl.arange(0, ROWS)
                v = _centred(m, rows, others, means, LAYOUT, C)  # [ROWS, ROWS]
                y = dot(v, _form(state, others, columns, d), y, C.form_product)
        y *= inverse[:, None]
    u = x.to(C.acc) * inverse[:, None]
    return y, u


@triton.jit
def _over_rows(m, dm, state, grad, k, tile, LAYOUT: tl.constexpr, C: tl.constexpr):
    n, d = m.n, m.d
    ROWS: tl.constexpr = _TILE if C.narrow else _ROW_BLOCK
    rows = tile * ROWS + tl.arange(0, ROWS)
    if C.penalty == _SIGNED:
        inverses, factor = state + padded(d), 2.0 * k * grad
    else:
        inverses, factor = state + d.to(tl.int64) * padded(d), 4.0 * k * grad
    inverse = tl.load(inverses + rows, mask=rows < n, other=0.0)  # [ROWS]
    means = inverses + padded(n)
    factor *= inverse
    if C.narrow:
        columns = tl.arange(0, _TILE)
        y, u = _product(m, state, rows, columns, inverse, means, LAYOUT, C)
        value = factor[:, None] * (y - tl.sum(y * u, 1)[:, None] * u)
        write(dm, value, rows, columns, LAYOUT)
    else:
        # Wide matrices make y twice, once for <y, u> and once to write it, and keep none of it.
        along = tl.zeros([ROWS], C.acc)
        for first in range(0, d, _TILE):
            columns = first + tl.arange(0, _TILE)
            y, u = _product(m, state, rows, columns, inverse, means, LAYOUT, C)
            along += tl.sum(y * u, 1)
        for first in range(0, d, _TILE):
            columns = first + tl.arange(0, _TILE)
            y, u = _product(m, state, rows, columns, inverse, means, LAYOUT, C)
            write(dm, factor[:, None] * (y - along[:, None] * u), rows, columns, LAYOUT)


@triton.jit
def _block(m, dm, state, grad, k, tile, over_rows, LAYOUT: tl.constexpr, C: tl.constexpr):
    if C.forms == _SOME:
        if over_rows:
            _over_rows(m, dm, state, grad, k, tile, LAYOUT, C)
        else:
            _primal(m, dm, state, grad, tile, LAYOUT, C)
    elif C.forms == _EVERY:
        _over_rows(m, dm, state, grad, k, tile, LAYOUT, C)
    else:
        _primal(m, dm, state, grad, tile, LAYOUT, C)


@triton.jit(do_not_specialize=["layers"])
def backward_kernel(xs, dxs, table, state, grad, layers, C: tl.constexpr):
    """One program for one block of rows (primal: and columns) of one matrix of one layer."""
    layer, local = find_layer(table + C.layers, tl.program_id(0), C.layers, C.padded)
    record = record_of(table, layer, C.layers)
    tiles = tl.load(record + _BACKWARD).to(tl.int32)
    over_rows = tl.load(record + _OVER_ROWS) != 0
    index, tile = (local // tiles).to(tl.int64), local % tiles
    x, dx = select(xs, layer, C.layers), select(dxs, layer, C.layers)
    size = multiple(tl.load(record + _STATE_SIZE), 4)
    state += multiple(tl.load(record + _STATE), 4) + index * size
    scale = tl.load(grad).to(C.acc)
    k = scale_of(record, layers, C.acc)
    if C.paths == _SOME:
        fast = tl.load(record + _FAST) != 0
    else:
        fast = C.paths == _EVERY
    if fast:
        m = matrix_of(x, table, record, _X_BATCH, index, C.fast, C.vector)
        dm = matrix_of(dx, table, record, _DX_BATCH, index, C.fast, C.vector)
        _block(m, dm, state, scale, k, tile, over_rows, C.fast, C)
    else:
        m = matrix_of(x, table, record, _X_BATCH, index, _GATHERED, C.vector)
        dm = matrix_of(dx, table, record, _DX_BATCH, index, _GATHERED, C.vector)
        _block(m, dm, state, scale, k, tile, over_rows, _GATHERED, C)
