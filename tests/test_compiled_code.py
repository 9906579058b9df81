"""The machine code of the pairwise kernels, as `make gpu` would run them, without a GPU.

Read off what the installed Triton makes for sm_90: nothing spilled but what is listed, nothing
overwritten that tensor cores still read, 16 bytes a load where a layer is fast, and against
compiled_code.json how many blocks a processor holds and how long one K step of every main loop is.
After an intended change, or with another Triton:

    python tests/test_compiled_code.py [CASES]

writes the table anew, or the rows of those cases (a regular expression).
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
ROOT = HERE.parent
TABLE = HERE / "compiled_code.json"
TARGET = "sm_90"
ALL = "R18"
SPILLED = {"R18 kernels fp32 medium, backward_kernel": 8}  # bytes, in the dual form's loop
TOLERANCE = 0.03  # of the instructions of a loop: another ptxas may order them otherwise

Rows = dict[str, dict]


@functools.cache
def compiled(cases: str) -> Rows:
    """What Triton makes of the cases, by "case, kernel"."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    path = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    said = subprocess.run(
        [sys.executable, HERE / "offline_compile.py", TARGET, f"^({cases})"],
        env=environment, stdout=subprocess.PIPE, text=True, check=True,
    ).stdout  # fmt: skip
    rows = [json.loads(line) for line in said.splitlines()]
    return {f"{r['case']}, {r['kernel']}": r for r in rows}


@pytest.fixture
def rows() -> Rows:
    found = compiled(ALL)
    assert found
    return found


def test_nothing_is_spilled(rows: Rows) -> None:
    assert {name: row["spills"] for name, row in rows.items() if row["spills"]} == SPILLED


def test_tensor_cores_read_nothing_that_is_overwritten(rows: Rows) -> None:
    assert not {name: row["races"] for name, row in rows.items() if row["races"]}


def test_fast_layers_are_read_16_bytes_at_a_time_and_ahead(rows: Rows) -> None:
    """The layers of one feature map, which is fast: the loops over its columns, and rows of A."""
    fast = {name: row for name, row in rows.items() if "1 features" in name}
    assert fast
    for name, row in fast.items():
        assert row["loops"], name
        means = {"LDGSTS 32"} if "centred, backward" in name else set()  # one of each row
        for loop in row["loops"]:
            assert {"LDGSTS 128"} <= set(loop["loads"]) <= {"LDGSTS 128"} | means, (name, loop)


def test_the_code_is_what_the_table_says(rows: Rows) -> None:
    table = json.loads(TABLE.read_text())
    if table["triton"] != triton.__version__:
        pytest.skip(f"compiled_code.json is of Triton {table['triton']}, not {triton.__version__}")
    for name, row in rows.items():
        kept = table["kernels"][name]
        assert row["blocks"] >= kept["blocks"], name
        loops = _loops(row)
        assert len(loops) == len(kept["loops"]), (name, loops)
        for (length, barriers), (expected, allowed) in zip(loops, kept["loops"], strict=True):
            assert barriers <= allowed, (name, loops)
            assert length <= (1 + TOLERANCE) * expected, (name, loops)


def _loops(row: dict) -> list[list[int]]:
    """Instructions and barriers of each main loop."""
    return [[loop["instructions"], loop["barriers"]] for loop in row["loops"]]


def main(cases: str = ALL) -> None:
    """Write the table, a line for each kernel."""
    kernels = {
        name: {**{k: row[k] for k in ("registers", "spills", "shared", "blocks")},
               "loops": _loops(row)}
        for name, row in compiled(cases).items()
    }  # fmt: skip
    before = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    if before.get("triton") == triton.__version__ and cases != ALL:
        kernels = before["kernels"] | kernels
    lines = ",\n".join(f"  {json.dumps(n)}: {json.dumps(k)}" for n, k in kernels.items())
    TABLE.write_text(
        f'{{\n "triton": "{triton.__version__}",\n "target": "{TARGET}",\n'
        f' "kernels": {{\n{lines}\n }}\n}}\n'
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
