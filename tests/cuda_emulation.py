"""The CUDA implementation on CPU tensors: its own kernels and operators, compiled as C++.

driver/cuda_on_cpu.h runs the kernels, one fiber for each CUDA thread. ``load`` compiles
csrc/cuda with it, once for each state of the sources, and registers the operators as
``torch.ops.imcl_fast_emulated.*``.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

from imcl_fast import operators
from imcl_fast.schemas import SCHEMAS

ROOT = Path(__file__).resolve().parents[1]
CUDA = ROOT / "csrc/cuda"
DRIVER = Path(__file__).resolve().parent / "driver"
EMULATOR = DRIVER / "cuda_on_cpu.h"
JOBS = 2  # compilers at once

# g++ doesn't know nvcc's pragmas; shared memory is carved out of bytes.
KERNEL_FLAGS = (
    *("-std=c++17", "-fPIC", "-fvisibility=hidden", "-pthread", "-fno-strict-aliasing"),
    *("-DIMCL_CUDA_ON_CPU", "-include", str(EMULATOR)),
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-psabi"),
)
# What has every access of a kernel checked (driver/cuda_races.h); and its part without them.
CHECKED = ("-O1", "-g1", "-DIMCL_RACES", "-fsanitize=thread")
CHECKS = ("-O2", "-g1", "-DIMCL_RACES", str(DRIVER / "cuda_races.cpp"))


class Emulated(NamedTuple):
    """What ``imcl_fast.operators`` has of a device: the three operations."""

    pairwise: operators.Pairwise
    consistency: Callable
    gram: operators.Gram


def why_not() -> str | None:
    """Why the kernels can't be compiled here, or None where they can."""
    if not (CUDA / "operators.cpp").exists():
        return "the CUDA sources are not beside the tests"
    if operators.build_info is None:  # the schemas are the extension's
        return operators.LOAD_ERROR
    if compiler() is None:
        return f"no C++ compiler found ({os.environ.get('CXX') or 'g++ or clang++'})"
    return None


def compiler() -> str | None:
    wanted = os.environ.get("CXX")
    return shutil.which(wanted) if wanted else shutil.which("g++") or shutil.which("clang++")


def run(command: list[str]) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-8000:]}")
    return done.stdout


def kernel_commands(cxx: str, *extra: str) -> dict[str, list[str]]:
    """For each kernel source, by its stem, how to compile it to run on the CPU."""
    return {
        source.stem: [cxx, *KERNEL_FLAGS, *extra, "-x", "c++", str(source)]
        for source in sorted(CUDA.glob("*.cu"))
    }


def compile_all(commands: dict[str, list[str]], folder: Path) -> list[str]:
    """The objects of these commands."""
    objects = [str(folder / f"{name}.o") for name in commands]
    with ThreadPoolExecutor(JOBS) as pool:
        list(pool.map(lambda job: run([*job[0], "-c", "-o", job[1]]),
                      zip(commands.values(), objects, strict=True)))
    return objects


def library() -> Path:
    """The compiled operators, from build/ if they were compiled before."""
    cxx = compiler()
    assert cxx is not None
    torch_folder = Path(torch.__file__).parent
    headers = f"-isystem{torch_folder / 'include'}"
    on_tensors = [*KERNEL_FLAGS, "-DTORCH_TARGET_VERSION=0x020b000000000000", headers, "-O1"]
    csrc = ROOT / "csrc"
    commands = kernel_commands(cxx, "-O1", "-g1")
    commands["operators"] = [cxx, *on_tensors, str(CUDA / "operators.cpp")]
    commands["tensors"] = [cxx, *on_tensors, str(csrc / "tensors.cpp")]
    commands["registration"] = [
        cxx, *on_tensors, f"-I{csrc}", str(DRIVER / "cuda_registration.cpp")
    ]  # fmt: skip
    link = [f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10", "-pthread"]

    key = hashlib.sha256()
    for path in sorted([*csrc.glob("*.[ch]*"), *CUDA.iterdir(), *DRIVER.glob("cuda_*")]):
        key.update(path.name.encode() + path.read_bytes())
    key.update(f"{run([cxx, '--version'])} {torch.__version__} {commands} {link}".encode())
    target = ROOT / "build/cuda_on_cpu" / f"{key.hexdigest()[:24]}.so"
    if target.exists():
        return target
    folder = target.with_suffix(f".{os.getpid()}")
    folder.mkdir(parents=True)
    try:
        objects = compile_all(commands, folder)
        made = folder / "operators.so"
        run([cxx, "-shared", "-o", str(made), *objects, *link])
        made.replace(target)  # at once, whoever else may be looking for it
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return target


@functools.cache
def load() -> Emulated:
    """The operators, compiled and registered with their fake kernels."""
    reason = why_not()
    if reason is not None:
        raise RuntimeError(f"the CUDA kernels can't be run on the CPU: {reason}")
    registered = torch.library.Library("imcl_fast_emulated", "DEF")
    load.registered = registered  # type: ignore[attr-defined]  # they live as long as it does
    fakes = (
        operators._gpu_pairwise_forward, operators._pairwise_backward, operators._consistency,
        operators._gpu_gram_forward, operators._gram_backward,
    )  # fmt: skip
    for name, fake in zip(SCHEMAS, fakes, strict=True):
        registered.define(name + SCHEMAS[name])
        torch.library.register_fake(f"imcl_fast_emulated::{name}", lib=registered)(fake)
    torch.ops.load_library(library())
    ops = torch.ops.imcl_fast_emulated
    return Emulated(
        operators.Pairwise(ops.pairwise.default, ops.pairwise_backward.default),
        ops.consistency.default,
        operators.Gram(ops.gram_forward.default, ops.gram_backward.default),
    )
