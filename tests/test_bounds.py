"""The bounds themselves: wrong results are rejected, on the very cases the other tests judge.

A check is run with a correct implementation, what it compares is recorded, and each of those
comparisons is made again with a wrong result in its place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import product
from typing import NamedTuple
from unittest import mock

import bounds
import conftest
import pytest
import torch
from bounds import assert_accurate
from conftest import (
    DTYPES,
    HALVES,
    Impl,
    check_consistency,
    check_mixture,
    check_pairwise,
    dtype_name,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import (
    PENALTIES,
    REDUCTIONS,
    TEACHERS,
    Heads,
    Matrices,
    features,
    heads,
    layers,
    weights,
)  # fmt: skip
from test_consistency import spec
from test_divergences import KINDS, probabilities
from test_pairwise import FEATURE_SHAPES, WEIGHT_SHAPES
from torch import Tensor

from imcl_fast import implementations, operators

TORCH = Impl("torch", "cpu")
few = settings(max_examples=15)  # each is judged with a dozen wrong results
# A part of a gradient that is missing must be noticed from this share of it on.
NOTICED = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 0.01, torch.bfloat16: 0.04}


class Comparison(NamedTuple):
    what: str
    got: Tensor
    truth: Tensor
    noise: Tensor
    dtype: torch.dtype


def comparisons(check: Callable, *args, judge: bool = True, **options) -> list[Comparison]:
    """What a check compares, and, with ``judge``, finds right."""
    seen = []

    def record(*comparison):
        seen.append(Comparison(*comparison))
        if judge:
            assert_accurate(*comparison)

    with mock.patch.object(conftest, "assert_accurate", record):
        check(TORCH, *args, **options)
    return seen


def is_rejected(one: Comparison, wrong: Tensor) -> bool:
    try:
        assert_accurate(one.what, wrong, *one[2:])
    except AssertionError:
        return True
    return False


def wrong_results(one: Comparison, rough: bool) -> Iterator[tuple[str, Tensor]]:
    got, rows = one.got.detach(), one.noise.numel()
    flat = got.double().contiguous().view(rows, -1)
    if one.what.startswith("gradient"):
        yield from (("zeros", 0 * got), ("-g", -got), ("2 g", 2 * got), ("1.25 g", 1.25 * got))
        if not rough:
            yield "1.1 g", 1.1 * got
    else:
        yield from (("zero", 0 * got), ("2 % more", 1.02 * got), ("2 % less", 0.98 * got))
    size = flat.norm(dim=-1)
    judged = (one.noise.reshape(-1) > 0) & torch.isfinite(one.noise.reshape(-1))
    if judged.any():  # the row of the median size goes missing
        middle = torch.where(judged & (size >= size[judged].median()), size, math.inf).argmin()
        dropped = flat.clone()
        dropped[middle] = 0
        yield "a row dropped", dropped
    for bad in (math.nan, math.inf, -math.inf):
        spoilt = flat.clone()
        spoilt.view(-1)[spoilt.numel() // 2] = bad
        yield f"a {bad}", spoilt


def assert_wrong_results_are_rejected(seen: list[Comparison], *, rough: bool = False) -> None:
    for one in seen:
        if not one.noise.any():
            continue  # exactly 0, as every test says it must be
        for name, wrong in wrong_results(one, rough or one.dtype in HALVES):
            assert is_rejected(one, wrong), f"{one.what}: {name} is accepted"


# --- the pairwise penalties


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@few
@given(specs=layers(features()), penalty=st.sampled_from(PENALTIES), center=st.booleans())
def test_drawn_features(dtype: torch.dtype, specs, penalty: str, center: bool) -> None:
    xs = [spec.build(dtype) for spec in specs]
    seen = comparisons(check_pairwise, xs, batched=True, penalty=penalty, center=center)
    assert_wrong_results_are_rejected(seen)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@few
@given(specs=layers(weights()), penalty=st.sampled_from(PENALTIES))
def test_drawn_weights(dtype: torch.dtype, specs, penalty: str) -> None:
    seen = comparisons(
        check_pairwise, [spec.build(dtype) for spec in specs], batched=False, penalty=penalty
    )
    assert_wrong_results_are_rejected(seen)


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_shapes(dtype: torch.dtype, penalty: str) -> None:
    cases = [(shape, True, center) for shape in FEATURE_SHAPES for center in (False, True)]
    for shape, batched, center in cases + [(shape, False, False) for shape in WEIGHT_SHAPES]:
        if math.prod(shape[1 + batched :]) <= 1 + center:
            continue  # every cosine is 1 or -1: there is no gradient
        shared = 3 * (penalty == "abs" and center)
        x = Matrices(shape, batched, dead=0.1 * batched, offset=0.3 * batched, seed=len(shape),
                     shared=shared).build(dtype)
        options = {"center": True} if center else {}
        seen = comparisons(check_pairwise, [x], batched=batched, penalty=penalty, **options)
        assert_wrong_results_are_rejected(seen)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_precisions(precision: str) -> None:
    for shape in ((70, 300), (96, 40, 3, 3), (130, 50), (256, 320)):
        x = Matrices(shape, False, seed=2).build(torch.float32)
        seen = comparisons(check_pairwise, [x], batched=False, precision=precision)
        assert_wrong_results_are_rejected(seen, rough=precision == "medium")


# --- the consistency


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@few
@given(drawn=heads())
def test_drawn_heads(dtype: torch.dtype, drawn: Heads) -> None:
    logits, target = drawn.build(dtype)
    assert_consistency_is_judged(logits, target, **drawn.options())


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_teachers(dtype: torch.dtype, teacher: str) -> None:
    for detach, (reduction, ignored) in product(
        (True, False), zip(REDUCTIONS, (0.0, 0.4, None), strict=True)
    ):
        logits, target = spec(4, 11, 21, seed=3, ignored=ignored).build(dtype)
        assert_consistency_is_judged(
            logits, target, teacher=teacher, detach_teacher=detach, reduction=reduction,
            ce_weight=[1.0, 0.0, 2.0, 0.5], kl_weight=[0.5, 1.0, 0.0, 3.0],
            label_smoothing=0.1, temperature=3.0,
        )
    for classes in (2, 33, 1003):
        logits, target = spec(3, 5, classes).build(dtype)
        assert_consistency_is_judged(logits, target, teacher=teacher, label_smoothing=0.05)


@pytest.mark.parametrize("name,activation", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_divergences(dtype: torch.dtype, name: str, activation: str) -> None:
    """Of another divergence, beta or activation a result is wrong, too."""
    for i, (teacher, detach) in enumerate(product(TEACHERS, (True, False))):
        logits, target = spec(3, 7, 9, seed=3).build(dtype)
        if activation == "sigmoid":
            target = probabilities(7, 9).to(dtype)
        options = {
            "teacher": teacher, "detach_teacher": detach, "reduction": REDUCTIONS[i % 3],
            "divergence": name, "activation": activation, "beta": 0.3,
        }  # fmt: skip
        assert_consistency_is_judged(logits, target, **options)
        seen = comparisons(check_consistency, logits, target, **options)
        for wrong in ({"divergence": "kl"}, {"divergence": "jsd", "beta": 0.6}):
            others = comparisons(
                check_consistency, logits, target, judge=False, **{**options, **wrong}
            )
            for one, other in zip(seen, others, strict=True):
                difference = (other.truth.double() - one.truth.double()).norm()
                if difference > NOTICED[one.dtype] * one.truth.double().norm():
                    assert is_rejected(one, other.truth), f"{one.what}: takes {wrong}"


@pytest.mark.parametrize("pi", [0.3, [0.5, 0.1, 0.2, 0.2]])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_mixtures(dtype: torch.dtype, pi) -> None:
    for reduction in REDUCTIONS:
        logits, target = spec(3, 7, 9, seed=3, ignored=0.2).build(dtype)
        seen = comparisons(check_mixture, logits, target, pi=pi, reduction=reduction)
        assert_wrong_results_are_rejected(seen)
        others = comparisons(
            check_mixture, logits, target, pi=0.31, reduction=reduction, judge=False
        )
        for one, other in zip(seen, others, strict=True):
            if dtype not in HALVES:
                assert is_rejected(one, other.truth), f"{one.what}: takes another pi"


def assert_consistency_is_judged(logits, target, **options) -> None:
    seen = comparisons(check_consistency, logits, target, **options)
    assert_wrong_results_are_rejected(seen)
    for missing in ("ce_weight", "kl_weight"):
        weights = options.get(missing, 1.0)
        none = [0.0] * len(weights) if isinstance(weights, list) else 0.0
        without = comparisons(
            check_consistency, logits, target, judge=False, **{**options, missing: none}
        )
        for one, other in zip(seen, without, strict=True):
            difference = (other.truth.double() - one.truth.double()).norm()
            if difference > NOTICED[one.dtype] * one.truth.double().norm():
                assert is_rejected(one, other.truth), f"{one.what}: {missing} is ignored"


# --- through the checks, and what is not a number


@pytest.mark.parametrize("factor", [0.0, -1.0, 1.25, math.nan, math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_the_checks_compare_everything(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, factor: float
) -> None:
    """Each of an implementation's results is wrong in turn."""
    right = implementations._PAIRWISE["torch"], implementations._CONSISTENCY["torch"]
    x = Matrices((2, 9, 5, 5), True, seed=1).build(dtype)
    logits, target = spec(3, 5, 9).build(dtype)
    for wrong in range(4):

        def scaled(i, t, wrong=wrong):
            return t * factor if i == wrong else t

        def forward(*args, scaled=scaled):
            loss, state = right[0].forward(*args)
            return scaled(0, loss), state

        def backward(*args, scaled=scaled):
            return [scaled(1, g) for g in right[0].backward(*args)]

        def consistency(*args, scaled=scaled):
            loss, terms, dz = right[1](*args)
            terms = torch.stack([scaled(3, terms[0]), scaled(2, terms[1])])
            return scaled(0, loss), terms, [scaled(1, g) for g in dz]

        fake = operators.Pairwise(forward, backward)
        monkeypatch.setitem(implementations._PAIRWISE, "torch", fake)
        monkeypatch.setitem(implementations._CONSISTENCY, "torch", consistency)
        if wrong < 2:
            with pytest.raises(AssertionError):
                check_pairwise(TORCH, [x], batched=True)
        with pytest.raises(AssertionError):
            check_consistency(TORCH, logits, target)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_truth_or_a_noise_that_is_no_number(bad: float) -> None:
    x, noise = torch.rand(3, 4).double() + 1, torch.full((3,), 1e-9)
    assert_accurate("x", x, x, noise, torch.float32)
    spoilt = x.clone()
    spoilt[1, 2] = bad
    for got, truth in ((x, spoilt), (spoilt, x), (-spoilt, spoilt)):
        with pytest.raises(AssertionError):
            assert_accurate("x", got, truth, noise, torch.float32)
    if math.isnan(bad):
        with pytest.raises(AssertionError):
            assert_accurate("x", spoilt, spoilt, noise, torch.float32)
        with pytest.raises(AssertionError):
            assert_accurate("x", x, x, noise * bad, torch.float32)
    else:  # what is infinite is so in both, and the rest is judged
        assert_accurate("x", spoilt, spoilt, noise, torch.float32)
        with pytest.raises(AssertionError):
            assert_accurate("x", 1.1 * spoilt, spoilt, noise, torch.float32)


def test_a_small_row_counts_as_much_as_a_large_one() -> None:
    x, noise = torch.tensor([[1.0, 2], [3, 4], [1e-9, 0]]), torch.full((3,), 1e-20)
    assert_accurate("x", x, x, noise, torch.float32)
    dropped = x * torch.tensor([[1.0], [1], [0]])
    with pytest.raises(AssertionError, match="roundings off"):
        assert_accurate("x", dropped, x, noise, torch.float32)


def test_most_rows_in_doubt_are_an_error() -> None:
    """Outside of Hypothesis, which draws again."""
    x, noise = torch.ones(4, 5), torch.full((4,), 1e-9)
    noise[0] = math.inf
    assert_accurate("x", x, x, noise, torch.float32)
    noise[1] = math.inf
    with pytest.raises(AssertionError, match="draw others"):
        assert_accurate("x", x, x, noise, torch.float32)


def test_without_noise_it_is_exact() -> None:
    zero, noise = torch.zeros(2, 3), torch.zeros(2)
    assert_accurate("x", zero, zero, noise, torch.bfloat16)
    with pytest.raises(AssertionError, match="exactly 0"):
        assert_accurate("x", zero + 1e-30, zero, noise, torch.bfloat16)


def test_the_bound_bites() -> None:
    """In every dtype ROUNDINGS roundings are a small part of a result."""
    for dtype in DTYPES:
        assert bounds.ROUNDINGS * bounds.unit(dtype) <= bounds.BITE / 2
