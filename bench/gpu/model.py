"""How long the kernels should take on an H100, worked out from their machine code.

    python -m bench.gpu.model

writes the table of docs/gpu.md anew, where it is said what is assumed. Nothing is compiled or
measured: code.json has what the compiler made (tests/gpu_code.py), plan.py the programs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from imcl_fast.kernels import config, plan

from .. import render
from ..rows import gpu_rows
from . import consistency_model, machine, stored
from .machine import BANDWIDTH, BFLOAT16, CLOCK, FLOAT32, SPLIT_TF32, Launch

CODE = Path(__file__).with_name("code.json")
PAGE = Path(__file__).parents[2] / "docs/gpu.md"

NO_DEVICE = torch.device("cpu")  # planned for as a Hopper
GATHERED = 16  # columns at a time, and in the backward rows: kernels/pairwise_forward.py


class Case(NamedTuple):
    row: str
    code: str  # of code.json
    dtype: torch.dtype
    batched: bool
    center: bool
    layers: tuple[plan.Layer, ...]

    @property
    def plan(self) -> plan.Plan:
        return plan.plan(self.layers, self.dtype.itemsize, 0, self.center, self.batched, NO_DEVICE)

    @property
    def config(self) -> config.PairwiseConfig:
        on_tensor_cores = self.dtype != torch.float32
        return config.pairwise_config(
            self.dtype, on_tensor_cores, self.center, self.plan, NO_DEVICE
        )


def cases() -> list[Case]:
    """The similarities of `make gpu`, in its order."""
    found = []
    for row in gpu_rows():
        if row.operation in ("consistency", "dependence"):  # the latter's loops nobody reads
            continue
        short = {torch.bfloat16: "bf16", torch.float32: "fp32"}[row.dtype]
        batched = row.operation == "representation"
        code = f"R18 kernels {short}"
        if batched:
            lies = "NHWC" if row.channels_last else "NCHW"
            code = f"R18 4 features {short} {lies}{' centred' if row.center else ''}"
        layout = torch.channels_last if row.channels_last else torch.contiguous_format
        layers = _layers(row.shapes, layout)
        found.append(Case(row.name, code, row.dtype, batched, row.center, layers))
    return found


def _layers(shapes: Sequence[Sequence[int]], layout: torch.memory_format) -> tuple:
    tensors = [torch.empty(s, device="meta").contiguous(memory_format=layout) for s in shapes]
    return tuple(plan.Layer(tuple(t.shape), t.stride(), True) for t in tensors)


class Matrices(NamedTuple):
    """Those of one layer."""

    batch: int
    n: int
    d: int
    over_rows: bool
    fast: bool


def matrices(case: Case) -> list[Matrices]:
    table, count = case.plan.table.tolist(), len(case.layers)
    records = [table[2 * count + i * plan.FIELDS :][: plan.FIELDS] for i in range(count)]
    return [Matrices(r[plan.BATCH], r[plan.ROWS], r[plan.COLUMNS], bool(r[plan.OVER_ROWS]),
                     bool(r[plan.FAST])) for r in records]  # fmt: skip


# ---- the code ----


class Loop(NamedTuple):
    """Instructions of its own, and of the way to it and on from it."""

    instructions: int
    outside: int = 0


class Code(NamedTuple):
    """The loops of one path through a kernel, fast or gathered."""

    over_rows: list[Loop]  # narrow: one; or an outer loop and the one in it, backward twice
    primal: list[Loop]


def codes(loops: Sequence[dict[str, Any]], of: plan.Plan, forward: bool) -> dict[bool, Code]:
    """The loops by path. They stand in the order of the source; others would be an error."""
    left = list(loops)

    def take(form: str, depth: int) -> Loop:
        if not left or (left[0]["form"], left[0]["depth"]) != (form, depth):
            raise ValueError(f"expected a loop of {form}, {depth} deep, and found {left[:1]}: "
                             "the kernels have other loops than bench/gpu/model.py knows of")
        loop = left.pop(0)
        return Loop(loop["instructions"], loop["outside"])

    found = {}
    loopless = not forward and of.narrow and of.forms != plan.NONE
    once = take("over_rows", 0) if loopless else None
    for fast in (True, False):
        if of.paths == (plan.NONE if fast else plan.EVERY):
            continue
        over_rows, primal = [], []
        if of.forms != plan.NONE and of.narrow:
            over_rows.append(once or take("over_rows", 0))
        elif of.forms != plan.NONE:
            for _ in range(1 if forward else 2):
                over_rows += [take("over_rows", 0), take("over_rows", 1)]
        if of.forms != plan.EVERY:
            primal.append(take("primal", 0))
            if forward and fast:
                primal.append(take("primal", 0))  # beside the diagonal
            while not forward and left and left[0]["form"] == "primal":
                primal.append(take("primal", 0))  # of the diagonal, and what is left of it
        found[fast] = Code(over_rows, primal)
    if left:
        raise ValueError(f"there are loops that bench/gpu/model.py doesn't know: {left}")
    return found


def forward_programs(case: Case, code: dict[bool, Code]) -> Iterator[int]:
    """Instructions of every program, in their order."""
    up = math.ceil
    for m in matrices(case):
        own, tile = code[m.fast], plan.TILE
        if m.over_rows:
            tiles = up(m.d / tile)
            outer, inner = own.over_rows if len(own.over_rows) > 1 else (*own.over_rows, Loop(0))
            turns = up(m.n / plan.ROW_BLOCK)
            each = outer.outside + turns * (outer.instructions + tiles * inner.instructions)
            yield from m.batch * (tiles * (tiles + 1) // 2) * [each]
            continue
        steps = up(m.d / (case.config.forward.depth if m.fast else GATHERED))
        on, off = (loop.outside + steps * loop.instructions
                   for loop in (own.primal[0], own.primal[-1]))  # fmt: skip
        yield from m.batch * [on if i == j else off
                              for j in range(up(m.n / tile)) for i in range(j + 1)]  # fmt: skip


def backward_programs(case: Case, code: dict[bool, Code]) -> Iterator[int]:
    up = math.ceil
    for m in matrices(case):
        own, row_tiles = code[m.fast], up(m.n / plan.TILE)
        if m.over_rows and case.plan.narrow:
            yield from m.batch * row_tiles * [own.over_rows[0].outside]
            continue
        if m.over_rows:
            turns = up(m.d / plan.ROW_BLOCK)
            passes = zip(own.over_rows[::2], own.over_rows[1::2], strict=True)
            each = own.over_rows[0].outside + sum(
                up(m.d / plan.TILE) * (outer.instructions + turns * inner.instructions)
                for outer, inner in passes
            )
            yield from m.batch * up(m.n / plan.ROW_BLOCK) * [each]
            continue
        steps = up(m.n / (case.config.backward.depth if m.fast else GATHERED))
        product, diagonal = own.primal[0], own.primal[-1]
        each = (product.outside + steps * product.instructions
                + row_tiles * diagonal.instructions)  # fmt: skip
        yield from m.batch * row_tiles * up(m.d / plan.TILE) * [each]


# ---- the time ----


def launch(case: Case, forward: bool, kernels: dict[str, Any]) -> Launch:
    way = "forward" if forward else "backward"
    kernel, of = kernels[f"{case.code}, {way}_kernel"], case.plan
    code = codes(kernel["loops"], of, forward)
    counts = list((forward_programs if forward else backward_programs)(case, code))
    elements = sum(m.batch * m.n * m.d for m in matrices(case))
    moved = (1 if forward else 2) * elements * case.dtype.itemsize + 4 * of.state
    return machine.launch(counts, moved, kernel)


def floor(case: Case) -> float:
    """Seconds for a read each way and a write, or for the products if those take longer."""
    moved = 3 * case.dtype.itemsize * sum(m.batch * m.n * m.d for m in matrices(case))
    products = 0.0
    for m in matrices(case):
        # Half of a symmetric product forward, a whole one backward.
        count = 3 * m.batch * m.n * m.d * (m.d if m.over_rows else m.n)
        half = SPLIT_TF32 if m.over_rows else BFLOAT16
        products += count / (half if case.dtype == torch.bfloat16 else FLOAT32)
    return max(moved / BANDWIDTH, products)


def predicted() -> list[tuple[str, Launch, Launch, float]]:
    """Name, forward, backward and floor of every row of `make gpu` but the dependence, and of one
    beyond."""
    kernels = json.loads(CODE.read_text())["kernels"]
    found = [(c.row, launch(c, True, kernels), launch(c, False, kernels), floor(c))
             for c in cases()]  # fmt: skip
    return found + [
        (c.name, c.forward(kernels[c.code]), c.backward, c.floor) for c in consistency_model.cases()
    ]


def table() -> str:
    lines = []
    for row, *ways, least in predicted():
        total = sum(way.seconds for way in ways)
        for name, way in zip(("forward", "backward"), ways, strict=True):
            first = name == "forward"
            made = [str(way.programs), f"{way.waves:.1f}", str(way.warps)]
            lines.append([
                row if first else "", name, *(made if way.programs else [""] * 3),
                f"{way.bytes / 1e6:.1f}", f"{way.slots / 1e6:.1f} M" if way.programs else "",
                f"{1e6 * way.bytes / BANDWIDTH:.0f}",
                f"{1e6 * way.cycles / CLOCK:.0f}" if way.programs else "",
                f"{1e6 * total:.0f}" if first else "",
                f"{1e6 * least:.0f}" if first else "",
            ])  # fmt: skip
    head = ["row", "", "programs", "waves", "warps a processor", "MB", "instructions",
            "us by bytes", "us by instructions", "us", "floor"]  # fmt: skip
    return render.table(head, lines)


if __name__ == "__main__":
    render.fill_places(PAGE, "gpu", {"model": table, "run": stored.tables})
