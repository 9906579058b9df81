"""Builds the compiled extension with ninja: the kernels once per ISA level, the operators
on PyTorch's stable ABI, and the small pybind11 module of build facts.

IMCL_FAST_BUILD says what to build: ``auto`` (the default) what this version has for this
machine, ``cpu`` the CPU kernels, ``cuda`` the CUDA kernels too or fail, ``0`` nothing.
CXX names the compiler, MAX_JOBS how many of it run at once.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
OPERATORS, BUILD_INFO = "imcl_fast._operators", "imcl_fast._build_info"

# -fno-strict-aliasing: the kernels carve objects of many types out of one scratch buffer.
CXXFLAGS = (
    "-std=c++17 -O3 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math "
    "-ffp-contract=fast -fno-strict-aliasing -Wall -Wextra -Wno-psabi"
)
AVX512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mprefer-vector-width=512"
# GCC 12's own intrinsic headers trip these two.
INTRINSICS = "-Wno-uninitialized -Wno-maybe-uninitialized"
ISA_FLAGS = {
    "avx512bf16": f"{AVX512} -mavx512bf16 {INTRINSICS}",
    "avx512": f"{AVX512} {INTRINSICS}",
    "avx2": "-mavx2 -mfma -mf16c",
    "baseline": "",
}
TORCH_ABI = "0x020b000000000000"  # runs under torch 2.11 and later


def fail(sentence: str) -> None:
    sys.exit(
        f"imcl_fast: {sentence} To install without the compiled extension (slower, the "
        "plain-PyTorch algebra only), set IMCL_FAST_BUILD=0."
    )


def torch_folder() -> Path:
    """The installed torch, without importing it: pip's isolated builds hide it from sys.path."""
    spec = find_spec("torch")
    places = [Path(spec.origin).parent] if spec and spec.origin else []
    places += [Path(sysconfig.get_path(kind)) / "torch" for kind in ("platlib", "purelib")]
    for place in places:
        if (place / "include/torch/csrc/stable/library.h").exists():
            return place
    fail(
        "building needs torch 2.11 or later, and none is installed. Run `pip install torch "
        "setuptools ninja pybind11`, then `pip install --no-build-isolation .`."
    )
    raise AssertionError


def compiler() -> str:
    wanted = os.environ.get("CXX")
    found = shutil.which(wanted) if wanted else shutil.which("g++") or shutil.which("clang++")
    if not found:
        fail(f"no C++ compiler found ({wanted or 'g++ or clang++'}). Install one, or set CXX.")
    return str(found)


def ninja_program() -> str:
    found = shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))
    if not found:
        fail("ninja is not installed. Run `pip install ninja`.")
    return str(found)


def jobs() -> int:
    if os.environ.get("MAX_JOBS"):
        return int(os.environ["MAX_JOBS"])
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(os.cpu_count() or 1, memory // 2**30))  # a compiler takes under 1 GiB


def ninja_file(operators: Path, build_info: Path) -> str:
    """The build as a ninja file, its paths relative to the build folder or absolute."""
    import pybind11

    torch = torch_folder()
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    levels = list(ISA_FLAGS) if x86 else ["baseline"]
    cpu = ROOT / "csrc/cpu"
    shared = "-bundle -undefined dynamic_lookup" if sys.platform == "darwin" else "-shared"
    lines = [
        f"cxx = {compiler()}",
        f"cxxflags = {CXXFLAGS} -I{cpu}",
        "rule compile",
        "  command = $cxx $cxxflags $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = $cxx {shared} -o $out $in $libs",
    ]

    def compile_(source: Path, name: str, flags: str = "") -> str:
        lines.extend([f"build {name}.o: compile {source}", f"  flags = {flags}"])
        return f"{name}.o"

    kernels = [
        compile_(cpu / f"{op}_kernels.cpp", f"{op}_{isa}", f"-DIMCL_ISA={isa} {ISA_FLAGS[isa]}")
        for op in ("pairwise", "consistency")
        for isa in levels
    ]
    kernels += [
        compile_(cpu / f"{name}.cpp", name)
        for name in ("pairwise", "consistency", "dispatch", "scratch")
    ]
    isa = compile_(cpu / "isa.cpp", "isa")
    registration = compile_(
        ROOT / "csrc/registration.cpp",
        "registration",
        f"-DTORCH_TARGET_VERSION={TORCH_ABI} -isystem {torch / 'include'}",
    )
    info = compile_(
        ROOT / "csrc/build_info.cpp",
        "build_info",
        f"-isystem {pybind11.get_include()} -isystem {sysconfig.get_path('include')}",
    )
    libraries = f"-L{torch / 'lib'} -ltorch_cpu -lc10"
    for out, objects, libs in (
        (operators, [registration, *kernels, isa], libraries),
        (build_info, [info, isa], ""),
    ):
        lines.extend([f"build {out}: link {' '.join(objects)}", f"  libs = {libs}"])
    return "\n".join(lines) + "\n"


class BuildExtension(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        # The operators are no Python module: torch loads them, whatever the Python version.
        if fullname.endswith("_operators"):
            return str(Path(*fullname.split(".")).with_suffix(".so"))
        return super().get_ext_filename(fullname)

    def build_extensions(self) -> None:
        outputs = [Path(self.get_ext_fullpath(name)).resolve() for name in (OPERATORS, BUILD_INFO)]
        for output in outputs:
            output.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(ninja_file(*outputs))
        command = [ninja_program(), "-C", str(folder), f"-j{jobs()}"]
        if subprocess.run(command).returncode:
            fail(f"the C++ build failed; its messages stand above. It ran in {folder}.")


def extensions() -> list[Extension]:
    mode = os.environ.get("IMCL_FAST_BUILD", "auto")
    if mode not in ("auto", "cpu", "cuda", "0"):
        fail(f"IMCL_FAST_BUILD: expected auto, cpu, cuda or 0, got {mode!r}.")
    if mode == "cuda":
        fail("IMCL_FAST_BUILD=cuda: this version has no CUDA kernels yet; use auto or cpu.")
    return [] if mode == "0" else [Extension(OPERATORS, []), Extension(BUILD_INFO, [])]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExtension})
