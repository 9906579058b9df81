"""Cases in which a wrong line of a kernel showed on one implementation, and no other test saw it;
on every implementation, for another may have its own such line."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from conftest import (
    Impl,
    assert_same_bits,
    cases,
    check_consistency,
    check_pairwise,
    leaf,
    matmul_precision,
)
from strategies import PENALTIES, TEACHERS, Matrices
from test_consistency import spec
from test_dependence import Views, check, run

from imcl_fast import functional as F

# Similarities


def test_more_layers_than_a_launch_takes(impl: Impl) -> None:
    xs = [
        Matrices((7 + i % 3, 5), False, seed=i).build(torch.float32, impl.device) for i in range(30)
    ]
    check_pairwise(impl, xs, batched=False)


def test_more_dimensions_than_a_launch_takes(impl: Impl) -> None:
    xs = [
        Matrices((5, 2, 3, 2), False, "sliced", seed=i).build(torch.float32, impl.device)
        for i in range(23)
    ]
    check_pairwise(impl, xs, batched=False)


@pytest.mark.parametrize("shape", [(2, 9, 12), (2, 30, 12)], ids=str)
@pytest.mark.parametrize("odd", ["row", "start", "batch"])
def test_numbers_that_do_not_begin_on_16_bytes(impl: Impl, odd: str, shape) -> None:
    x = Matrices(shape, True).build(torch.float32, impl.device)
    batch, rows, columns = shape
    row, start = columns + (odd == "row"), int(odd == "start")
    each = -(-rows * row // 4) * 4 + (odd == "batch")
    room = torch.zeros(batch * each + 4, device=impl.device)
    y = room.as_strided(shape, (each, row, 1), start).copy_(x)
    for penalty in PENALTIES:
        check_pairwise(impl, [y], batched=True, penalty=penalty)


@pytest.mark.parametrize("rows", [9, 50])
def test_a_repeated_dimension_between_two_that_collapse(impl: Impl, rows: int) -> None:
    x = Matrices((2, rows, 3, 1, 7), True).build(torch.float32, impl.device)
    for penalty in PENALTIES:
        check_pairwise(impl, [x.expand(-1, -1, -1, 4, -1)], batched=True, penalty=penalty)


@pytest.mark.parametrize("rows", [9, 3])
def test_a_dimension_between_two_repeated_ones(impl: Impl, rows: int) -> None:
    """They collapse in x, but not in its gradient."""
    x = Matrices((2, rows, 1, 7, 1), True).build(torch.float32, impl.device)
    check_pairwise(impl, [x.expand(-1, -1, 4, -1, 5)], batched=True)


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("center", [False, True])
def test_many_rows_of_several_tiles(impl: Impl, center: bool, penalty: str) -> None:
    x = Matrices((1, 300, 70), True, offset=0.5).build(torch.float32, impl.device)
    check_pairwise(impl, [x], batched=True, penalty=penalty, center=center)


def test_nothing_of_float64_is_0(impl: Impl) -> None:
    for _ in range(20):
        room = torch.full((2,), 3.5, dtype=torch.float64, device=impl.device)
        del room  # what is allocated next may lie there
        x = torch.zeros(0, 4, 3, dtype=torch.float64, device=impl.device)
        assert F.representation_similarity(x, impl=impl.name).item() == 0


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_rows_are_centred_before_they_are_rounded(impl: Impl, precision: str) -> None:
    x = 1 + 1e-3 * torch.randn(1, 40, 60, generator=torch.Generator().manual_seed(0))
    x = leaf(x.to(impl.device))
    wide = leaf(x.detach().double().cpu())
    with matmul_precision(precision):
        loss = F.representation_similarity(x, center=True, impl=impl.name)
        (got,) = torch.autograd.grad(loss, x)
    truth = F.representation_similarity(wide, center=True, impl="reference")
    (truth,) = torch.autograd.grad(truth, wide)
    assert (got.double().cpu() - truth).norm() <= 5e-3 * truth.norm()


def test_centred_float16_may_be_beyond_its_range(impl: Impl) -> None:
    x = Matrices((1, 9, 40), True).build(torch.float64)
    x = (x.sign() * 60000 + 1000 * x).clamp(-65504, 65504).half().to(impl.device)
    x[0, :, :15] = 60000 + x[0, :, :15] / 64
    check_pairwise(impl, [x], batched=True, center=True)


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("shape", [(2, 40, 4), (2, 40, 30), (2, 20, 50)], ids=str)
def test_the_loss_is_the_same_without_a_gradient(impl: Impl, penalty: str, shape) -> None:
    x = leaf(Matrices(shape, True, offset=100.0).build(torch.float32, impl.device))
    options = {"penalty": penalty, "center": True, "impl": impl.name}
    alone = F.representation_similarity(x.detach(), **options)
    assert_same_bits([alone], [F.representation_similarity(x, **options).detach()])


@pytest.mark.parametrize("penalty", ["square", "signed"])
def test_more_pairs_than_32_bits_count(impl: Impl, penalty: str) -> None:
    x = torch.randn(50_000, 2, generator=torch.Generator().manual_seed(0)).to(impl.device)
    got = F.kernel_similarity(x, penalty=penalty, impl=impl.name)
    unit = x.double() / x.double().norm(dim=1, keepdim=True)
    true = unit.T @ unit if penalty == "square" else unit.sum(0)
    true = (true.square().sum().item() - 50_000) / (50_000 * 49_999)
    assert got.item() == pytest.approx(true, rel=1e-3, abs=1e-8)


# Dependence


def test_parts_of_grams_in_two_launches(impl: Impl) -> None:
    views = Views(6, ((3000,), *[(5,)] * 9, (3000,)), 2).build(torch.float32, impl.device)
    options = {"kernel": "linear", "bandwidth": "median", "estimator": "biased", "normalize": False}
    check(run(views, impl.name, **options), views, **options)


def test_more_samples_than_panels_are_copied_for(impl: Impl) -> None:
    x, y = (
        leaf(torch.randn(1100, n, generator=torch.Generator().manual_seed(n)).to(impl.device))
        for n in (3, 40)
    )
    results = []
    for name in (impl.name, "torch"):
        loss = F.dependence(x, y, kernel="linear", impl=name)
        results.append([loss, *torch.autograd.grad(loss, (x, y))])
    for got, true in zip(*results, strict=True):
        assert (got - true).norm() <= 1e-4 * true.norm()


# Consistency


@pytest.mark.parametrize("divergence", ["kl", "jsd"])
def test_chunks_of_classes_that_lie_apart(impl: Impl, divergence: str) -> None:
    z = torch.randn(12_000, 3, 2, generator=torch.Generator().manual_seed(0)).to(impl.device)
    y = torch.rand(12_000, 2, generator=torch.Generator().manual_seed(1)).to(impl.device)
    for teacher, detach in cases(impl, [*product(TEACHERS, (True, False))], 0):
        check_consistency(
            impl, [z.permute(1, 2, 0)], (y / y.sum(0)).T, teacher=teacher, detach_teacher=detach,
            divergence=divergence,
        )  # fmt: skip


@pytest.mark.parametrize("batch", [3, 40])
@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
def test_pairs_of_a_later_group_have_its_weights(impl: Impl, divergence: str, batch: int) -> None:
    z = torch.randn(4, batch, 5, generator=torch.Generator().manual_seed(0)).to(impl.device)
    check_consistency(
        impl, [z], None, groups=[2, 2], kl_weight=[1.0, 2.0, 3.0, 0.5], teacher="pairwise",
        divergence=divergence, detach_teacher=False,
    )  # fmt: skip


@pytest.mark.parametrize("batch", [3, 40])
@pytest.mark.parametrize("classes", [21, 40])
def test_a_gradient_in_bfloat16_is_the_nearest(impl: Impl, classes: int, batch: int) -> None:
    z = torch.randn(3, batch, classes, generator=torch.Generator().manual_seed(0)).to(impl.device)
    half = leaf(z.bfloat16())
    wide, target = leaf(half.float()), torch.arange(batch, device=impl.device) % classes
    got, true = (
        torch.autograd.grad(F.collaborative_consistency(x, target, impl=impl.name), x)[0]
        for x in (half, wide)
    )
    assert (got != true.bfloat16()).float().mean() < 0.01


@pytest.mark.parametrize("teacher", ["others", "pairwise"])
def test_more_heads_than_a_warp_has_threads(impl: Impl, teacher: str) -> None:
    logits, target = spec(40, 3, 10).build(torch.float32, impl.device)
    check_consistency(impl, [60 * z for z in logits], target, teacher=teacher)


@pytest.mark.parametrize("teacher", TEACHERS)
def test_maxima_that_rise_from_chunk_to_chunk(impl: Impl, teacher: str) -> None:
    z = torch.randn(3, 2, 9000, generator=torch.Generator().manual_seed(0)).to(impl.device)
    z += torch.linspace(0, 8, 9000, device=impl.device)
    target = torch.tensor([5, 8900], device=impl.device)
    check_consistency(impl, list(z), target, teacher=teacher, detach_teacher=False)


def test_an_ignored_sample_of_many_classes_has_no_gradient(impl: Impl) -> None:
    z = torch.randn(3, 2, 9000, generator=torch.Generator().manual_seed(0))
    z = leaf(z.to(impl.device))
    target = torch.tensor([-100, 3], device=impl.device)
    room = torch.full_like(z, math.nan)
    del room
    loss = F.collaborative_consistency(z, target, impl=impl.name)
    (g,) = torch.autograd.grad(loss, z)
    assert not g[:, 0].any() and g[:, 1].any()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_weights_of_classes_that_lie_apart_under_smoothing(impl: Impl, smoothing: float) -> None:
    z = torch.randn(2, 4, 7, generator=torch.Generator().manual_seed(0)).to(impl.device)
    weight = torch.rand(7, 2, generator=torch.Generator().manual_seed(1))[:, 1].to(impl.device)
    for y in (torch.tensor([0, 3, 6, 2], device=impl.device), z[0].softmax(-1)):
        check_consistency(impl, [z], y, weight=weight, label_smoothing=smoothing)


@pytest.mark.parametrize("heads", [1, 2])
def test_a_mixture_of_the_smallest_probability_is_finite(impl: Impl, heads: int) -> None:
    """Its share rounds to 0."""
    z = torch.zeros(heads, 1, 2)
    z[:, :, 1] = -103.0
    z = leaf(z.to(impl.device))
    loss = F.jensen_shannon(z, torch.tensor([0], device=impl.device), impl=impl.name)
    (g,) = torch.autograd.grad(loss, z)
    assert loss.isfinite() and g.isfinite().all()
