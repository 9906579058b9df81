"""The CUDA kernels under AddressSanitizer and UndefinedBehaviorSanitizer, on the CPU
(driver/cuda_on_cpu.h); and what that emulator shows of kernels with faults.

Without a checkout or a compiler this file skips and says why.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from cuda_emulation import DRIVER, KERNEL_FLAGS, compile_all, kernel_commands
from test_sanitizers import ADDRESS, compiler, run, sanitizing_compiler

# Locals that nobody set hold large numbers, as uninitialised registers may.
POISONED_LOCALS = "-ftrivial-auto-var-init=pattern"
BARRIER = "threads wait"  # what the emulator says of a barrier that not all come to


def faults(folder: Path, cxx: str, *flags: str) -> Path:
    program = folder / "cuda_faults"
    run([cxx, *KERNEL_FLAGS, "-O1", "-g1", *flags, "-x", "c++", DRIVER / "cuda_faults.cu",
         "-o", program])
    return program


@pytest.fixture(scope="module")
def plain_faults(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return faults(tmp_path_factory.mktemp("faults"), compiler())


@pytest.fixture(scope="module")
def sanitized_faults(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sanitized_faults")
    return faults(folder, sanitizing_compiler(folder, ADDRESS), *ADDRESS)


def lines(program: Path, fault: str) -> list[str]:
    return run([program, fault]).splitlines()


def test_emulator_runs_a_kernel(plain_faults: Path, sanitized_faults: Path) -> None:
    for program in (plain_faults, sanitized_faults):
        assert lines(program, "none") == [str(sum(range(96)))] * 2


@pytest.mark.parametrize("fault", ["missing barrier", "overwritten", "uninitialised"])
def test_emulator_turns_races_into_wrong_numbers(plain_faults: Path, fault: str) -> None:
    """In one of the two orders that threads take turns in, at the least."""
    assert lines(plain_faults, fault) != [str(sum(range(96)))] * 2
    if fault == "uninitialised":
        assert {line.removeprefix("-") for line in lines(plain_faults, fault)} == {"nan"}


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("divergent barrier", "threads wait at different barriers: 32 threads wait at the barrier"),
        ("early return", "threads wait for one another for ever: 32 threads have ended"),
        ("divergent shuffle", "48 threads wait in the warp operation"),
        ("too many threads", "a launch that no GPU takes: blocks of 1056 threads"),
        ("too much shared", "more dynamic shared memory than allowed: 65536 bytes"),
    ],
)
def test_emulator_refuses(plain_faults: Path, fault: str, message: str) -> None:
    for line in lines(plain_faults, fault):
        assert message in line


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("beyond global", "AddressSanitizer: heap-buffer-overflow"),
        # The other sanitizer knows the type of such an array, and comes first.
        ("beyond shared", "index 3 out of bounds for type 'float [3]'"),
        ("beyond dynamic", "AddressSanitizer: heap-buffer-overflow"),
    ],
)
def test_sanitizers_see_overruns_in_kernels(
    sanitized_faults: Path, fault: str, message: str
) -> None:
    done = subprocess.run([sanitized_faults, fault], capture_output=True, text=True)
    assert done.returncode != 0
    assert message in done.stderr


@pytest.mark.slow
def test_kernels_under_address_and_undefined_sanitizer(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("address")
    cxx = sanitizing_compiler(folder, ADDRESS)
    (folder / "empty.cpp").write_text("")
    accepted = subprocess.run([cxx, POISONED_LOCALS, "-c", folder / "empty.cpp",
                               "-o", folder / "empty.o"], capture_output=True)
    flags = [*ADDRESS, *([] if accepted.returncode else [POISONED_LOCALS])]
    commands = kernel_commands(cxx, *flags)
    commands["driver"] = [cxx, *KERNEL_FLAGS, *flags, str(DRIVER / "cuda_kernels.cpp")]
    program = folder / "cuda_kernels"
    run([cxx, "-pthread", *ADDRESS, *compile_all(commands, folder), "-o", program])
    # A small quarantine: what is freed here is not used again, and new pages take time.
    environment = {**os.environ, "ASAN_OPTIONS": "quarantine_size_mb=8"}
    # Every fifth: each penalty and each dtype, in each layout, in the end.
    print(run([program, "5"], env=environment))
