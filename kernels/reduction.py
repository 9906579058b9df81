"""The second stage of every sum over programs, within the same launch.

Each program stores what it has and draws a ticket. Whoever draws the last one finds
everything stored, and adds it up in a fixed order: one launch, the same bits every time,
no float atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK = 1024  # elements added at a time


@triton.jit
def draws_last_ticket(tickets, programs):
    """Whether all ``programs`` programs have stored; tickets () int32 was 0 before the first,
    and is again after the last."""
    tl.debug_barrier()  # all threads of this program have stored
    last = tl.atomic_add(tickets, 1, sem="acq_rel") == programs - 1
    if last:
        tl.store(tickets, 0)  # nobody else draws one any more: for the next launch
    return last


@triton.jit
def total(partials, count, stride, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """Sum of partials[i * stride], i < count, in an order that depends on count alone."""
    sums = tl.zeros([BLOCK], ACC)
    for first in range(0, count, BLOCK):
        i = first + tl.arange(0, BLOCK)
        # Past the first-level cache: other processors wrote them.
        sums += tl.load(
            partials + i.to(tl.int64) * stride, mask=i < count, other=0.0, cache_modifier=".cg"
        ).to(ACC)
    return tl.sum(sums)


@triton.jit
def totals(
    partials, count, SUMS: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Sums [PADDED] over i < count of partials (SUMS, count), in an order as above."""
    which = tl.arange(0, PADDED)[:, None]
    sums = tl.zeros([PADDED, BLOCK], ACC)
    for first in range(0, count, BLOCK):
        i = first + tl.arange(0, BLOCK)[None, :]
        mask = (which < SUMS) & (i < count)
        sums += tl.load(
            partials + which * count + i, mask=mask, other=0.0, cache_modifier=".cg"
        )  # [SUMS, count]
    return tl.sum(sums, 1)


@triton.jit
def added_up(tile, parts, tickets, part, count, FAN: tl.constexpr):
    """Sum of the tiles [ROWS, COLUMNS] of ``count`` programs, in an order that depends on count
    alone, and whether this program, ``part`` of them, is the one that has it.

    Of FAN programs the last to store its tile adds up theirs, of FAN such sums the last to store
    its own adds up those, and so on: no program reads the tiles of many, one after the other.
    Parts have room for count tiles; tickets (count,) are 0, and are again afterwards.
    """
    ROWS: tl.constexpr = tile.shape[0]
    COLUMNS: tl.constexpr = tile.shape[1]
    SIZE: tl.constexpr = ROWS * COLUMNS
    inside = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    left = count  # sums there are; 0 where another program goes on
    apart = SIZE  # of each other, in parts
    while left > 1:
        tl.store(parts + part * apart + inside, tile)
        group = part // FAN
        members = tl.minimum(left - group * FAN, FAN)
        if draws_last_ticket(tickets + group, members):
            tile = tl.zeros([ROWS, COLUMNS], tile.dtype)
            every = tl.full([ROWS, COLUMNS], True, tl.int1)
            for i in tl.static_range(FAN):
                # Past the first-level cache: other processors wrote them.
                each = parts + (group * FAN + i) * apart + inside
                # Not `i < members`: of a scalar Triton's interpreter makes no mask of bools.
                mask = tl.where(i < members, every, False)
                tile += tl.load(each, mask=mask, other=0.0, cache_modifier=".cg")
            left = (left + FAN - 1) // FAN
            tickets += left
            part = group
            apart *= FAN
        else:
            left = 0
    return tile, left == 1
