"""How the GPU kernels see their matrices, and those of the pairwise penalty plan their work: tiles,
state, geometry.

Needs no Triton: the fake kernels of both GPU backends ask here for the size of the state.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..algebra.pairwise import SIGNED, is_dual
from .kept import on_device

TILE = 64  # edge of a tile of the Gram matrix, in both GPU backends
ROW_BLOCK = 32  # rows at a time in the dual and signed forms, which work on whole rows
MOST = 2**30  # rows, or columns

# The record of a layer in the geometry table, int64 each.
(
    BATCH,  # number of matrices
    ROWS,
    COLUMNS,
    OVER_ROWS,  # dual or signed: each program takes all rows, or all columns
    FAST,  # unit stride and aligned: no offset table
    X_BATCH,  # strides of x
    X_ROW,
    X_COLUMN,
    X_OFFSETS,  # where in the table the offsets of x's columns begin, unless FAST
    DX_BATCH,  # the same of its gradient
    DX_ROW,
    DX_COLUMN,
    DX_OFFSETS,
    STATE,  # where in the state the first matrix begins
    STATE_SIZE,
    FORWARD,  # programs of a matrix; of a dependence, of each tile of its Gram
    BACKWARD,
    PLACE,  # of a dependence: which of its Grams
    FIELDS,
) = range(19)

# How many layers are something: over rows, or fast.
NONE, SOME, EVERY = range(3)

# In which order a kernel reads a matrix. The fast ones take 16 bytes at a time: down a column
# (channels_last), or along a row.
GATHERED, BY_ROWS, BY_COLUMNS = range(3)


def divide_up(a, b):
    return (a + b - 1) // b


def state_size(penalty: int, center: bool, n: int, d: int) -> int:
    """Elements that the forward saves of one matrix of n rows and d columns.

    primal  A (n, n), its diagonal 0 | what each column tile adds to -A_ii (tiles, n)
    dual    M (d, d) | 1/n (n)
    signed  s (d) | 1/n (n)
    then the row means (n) if centred. Every row is padded to a multiple of 4 elements, those
    of A and M with zeros, so that 16 bytes can be read at a time.
    """
    rows, columns = divide_up(n, 4) * 4, divide_up(d, 4) * 4
    if penalty == SIGNED:
        size = columns + rows
    elif is_dual(penalty, n, d):
        size = d * columns + rows
    else:
        size = n * rows + divide_up(n, TILE) * rows
    return size + (rows if center else 0)


class Layer(NamedTuple):
    """What of a tensor decides how it is read; hashable, the key of a plan."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    aligned: bool  # starts at a multiple of 16 bytes


class Plan(NamedTuple):
    """Geometry of the layers of one dtype."""

    table: Tensor  # first programs forward (L), backward (L), records (L, FIELDS), offsets
    rows_unit: bool  # whether the fast layers have unit stride in their rows (channels_last)
    forms: int  # NONE, SOME or EVERY of the layers work over rows
    paths: int  # the same of fast ones
    narrow: bool  # whether all that do have rows of a single tile
    state: int  # elements of the state
    forward: int  # programs in all
    backward: int


# Of each tensor its dtype and what a Layer has, in the plain types that are quickest to compare.
Layout = tuple[tuple[torch.dtype, torch.Size, tuple[int, ...], bool], ...]


def layout(tensors: Iterable[Tensor]) -> Layout:
    """What of the tensors that a call is given decides what it launches, and code for what; the key
    of all that is kept of it."""
    return tuple([(x.dtype, x.shape, x.stride(), x.data_ptr() % 16 == 0) for x in tensors])


class Typed(NamedTuple):
    """The layers of one dtype, which share a launch, and where they are among all."""

    dtype: torch.dtype
    indices: tuple[int, ...]
    layers: tuple[Layer, ...]

    def of(self, xs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(xs) if len(xs) == len(self.indices) else tuple([xs[i] for i in self.indices])


def by_dtype(layers: Layout) -> list[Typed]:
    """Sorted by dtype, in order of appearance."""
    found: dict[torch.dtype, tuple[list[int], list[Layer]]] = {}
    for i, (dtype, shape, stride, aligned) in enumerate(layers):
        indices, same = found.setdefault(dtype, ([], []))
        indices.append(i)
        same.append(Layer(shape, stride, aligned))
    return [Typed(dtype, tuple(i), tuple(same)) for dtype, (i, same) in found.items()]


@functools.lru_cache(maxsize=256)
def plan(
    layers: tuple[Layer, ...],
    itemsize: int,
    penalty: int,
    center: bool,
    batched: bool,
    device: torch.device,
) -> Plan:
    """The plan of layers of one dtype; kept, so that a step uploads nothing after the first.

    It knows no addresses: the tensors themselves are arguments of the kernels.
    """
    lie = geometry(layers, itemsize, batched)
    for record in lie.records:
        record[OVER_ROWS] = penalty == SIGNED or is_dual(penalty, record[ROWS], record[COLUMNS])
    longest = max((r[COLUMNS] for r in lie.records if r[OVER_ROWS]), default=0)
    narrow = itemsize == 2 and longest <= TILE and operands_in_shared_memory(device)
    starts: tuple[list[int], list[int]] = ([], [])
    state = forward = backward = 0
    for record in lie.records:
        n, d = record[ROWS], record[COLUMNS]
        record[STATE], record[STATE_SIZE] = state, state_size(penalty, center, n, d)
        row_tiles, column_tiles = divide_up(n, TILE), divide_up(d, TILE)
        if record[OVER_ROWS]:
            pairs = column_tiles * (column_tiles + 1) // 2
            record[FORWARD] = column_tiles if penalty == SIGNED else pairs
            record[BACKWARD] = row_tiles if narrow else divide_up(n, ROW_BLOCK)
        else:
            record[FORWARD] = row_tiles * (row_tiles + 1) // 2
            record[BACKWARD] = row_tiles * column_tiles
        if d == 0:
            record[FORWARD] = record[BACKWARD] = 0
        starts[0].append(forward)
        starts[1].append(backward)
        state += record[BATCH] * record[STATE_SIZE]
        forward += record[BATCH] * record[FORWARD]
        backward += record[BATCH] * record[BACKWARD]
    working = [record for record in lie.records if record[FORWARD]]
    forms, paths = (how_many(working, field) for field in (OVER_ROWS, FAST))
    table = lie.table(starts, device)
    return Plan(table, lie.rows_unit, forms, paths, narrow, state, forward, backward)


@functools.cache
def operands_in_shared_memory(device: torch.device) -> bool:
    """Whether products find both factors there, and their sums in registers: on Hopper's tensor
    cores. Elsewhere, and without tensor cores, those of whole tiles would be spilled."""
    if device.type == "cpu":
        return True  # interpreted
    return (
        device.type == "cuda" and not torch.version.hip
        and torch.cuda.get_device_capability(device)[0] == 9
    )  # fmt: skip


class Geometry(NamedTuple):
    """How the layers of one dtype lie."""

    records: list[list[int]]  # what plans have yet to fill in is 0
    offsets: list[int]
    rows_unit: bool  # as in a Plan

    def table(self, starts: tuple[list[int], list[int]], device: torch.device) -> Tensor:
        """On the device: the first programs of each layer, forward and backward, and the rest."""
        records = (field for record in self.records for field in record)
        flat = [*starts[0], *starts[1], *records, *self.offsets]
        return on_device(torch.tensor(flat, dtype=torch.int64, device="cpu"), device)


def geometry(layers: tuple[Layer, ...], itemsize: int, batched: bool) -> Geometry:
    vector = 16 // itemsize
    views = [_view(layer, batched) for layer in layers]
    by_rows = sum(math.prod(v.layer.shape) for v in views if _is_fast(v, vector, True))
    by_columns = sum(math.prod(v.layer.shape) for v in views if _is_fast(v, vector, False))
    rows_unit = by_rows > by_columns
    records: list[list[int]] = []
    offsets: list[int] = []
    places: dict[tuple[tuple[int, int], ...], int] = {}

    def place_of(columns: tuple[tuple[int, int], ...]) -> int:
        """Where the offsets of columns are, which all that lie alike share."""
        if columns not in places:
            places[columns] = len(layers) * (2 + FIELDS) + len(offsets)
            offsets.extend(_offsets(columns))
        return places[columns]

    for v in views:
        record = [0] * FIELDS
        record[BATCH], record[ROWS], record[COLUMNS] = v.batch, v.n, v.d
        record[FAST] = _is_fast(v, vector, rows_unit)
        record[X_BATCH], record[X_ROW] = v.x_batch, v.x_row
        record[DX_BATCH], record[DX_ROW] = v.dx_batch, v.dx_row
        if record[FAST]:
            record[X_COLUMN] = record[DX_COLUMN] = v.columns[0].x if v.columns else 1
        else:
            record[X_OFFSETS] = place_of(tuple([(c.size, c.x) for c in v.columns]))
            record[DX_OFFSETS] = place_of(tuple([(c.size, c.dx) for c in v.columns]))
        records.append(record)
    return Geometry(records, offsets, rows_unit)


def how_many(records: Sequence[Sequence[int]], field: int) -> int:
    having = {record[field] for record in records}
    return SOME if len(having) > 1 else EVERY if having == {1} else NONE


class _Column(NamedTuple):
    """A column dimension: size, stride in x, stride in its gradient."""

    size: int
    x: int
    dx: int


class _View(NamedTuple):
    layer: Layer
    batch: int
    n: int
    d: int
    x_batch: int
    x_row: int
    dx_batch: int
    dx_row: int
    columns: list[_Column]  # slowest first, as few as can be


def _view(layer: Layer, batched: bool) -> _View:
    """A tensor as (batch, rows, columns) matrices.

    The columns are taken in the order of their strides: a permutation of them changes
    nothing, if the gradient's are permuted alike, and more dimensions then collapse.
    """
    shape, stride = layer.shape, layer.stride
    row = 1 if batched else 0
    rows_and_columns = shape[row], math.prod(shape[row + 1 :])
    if max(rows_and_columns) > MOST:  # the kernels count them in 32 bits
        raise RuntimeError(
            "expected at most 2^30 rows and columns for Triton's kernels, got "
            f'{rows_and_columns[0]} and {rows_and_columns[1]}; pass impl="torch"'
        )
    gradient = torch.empty_like(torch.empty_strided(shape, stride, device="meta")).stride()
    dims = [
        _Column(shape[i], stride[i], gradient[i])
        for i in range(row + 1, len(shape))
        if shape[i] != 1
    ]
    columns: list[_Column] = []
    for dim in sorted(dims, key=lambda c: (-c.x, -c.dx)):
        outer = columns[-1] if columns else None
        if outer and outer.x == dim.size * dim.x and outer.dx == dim.size * dim.dx:
            columns[-1] = _Column(outer.size * dim.size, dim.x, dim.dx)
        else:
            columns.append(dim)
    return _View(
        layer,
        shape[0] if batched else 1,
        *rows_and_columns,
        stride[0] if batched else 0,
        stride[row],
        gradient[0] if batched else 0,
        gradient[row],
        columns,
    )


def _is_fast(v: _View, vector: int, rows_unit: bool) -> bool:
    """Whether 16 bytes at a time can be read, and written, along the axis of unit stride."""
    if len(v.columns) > 1 or not v.layer.aligned:
        return False
    column = v.columns[0] if v.columns else _Column(1, 1, 1)
    if column.x != column.dx or (v.x_row, v.x_batch) != (v.dx_row, v.dx_batch):
        return False
    unit, other, length = (
        (v.x_row, column.x, v.n) if rows_unit else (column.x, v.x_row, v.d)
    )
    return unit == 1 and all(i % vector == 0 for i in (other, length, v.x_batch))


def _offsets(columns: Sequence[tuple[int, int]]) -> list[int]:
    """Offset of every column of dimensions (size, stride), the last running fastest."""
    offsets = [0]
    for size, stride in columns:
        offsets = [offset + i * stride for offset in offsets for i in range(size)]
    return offsets
