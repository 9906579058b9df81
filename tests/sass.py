"""What machine code of an NVIDIA GPU is made of: the loops of a cubin, and their instructions."""

from __future__ import annotations

import collections
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
_PRODUCTS = re.compile(r"HMMA|HGMMA|UTCHMMA|UTCQMMA|FFMA")
_WIDTH = re.compile(r"\.(?:[US]?(8|16|64|128))\b")


class Loop(NamedTuple):
    instructions: int
    barriers: int
    products: int  # instructions on tensor cores, or fused multiply-adds
    loads: dict[str, int]  # from global memory, by kind: "LDGSTS 128", "LDG 32"


def disassembled(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [TOOLS / "cuobjdump", "-sass", file.name], capture_output=True, text=True, check=True
        ).stdout


def inner_loops(sass: str, least: int = 20) -> list[Loop]:
    """Loops of at least so many instructions that hold no such loop, in their order."""
    code = [
        (int(m[1], 16), m[2].strip())
        for m in re.finditer(r"/\*([0-9a-f]{4,6})\*/\s+(.*?);", sass)
    ]
    place = {address: i for i, (address, _) in enumerate(code)}
    found = []
    for i, (address, line) in enumerate(code):
        jump = re.search(r"\bBRA(?:\.\w+)*\s+(?:[^,]*,\s*)?(0x[0-9a-f]+)", line)
        if jump:
            target = int(jump[1], 16)
            if target < address and target in place and i - place[target] >= least:
                found.append((place[target], i))
    inner = [
        one for one in found
        if not any(o != one and one[0] <= o[0] and o[1] <= one[1] for o in found)
    ]  # fmt: skip
    return [_loop([line for _, line in code[a : b + 1]]) for a, b in sorted(inner)]


def main_loops(sass: str) -> list[Loop]:
    """The inner loops that multiply: one K step each."""
    return [loop for loop in inner_loops(sass) if loop.products]


def _loop(lines: list[str]) -> Loop:
    loads: collections.Counter[str] = collections.Counter()
    barriers = products = 0
    for line in lines:
        operation = re.sub(r"^@!?U?P\w+\s+", "", line).split()[0]
        name = operation.split(".")[0]
        if name in ("LDG", "LDGSTS"):
            width = _WIDTH.search(operation)
            loads[f"{name} {width[1] if width else 32}"] += 1
        barriers += name == "BAR"
        products += _PRODUCTS.fullmatch(name) is not None
    return Loop(len(lines), barriers, products, dict(loads))
