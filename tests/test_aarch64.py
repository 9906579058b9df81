"""The CPU kernels on aarch64, cross-compiled and run under qemu against the driver's loops."""

from __future__ import annotations

import re
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


def instructions(objects: list[Path]) -> list[tuple[int, str]]:
    """Of the kernels that have the products: address and text, function by function."""
    (kernels,) = [path for path in objects if path.stem == "pairwise_baseline"]
    code = run(["aarch64-linux-gnu-objdump", "-d", "--no-show-raw-insn", kernels])
    lines = re.findall(r"^ +([0-9a-f]+):\t(.+)$", code, re.MULTILINE)
    return [(int(address, 16), words.replace("\t", " ")) for address, words in lines]


def innermost_loops(code: list[tuple[int, str]]) -> list[list[str]]:
    at = {address: i for i, (address, _) in enumerate(code)}
    back = []  # from and to of jumps backwards, those that begin last first
    for i, (_, words) in enumerate(code):
        jump = re.match(r"(?:b|b\.\w+|cbn?z|tbn?z) (?:.*, )?([0-9a-f]+) <", words)
        if jump and at.get(int(jump[1], 16), i + 1) <= i:
            back.append((at[int(jump[1], 16)], i))
    inner = [b for b in back if not any(b != o and b[0] <= o[0] and o[1] <= b[1] for o in back)]
    return [[words for _, words in code[first : last + 1]] for first, last in inner]


def test_products_multiply_by_element_and_halves_convert_in_vectors(objects: list[Path]) -> None:
    """What the CPU has an instruction for is one: no factor and no half by itself."""
    words = [text for _, text in instructions(objects)]
    by_element = [w for w in words if w.startswith("fmla") and ".s[" in w]
    assert len(by_element) > 100
    assert any(w.startswith("fcvtl") for w in words) and any(w.startswith("fcvtn") for w in words)
    # The mask of a half's exponent and mantissa: of a conversion by hand.
    assert not [w for w in words if w.startswith("and") and "#0x7fff" in w and "0x7fffff" not in w]


def test_a_product_of_float32_loads_four_registers_for_sixteen_sums(objects: list[Path]) -> None:
    """Eight rows by two vectors, enough sums for what has four multipliers that answer after four
    cycles; their factors are loaded in whole registers, and no sum is put aside in between."""
    whole = 0
    for loop in innermost_loops(instructions(objects)):
        multiplied = [w for w in loop if w.startswith("fmla")]
        if sum(".s[" in w for w in multiplied) < 6:
            continue
        assert not [w for w in loop if "[sp" in w], loop
        assert len({w.split()[1] for w in multiplied}) >= 16, loop
        # But for the last few of a depth that is no multiple of four.
        if not [w for w in loop if re.match(r"ld(p|u?r) s|ld1r", w)]:
            loads = [w for w in loop if re.match(r"ld(p|u?r) q", w)]
            assert sum(1 + w.startswith("ldp") for w in loads) * 4 <= len(multiplied), loop
            assert all(".s[" in w for w in multiplied), loop
            whole += 1
    assert whole >= 10
