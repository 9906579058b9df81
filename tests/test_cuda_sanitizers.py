"""The CUDA kernels under AddressSanitizer and UndefinedBehaviorSanitizer, and under the check
for races, on the CPU (driver/cuda_on_cpu.h); and what that emulator shows of kernels with faults.

Without a checkout or a compiler this file skips and says why.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from cuda_emulation import (
    CHECKED,
    CHECKS,
    CUDA,
    DRIVER,
    KERNEL_FLAGS,
    compile_all,
    kernel_commands,
)
from test_sanitizers import ADDRESS, compiler, run, sanitizing_compiler

# Locals that nobody set hold large numbers, as uninitialised registers may.
POISONED_LOCALS = "-ftrivial-auto-var-init=pattern"
SEEDS = 10  # of orders in which the kernels are checked for races


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


@pytest.fixture(scope="module")
def checked_faults(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, cxx = tmp_path_factory.mktemp("checked_faults"), compiler()
    return checked(folder, {"faults": [cxx, *KERNEL_FLAGS, *CHECKED, "-x", "c++",
                                       str(DRIVER / "cuda_faults.cu")]})


@pytest.fixture(scope="module")
def checked_kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, cxx = tmp_path_factory.mktemp("checked_kernels"), compiler()
    driver = [cxx, *KERNEL_FLAGS, *CHECKED, str(DRIVER / "cuda_kernels.cpp")]
    return checked(folder, {**kernel_commands(cxx, *CHECKED), "driver": driver})


def checked(folder: Path, commands: dict[str, list[str]]) -> Path:
    """What these make, linked with the check in place of the sanitizer's library."""
    program = folder / "checked"
    commands = {**commands, "checks": [compiler(), *KERNEL_FLAGS, *CHECKS]}
    run([compiler(), "-pthread", *compile_all(commands, folder), "-ldl", "-o", program])
    return program


def lines(program: Path, fault: str, **environment: str) -> list[str]:
    return run([program, fault], env={**os.environ, **environment}).splitlines()


RIGHT = [str(sum(range(96)))] * 2
ORDERS: list[dict[str, str]] = [{}, *({"IMCL_EMULATED_SEED": str(seed)} for seed in range(8))]


def test_emulator_runs_a_kernel(
    plain_faults: Path, sanitized_faults: Path, checked_faults: Path
) -> None:
    for program in (plain_faults, sanitized_faults, checked_faults):
        for order in ORDERS:
            assert lines(program, "none", **order) == RIGHT
            assert lines(program, "none by luck", **order) == RIGHT


@pytest.mark.parametrize("fault", ["missing barrier", "overwritten", "uninitialised"])
def test_emulator_turns_races_into_wrong_numbers(plain_faults: Path, fault: str) -> None:
    """In one of the two orders that threads take turns in, at the least."""
    assert lines(plain_faults, fault) != RIGHT
    if fault == "uninitialised":
        assert {line.removeprefix("-") for line in lines(plain_faults, fault)} == {"nan"}


def test_emulator_does_what_is_captured_in_the_replay(plain_faults: Path) -> None:
    assert lines(plain_faults, "captured") == RIGHT
    assert lines(plain_faults, "read while captured") == ["-1", "-1"]


def test_emulator_draws_orders_from_a_seed(plain_faults: Path) -> None:
    """What is right in both orders, and in few of those drawn."""
    fault = "first or last"
    assert lines(plain_faults, fault) == RIGHT
    drawn = [lines(plain_faults, fault, **order) for order in ORDERS[1:]]
    assert sum(sums != RIGHT for sums in drawn) > len(drawn) / 2
    assert len({*map(tuple, drawn)}) > 1
    assert drawn == [lines(plain_faults, fault, **order) for order in ORDERS[1:]]


RACE = r"a race on shared memory, byte \d+: thread \d+ "
UNWRITTEN = r"thread \d+ reads what nobody has written of shared memory"
OF_BLOCKS = r"a race on global memory: thread \d+ {} at [^ ]+ what another block's thread \d+ {}"


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("no barrier", f"{RACE}reads|{UNWRITTEN}"),
        ("only warp barrier", f"{RACE}reads|{UNWRITTEN}"),
        ("no warp barrier", f"{RACE}reads"),
        ("half warp barrier", f"{RACE}reads"),
        ("overwritten in warp", rf"{RACE}writes at [^ ]+ what thread \d+ read"),
        ("unwritten", UNWRITTEN),
        ("written twice", rf"{RACE}writes at [^ ]+ what thread \d+ wrote"),
        ("no fence before", OF_BLOCKS.format("reads", "wrote")),
        ("no fence after", OF_BLOCKS.format("reads", "wrote")),
        ("written by blocks", OF_BLOCKS.format("writes", "wrote")),
        ("read before any ticket",
         OF_BLOCKS.format("reads", "wrote") + "|" + OF_BLOCKS.format("writes", "read")),
        ("atomic and not", RACE),
    ],
)  # fmt: skip
def test_race_check_finds_what_is_right_by_luck(
    plain_faults: Path, checked_faults: Path, fault: str, message: str
) -> None:
    for order in ORDERS:
        assert lines(plain_faults, fault, **order) == RIGHT
    for order in ORDERS[::4]:
        for line in lines(checked_faults, fault, **order):
            assert re.search(message, line)
            assert "cuda_faults.cu:" in line


@pytest.mark.parametrize("fault", ["missing barrier", "overwritten", "uninitialised"])
def test_race_check_names_what_makes_wrong_numbers(checked_faults: Path, fault: str) -> None:
    for line in lines(checked_faults, fault):
        assert re.search(UNWRITTEN if fault == "uninitialised" else f"{RACE}|{UNWRITTEN}", line)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("divergent barrier", "threads wait at different barriers: 32 threads wait at the barrier"),
        ("early return", "threads wait for one another for ever: 32 threads have ended"),
        ("divergent shuffle", "48 threads wait in the warp operation"),
        ("too many threads", "a launch that no GPU takes: blocks of 1056 threads"),
        ("too much shared", "more dynamic shared memory than allowed: 65536 bytes"),
        ("other stream", "work for another stream than the one that is captured"),
        ("default stream", "the default stream can't be captured"),
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


@pytest.mark.slow
def test_kernels_have_no_races(checked_kernels: Path) -> None:
    """In many orders, each over cases of its own."""
    for seed in range(SEEDS):
        environment = {**os.environ, "IMCL_EMULATED_SEED": str(seed)}
        print(run([checked_kernels, str(10 * SEEDS), str(10 * seed)], env=environment))


def orderings() -> list[str]:
    """The lines of csrc/cuda that order memory, as the emulator names them."""
    names = re.compile(r"^[^/]*\b__(syncthreads|syncwarp|threadfence)\(")
    return [f"{source.name}:{number}" for source in sorted(CUDA.iterdir())
            for number, line in enumerate(source.read_text().splitlines(), 1) if names.match(line)]


@pytest.mark.slow
def test_every_barrier_is_there_for_something(checked_kernels: Path) -> None:
    """The check finds a race where one orders nothing, though all numbers are right."""
    assert len(orderings()) > 20
    for site in orderings():
        done = subprocess.run([checked_kernels, "19"], capture_output=True, text=True,
                              env={**os.environ, "IMCL_EMULATED_WITHOUT": site})
        assert done.returncode != 0, f"{site} is not missed"
        assert re.search(f"a race on|{UNWRITTEN}", done.stdout + done.stderr), site
