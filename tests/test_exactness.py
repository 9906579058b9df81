"""Bit for bit: inputs on which every step is exact leave an implementation no choice.

Rows of 4^m ones and minus ones have norms of 2^m, and cosines that are fractions of powers of
two; two rows have a mean over pairs that is one, too. Logits that are 0 but for one large
one, or all alike, have probabilities of 0, 1 and 1/2^m. What order the numbers are added
in, in how many lanes, threads and tiles, then makes no difference.
"""

from __future__ import annotations

import hashlib
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
import torch
from conftest import (
    HALVES,
    Impl,
    assert_same_bits,
    bits,
    cases,
    dtype_name,
    leaf,
    threads,
    usable,
)
from strategies import PENALTIES, TEACHERS, Matrices, lay_out
from torch import Tensor

import imcl_fast
from imcl_fast import functional as F
from imcl_fast import operators

CPP = Impl("cpp", "cpu")
LEVELS = tuple(operators.build_info.isa_levels()) if operators.build_info else ()
DTYPES = (torch.float32, *HALVES)
LAYOUTS = ("contiguous", "channels_last", "transposed", "sliced")
LARGE = 1024.0  # exp(-LARGE / 8) is 0 in float32


def signs(shape: tuple[int, ...], ones: int, seed: int = 0) -> Tensor:
    """Rows (..., D) with ``ones`` elements of one size, a power of two, and zeros."""
    generator = torch.Generator().manual_seed(seed)
    place = torch.rand(shape, generator=generator).argsort(-1) < ones
    sign = 2.0 * torch.randint(0, 2, shape, generator=generator) - 1
    return place * sign * 2.0 ** torch.randint(-2, 3, (*shape[:-1], 1), generator=generator)


def pairs_of_rows(dtype: torch.dtype) -> Iterator[Tensor]:
    """Features (4, 2, *spatial) whose penalties and gradients are exact in dtype."""
    for spatial, ones in (((2, 2), 4), ((5, 4), 16), ((9, 9), 64), ((33, 32), 256), ((4, 70), 64)):
        columns = spatial[0] * spatial[1]
        ones = min(ones, 16) if dtype == torch.bfloat16 else ones  # 1 - c takes 8 bits
        yield signs((4, 2, columns), ones, columns).view(4, 2, *spatial).to(dtype)


def run_pairwise(x: Tensor, impl: str, **options) -> list[Tensor]:
    x = leaf(x)
    loss = F.representation_similarity(x, impl=impl, **options)
    return [loss, *torch.autograd.grad(1024 * loss, x)]


def heads_of(teacher: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits (H, 8, 16) and labels: a large one for each head and sample, or all alike."""
    count = {"others": 3, "mean": 4, "final": 3, "pairwise": 5}[teacher]
    generator = torch.Generator().manual_seed(count)
    target = torch.randint(0, 16, (8,), generator=generator)
    # No two heads of a sample are of one mind: means of theirs tie.
    classes = torch.rand(8, 16, generator=generator).argsort(-1)[:, :count].T
    yield LARGE * torch.nn.functional.one_hot(classes, 16), target
    yield torch.randint(-4, 5, (count, 8, 1), generator=generator).expand(count, 8, 16), target


def run_consistency(z: Tensor, target: Tensor, teacher: str, impl: str) -> list[Tensor]:
    z = leaf(z)
    loss = F.collaborative_consistency(
        z, target, teacher=teacher, label_smoothing=0.5, ce_weight=0.5, impl=impl
    )
    return [loss, *torch.autograd.grad(loss, z)]


def exact(results: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """float64 results, which must be numbers of the loss' and the gradient's dtype."""
    rounded = [results[0].float(), *(g.to(dtype) for g in results[1:])]
    assert all(torch.equal(r.double(), t) for r, t in zip(rounded, results, strict=True))
    return [r + 0.0 for r in rounded]  # -0 is 0


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_pairwise_is_exact(impl: Impl, dtype: torch.dtype, penalty: str) -> None:
    turn = DTYPES.index(dtype) + PENALTIES.index(penalty)
    for x, layout in cases(impl, product(pairs_of_rows(dtype), LAYOUTS), turn):
        truth = exact(run_pairwise(x.double(), "reference", penalty=penalty), dtype)
        got = run_pairwise(lay_out(x.to(impl.device), layout), impl.name, penalty=penalty)
        assert_same_bits([t.cpu() + 0.0 for t in got], truth)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_sums_of_many_pairs_are_exact(impl: Impl, penalty: str) -> None:
    """Only the share of a pair is rounded, and the loss: a unit in the last place each."""
    for shape, ones in cases(impl, (((40, 60), 16), ((70, 300), 64), ((96, 40), 16)), 0):
        x = signs(shape, ones)
        truth = F.kernel_similarity(x.double(), penalty=penalty, impl="reference")
        x = x.to(impl.device)
        got = F.kernel_similarity(x, penalty=penalty, impl=impl.name)
        error = abs(got.double().item() - truth.item())
        assert error <= 2**-23 * abs(truth.item())
        for layout in ("transposed", "sliced"):
            same = F.kernel_similarity(lay_out(x, layout), penalty=penalty, impl=impl.name)
            assert_same_bits([same], [got])


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_consistency_is_exact(impl: Impl, dtype: torch.dtype, teacher: str) -> None:
    among = product(heads_of(teacher), ("contiguous", "transposed", "sliced"))
    for (z, target), layout in cases(impl, among, DTYPES.index(dtype)):
        z = z.to(impl.device, dtype)
        truth = run_consistency(z.cpu().double(), target, teacher, "reference")
        got = run_consistency(lay_out(z, layout), target.to(impl.device), teacher, impl.name)
        large = bool((z == LARGE).any())
        if large and teacher in ("final", "pairwise"):  # the others' has a logarithm of 2
            assert got[0].item() == truth[0].item()
        # exp(-LARGE) is not 0 in float64, but is next to 1/16.
        expected = exact([truth[0].float().double(), truth[1].float().double()], dtype)
        assert_same_bits([got[1].cpu() + 0.0], [expected[1]])


# --- instruction sets


def digest() -> str:
    """Of everything exact that the C++ kernels compute."""
    seen = hashlib.sha256()
    for dtype in DTYPES:
        results = [r for x, penalty, layout in product(pairs_of_rows(dtype), PENALTIES, LAYOUTS)
                   for r in run_pairwise(lay_out(x, layout), "cpp", penalty=penalty)]
        results += [F.kernel_similarity(signs(shape, 16).to(dtype), penalty=penalty, impl="cpp")
                    for shape in ((40, 60), (70, 300), (96, 40), (65, 17))
                    for penalty in PENALTIES]
        results += [run_consistency(z.to(dtype), target, teacher, "cpp")[1]
                    for teacher in TEACHERS for z, target in heads_of(teacher)]
        for r in results:
            seen.update(bits(r + 0.0).numpy().tobytes())
    return seen.hexdigest()


@pytest.mark.parametrize("level", LEVELS)
def test_every_level_gives_the_same_bits(level: str) -> None:
    usable(CPP)
    root = str(Path(imcl_fast.__file__).parents[1])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "IMCL_FAST_ISA": level, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [level, digest()]


@pytest.mark.parametrize("count", [1, 2])
def test_every_number_of_threads_gives_the_same_bits(count: int) -> None:
    usable(CPP)
    expected = digest()
    with threads(count):
        assert digest() == expected


# --- rows far from 0


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("form", ["primal", "tiles", "dual", "halves"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_mean_of_centred_rows_is_taken_off_whole(
    impl: Impl, penalty: str, form: str, layout: str
) -> None:
    """And not only as much of it as one float32 holds, which stays in a gradient that should sum
    to 0 in each row. On a GPU a mean is one number."""
    shapes = {"primal": (2, 16, 8, 8), "tiles": (2, 40, 6, 6), "dual": (2, 64, 5, 5),
              "halves": (1, 200, 32, 32)}  # fmt: skip
    worst = {0.0: 2e-6, 1e3: 2e-6, 1e4: 3e-5}
    if impl.name not in ("cpp", "torch"):
        shapes, worst = {**shapes, "halves": (1, 6, 9, 9)}, {1e3: 1e-3}  # interpreted
    shape = shapes[form]
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(shape, generator=generator)
    level = torch.rand(*shape[:2], 1, 1, generator=generator)
    for offset, allowed in worst.items():
        x = lay_out(noise + offset * (1 + level), layout).to(impl.device)
        truth = leaf(x.double().cpu())
        F.representation_similarity(
            truth, penalty=penalty, center=True, impl="reference"
        ).backward()
        found = leaf(x)
        F.representation_similarity(found, penalty=penalty, center=True, impl=impl.name).backward()
        error = (found.grad.double().cpu() - truth.grad).norm() / truth.grad.norm()
        assert error < allowed, (offset, error)


# --- logits that have something in common


@pytest.mark.parametrize("labels", ["index", "smooth", "soft", "weighted"])
@pytest.mark.parametrize("classes", [5, 90, 20_000])
def test_what_logits_have_in_common_costs_no_digits(impl: Impl, labels: str, classes: int) -> None:
    """A softmax knows nothing of it. The largest logits come last, so that maxima rise from chunk
    to chunk; all sums of logits are exact."""
    batch = 3 if classes > 90 else 20
    generator = torch.Generator().manual_seed(classes)
    z = 2 * torch.randn(3, batch, classes, generator=generator).sort(-1).values
    z = (z * 256).round() / 256
    weight = 0.5 + torch.rand(classes, generator=generator)
    target = torch.randint(0, classes, (batch,), generator=generator)
    if labels == "soft":
        target = torch.rand(batch, classes, generator=generator).square()
        target[0] = 0
    given = {
        "label_smoothing": 0.3 * (labels in ("smooth", "weighted")),
        "weight": weight.to(impl.device) if labels == "weighted" else None,
    }

    def run(z: Tensor, name: str, teacher: str) -> list[Tensor]:
        z = leaf(z)
        loss = F.collaborative_consistency(
            z, target.to(z.device), teacher=teacher, temperature=2.0, detach_teacher=False,
            reduction="none", impl=name, **given,
        )  # fmt: skip
        return [loss, *torch.autograd.grad(loss.sum(), z)]

    for teacher in cases(impl, TEACHERS, len(labels) + classes):
        truth = run(z.double(), "reference", teacher)
        for offset in cases(impl, (1024.0, 128.0, 0.0), 0):
            found = run((z + offset).to(impl.device), impl.name, teacher)
            for got, true in zip(found, truth, strict=True):
                error = (got.cpu() - true).norm() / true.norm()
                assert error < 5e-7, (teacher, offset, error)


# --- batches


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("center", [False, True])
def test_a_batch_is_its_samples(impl: Impl, center: bool, penalty: str) -> None:
    """On any numbers, the kernels' gradient of a sample of four is a fourth of its own."""
    whole = [Matrices(s, True, offset=0.3, seed=5).build(torch.float32, impl.device)
             for s in ((4, 9, 5, 5), (4, 33, 4, 3), (4, 70, 30))]
    if impl.name == "torch":
        pytest.skip("torch: PyTorch's products of one matrix and of four may differ")
    for x in cases(impl, whole, PENALTIES.index(penalty) + center):
        _, g = run_pairwise(x, impl.name, penalty=penalty, center=center)
        for b in cases(impl, range(4), center):
            _, alone = run_pairwise(x[b : b + 1], impl.name, penalty=penalty, center=center)
            assert_same_bits([alone], [4 * g[b : b + 1]])


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("detach", [False, True])
def test_a_batch_of_logits_is_its_samples(impl: Impl, detach: bool, teacher: str) -> None:
    if impl.name == "torch":
        pytest.skip("torch: PyTorch's softmax of a few rows may differ from that of many")
    z = torch.randn(4, 8, 37, generator=torch.Generator().manual_seed(0)).to(impl.device)
    target = torch.arange(8, device=impl.device)

    def run(z: Tensor, target: Tensor) -> list[Tensor]:
        z = leaf(z)
        loss = F.collaborative_consistency(
            z, target, teacher=teacher, detach_teacher=detach, reduction="none", impl=impl.name
        )
        return [loss, *torch.autograd.grad(loss.sum(), z)]

    loss, g = run(z, target)
    for b in cases(impl, range(8), 3 * detach):
        one = slice(b, b + 1)
        assert_same_bits(run(z[:, one].clone(), target[one]), [loss[one], g[:, one]])


@pytest.mark.parametrize(
    ("shape", "channels_last"), [((2, 64, 5, 5), False), ((2, 16, 8, 8), True)]
)
def test_the_mean_of_every_second_number_is_taken_off_whole(shape, channels_last: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    level = 1e4 * (1 + torch.rand(*shape[:2], 1, 1, generator=generator))
    x = torch.randn(shape, generator=generator) + level
    order = (0, 2, 3, 1) if channels_last else (0, 1, 2, 3)
    room = torch.full([*(shape[i] for i in order), 2], math.nan)
    x = room[..., 0].copy_(x.permute(order)).permute([order.index(i) for i in range(4)])
    found, truth = leaf(x), leaf(x.double().contiguous())
    for each, name in ((found, "cpp"), (truth, "reference")):
        F.representation_similarity(each, center=True, impl=name).backward()
    assert (found.grad - truth.grad).norm() < 3e-5 * truth.grad.norm()


if __name__ == "__main__":
    print(operators.build_info.isa_chosen(), digest())
