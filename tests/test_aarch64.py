"""The CPU kernels on aarch64, cross-compiled and run under qemu against the driver's loops."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from test_sanitizers import compile_all, driver_jobs, kernel_jobs, run

CXX = "aarch64-linux-gnu-g++"
EMULATOR = "qemu-aarch64"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    if not shutil.which(CXX):
        pytest.skip(f"{CXX} is not installed (Debian: g++-aarch64-linux-gnu)")
    jobs = {**driver_jobs([]), **kernel_jobs(only=("baseline",))}
    del jobs["own_scratch"]  # stands in for another one
    return compile_all(CXX, tmp_path_factory.mktemp("aarch64"), jobs)


def test_every_seventh_case_is_right(objects: list[Path], tmp_path: Path) -> None:
    if not shutil.which(EMULATOR):
        pytest.skip(f"{EMULATOR} is not installed (Debian: qemu-user)")
    program = tmp_path / "kernels"
    run([CXX, "-static", *objects, "-o", program])
    said = run([EMULATOR, program, "7"])
    print(said)
    assert said.startswith("baseline ")


def test_products_multiply_by_element_and_halves_convert_in_vectors(objects: list[Path]) -> None:
    """What the CPU has an instruction for is one: no factor and no half by itself."""
    (kernels,) = [path for path in objects if path.stem == "pairwise_baseline"]
    code = run(["aarch64-linux-gnu-objdump", "-d", "--no-show-raw-insn", kernels])
    words = [line.split("\t", 1)[1] for line in code.splitlines() if "\t" in line]
    by_element = [w for w in words if w.startswith("fmla") and ".s[" in w]
    assert len(by_element) > 100
    assert any(w.startswith("fcvtl") for w in words) and any(w.startswith("fcvtn") for w in words)
    # The mask of a half's exponent and mantissa: of a conversion by hand.
    assert not [w for w in words if w.startswith("and") and "#0x7fff" in w and "0x7fffff" not in w]
