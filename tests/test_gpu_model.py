"""The model of how long kernels take on a GPU: its arithmetic, and that what is written down
(bench/gpu/code.json, docs/gpu.md) is what it says now.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.gpu import model
from bench.render import marked
from bench.rows import gpu_rows
from imcl_fast.kernels import plan

HERE = Path(__file__).parent
TOLERANCE = 0.03  # of instructions: another ptxas may order them otherwise


def test_the_page_has_the_table_of_the_model() -> None:
    """Else: python -m bench.gpu.model"""
    ((_, name, text, _),) = marked("gpu").findall(model.PAGE.read_text())
    assert (name, text) == ("model", model.table())


def test_no_floor_is_below_what_must_be_moved() -> None:
    measured = {row.name: row for row in gpu_rows()}
    for case in model.cases():
        least = 3 * measured[case.row].bytes / model.BANDWIDTH
        assert model.floor(case) >= least * (1 - 1e-9)


@pytest.mark.parametrize("case", model.cases(), ids=lambda case: case.row)
def test_programs_are_those_of_the_plan(case: model.Case) -> None:
    one = model.Loop(1)
    forward = {fast: model.Code([one] * 2, [one] * 2) for fast in (True, False)}
    backward = {fast: model.Code([one] * 4, [one] * 2) for fast in (True, False)}
    assert len(list(model.forward_programs(case, forward))) == case.plan.forward
    assert len(list(model.backward_programs(case, backward))) == case.plan.backward


def one_layer(*shape: int) -> model.Case:
    layer = plan.Layer(shape, torch.empty(shape, device="meta").stride(), True)
    return model.Case("", "", torch.bfloat16, True, False, (layer,))


def code(over_rows: list[tuple[int, int]], primal: list[tuple[int, int]]) -> dict:
    return {True: model.Code([model.Loop(*n) for n in over_rows], [model.Loop(*n) for n in primal])}


def test_loops_turn_as_often_as_the_kernels_do() -> None:
    primal, dual = one_layer(2, 130, 256), one_layer(2, 200, 72)
    loops = code([(1000, 7), (10, 0)], [(3, 100), (5, 200)])
    on, off = 100 + 4 * 3, 200 + 4 * 5  # 256 columns are 4 steps of 64
    assert list(model.forward_programs(primal, loops)) == 2 * [on, off, on, off, off, on]
    # 200 rows are 7 blocks of 32, 72 columns 2 tiles: 3 of M.
    assert list(model.forward_programs(dual, loops)) == 6 * [7 + 7 * (1000 + 2 * 10)]
    loops = code([(1000, 7), (10, 0), (2000, 8), (20, 0)], [(3, 100), (7, 101), (5, 102)])
    # 3 steps, and 3 tiles of the diagonal; 3 by 4 tiles of the gradient.
    assert list(model.backward_programs(primal, loops)) == 24 * [100 + 3 * 3 + 3 * 5]
    each = 7 + 2 * (1000 + 3 * 10) + 2 * (2000 + 3 * 20)  # 72 columns are 3 blocks of 32
    assert list(model.backward_programs(dual, loops)) == 14 * [each]


def test_other_loops_are_an_error() -> None:
    of = one_layer(2, 130, 256).plan
    loop = {"form": "primal", "depth": 0, "instructions": 3, "outside": 9}
    assert model.codes([loop, loop], of, True) == code([], [(3, 9), (3, 9)])
    for loops in ([loop], [loop, loop, loop], [{**loop, "form": "over_rows"}, loop]):
        with pytest.raises(ValueError, match="loops"):
            model.codes(loops, of, True)


def test_makespan() -> None:
    assert model.makespan([3, 1, 1, 1], 2) == 3
    assert model.makespan([1, 1, 1, 3], 2) == 4  # the longest last
    assert model.makespan([2] * 5, 2) == 6


def _numbers(value: object, name: str = "") -> dict[str, float]:
    """All numbers in it, by where they are."""
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = ((str(i), v) for i, v in enumerate(value))
    else:
        return {name: value} if isinstance(value, int) else {}
    return {k: v for key, each in items for k, v in _numbers(each, f"{name} {key}").items()}


@pytest.mark.slow
def test_the_code_is_what_triton_makes() -> None:
    """Else: python tests/gpu_code.py"""
    triton = pytest.importorskip("triton")
    kept = json.loads(model.CODE.read_text())
    if kept["triton"] != triton.__version__:
        pytest.skip(f"code.json is of Triton {kept['triton']}, not {triton.__version__}")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), str(HERE)])
    program = "import json, gpu_code; print(json.dumps(gpu_code.compiled()))"
    said = subprocess.run([sys.executable, "-c", program], env=environment, text=True,
                          stdout=subprocess.PIPE, check=True).stdout  # fmt: skip
    found, expected = _numbers(json.loads(said)), _numbers(kept["kernels"])
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value == pytest.approx(expected[name], rel=TOLERANCE, abs=3), name
