"""The C++ kernels under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer,
through the small program driver/kernels.cpp; and what symbols their objects define.

The kernels are compiled here, with the flags that setup.py compiles them with, so that
this file needs a checkout and a compiler; without one of them it skips and says why.
"""

from __future__ import annotations

import ast
import os
import platform
import shutil
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]
CPU = ROOT / "csrc/cpu"
DRIVER = Path(__file__).resolve().parent / "driver/kernels.cpp"
JOBS = 2  # compilers at once
ADDRESS = ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
THREAD = ["-O1", "-g1", "-fsanitize=thread"]
STAND_IN = "-DIMCL_MATRIX_UNIT_STAND_IN"
# What /proc/cpuinfo calls the last of what a level needs.
FEATURES = {"avx512bf16": "avx512_bf16", "avx512": "avx512vl", "avx2": "avx2"}


def flags() -> tuple[list[str], dict[str, list[str]], tuple[str, ...]]:
    """Those of every file, those of each ISA level, and the levels of products
    only, read out of setup.py, which isn't run."""
    wanted = ("CXXFLAGS", "AVX512", "INTRINSICS", "ISA_FLAGS", "PRODUCTS_ONLY")
    setup = ast.parse((ROOT / "setup.py").read_text())
    setup.body = [
        node
        for node in setup.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") in wanted
    ]
    names: dict = {}
    exec(compile(setup, "setup.py", "exec"), names)
    levels = {isa: own.split() for isa, own in names["ISA_FLAGS"].items()}
    if platform.machine().lower() not in ("x86_64", "amd64"):
        levels = {"baseline": levels["baseline"]}
    return [*names["CXXFLAGS"].split(), f"-I{CPU}"], levels, names["PRODUCTS_ONLY"]


def compiler() -> str:
    if not (CPU / "dispatch.cpp").exists() or not (ROOT / "setup.py").exists():
        pytest.skip("the C++ sources are not beside the tests")
    wanted = os.environ.get("CXX")
    found = shutil.which(wanted) if wanted else shutil.which("g++") or shutil.which("clang++")
    if not found:
        pytest.skip(f"no C++ compiler found ({wanted or 'g++ or clang++'})")
    return found


def run(command: Iterable[object], **options) -> str:
    words = [str(word) for word in command]
    done = subprocess.run(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600, **options
    )
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout[-8000:]}"
    return done.stdout


def sanitizing_compiler(folder: Path, sanitizer: list[str]) -> str:
    """The compiler, if a program it makes with the sanitizer runs here."""
    cxx = compiler()
    source, program = folder / "empty.cpp", folder / "empty"
    source.write_text("int main() { return 0; }\n")
    try:
        run([cxx, *sanitizer, source, "-o", program])
        run([program])
    except AssertionError as error:
        pytest.skip(f"{sanitizer[-1]} does not work here: {str(error)[-300:]}")
    return cxx


def compile_all(cxx: str, folder: Path, jobs: dict[str, list[object]]) -> list[Path]:
    """Objects of that name from those arguments, in order."""
    outputs = [folder / f"{name}.o" for name in jobs]
    with ThreadPoolExecutor(JOBS) as pool:
        list(pool.map(lambda job: run([cxx, *job[0], "-c", "-o", job[1]]),
                      zip(jobs.values(), outputs, strict=True)))
    return outputs


def kernel_jobs(
    extra: Iterable[str] = (), only: Iterable[str] | None = None, unit: list[str] | None = None
) -> dict:
    """Compilations of the per-ISA kernels, the baseline before what needs a newer CPU: of what
    several objects define the linker takes the first. With ``unit``, flags for the CPU at hand,
    the matrix unit is a stand-in."""
    common, levels, products_only = flags()
    if unit is not None and "amx" in levels:
        levels["amx"] = [*unit, "-DIMCL_MATRIX_UNIT", STAND_IN]
    return {
        f"{op}_{isa}": [*common, f"-DIMCL_ISA={isa}", *own, *extra, CPU / f"{op}_kernels.cpp"]
        for op in ("consistency", "dependence", "pairwise")
        for isa, own in reversed(levels.items())
        if (only is None or isa in only) and (op == "pairwise" or isa not in products_only)
    }


def driver_jobs(extra: Iterable[str]) -> dict:
    """Compilations of what is not per ISA: the driver and both kinds of working memory."""
    common = [*flags()[0], *extra]
    sources = sorted(
        path
        for path in CPU.glob("*.cpp")
        if not path.stem.endswith("_kernels") and path.stem != "operators"  # that needs torch
    )
    return {
        "driver": [*common, DRIVER],
        "own_scratch": [*common, "-DONLY_SCRATCH", DRIVER],
        **{path.stem: [*common, path] for path in sources},
    }


@pytest.fixture(scope="module")
def plain_kernels(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The per-ISA kernels as setup.py compiles them."""
    return compile_all(compiler(), tmp_path_factory.mktemp("plain"), kernel_jobs())


def check_symbols(objects: list[Path]) -> None:
    """Of an inline function that several objects define, the linker keeps one copy. Were it
    the one from the AVX-512 object, every level would call it, and a CPU without AVX-512
    would stop at an illegal instruction: in one build and not in the next, and never on the
    machine of a developer whose CPU has it. So all that a per-ISA object defines for others
    must be in the namespace of its ISA. What the compiler has put inline is no symbol.
    """
    nm = shutil.which("nm")
    if not nm:
        pytest.skip("nm is not installed")
    for path in objects:
        isa = path.stem.split("_")[1]
        table = run([nm, "-C", "--defined-only", path]).splitlines()
        symbols = [line.split(maxsplit=2)[1:] for line in table]
        # Capital letters are global; u, v and w are unique and weak.
        shared = [name for kind, name in symbols if kind.isupper() or kind in "uvw"]
        assert any("_kernels" in name for name in shared), f"{path.name}: the table is missing"
        foreign = [
            name
            for name in shared
            # A function's name may follow its return type.
            if f"imcl::{isa}::" not in name.split("(")[0]
            # A pointer to the C++ runtime, the same from every object.
            and name != "DW.ref.__gxx_personality_v0"
        ]
        assert not foreign, f"{path.name} defines what other objects may define too: {foreign}"


def test_kernels_define_nothing_that_two_isas_share(plain_kernels: list[Path]) -> None:
    check_symbols(plain_kernels)


def cpu_has(feature: str) -> bool:
    cpu = Path("/proc/cpuinfo")
    return cpu.exists() and f" {feature} " in f"{cpu.read_text()} ".replace("\n", " ")


def test_kernels_under_address_and_undefined_sanitizer(
    tmp_path_factory: pytest.TempPathFactory, plain_kernels: list[Path]
) -> None:
    """At every level of this CPU, and that of the matrix unit on a stand-in for it."""
    folder = tmp_path_factory.mktemp("address")
    cxx = sanitizing_compiler(folder, ADDRESS)
    unit = ["-mavx2", "-mfma"] if cpu_has("avx2") else []
    runs = [level for level in flags()[1] if level not in FEATURES or cpu_has(FEATURES[level])]
    jobs = {**driver_jobs([*ADDRESS, STAND_IN]), **kernel_jobs(ADDRESS, only=runs, unit=unit)}
    objects = dict(zip(jobs, compile_all(cxx, folder, jobs), strict=True))
    # Of the other levels any objects do: they are linked, and never called.
    objects |= {path.stem: path for path in plain_kernels if path.stem not in objects}
    # A small quarantine: what is freed here is not used again, and new pages take time.
    environment = {**os.environ, "ASAN_OPTIONS": "quarantine_size_mb=8"}

    def report(left_out: str, *arguments: str) -> str:
        program = folder / f"without_{left_out}"
        linked = [path for name, path in objects.items() if name != left_out]
        run([cxx, "-pthread", *ADDRESS, *linked, "-o", program])
        return run([program, *arguments], env=environment)

    # The working memory in pieces that end where they should; for some cases, as it is.
    with ThreadPoolExecutor(JOBS) as pool:
        reports = [pool.submit(report, "scratch"), pool.submit(report, "own_scratch", "7")]
        for done in reports:
            print(done.result())
            if platform.machine().lower() in ("x86_64", "amd64"):
                assert done.result().startswith("amx ")


def test_the_stand_in_gives_the_bits_of_the_matrix_unit(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    if not cpu_has("amx_bf16"):
        pytest.skip("this CPU has no matrix unit (AMX) to compare the stand-in with")
    cxx, bits = compiler(), {}
    avx512 = flags()[1]["avx512bf16"]
    for name, extra, unit in (("unit", [], None), ("stand_in", [STAND_IN], avx512)):
        folder = tmp_path_factory.mktemp(name)
        jobs = {**driver_jobs(extra), **kernel_jobs(unit=unit)}
        del jobs["own_scratch"]
        program = folder / name
        run([cxx, "-pthread", *compile_all(cxx, folder, jobs), "-o", program])
        report = run([program, "5", "amx"])
        print(report)
        bits[name] = report.split("bits ")[1]
    assert bits["unit"] == bits["stand_in"]


def test_kernels_under_thread_sanitizer(
    tmp_path_factory: pytest.TempPathFactory, plain_kernels: list[Path]
) -> None:
    """One level: what the threads share is the same at all of them."""
    folder = tmp_path_factory.mktemp("thread")
    cxx = sanitizing_compiler(folder, THREAD)
    jobs = {**driver_jobs(THREAD), **kernel_jobs(THREAD, only=["baseline"])}
    del jobs["own_scratch"]
    objects = compile_all(cxx, folder, jobs)
    others = [path for path in plain_kernels if "baseline" not in path.name]
    program = folder / "kernels"
    run([cxx, "-pthread", *THREAD, *objects, *others, "-o", program])
    print(run([program, "11", "baseline"]))
