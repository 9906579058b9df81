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

from bench.gpu import consistency_model, machine, model, stored
from bench.render import marked
from bench.rows import consistency, gpu_rows
from imcl_fast.kernels import plan

HERE = Path(__file__).parent
TOLERANCE = 0.03  # of instructions: another ptxas may order them otherwise


def test_the_page_has_the_tables_of_the_model_and_of_the_latest_run() -> None:
    """Else: python -m bench.gpu.model"""
    places = {name: text for _, name, text, _ in marked("gpu").findall(model.PAGE.read_text())}
    assert places == {"model": model.table(), "run": stored.tables()}


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


def of_consistency(*chunks: int) -> dict:
    forms = ("weights", 0, 7), ("samples", 0, 100), *(("samples", 1, n) for n in chunks)
    loops = [{"form": form, "depth": depth, "instructions": n, "outside": 50 * (form == "samples")}
             for form, depth, n in (*forms, ("finish", 0, 9))]  # fmt: skip
    return {"blocks": 2, "warps": 4, "programs": 4, "samples": 2, "loops": loops,
            "block": 256 if chunks else 1024}  # fmt: skip


def test_the_consistency_turns_as_often_as_its_kernel_does() -> None:
    case = consistency_model.Case(consistency(3, 10, 1000, dtype=torch.bfloat16))
    # 10 samples, 2 at a time: 4 programs take 8, the first the rest. 1,000 classes are 4 chunks.
    for chunks, each in (((), 100), ((10, 20), 100 + 4 * 30)):
        expected = [50 + 7 + 2 * each, *3 * [50 + 7 + each]]
        expected[-1] += 9
        found = case.forward(of_consistency(*chunks))
        assert case.programs(of_consistency(*chunks)) == expected
        assert (found.programs, found.warps, found.slots) == (4, 8, 4 * sum(expected))
        assert found.bytes == 2 * 3 * 10 * 1000 * 2  # the second read is from the cache


def test_what_the_cache_does_not_hold_is_read_twice() -> None:
    case = consistency_model.Case(consistency(8, 40, 500_000, dtype=torch.bfloat16))
    once = 8 * 40 * 500_000 * 2
    for programs, reads in ((4, 1), (40, 2)):  # 8 MB a sample
        kernel = {**of_consistency(10, 20), "programs": programs, "samples": 1}
        assert case.forward(kernel).bytes == (reads + 1) * once
    assert case.forward({**kernel, "block": 500_000}).bytes == 2 * once


def test_a_small_gradient_is_read_and_written_once_more() -> None:
    """A large one isn't: kernels/scaling.py."""
    for classes, moved in ((400_000, 2), (500_000, 0)):
        case = consistency_model.Case(consistency(4, 10, classes, dtype=torch.bfloat16))
        assert case.backward.bytes == moved * 4 * 10 * classes * 2 and not case.backward.programs


def test_other_loops_of_the_consistency_are_an_error() -> None:
    loops = of_consistency(10, 20)["loops"]
    for wrong in (loops[1:], loops[:-1], [*loops[:2], *loops[3:]]):
        with pytest.raises(ValueError, match="other loops"):
            consistency_model.loops_of(wrong)


def test_makespan() -> None:
    assert machine.makespan([3, 1, 1, 1], 2) == 3
    assert machine.makespan([1, 1, 1, 3], 2) == 4  # the longest last
    assert machine.makespan([2] * 5, 2) == 6


def _numbers(value: object, name: str = "") -> dict[str, float]:
    """All numbers in it, by where they are."""
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = ((str(i), v) for i, v in enumerate(value))
    else:
        return {name: value} if isinstance(value, int) else {}
    return {k: v for key, each in items for k, v in _numbers(each, f"{name} {key}").items()}


def test_the_functions_that_loops_are_known_by_are_there() -> None:
    """Loops are told apart by the names of the functions whose lines they are of."""
    pytest.importorskip("triton")
    import gpu_code

    text = "\n".join(path.read_text() for path in (HERE.parent / "kernels").glob("*.py"))
    for names in (*gpu_code.FORMS.values(), gpu_code.OF_LABELS, gpu_code.OF_PARTIALS):
        assert not {name for name in names if f"\ndef {name}(" not in text}


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
