"""Instruction counts of the C++ kernels under callgrind: the figure that repeats exactly.

The kernels are compiled with setup.py's own flags, at a level that valgrind runs (it knows no
AVX-512), linked to ``driver/callgrind.cpp`` and counted case by case. Counts depend on the
compiler: they are compared with ``baseline.json`` only where the compiler and the level are
those it was made with.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
CPU = ROOT / "csrc/cpu"
DRIVER = Path(__file__).resolve().parent / "driver/callgrind.cpp"
BASELINE = Path(__file__).resolve().parent / "baseline.json"
TOLERANCE = 0.03
SAME = ("compiler", "isa")  # what makes counts comparable


class CantCount(Exception):
    """Why instructions can't be counted here: a sentence."""


def count(folder: Path) -> dict:
    """Compile, link and count; ``folder`` takes the program.

    Returns:
        ``compiler``, ``isa``, ``valgrind`` and ``instructions`` by case.

    Raises:
        CantCount: valgrind or a compiler is missing, or either fails.
    """
    for tool, package in (("valgrind", "valgrind"), (_compiler(), "g++")):
        if not shutil.which(tool):
            raise CantCount(f"{tool} is not installed; on Debian: apt-get install {package}")
    program = build(folder)
    cases = _run(program, "--list").splitlines()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        counts = list(pool.map(lambda case: _instructions(program, case), cases))
    return {
        "compiler": _run(_compiler(), "--version").splitlines()[0],
        "isa": isa(),
        "valgrind": _run("valgrind", "--version").strip(),
        "instructions": dict(zip(cases, counts, strict=True)),
    }


def isa() -> str:
    """The level to count at."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return "baseline"
    info = Path("/proc/cpuinfo")
    return "avx2" if info.exists() and " avx2 " in info.read_text() else "baseline"


def build(folder: Path) -> Path:
    """The driver, linked to the kernels of one level."""
    setup = _setup()
    flags = [*setup.CXXFLAGS.split(), f"-I{CPU}", f"-DIMCL_ISA={isa()}"]
    level = setup.ISA_FLAGS[isa()].split()
    shared = [DRIVER, *(CPU / f"{name}.cpp" for name in ("pairwise", "consistency", "scratch"))]
    kernels = [CPU / f"{name}_kernels.cpp" for name in ("pairwise", "consistency")]
    jobs = [*((source, []) for source in shared), *((source, level) for source in kernels)]

    def compile_(job: tuple[Path, list[str]]) -> Path:
        source, own = job
        made = folder / f"{source.stem}.o"
        _run(_compiler(), *flags, *own, "-c", str(source), "-o", str(made))
        return made

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_, jobs))
    program = folder / "callgrind"
    _run(_compiler(), *map(str, objects), "-o", str(program))
    return program


def compare(found: dict, baseline: dict) -> tuple[list[str], bool]:
    """Lines that say how the counts stand to the baseline, and whether all are within
    ``TOLERANCE``; a count from another compiler or level is neither good nor bad."""
    other = [key for key in SAME if found[key] != baseline[key]]
    if other:
        return [
            f"not compared: the baseline's {key} is {baseline[key]}, this one's {found[key]}"
            for key in other
        ], True
    lines, good = [], True
    now, before = found["instructions"], baseline["instructions"]
    for case in [*before, *(case for case in now if case not in before)]:
        if case not in now or case not in before:
            lines.append(f"{case}: only in the {'baseline' if case in before else 'driver'}")
            good = False
            continue
        change = now[case] / before[case] - 1
        verdict = ""
        if change > TOLERANCE:
            verdict, good = f"  more than {TOLERANCE:.0%} too many", False
        elif change < -TOLERANCE:
            verdict = "  fewer: the baseline can be updated"
        lines.append(f"{case:54s}{now[case]:>14,d}{change:>+9.2%}{verdict}")
    return lines, good


def read_baseline() -> dict:
    return json.loads(BASELINE.read_text())


def _instructions(program: Path, case: str) -> int:
    done = _run(
        "valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null",
        "--toggle-collect=measured*", str(program), case,
    )  # fmt: skip
    collected = re.search(r"Collected\s*:\s*(\d+)", done)
    if not collected or collected[1] == "0":
        raise CantCount(f"callgrind counted nothing of {case!r}; it said: {done.strip()[-300:]}")
    return int(collected[1])


def _setup() -> ModuleType:
    """setup.py, for its flags; it builds only when it is the program that runs."""
    spec = importlib.util.spec_from_file_location("imcl_fast_setup", ROOT / "setup.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _compiler() -> str:
    return os.environ.get("CXX", "g++")


def _run(*command: str | Path) -> str:
    done = subprocess.run(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        raise CantCount(f"{Path(command[0]).name} failed: {done.stdout.strip()[-500:]}")
    return done.stdout
