"""How setup.py finds nvcc and the GPUs to build for, and that what it builds loads under a
torch without CUDA.

Parts need nvcc, and skip with the reason where there is none.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import stat
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
import torch

from imcl_fast import operators
from imcl_fast.schemas import LAYOUT, SCHEMAS

ROOT = Path(__file__).resolve().parents[1]
KNOWN = {75, 80, 86, 87, 89, 90, 100, 120}


@pytest.fixture(scope="module")
def build() -> ModuleType:
    path = ROOT / "setup.py"
    if not path.exists():
        pytest.skip("setup.py is not beside the tests")
    spec = importlib.util.spec_from_file_location("imcl_fast_setup", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def cxx(build: ModuleType) -> str:
    wanted = os.environ.get("CXX")
    found = shutil.which(wanted or "g++") or shutil.which("clang++")
    if not found:
        pytest.skip("no C++ compiler found")
    return found


@pytest.fixture
def nvcc(build: ModuleType, cxx: str):
    try:
        return build.nvcc(cxx)
    except build.NoCuda as reason:
        pytest.skip(f"nvcc: {reason}")


def fake_nvcc(home: Path, script: str) -> None:
    program = home / "bin/nvcc"
    program.parent.mkdir(parents=True)
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)


# --- TORCH_CUDA_ARCH_LIST


@pytest.mark.parametrize(
    ("arch_list", "binary", "ptx"),
    [
        (None, "80 90 100 120", "120"),
        ("  ", "80 90 100 120", "120"),
        ("8.0;9.0+PTX", "80 90", "90"),
        ("8.0 9.0a", "80 90a", ""),
        ("8.6, 8.9;", "86 89", ""),
        ("10.0f+PTX 12.0", "100f 120", "100f"),
        ("9.0;9.0+PTX", "90", "90"),
        ("Ampere Hopper", "80 86 90", "86 90"),
        ("7.0 7.5 8.0+PTX", "80", "80"),  # what an environment lists for all it builds
    ],
)
def test_arch_list(build: ModuleType, arch_list: str | None, binary: str, ptx: str) -> None:
    gpus = build.wanted_gpus(KNOWN, arch_list)
    assert gpus == (tuple(binary.split()), tuple(ptx.split()))
    flags = gpus.flags().split()
    assert flags.count("-gencode") == len(gpus.binary) + len(gpus.ptx)
    for name in gpus.binary:
        assert f"arch=compute_{name},code=sm_{name}" in flags
    for name in gpus.ptx:
        assert f"arch=compute_{name},code=compute_{name}" in flags


def test_default_is_what_nvcc_knows(build: ModuleType) -> None:
    assert build.wanted_gpus({70, 75, 80, 86, 90}, None) == (("80", "90"), ("90",))
    with pytest.raises(build.NoCuda, match="knows none of"):
        build.wanted_gpus({70, 75}, None)


@pytest.mark.parametrize(
    ("arch_list", "message"),
    [
        ("sm_90", "expected entries like 8.0, 9.0a or 9.0.PTX.*got 'sm_90'"),
        ("8.0;nine", "got 'nine'"),
        ("8.0+ptx", "got '8.0.ptx'"),
        ("10.3", "doesn't know 10.3; it knows 7.5, 8.0"),
        ("6.1 7.5", "need a GPU of 8.0 or later.*'6.1 7.5'"),
    ],
)
def test_bad_arch_list(build: ModuleType, arch_list: str, message: str) -> None:
    with pytest.raises(build.NoCuda, match=message):
        build.wanted_gpus(KNOWN, arch_list)


# --- IMCL_FAST_BUILD


def test_cpu_mode_looks_for_no_nvcc(
    build: ModuleType, cxx: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IMCL_FAST_BUILD", "cpu")
    monkeypatch.setattr(build, "find_nvcc", lambda: pytest.fail("it looked for nvcc"))
    assert build.chosen_nvcc(cxx) is None


def test_unknown_mode(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMCL_FAST_BUILD", "gpu")
    with pytest.raises(SystemExit, match="expected auto, cpu, cuda or 0, got 'gpu'"):
        build.build_mode()


BROKEN = {
    "no nvcc": (None, "there is no bin/nvcc in it"),
    "broken": ("echo 'nvcc fatal: no such thing'; exit 1", "nvcc fatal: no such thing"),
    "silent": ("exit 3", "it says nothing"),
    # Answers every question, and compiles nothing: as an old one would the probe.
    "old": (
        'case "$*" in\n'
        '*--version*) echo "Cuda compilation tools, release 11.4, V11.4.48";;\n'
        "*--list-gpu-arch*) echo compute_80;;\n"
        "*) echo \"probe.cu(3): error: too many bytes of parameters\"; exit 2;;\n"
        "esac",
        "too many bytes of parameters It must be CUDA 12.1 or later and take",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_without_a_working_nvcc(
    build: ModuleType,
    cxx: str,
    case: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """``auto`` says so in one line and builds for the CPU; ``cuda`` stops."""
    script, message = BROKEN[case]
    if script is not None:
        fake_nvcc(tmp_path, script)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setenv("IMCL_FAST_BUILD", "auto")
    plan = build.ninja_file(tmp_path / "operators.so", tmp_path / "info.so")
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("imcl_fast: building without CUDA kernels: ")
    assert message in said
    assert "rule nvcc" not in plan and "-DIMCL_WITH_CUDA" not in plan and "cudart" not in plan

    monkeypatch.setenv("IMCL_FAST_BUILD", "cuda")
    with pytest.raises(SystemExit) as stop:
        build.ninja_file(tmp_path / "operators.so", tmp_path / "info.so")
    assert str(stop.value).startswith("imcl_fast: IMCL_FAST_BUILD=cuda: ")
    assert message in str(stop.value)


def test_wheels_for_others_have_no_cuda_kernels(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever nvcc is: it isn't even looked for."""
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nowhere"))
    monkeypatch.setenv("IMCL_FAST_PORTABLE", "1")
    monkeypatch.setenv("IMCL_FAST_BUILD", "auto")
    assert build.chosen_nvcc(build.compiler()) is None
    monkeypatch.setenv("IMCL_FAST_BUILD", "cuda")
    with pytest.raises(SystemExit, match="IMCL_FAST_PORTABLE=1 is for wheels"):
        build.chosen_nvcc(build.compiler())


def test_plan_with_nvcc(
    build: ModuleType, nvcc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IMCL_FAST_BUILD", "cuda")
    plan = build.ninja_file(tmp_path / "operators.so", tmp_path / "info.so")
    for source in (ROOT / "csrc/cuda").glob("*.cu"):
        assert f"build {source.stem}_cuda.o: nvcc {build.name_of(source)}" in plan
    assert nvcc.gpus.flags() in plan and "-DIMCL_WITH_CUDA" in plan
    assert nvcc.version.split(".")[0].isdigit()


def types_of(folder: Path) -> set[str]:
    """What headers define in ``imcl`` itself, not in the namespace of an ISA level."""
    texts = [path.read_text() for path in folder.glob("*.h")]
    return {
        name
        for text in texts
        if "namespace IMCL_ISA" not in text
        for name in re.findall(r"^(?:struct|class|union|enum class) (\w+)", text, re.MULTILINE)
    }


def test_no_two_devices_have_a_type_of_one_name() -> None:
    """They are linked into one library, which keeps one std::vector of that name."""
    cpu, cuda = types_of(ROOT / "csrc/cpu"), types_of(ROOT / "csrc/cuda")
    if not cuda:
        pytest.skip("csrc/ is not beside the tests")
    assert {"Representation", "Matrices"} <= cpu and {"Layer", "GramLayer"} <= cuda
    assert cpu & cuda == set()


# --- what was built


@pytest.fixture
def built(nvcc) -> None:
    """Only where the extension in use is of such a build: a stale one is not looked at."""
    if os.environ.get("IMCL_FAST_BUILD") in ("0", "cpu"):
        pytest.skip(f"IMCL_FAST_BUILD={os.environ['IMCL_FAST_BUILD']}: without CUDA on purpose")
    assert operators.build_info is not None, operators.LOAD_ERROR
    assert operators.build_info.cuda_architectures(), (
        "nvcc works, and the extension was built without CUDA kernels: build it again, or set "
        "IMCL_FAST_BUILD=cpu for these tests"
    )


def test_extension_has_both_devices(built: None) -> None:
    """One library serves this torch, CUDA or not."""
    assert operators.LOAD_ERROR == ""
    for name in SCHEMAS:
        operator = f"imcl_fast::{name}.{LAYOUT}"
        for key in ("CPU", "CUDA"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(operator, key)


def cuobjdump() -> str:
    """The tool, from the CUDA toolkit or as Triton ships it."""
    found = shutil.which("cuobjdump") or shutil.which("/usr/local/cuda/bin/cuobjdump")
    triton = importlib.util.find_spec("triton")
    if not found and triton and triton.origin:
        found = shutil.which(Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump")
    if not found:
        pytest.skip("cuobjdump is not installed")
    return found


def output_of(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_extension_holds_the_architectures(built: None) -> None:
    info = operators.build_info
    assert info is not None and info.nvcc()
    listed = output_of(cuobjdump(), "--list-elf", "--list-ptx", operators.LIBRARY)
    for name in info.cuda_architectures().split(";"):
        assert f".sm_{name}.cubin" in listed
    for name in filter(None, info.cuda_ptx().split(";")):
        assert f".sm_{name}.ptx" in listed or f".compute_{name}.ptx" in listed


# ptxas's report of one kernel for one GPU, as the build keeps it.
REPORT = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)' for '(?P<gpu>sm_\w+)'.*?"
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?:.*? (?P<shared>\d+) bytes smem)?",
    re.DOTALL,
)


def test_no_kernel_spills(build: ModuleType, built: None) -> None:
    logs = [build.OBJECTS / f"{source.stem}_cuda.o.log" for source in build.CUDA_SOURCES]
    if not all(log.exists() for log in logs):
        pytest.skip(f"the extension was built elsewhere: no reports of ptxas in {build.OBJECTS}")
    reports = [m.groupdict() for log in logs for m in REPORT.finditer(log.read_text())]
    assert operators.build_info is not None
    gpus = {f"sm_{name}" for name in operators.build_info.cuda_architectures().split(";")}
    assert {report["gpu"] for report in reports} == gpus
    for report in reports:
        print(*(f"{key} {value or 0:>6}" for key, value in report.items()))
    assert [r for r in reports if int(r["stores"]) or int(r["loads"])] == []
    # What every GPU from sm_80 on gives a block without being asked for more.
    assert all(int(report["shared"] or 0) <= 48 * 1024 for report in reports)


def test_products_of_halves_use_the_tensor_cores(built: None) -> None:
    """In machine code: HMMA in every pairwise kernel of bfloat16, none in float32's own; and in
    those of the dependence of either half type."""
    tool = cuobjdump()
    assert operators.build_info is not None
    for name in operators.build_info.cuda_architectures().split(";"):
        code = output_of(tool, "-sass", "-arch", f"sm_{name}", operators.LIBRARY)
        kernels = dict(re.findall(r"Function : (\w+)\n(.*?)(?=Function : |\Z)", code, re.DOTALL))
        pairwise = {k: v for k, v in kernels.items() if "PairwiseArguments" in k}
        halves = [v for k, v in pairwise.items() if "I13__nv_bfloat16" in k]
        full = [v for k, v in pairwise.items() if "IfNS_4SimtIfE" in k]
        assert len(halves) == 4 and len(full) == 2, list(pairwise)  # "medium" rounds to it
        assert all("HMMA" in body for body in halves)
        assert not any("HMMA" in body for body in full)
        dependence = {k: v for k, v in kernels.items() if "DependenceArguments" in k}
        halves = [v for k, v in dependence.items() if "HMMA" in v]
        assert len(dependence) == 8 and len(halves) == 4, list(dependence)
