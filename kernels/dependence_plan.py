"""How the Triton kernels of the dependence share out their work: tiles of Grams, parts of columns.

Needs no Triton: the fake kernel asks here for the size of the means.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .plan import (
    BACKWARD,
    COLUMNS,
    FAST,
    FORWARD,
    PLACE,
    ROWS,
    STATE,
    TILE,
    Layer,
    divide_up,
    geometry,
    how_many,
)


def means_size(columns: int) -> int:
    """Elements that the means of one representation take: so many that the next one's, too, can be
    read 16 bytes at a time."""
    return divide_up(columns, 4) * 4


class Split(NamedTuple):
    """How one of the two kernels takes the columns of all representations."""

    span: int  # columns of a part, whole blocks
    programs: int  # in all; of a representation, one after the other, the tiles of each part


class DependencePlan(NamedTuple):
    """Of representations of one dtype."""

    table: Tensor  # as plan.Plan.table
    rows_unit: bool  # as there, and
    paths: int
    means: int  # elements
    gram: Split
    product: Split
    divided: bool  # whether a tile of a Gram is a sum of parts


@functools.lru_cache(maxsize=256)
def dependence_plan(
    layers: tuple[Layer, ...],
    places: tuple[int, ...],
    itemsize: int,
    gram_block: int,
    product_block: int,
    at_once: int,
    device: torch.device,
) -> DependencePlan:
    """The plan of representations of one dtype, whose Grams are those of ``places``; kept, so that
    a step uploads nothing after the first. ``at_once``: programs that run at a time."""
    lie = geometry(layers, itemsize, False)
    columns = [record[COLUMNS] for record in lie.records]
    row_tiles = divide_up(lie.records[0][ROWS], TILE)
    tiles = row_tiles * (row_tiles + 1) // 2
    gram_span = _span(columns, tiles, gram_block, at_once)
    product_span = _span(columns, row_tiles, product_block, at_once)
    starts: tuple[list[int], list[int]] = ([], [])
    means = gram = product = 0
    for record, place in zip(lie.records, places, strict=True):
        d = record[COLUMNS]
        record[PLACE], record[STATE] = place, means
        # The Gram of no columns is 0, and somebody has to write that.
        record[FORWARD] = max(1, divide_up(d, gram_span))
        record[BACKWARD] = divide_up(d, product_span)
        starts[0].append(gram)
        starts[1].append(product)
        means += means_size(d)
        gram += tiles * record[FORWARD]
        product += row_tiles * record[BACKWARD]
    return DependencePlan(
        lie.table(starts, device),
        lie.rows_unit,
        how_many(lie.records, FAST),
        means,
        Split(gram_span, gram),
        Split(product_span, product),
        any(record[FORWARD] > 1 for record in lie.records),
    )


def _span(columns: Sequence[int], tiles: int, block: int, at_once: int) -> int:
    """Columns of a part: as few as let all parts run at once. Where one part of each representation
    is more than that, so few that every program running has one."""
    blocks = [divide_up(d, block) for d in columns]
    least = max(1, divide_up(tiles * sum(blocks), at_once))
    for each in range(least, 2 * least + 1):
        if tiles * sum(divide_up(count, each) for count in blocks) <= at_once:
            return each * block
    return least * block
