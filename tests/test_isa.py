"""Every instruction set the extension was compiled for and this CPU can run.

Which one is used is decided once for each process, so that the tests of the others
run in a process of their own: this file, as a program, is what they run.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import (
    DTYPES,
    Impl,
    assert_same_bits,
    check_consistency,
    check_pairwise,
    leaf,
    threads,
    usable,
)
from strategies import PENALTIES, TEACHERS, Heads, Matrices
from test_sanitizers import check_symbols

import imcl_fast
from imcl_fast import functional as F
from imcl_fast import operators

CPP = Impl("cpp", "cpu")
LEVELS = tuple(operators.build_info.isa_levels()) if operators.build_info else ()


def run(level: str) -> subprocess.CompletedProcess:
    root = str(Path(imcl_fast.__file__).parents[1])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ, "IMCL_FAST_ISA": level, "PYTHONPATH": os.pathsep.join(paths)
    }
    return subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=300
    )


def test_there_are_levels() -> None:
    usable(CPP)
    assert "baseline" in LEVELS
    assert set(LEVELS) <= set(operators.build_info.isa_compiled())
    # Dot products of bfloat16 are not quicker than those of float32 everywhere.
    best = [level for level in LEVELS if level != "avx512bf16"][0]
    wanted = os.environ.get("IMCL_FAST_ISA")
    chosen = operators.build_info.isa_chosen()
    assert chosen == wanted if wanted else chosen in (LEVELS[0], best)


def test_objects_define_nothing_that_two_levels_share() -> None:
    """Those that this extension was linked of; see test_sanitizers."""
    folder = Path(imcl_fast.__file__).parents[1] / "build/objects"
    compiled = operators.build_info.isa_compiled() if operators.build_info else ()
    objects = [path for isa in compiled for path in sorted(folder.glob(f"*_{isa}.o"))]
    if not objects:
        pytest.skip("no objects are left of the build: the extension was built elsewhere")
    check_symbols(objects)


@pytest.mark.parametrize("level", LEVELS)
def test_level(level: str) -> None:
    done = run(level)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == level


def test_an_unknown_level_is_an_error_that_names_those_there_are() -> None:
    usable(CPP)
    done = run("mmx")
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert "IMCL_FAST_ISA" in last and "mmx" in last and "baseline" in last


def cross_section() -> None:
    """A few shapes of each kind: remainders of every vector width, one and many tiles."""
    torch.set_num_threads(1)  # a process beside others; the last check raises it
    for dtype in DTYPES:
        for penalty in PENALTIES:
            for shape in ((2, 9, 5, 5), (2, 37, 3, 3), (1, 70, 75), (2, 18, 2)):
                for layout in ("contiguous", "channels_last", "sliced"):
                    spec = Matrices(shape, True, layout, dead=0.1, offset=1.0, seed=1,
                                    shared=3 * (penalty == "abs"))
                    check_pairwise(
                        CPP, [spec.build(dtype)], batched=True, penalty=penalty,
                        center=layout != "contiguous",
                    )
            for shape in ((96, 40, 3, 3), (70, 301), (130, 50), (65, 1, 3, 3), (33, 19, 1, 1)):
                xs = [Matrices(shape, False, seed=2).build(dtype)]
                check_pairwise(CPP, xs, batched=False, penalty=penalty)
        for teacher in TEACHERS:
            for classes in (1, 10, 67, 1000):
                for layout in ("contiguous", "transposed"):
                    drawn = Heads(
                        5, classes, (0, 3), (layout, layout), (4,), (2.0,), (teacher,), (False,),
                        (1.0,) * 4, (0.5,) * 4, ignored=0.2, size=4.0, seed=3,
                    )
                    logits, target = drawn.build(dtype)
                    check_consistency(CPP, logits, target, **drawn.options())
        # Pairs of more columns than are packed at a time, with the channels last.
        many = Matrices((1, 37, 20, 15), True, "channels_last")
        check_pairwise(CPP, [many.build(dtype)], batched=True)
        for bad in (math.nan, math.inf):
            x = Matrices((1, 9, 40), True).build(dtype)
            x[0, 1, 37] = bad
            assert not F.representation_similarity(x, impl="cpp").isfinite()
            z = torch.randn(40, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
            z[1, 3] = bad
            for rows in (z, z[:2]):  # in lanes of samples, and one by one
                y = torch.zeros(len(rows), dtype=torch.long)
                assert not F.collaborative_consistency([rows], y, impl="cpp").isfinite()
    z = torch.randn(1, 8, 40, generator=torch.Generator().manual_seed(0))
    z.view(torch.int32)[0, 0, 3] = 0x7FC001FF  # a NaN whose lowest bits are none of a usual one
    assert F.collaborative_consistency(z, torch.zeros(8, dtype=torch.long), impl="cpp").isnan()
    x = Matrices((96, 320), False).build(torch.float32)
    for precision in ("highest", "high", "medium"):
        check_pairwise(CPP, [x], batched=False, precision=precision)
    xs = [leaf(Matrices(shape, True).build(torch.float32)) for shape in ((3, 64, 100), (2, 70, 20))]
    results = []
    for count in (1, 2):
        with threads(count):
            loss = F.representation_similarity(xs, impl="cpp")
            results.append([loss, *torch.autograd.grad(loss, xs)])
    assert_same_bits(*results)


def chosen(level: str) -> subprocess.CompletedProcess:
    code = "from imcl_fast import operators; print(operators.build_info.isa_chosen())"
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "IMCL_FAST_ISA": level},
        capture_output=True, text=True,
    )  # fmt: skip


def test_a_level_that_this_cpu_lacks_is_refused() -> None:
    usable(CPP)
    lacking = sorted(set(operators.build_info.isa_compiled()) - set(LEVELS))
    if not lacking:
        pytest.skip("this CPU has all levels")
    for level in lacking:
        done = chosen(level)
        assert done.returncode == 1 and level in done.stderr.splitlines()[-1]


def test_no_level_at_all_is_the_best_there_is() -> None:
    usable(CPP)
    done = chosen("")
    assert done.returncode == 0 and done.stdout.strip() in LEVELS, done.stderr


if __name__ == "__main__":
    print(operators.build_info.isa_chosen())
    cross_section()
