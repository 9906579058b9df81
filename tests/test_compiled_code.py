"""The machine code of the pairwise kernels, as `make gpu` would run them, without a GPU.

Read off what Triton makes for each target: nothing spilled, 16 bytes a load where a layer is
fast, and against compiled_code.json how many blocks a processor holds and how long one K step
of every main loop is. After an intended change:

    python tests/test_compiled_code.py

writes the table anew. ``make test`` compiles a few cases with the Triton that is installed;
with IMCL_FAST_TEST_ALL=1 all of them, for every target, with the oldest Triton too.
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

HERE = Path(__file__).parent
ROOT = HERE.parent
TABLE = HERE / "compiled_code.json"
OLDEST = "3.6.0"
TARGETS = ("sm_80", "sm_90", "sm_100")
FEW = "R18 1 features bf16 NHWC$|R18 4 features fp32 NCHW centred$|R18 kernels bf16$"
EVERY = os.environ.get("IMCL_FAST_TEST_ALL") == "1"
TOLERANCE = 0.03  # of the instructions of a loop: another compiler may order them otherwise

Rows = dict[str, dict]


def compiled(version: str, targets: tuple[str, ...], cases: str) -> Rows:
    """What a Triton makes of the cases, by "case, kernel, target"."""
    path = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    if version != triton.__version__:
        path.insert(0, str(older(version)))
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    said = subprocess.run(
        [sys.executable, HERE / "offline_compile.py", ",".join(targets), f"^({cases})"],
        env=environment, stdout=subprocess.PIPE, text=True, check=True,
    ).stdout  # fmt: skip
    rows = [json.loads(line) for line in said.splitlines()]
    return {f"{r['case']}, {r['kernel']}, {r['target']}": r for r in rows}


def older(version: str) -> Path:
    """The folder of another Triton: build/triton-<version>, fetched if it isn't there."""
    folder = ROOT / f"build/triton-{version}"
    if not folder.exists():
        done = subprocess.run(
            [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target",
             f"{folder}.part", f"triton=={version}"],
            capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["pip says nothing"])[-1]
            raise LookupError(f"Triton {version} can't be fetched: {last}")
        os.rename(f"{folder}.part", folder)
    return folder


@functools.cache
def rows_of(version: str) -> Rows:
    try:
        return compiled(version, TARGETS if EVERY else ("sm_90",), "R18" if EVERY else FEW)
    except LookupError as reason:
        pytest.skip(str(reason))


def versions() -> list[str]:
    return sorted({triton.__version__, OLDEST}) if EVERY else [triton.__version__]


each_version = pytest.mark.parametrize("version", versions())


@each_version
def test_nothing_is_spilled(version: str) -> None:
    rows = rows_of(version)
    assert rows
    assert not {name: row["spills"] for name, row in rows.items() if row["spills"]}


@each_version
def test_fast_layers_are_read_16_bytes_at_a_time_and_ahead(version: str) -> None:
    """The layers of one feature map, which is fast: the loops over its columns, and rows of A."""
    rows = {name: row for name, row in rows_of(version).items() if "1 features" in name}
    assert rows
    for name, row in rows.items():
        assert row["loops"], name
        for loop in row["loops"]:
            assert set(loop["loads"]) == {"LDGSTS 128"}, (name, loop)


@each_version
def test_the_code_is_what_the_table_says(version: str) -> None:
    table = json.loads(TABLE.read_text()).get(version) if TABLE.exists() else None
    if table is None:
        pytest.skip(f"compiled_code.json says nothing of Triton {version}: see above to write it")
    for name, row in rows_of(version).items():
        kept = table[name]
        assert row["blocks"] >= kept["blocks"], name
        loops = [[loop["instructions"], loop["barriers"]] for loop in row["loops"]]
        assert len(loops) == len(kept["loops"]), (name, loops)
        for (length, barriers), (expected, allowed) in zip(loops, kept["loops"], strict=True):
            assert barriers <= allowed, (name, loops)
            assert length <= (1 + TOLERANCE) * expected, (name, loops)


def main() -> None:
    """Write the table."""
    table = {
        version: {
            name: {
                "registers": row["registers"],
                "shared": row["shared"],
                "blocks": row["blocks"],
                "loops": [[loop["instructions"], loop["barriers"]] for loop in row["loops"]],
            }
            for name, row in compiled(version, TARGETS, "R18").items()
        }
        for version in sorted({triton.__version__, OLDEST})
    }
    TABLE.write_text(json.dumps(table, indent=0) + "\n")


if __name__ == "__main__":
    main()
