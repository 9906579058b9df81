"""Every instruction set the extension was compiled for and this CPU can run.

Which one is used is decided once for each process, so that the tests of the others
run in a process of their own: this file, as a program, is what they run.
"""

from __future__ import annotations

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


if __name__ == "__main__":
    print(operators.build_info.isa_chosen())
    cross_section()
