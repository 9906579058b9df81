"""What the kernels' machine code is made of, for the model of bench/gpu/model.py.

    python tests/gpu_code.py

compiles what `make gpu` measures for sm_90 (offline_compile.py) and writes bench/gpu/code.json:
of every kernel how many blocks a processor holds, and its loops in the order of the code. Of each
loop it has the form of layers that it is for, by the lines that the compiler says it comes from;
how many loops it is in; the instructions that are in none of its inner loops; and those outside
of all loops on the longest way through the code that leads through it.
"""

from __future__ import annotations

import ast
import collections
import contextlib
import functools
import itertools
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import offline_compile
import sass
import triton

from bench.gpu import consistency_model
from bench.gpu.model import CODE
from imcl_fast.kernels import config, launch, pairwise
from imcl_fast.kernels.constants import plain

KERNELS = Path(pairwise.__file__).parent
CASES = [
    *(f"R18 4 features {dtype} {lies}{centred}" for dtype in ("bf16", "fp32")
      for lies in ("NHWC", "NCHW") for centred in ("", " centred")),
    *(f"R18 kernels {dtype}" for dtype in ("bf16", "fp32")),
]  # fmt: skip
# Functions of layers over rows (dual) only, and of the others only.
FORMS = {
    "over_rows": {"_row_norms", "_whole_rows", "_over_rows", "_product", "_form"},
    "primal": {"_gram", "_primal", "_shares"},
}
# Functions of the consistency's loops over labels, over what programs leave, and over samples.
OF_LABELS, OF_PARTIALS = {"add_weights", "read_samples", "class_weight"}, {"totals", "finish"}

Line = tuple[str, int] | None  # file and number


def disassembled(cubin: bytes) -> tuple[list[tuple[str, Line]], dict[str, int]]:
    """Instructions with their lines, and where labels stand among them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [sass.TOOLS / "nvdisasm", "-g", "-c", file.name],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
    code: list[tuple[str, Line]] = []
    labels: dict[str, int] = {}
    line: Line = None
    for each in text.splitlines():
        if found := re.match(r'\s*//## File "(?:.*/)?(.*)", line (\d+)', each):
            line = found[1], int(found[2])
        elif found := re.match(r"(\.L_\w+):", each):
            labels[found[1]] = len(code)
        elif found := re.match(r"\s*/\*[0-9a-f]{4,6}\*/\s+(.*?);", each):
            code.append((found[1].strip(), line))
    return code, labels


@functools.cache
def functions(file: str) -> list[tuple[int, int, str]]:
    path = KERNELS / file
    if not path.exists():
        return []
    return [(f.lineno, f.end_lineno or f.lineno, f.name)
            for f in ast.parse(path.read_text()).body if isinstance(f, ast.FunctionDef)]


def function_of(line: Line) -> str | None:
    if line is None:
        return None
    return next((name for first, last, name in functions(line[0]) if first <= line[1] <= last),
                None)


class Block(NamedTuple):
    """Instructions that run one after the other, and the blocks that may follow."""

    first: int
    end: int
    followers: list[int]


def blocks_of(code: list[tuple[str, Line]], labels: dict[str, int]) -> list[Block]:
    jumps = {i: labels[found[1]] for i, (text, _) in enumerate(code)
             if (found := re.search(r"\bBRA\b.*`\((\.L_\w+)\)", text))}  # fmt: skip
    ends = {i for i, (text, _) in enumerate(code) if re.match(r"(EXIT|RET)\b", text)}
    starts = sorted({0, len(code), *labels.values(), *(i + 1 for i in (*jumps, *ends))})
    number = {start: i for i, start in enumerate(starts)}
    found = []
    for first, end in itertools.pairwise(starts):
        last = end - 1
        followers = [number[jumps[last]]] if last in jumps else []
        always = last in ends or re.match(r"BRA `", code[last][0])  # BRA.DIV is on a condition
        if not always and end < len(code):
            followers.append(number[end])
        found.append(Block(first, end, followers))
    return found


def loops_of(blocks: list[Block]) -> list[set[int]]:
    """The blocks of every loop, in the order of where they begin: a jump back to what every way
    to it leads through, and whatever leads to that jump without it."""
    every = set(range(len(blocks)))
    before: dict[int, set[int]] = {i: set() for i in every}
    for i, block in enumerate(blocks):
        for follower in block.followers:
            before[follower].add(i)
    dominators = {i: {0} if i == 0 else every for i in every}
    changed = True
    while changed:
        changed = False
        for i in range(1, len(blocks)):
            ways = [dominators[b] for b in before[i]]
            now = {i} | (set.intersection(*ways) if ways else set())
            changed |= now != dominators[i]
            dominators[i] = now
    loops: dict[int, set[int]] = {}
    for i, block in enumerate(blocks):
        for head in block.followers:
            if head == i and block.end == block.first + 1:
                continue  # a program that has ended jumps to itself
            if head in dominators[i]:
                body, left = loops.setdefault(head, {head}), [i]
                while left:
                    each = left.pop()
                    if each not in body:
                        body.add(each)
                        left += before[each]
    return [loops[head] for head in sorted(loops)]


def made_of(cubin: bytes, forms: Mapping[str, set[str]]) -> list[dict[str, Any]]:
    """The loops, as the module's docstring has them."""
    code, labels = disassembled(cubin)
    blocks = blocks_of(code, labels)
    loops = loops_of(blocks)
    names = [collections.Counter(function_of(line) for _, line in code[b.first : b.end])
             for b in blocks]  # fmt: skip

    outside = ways_through(blocks, loops)
    rows = []
    for loop in loops:
        votes = {form: sum(names[i][name] for i in loop for name in functions)
                 for form, functions in forms.items()}  # fmt: skip
        form = max(votes, key=lambda each: votes[each])
        if not votes[form]:
            continue
        own = loop.difference(*(other for other in loops if other < loop))
        depth = sum(loop < other for other in loops)
        instructions = sum(blocks[i].end - blocks[i].first for i in own)
        rows.append({"form": form, "depth": depth, "instructions": instructions,
                     "outside": 0 if depth else outside[min(loop)]})  # fmt: skip
    for form, of in forms.items():
        ways = [outside[i] for i, name in enumerate(names) if any(name[each] for each in of)]
        if ways and all(row["form"] != form for row in rows):
            without_loops = {"form": form, "depth": 0, "instructions": 0, "outside": max(ways)}
            rows.insert(0, without_loops)
    return rows


def ways_through(blocks: list[Block], loops: list[set[int]]) -> list[int]:
    """Instructions outside of loops of the longest way through the code that leads through a
    block: what it excludes (the code of other layers, say) isn't counted."""
    inside = [any(i in loop for loop in loops) for i in range(len(blocks))]
    head = list(range(len(blocks)))  # a loop is a single step, at its head
    for loop in sorted(loops, key=len):
        for i in loop:
            head[i] = min(loop)
    followers: dict[int, set[int]] = {i: set() for i in head}
    for i, block in enumerate(blocks):
        followers[head[i]] |= {head[f] for f in block.followers} - {head[i]}

    def longest(next_of: dict[int, set[int]]) -> dict[int, int]:
        """From each block on, itself left out."""
        found: dict[int, int] = {}

        def visit(i: int) -> int:
            if i not in found:
                found[i] = max((own(f) + visit(f) for f in next_of[i]), default=0)
            return found[i]

        for i in next_of:
            visit(i)
        return found

    def own(i: int) -> int:
        return 0 if inside[i] else blocks[i].end - blocks[i].first

    before: dict[int, set[int]] = {i: set() for i in followers}
    for i, all_of_it in followers.items():
        for f in all_of_it:
            before[f].add(i)
    onward, back = longest(followers), longest(before)
    return [own(h) + onward[h] + back[h] for h in head]


def described(kernel, args, options, forms: Mapping[str, set[str]]) -> dict[str, Any]:
    """What code.json has of a kernel that is launched so."""
    wanted = dict(options)
    build = {k: wanted.pop(k) for k in ("num_warps", "num_stages", "maxnreg") if k in wanted}
    made = triton.compile(offline_compile.source(kernel, args, wanted),
                          target=offline_compile.TARGETS["sm_90"], options=build)
    registers = offline_compile.resources(made.asm["ptx"])["registers"]
    blocks = offline_compile.blocks("sm_90", registers, made.metadata.shared, build["num_warps"])
    return {"registers": registers, "blocks": blocks, "warps": build["num_warps"],
            "loops": made_of(made.asm["cubin"], forms)}  # fmt: skip


@contextlib.contextmanager
def caught() -> Iterator[list[tuple[launch.Launch, tuple]]]:
    """Launches with their arguments, in place of launching."""
    launches: list[tuple[launch.Launch, tuple]] = []
    before = launch.Launch.__call__
    launch.Launch.__call__ = lambda self, *args: launches.append((self, args))
    try:
        yield launches
    finally:
        launch.Launch.__call__ = before


def compiled() -> dict[str, dict[str, Any]]:
    config.processors_of = lambda device: 132
    found = {}
    calls = dict(offline_compile.benched())
    for case in CASES:
        with caught() as launches:
            calls[case]()
        for launched, args in launches:
            kernel = launched.kernel
            found[f"{case}, {kernel.__name__}"] = described(kernel, args, launched.options, FORMS)
    return found | of_consistencies()


def of_consistencies() -> dict[str, dict[str, Any]]:
    """The same of the consistency, and how it is planned."""
    every = {name for file in ("consistency_kernel.py", "consistency_tiles.py")
             for _, _, name in functions(file)}  # fmt: skip
    forms = {"weights": OF_LABELS, "finish": OF_PARTIALS,
             "samples": every - OF_LABELS - OF_PARTIALS}  # fmt: skip
    found = {}
    for case in consistency_model.cases():
        with caught() as launches:
            offline_compile.consistency_of(*case.sizes, case.row.dtype)
        ((launched, args),) = launches
        made_for = launched.options["C"]
        planned = {"programs": launched.programs, "samples": plain(made_for.samples),
                   "block": plain(made_for.block)}  # fmt: skip
        found[case.code] = planned | described(launched.kernel, args, launched.options, forms)
    return found


def main() -> None:
    lines = ",\n".join(f"  {json.dumps(n)}: {json.dumps(k)}" for n, k in compiled().items())
    CODE.write_text(f'{{\n "triton": "{triton.__version__}",\n "target": "sm_90",\n'
                    f' "kernels": {{\n{lines}\n }}\n}}\n')


if __name__ == "__main__":
    main()
