"""Whether Hopper's tensor cores still read what a kernel already overwrites, read off its TTGIR.

wgmma reads shared memory after it was issued; only a wait says that it has finished, and only to
the warp group (four warps) that waits. Two ways in which what Triton makes of a correct kernel can
go wrong, found when a first GPU gave wrong gradients:

- A load that feeds a product and other code too gets as many buffers as loads are ahead, not one
  more (triton-lang/triton#6691): the next load goes where the product of this step still reads.
- With eight warps a program has two warp groups, and neither waits for the other's products
  (triton-lang/triton#11047, mended after 3.7).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

_VIEWS = ("memdesc_trans", "memdesc_subslice", "memdesc_reinterpret", "memdesc_index")


def races(ttgir: str) -> list[str]:
    """What is wrong, in words."""
    lines = ttgir.splitlines()
    products = any("ttng.warp_group_dot " in line for line in lines)
    warps = int(_only(r'"ttg.num-warps" = (\d+)', ttgir))
    found = [f"wgmma in {warps} warps"] if products and warps > 4 else []
    for first, last in _innermost_loops(lines):
        found += _of_loop(lines, first, last)
    return found


class _Ring(NamedTuple):
    """Buffers that the steps of a loop take in turn."""

    line: int  # where they are allocated
    name: str
    buffers: int


def _of_loop(lines: list[str], first: int, last: int) -> list[str]:
    """Plays the loop: a product is running until a wait says otherwise, and reads the buffer of
    its step until then."""
    found: dict[_Ring, str] = {}
    running: list[tuple[_Ring, int, int]] = []  # what is read, at which step, by which product
    products = 0
    for step in range(4):
        for i in range(first, last):
            line = lines[i]
            if "ttng.warp_group_dot " in line:
                products += 1
                operands = line.split("ttng.warp_group_dot ")[1].split(":")[0]
                for operand in _names(operands):
                    if ring := _ring(operand, lines, i):
                        running.append((ring, step, products))
            elif wait := re.search(r"warp_group_dot_wait .*pendings = (\d+)", line):
                oldest = products - int(wait[1])
                running = [read for read in running if read[2] > oldest]
            elif ring := _loaded(lines, i):
                to = step + _ahead(ring, lines, first)
                for read, of, _ in running:
                    if read == ring and (to - of) % ring.buffers == 0:
                        found.setdefault(
                            ring,
                            f"{ring.name}: of {ring.buffers} buffers step {step} loads what step "
                            f"{to} takes into the one that the product of step {of} reads",
                        )
    return list(found.values())


def _innermost_loops(lines: list[str]) -> Iterator[tuple[int, int]]:
    """First lines within, and the ones that close them."""
    for i, line in enumerate(lines):
        if "scf.for " not in line:
            continue
        end = next(j for j in range(i + 1, len(lines)) if _depth(lines[j]) == _depth(line))
        if not any("scf.for " in inner for inner in lines[i + 1 : end]):
            yield i + 1, end


def _ahead(ring: _Ring, lines: list[str], loop: int) -> int:
    """Loads into a ring before its loop: so many steps are they ahead."""
    return sum(_loaded(lines, i) == ring for i in range(ring.line, loop))


def _loaded(lines: list[str], i: int) -> _Ring | None:
    """The buffers into one of which that line loads, if it does."""
    _, load, operands = lines[i].partition("ttg.async_copy_global_to_local")
    return _ring(_names(operands)[1], lines, i) if load else None


def _ring(name: str, lines: list[str], use: int) -> _Ring | None:
    """The buffers of which a view, used in that line, is one."""
    for i in range(use - 1, -1, -1):  # names come again in other regions: the last one counts
        text = lines[i].lstrip()
        if not text.startswith((f"{name} =", f"{name}:")):
            continue
        if "ttg.local_alloc : ()" in text:
            return _Ring(i, name, int(_only(r"memdesc<(\d+)x", text)))
        if any(view in text for view in _VIEWS):
            return _ring(_names(text.split("=", 1)[1])[0], lines, i)
        return None
    return None


def _names(text: str) -> list[str]:
    return re.findall(r"%[\w$-]+", text)


def _only(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    assert match, (pattern, text[:200])
    return match[1]


def _depth(line: str) -> int:
    return len(line) - len(line.lstrip())
