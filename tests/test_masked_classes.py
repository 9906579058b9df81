"""Consistency with masked classes: logits of -inf, or of the lowest number of their dtype.

A class masked in every head is as if it were not there, so that the truth is the float64
reference on the logits without its column. Where the heads differ in what they mask, it is the
float64 reference, which is itself tested against plain loops first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as TF
from conftest import DTYPES, HALVES, Impl, assert_same_bits, bits, cases, dtype_name, leaf
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import TEACHERS, Heads, heads, lay_out
from torch import Tensor

from imcl_fast import functional as F

UNITS = 32  # rounding units of float32, of a result's scale
SPELLINGS = ("infinite", "lowest")
KINDS = ("shared", "per head", "both")


class Result(NamedTuple):
    loss: Tensor
    terms: Tensor  # (2, H)
    gradients: list[Tensor]


def run(impl: str, logits: Sequence[Tensor], target: Tensor | None, **options) -> Result:
    logits = [leaf(z) for z in logits]
    before = [bits(z) for z in logits]
    loss, terms = F.collaborative_consistency(
        logits, target, impl=impl, return_terms=True, **options
    )
    gradients = [torch.zeros_like(z) for z in logits]
    if loss.requires_grad:
        gradients = list(torch.autograd.grad(loss.sum(), logits, materialize_grads=True))
    assert all(bits(z).equal(b) for z, b in zip(logits, before, strict=True)), "input written"
    return Result(loss.detach(), torch.stack([*terms.values()]), gradients)


def spelled(z: Tensor, mask: Tensor, dtype: torch.dtype, spelling: str) -> Tensor:
    low = -math.inf if spelling == "infinite" else torch.finfo(dtype).min
    return z.to(dtype).masked_fill(mask, low)


def widened(z: Tensor) -> Tensor:
    """In float64, where the dtype's lowest number is no longer the lowest."""
    return z.double().masked_fill(z <= torch.finfo(z.dtype).min, -math.inf).cpu()


def scale_of(logits: Sequence[Tensor], options: dict) -> float:
    """Magnitude of what the loss and its gradients sum: a logarithm of a probability carries
    a rounding error relative to the largest logit."""
    z = torch.cat([widened(stack).reshape(-1) for stack in logits])
    largest = z.masked_fill(z.isinf(), 0).abs().max().item()
    classes = logits[0].shape[-1]
    temperature = options.get("temperature", 2.0)
    temperature = temperature if isinstance(temperature, list) else [temperature]
    spread = 1 + largest / min(1, *temperature) + math.log(classes)
    weights = [options.get(name, 1.0) for name in ("ce_weight", "kl_weight")]
    count = sum(len(stack) if stack.dim() == 3 else 1 for stack in logits)
    total = sum(sum(map(abs, w)) if isinstance(w, list) else count * w for w in weights)
    return spread**2 * max(1, *temperature) ** 2 * max(total, 1) * logits[0].shape[-2]


def assert_close(what: str, got: Tensor, truth: Tensor, scale: float, dtype: torch.dtype) -> None:
    """Within rounding of the finite truth, and as infinite or not a number as it is."""
    got, truth = got.detach().cpu(), truth.detach().cpu()
    finite = truth.isfinite()
    assert torch.equal(got.isnan(), truth.isnan()), f"{what}: {got}, not {truth}"
    assert torch.equal(got.double()[truth.isinf()], truth[truth.isinf()]), f"{what}: {got}"
    allowed = 1e-12 * scale
    if dtype != torch.float64:
        allowed = UNITS * torch.finfo(torch.float32).eps * scale
    allowed = allowed + torch.zeros_like(truth[finite])
    if got.dtype in HALVES:
        unit = torch.finfo(got.dtype)
        allowed += unit.eps * truth[finite].abs() + unit.smallest_normal * unit.eps
    error = (got.double()[finite] - truth[finite]).abs()
    assert (error <= allowed).all(), f"{what}: {got}, not {truth}"


def assert_result(got: Result, truth: Result, scale: float, dtype: torch.dtype) -> None:
    assert_close("loss", got.loss, truth.loss, scale, dtype)
    assert_close("terms", got.terms, truth.terms, scale, dtype)
    for i, (g, t) in enumerate(zip(got.gradients, truth.gradients, strict=True)):
        assert_close(f"gradient {i}", g, t, scale, dtype)


def check(impl: Impl, logits: Sequence[Tensor], target: Tensor | None, **options) -> Result:
    """Everything against the float64 reference."""
    got = run(impl.name, logits, target, **options)
    truth = run(
        "reference", [widened(z) for z in logits], None if target is None else target.cpu(),
        **options,
    )
    detach = options.get("detach_teacher", True)
    if not truth.terms.isfinite().all() and detach not in (True, [True]):
        # Into a teacher that isn't detached an infinite divergence has no gradient.
        truth = truth._replace(gradients=[torch.zeros(0)] * len(logits))
        got = got._replace(gradients=truth.gradients)
    assert_result(got, truth, scale_of(logits, options), logits[0].dtype)
    return got


class Masked(NamedTuple):
    """Heads, and for each class and head whether it is masked there."""

    heads: Heads
    kind: str
    fraction: float
    spelling: str
    seed: int

    def build(self, dtype: torch.dtype, impl: Impl) -> tuple[list[Tensor], Tensor | None, Tensor]:
        """Logits, target, and the classes that every head masks in every sample, [K]."""
        plain = self.heads._replace(layouts=("contiguous",) * len(self.heads.stacks))
        stacks, target = plain.build(torch.float64)
        generator = torch.Generator().manual_seed(self.seed)
        classes = self.heads.classes
        shared = torch.rand(classes, generator=generator) < self.fraction
        if self.kind == "per head":
            shared[:] = False
        open_ = torch.randint(0, classes, (), generator=generator)
        shared[open_] = False
        logits = []
        for z, layout in zip(stacks, self.heads.layouts, strict=True):
            mask = shared.expand_as(z)
            if self.kind != "shared":
                mask = mask | (torch.rand(z.shape, generator=generator) < self.fraction / 4)
                mask[..., open_] = False
            layout = layout if not layout.startswith("expanded") else "sliced"
            filled = spelled(z, mask, dtype, self.spelling)
            logits.append(lay_out(filled.to(impl.device), layout))
        if target is not None:
            # A label that every head masks is infinite in all of them: that has its own test.
            target = torch.where((target >= 0) & shared[target.clamp(min=0)], open_, target)
            target = target.to(impl.device)
        return logits, target, shared


@st.composite
def masked(draw: st.DrawFn, kinds: Sequence[str] = KINDS) -> Masked:
    return Masked(
        draw(heads()),
        draw(st.sampled_from(kinds)),
        draw(st.sampled_from([0.1, 0.5, 0.9])),
        draw(st.sampled_from(SPELLINGS)),
        draw(st.integers(0, 10**6)),
    )


# --- the reference itself


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("teacher", TEACHERS)
def test_reference_is_the_definition(teacher: str, spelling: str) -> None:
    """Plain loops over the classes that are there; infinite where a head masks what it is
    taught."""
    t, count, classes = 1.7, 3, 6
    generator = torch.Generator().manual_seed(5)
    z = torch.randn(count, 4, classes, generator=generator, dtype=torch.float64)
    target = torch.tensor([1, 3, 0, 5])
    mask = torch.zeros(z.shape, dtype=torch.bool)
    mask[:, 0, 2] = True  # sample 0: in every head
    mask[1, 1, 2] = True  # sample 1: in one
    mask[2, 2, 4] = True  # sample 2: in the last
    mask[:, 3, 5] = True  # sample 3: in every head, its label

    def softmax(row: list[float]) -> list[float]:
        total = sum(math.exp(v) for v in row)
        return [math.exp(v) / total for v in row]

    def log(p: float) -> float:
        return math.log(p) if p > 0 else -math.inf

    def divergence(q: list[float], p: list[float]) -> float:
        return sum(a * (math.log(a) - log(b)) for a, b in zip(q, p, strict=True) if a > 0)

    rows = z.masked_fill(mask, -math.inf).tolist()
    for b in range(4):
        heads_of = [rows[h][b] for h in range(count)]
        p = [softmax([v / t for v in row]) for row in heads_of]
        ce = [-log(softmax(row)[target[b]]) for row in heads_of]
        kl = []
        for h in range(count):
            among = [j for j in range(count) if teacher == "mean" or j != h]
            if teacher == "pairwise":
                kl.append(sum(divergence(p[j], p[h]) for j in among) / len(among))
            elif teacher == "final":
                kl.append(divergence(p[-1], p[h]) if h < count - 1 else 0.0)
            else:
                mean = [sum(heads_of[j][k] for j in among) / len(among) for k in range(classes)]
                kl.append(divergence(softmax([v / t for v in mean]), p[h]))
        got = run(
            "reference", list(spelled(z, mask, torch.float64, spelling)[:, b : b + 1]),
            target[b : b + 1], teacher=teacher, temperature=t,
        )  # fmt: skip
        assert got.terms[0].tolist() == pytest.approx(ce, rel=1e-12)
        assert got.terms[1].tolist() == pytest.approx([t * t * v for v in kl], rel=1e-12)
        assert got.loss.item() == pytest.approx(sum(ce) + t * t * sum(kl), rel=1e-12)
        assert all(g.isfinite().all() for g in got.gradients)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_reference_is_torchs_cross_entropy(smoothing: float) -> None:
    z = torch.randn(2, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    target = torch.tensor([0, 1, -100, 3, 6])
    z[..., 4], z[0, 1, 1] = -math.inf, -math.inf
    for reduction in ("none", "sum", "mean"):
        options = {"label_smoothing": smoothing, "reduction": reduction}
        expected = sum(TF.cross_entropy(head, target, **options) for head in z)
        got = run("reference", [*z], target, kl_weight=0.0, **options)
        torch.testing.assert_close(got.loss, expected)
        for head, gradient in zip(z, got.gradients, strict=True):
            head = leaf(head)
            loss = TF.cross_entropy(head, target, **options).sum()
            torch.testing.assert_close(gradient, *torch.autograd.grad(loss, head))


def test_reference_is_torchs_divergence() -> None:
    """Of a teacher without masks, to a head with one: infinite, its gradient p - q."""
    teacher, head = torch.randn(2, 5, 7, dtype=torch.float64)
    head[1, 2] = -math.inf
    got = run("reference", [head, teacher], None, teacher="final", temperature=1.0)
    p, q = head.softmax(-1), teacher.softmax(-1)
    expected = TF.kl_div(head.log_softmax(-1), q, reduction="none").sum(-1)
    assert expected[1] == math.inf
    torch.testing.assert_close(got.terms[1, 0], expected.mean())
    torch.testing.assert_close(got.gradients[0], (p - q) / 5)


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("low", [-math.inf, torch.finfo(torch.float64).min])
def test_reference_is_differentiable_twice(teacher: str, detach: bool, low: float) -> None:
    z = torch.randn(3, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    target = torch.tensor([0, 3])

    def loss(z: Tensor) -> Tensor:
        column = torch.full_like(z[..., :1], low)
        return F.collaborative_consistency(
            torch.cat([z[..., :2], column, z[..., 2:]], -1), torch.where(target > 1, 4, target),
            teacher=teacher, detach_teacher=detach, impl="reference",
        )  # fmt: skip

    if not detach:  # a detached teacher is no constant to finite differences
        assert torch.autograd.gradcheck(loss, leaf(z))
    first = torch.autograd.grad(loss(x := leaf(z)), x, create_graph=True)[0]
    (second,) = torch.autograd.grad(first.square().sum(), x)
    plain = torch.autograd.grad(
        F.collaborative_consistency(
            x, target, teacher=teacher, detach_teacher=detach, impl="reference"
        ), x, create_graph=True,
    )[0]  # fmt: skip
    torch.testing.assert_close(first, plain)
    torch.testing.assert_close(second, torch.autograd.grad(plain.square().sum(), x)[0])


# --- drawn


def has_float32s_teachers(drawn: Masked, logits: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Whether a teacher's probabilities are float32's. Where one is 0 there and not in float64, a
    class that a head alone masks costs nothing, and infinitely much in the reference."""
    if dtype == torch.float64 or drawn.kind == "shared":
        return True
    z = torch.cat([widened(stack).reshape(-1) for stack in logits])
    z = z[z.isfinite()]
    lowest = min(drawn.heads.temperature, default=1.0)
    return not len(z) or (z.max() - z.min()).item() / lowest < 80


@given(drawn=masked(), dtype=st.sampled_from(DTYPES))
def test_drawn(impl: Impl, drawn: Masked, dtype: torch.dtype) -> None:
    logits, target, _ = drawn.build(dtype, impl)
    assume(has_float32s_teachers(drawn, logits, dtype))
    check(impl, logits, target, **drawn.heads.options())


@given(drawn=masked(["shared"]), dtype=st.sampled_from(DTYPES))
def test_a_class_masked_by_all_is_not_there(
    impl: Impl, drawn: Masked, dtype: torch.dtype
) -> None:
    logits, target, mask = drawn.build(dtype, impl)
    options = drawn.heads.options() | {"label_smoothing": 0.0}
    got = run(impl.name, logits, target, **options)
    open_ = ~mask
    if target is not None:
        place = open_.cumsum(0) - 1
        target = torch.where(target >= 0, place[target.cpu().clamp(min=0)], target.cpu())
    truth = run("reference", [widened(z)[..., open_] for z in logits], target, **options)
    assert all((g[..., mask] == 0).all() for g in got.gradients)
    got = got._replace(gradients=[g[..., open_] for g in got.gradients])
    assert_result(got, truth, scale_of(logits, options), dtype)


@given(drawn=masked(), dtype=st.sampled_from(DTYPES))
def test_both_spellings_mean_the_same(impl: Impl, drawn: Masked, dtype: torch.dtype) -> None:
    results = []
    for spelling in SPELLINGS:
        logits, target, _ = drawn._replace(spelling=spelling).build(dtype, impl)
        got = run(impl.name, logits, target, **drawn.heads.options())
        results.append([got.loss, got.terms, *(g.contiguous() for g in got.gradients)])
    assert_same_bits(*results)


# --- chunks and tiles


def blanked(
    count: int, classes: int, part: str, dtype: torch.dtype, impl: Impl, spelling: str
) -> tuple[list[Tensor], Tensor]:
    """Heads of which two thirds of the classes are masked: chunks of all sizes among them."""
    z = torch.randn(count, 2, classes, generator=torch.Generator().manual_seed(classes))
    third = max(classes // 3, 1)
    open_ = {"leading": classes - third, "middle": 0, "trailing": 0, "ends": third}[part]
    mask = torch.ones(classes, dtype=torch.bool)
    mask[open_ : open_ + third] = False
    if part == "middle":
        mask[classes - third :] = False
    target = torch.tensor([open_, open_ + third - 1])
    z = spelled(z, mask.expand_as(z), dtype, spelling)
    return [head.to(impl.device) for head in z], target.to(impl.device)


PARTS = ("leading", "middle", "trailing", "ends")


@pytest.mark.parametrize("classes", [3, 15, 16, 17, 255, 257, 1025, 4099])
def test_class_counts(impl: Impl, classes: int) -> None:
    among = product(PARTS, TEACHERS, (2, 3, 6), (torch.float32, torch.float16))
    for i, (part, teacher, count, dtype) in enumerate(cases(impl, among, classes)):
        logits, target = blanked(count, classes, part, dtype, impl, SPELLINGS[i % 2])
        check(impl, logits, target, teacher=teacher)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("teacher", TEACHERS)
def test_whole_chunks_are_masked(impl: Impl, teacher: str, part: str) -> None:
    turn = PARTS.index(part) + TEACHERS.index(teacher)
    for count, classes, detach, spelling in cases(
        impl, ((1, 100_003, True, "infinite"), (1, 99_999, True, "lowest"),
               (3, 50_000, True, "lowest"), (3, 50_001, False, "infinite")), turn,
    ):  # fmt: skip
        logits, target = blanked(count, classes, part, torch.float32, impl, spelling)
        got = check(impl, logits, target, teacher=teacher, detach_teacher=detach)
        assert got.loss.isfinite() and all(g.isfinite().all() for g in got.gradients)


@pytest.mark.parametrize("teacher", TEACHERS)
def test_heads_mask_different_chunks(impl: Impl, teacher: str) -> None:
    """A teacher may rule out all a head allows so far, or allow all that it has ruled out."""
    classes = 50_000
    for masks in cases(
        impl, ((slice(0, 30_000), slice(0)), (slice(0), slice(0, 30_000)),
               (slice(0, 25_000), slice(40_000, None))), TEACHERS.index(teacher),
    ):  # fmt: skip
        z = torch.randn(3, 1, classes, generator=torch.Generator().manual_seed(3))
        z[0, :, masks[0]] = z[2, :, masks[1]] = -math.inf
        check(
            impl, [head.to(impl.device) for head in z],
            torch.tensor([30_001], device=impl.device), teacher=teacher,
        )  # fmt: skip


# --- where the definition is not finite


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_a_head_masks_what_it_is_taught(impl: Impl, dtype: torch.dtype, spelling: str) -> None:
    z = torch.randn(3, 4, 9, generator=torch.Generator().manual_seed(4))
    mask = torch.zeros(z.shape, dtype=torch.bool)
    mask[0, 1, 5] = True
    logits = [head.to(impl.device) for head in spelled(z, mask, dtype, spelling)]
    target = torch.tensor([0, 1, 2, 3], device=impl.device)
    for teacher in cases(impl, TEACHERS, DTYPES.index(dtype)):
        got = check(impl, logits, target, teacher=teacher)
        # A mean of all heads rules the class out, as the head itself does.
        assert got.loss.isinf() != (teacher == "mean")
        assert all(g.isfinite().all() for g in got.gradients)
        spared = check(impl, logits, target, teacher=teacher, kl_weight=[0.0, 1.0, 1.0])
        assert spared.loss.isfinite()
        assert torch.equal(spared.terms.isinf(), got.terms.isinf())
        for detach in (True, False):
            without = check(
                impl, logits, target, teacher=teacher, kl_weight=0.0, detach_teacher=[detach]
            )
            expected = sum(TF.cross_entropy(head.double(), target) for head in logits)
            torch.testing.assert_close(without.loss.double(), expected, rtol=1e-5, atol=1e-5)
            plain = run(impl.name, logits, target, kl_weight=0.0, detach_teacher=[detach])
            assert all(g.isfinite().all() for g in plain.gradients)


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_masked_label_has_an_infinite_cross_entropy(
    impl: Impl, count: int, spelling: str
) -> None:
    z = torch.randn(count, 3, 7, generator=torch.Generator().manual_seed(count))
    mask = torch.zeros(z.shape, dtype=torch.bool)
    mask[..., 2] = True
    logits = [head.to(impl.device) for head in spelled(z, mask, torch.float32, spelling)]
    target = torch.tensor([0, 2, 4], device=impl.device)
    for smoothing, labels in ((0.0, target), (0.1, target.clamp(max=0))):
        got = check(impl, logits, labels, label_smoothing=smoothing)
        assert (got.terms[0] == math.inf).all() and got.loss == math.inf
        assert all(g.isfinite().all() for g in got.gradients)
        spared = check(impl, logits, labels, label_smoothing=smoothing, ce_weight=0.0)
        assert spared.loss.isfinite() and (spared.terms[0] == math.inf).all()


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("count", [1, 3])
def test_nothing_is_left(impl: Impl, count: int, spelling: str, teacher: str) -> None:
    """A sample of masked classes only has no loss, and leaves the others theirs."""
    z = torch.randn(count, 3, 7, generator=torch.Generator().manual_seed(count))
    mask = torch.zeros(z.shape, dtype=torch.bool)
    mask[:, 1] = True
    logits = [head.to(impl.device) for head in spelled(z, mask, torch.float32, spelling)]
    target = torch.tensor([0, 2, 4], device=impl.device)
    got = run(impl.name, logits, target, teacher=teacher, reduction="none")
    assert got.loss.isnan().tolist() == [False, True, False]
    assert all(g.isnan().any(-1).tolist() == [False, True, False] for g in got.gradients)
    ignored = torch.tensor([0, -100, 4], device=impl.device)
    got = run(impl.name, logits, ignored, teacher=teacher)
    assert got.loss.isfinite() and all(g.isfinite().all() for g in got.gradients)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("teacher", TEACHERS)
def test_other_non_finite_numbers_beside_masks(impl: Impl, teacher: str, bad: float) -> None:
    turn = TEACHERS.index(teacher)
    for count, classes, spelling in cases(impl, product((1, 3), (7, 40), SPELLINGS), turn):
        z = torch.randn(count, 2, classes, generator=torch.Generator().manual_seed(classes))
        mask = torch.zeros(z.shape, dtype=torch.bool)
        mask[..., 2] = mask[..., -1] = True
        logits = [head.to(impl.device) for head in spelled(z, mask, torch.float32, spelling)]
        for place in (0, 2):
            logits[0][1, place] = bad
            for target in (torch.tensor([0, 1], device=impl.device), None):
                if target is None and count == 1:
                    continue  # no part of the loss looks at the logits
                got = run(impl.name, logits, target, teacher=teacher)
                assert not got.loss.isfinite()


# --- large numbers that are not masks


@pytest.mark.parametrize("low", [-1e4, -1e9, -1e30, -3e38])
@pytest.mark.parametrize("teacher", TEACHERS)
def test_very_negative_logits(impl: Impl, teacher: str, low: float) -> None:
    """In every head: their sum may overflow, and counts for nothing."""
    turn = TEACHERS.index(teacher)
    among = product((2, 3, 6), (1.0, 2.0, 4.0), (True, False), (torch.float32, torch.bfloat16))
    for count, t, detach, dtype in cases(impl, among, turn):
        z = torch.randn(count, 3, 9, generator=torch.Generator().manual_seed(count)).to(dtype)
        z[..., 3], z[..., 7] = low, low
        logits = [head.to(impl.device) for head in z]
        target = torch.tensor([0, 1, -100], device=impl.device)
        options = {"teacher": teacher, "temperature": t, "detach_teacher": detach}
        got = run(impl.name, logits, target, **options)
        open_ = torch.tensor([0, 1, 2, 4, 5, 6, 8])
        truth = run("reference", [widened(h)[..., open_] for h in logits], target.cpu(), **options)
        assert all((g[..., [3, 7]] == 0).all() for g in got.gradients)
        got = got._replace(gradients=[g[..., open_] for g in got.gradients])
        assert_result(got, truth, scale_of([z[..., open_]], options) * count, dtype)


@pytest.mark.parametrize("low", [-1e9, -3e30, -1e36])
@pytest.mark.parametrize("count", [1, 2, 6])
def test_samples_of_very_negative_logits_alone(impl: Impl, count: int, low: float) -> None:
    z = torch.full((count, 3, 9), low)
    z[:, 1, 4] *= 2
    target = torch.tensor([0, 4, 2])
    options = {"temperature": 0.5}
    got = run(impl.name, list(z.to(impl.device)), target.to(impl.device), **options)
    truth = run("reference", [head.double() for head in z], target, **options)
    torch.testing.assert_close(got.loss.double().cpu(), truth.loss, rtol=1e-5, atol=0)
    for g, t in zip(got.gradients, truth.gradients, strict=True):
        torch.testing.assert_close(g.double().cpu(), t, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [-1e9, -1e5, 1e5, 1e9])
@pytest.mark.parametrize("kept", [True, False])
def test_one_large_logit_is_not_subtracted_from_a_sum(
    impl: Impl, size: float, kept: bool
) -> None:
    """The other heads' mean can't be had back from a sum that it was rounded away in."""
    for count in cases(impl, (2, 3, 5, 7), int(kept)):
        z = torch.randn(count, 3, 9, generator=torch.Generator().manual_seed(count))
        z[0, :, 4] = size
        logits = [head.to(impl.device) for head in z]
        q = z[1:].double().mean(0).div(2).softmax(-1)
        p = (z[0].double() / 2).softmax(-1)
        if kept:
            got = run(impl.name, logits, None, reduction="sum")
            torch.testing.assert_close(
                got.gradients[0].cpu().double(), 2 * (p - q), rtol=1e-5, atol=1e-6
            )
        else:
            logits = [head.detach() for head in logits]
            loss, terms = F.collaborative_consistency(
                logits, None, impl=impl.name, return_terms=True
            )
        if not kept:
            log_p = (z[0].double() / 2).log_softmax(-1)
            kl = 4 * (q * (q.log() - log_p)).sum(-1).mean()
            assert terms["kl"][0].item() == pytest.approx(kl.item(), rel=1e-5)


def test_the_lowest_of_a_narrower_dtype(impl: Impl) -> None:
    """Promoted to float32 it would be a number as any, and hardly masked."""
    z = torch.randn(3, 4, 9, generator=torch.Generator().manual_seed(6)).half()
    z[..., 3] = torch.finfo(torch.float16).min
    logits = [z[0].float(), z[1], z[2]]
    logits = [head.to(impl.device) for head in logits]
    target = torch.tensor([0, 1, 2, 4], device=impl.device)
    got = run(impl.name, logits, target)
    open_ = torch.tensor([0, 1, 2, 4, 5, 6, 7, 8])
    place = torch.tensor([0, 1, 2, 3])
    truth = run("reference", [h.double().cpu()[..., open_] for h in logits], place)
    assert all((g[..., 3] == 0).all() for g in got.gradients)
    got = got._replace(gradients=[g[..., open_] for g in got.gradients])
    assert_result(got, truth, scale_of([z[..., open_]], {}), torch.float32)
    for dtype in (torch.float16, torch.bfloat16):
        low = z[1].float().to(dtype)
        low[:, 3] = torch.finfo(dtype).min
        wide = logits[0].masked_fill(logits[0] < -1e4, torch.finfo(torch.float32).min)
        for pair in ([low.to(impl.device), wide], [wide, low.to(impl.device)]):
            terms = F.collaborative_consistency(
                pair, target, label_smoothing=0.1, return_terms=True, impl=impl.name
            )[1]
            assert terms["cross_entropy"].tolist() == [math.inf, math.inf]  # of a masked class


# --- many samples, and many classes: both are taken in pieces


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("teacher", TEACHERS)
def test_classes_of_many_samples_are_masked(impl: Impl, teacher: str, detach: bool) -> None:
    z = torch.randn(3, 40, 7, generator=torch.Generator().manual_seed(0))
    z[:, 3::5, 2] = -math.inf
    target = torch.full((40,), 4, device=impl.device)
    got = check(impl, [*z.to(impl.device)], target, teacher=teacher, detach_teacher=detach)
    assert got.loss.isfinite() and all(g.isfinite().all() for g in got.gradients)


@pytest.mark.parametrize("batch", [4, 40])
@pytest.mark.parametrize("teacher", TEACHERS)
def test_a_class_that_one_head_masks_in_many_samples(impl: Impl, teacher: str, batch: int) -> None:
    """Of a head that learns from nobody, and of which others do."""
    z = torch.randn(3, batch, 7, generator=torch.Generator().manual_seed(0))
    z[0, 3::5, 2] = -math.inf
    target = torch.full((batch,), 4, device=impl.device)
    for detach in (True, False):
        got = check(
            impl, [*z.to(impl.device)], target, teacher=teacher, detach_teacher=detach,
            kl_weight=[0.0, 1.0, 1.0],
        )  # fmt: skip
        assert got.loss.isfinite() and got.terms[1, 1:].isfinite().all()


@pytest.mark.parametrize("weight", [0.0, [0.0, 1.0, 1.0]], ids=str)
@pytest.mark.parametrize("teacher", TEACHERS)
def test_a_sample_s_gradient_is_that_of_few_samples(
    impl: Impl, teacher: str, weight: float | list[float]
) -> None:
    z = torch.randn(3, 40, 7, generator=torch.Generator().manual_seed(0)).to(impl.device)
    z[0, 3::5, 2] = -math.inf
    target = torch.full((40,), 4, device=impl.device)
    options = {"teacher": teacher, "detach_teacher": [False], "kl_weight": weight}
    many, few = (run(impl.name, [*z[:, :n]], target[:n], **options) for n in (40, 8))
    for g, alone in zip(many.gradients, few.gradients, strict=True):
        torch.testing.assert_close(5 * g[:8], alone, equal_nan=True)
    assert all(g.isfinite().any(-1).all() for g in many.gradients)


@pytest.mark.parametrize("batch, classes", [(3, 7), (40, 7), (3, 40)])
def test_what_has_no_weight_may_be_infinite_in_every_sample(
    impl: Impl, batch: int, classes: int
) -> None:
    z = torch.randn(2, batch, classes, generator=torch.Generator().manual_seed(0)).to(impl.device)
    z[0, 1, 2] = -math.inf
    target = torch.full((batch,), 2, device=impl.device)
    for ce, kl in (([0.0, 1.0], 0.0), (0.0, [0.0, 1.0])):
        loss, terms = F.collaborative_consistency(
            z, target, ce_weight=ce, kl_weight=kl, reduction="none", return_terms=True,
            impl=impl.name,
        )  # fmt: skip
        assert loss.isfinite().all() and terms["cross_entropy"][0].isinf()


@pytest.mark.parametrize("batch", [4, 40])
def test_a_head_without_weight_may_have_no_class(impl: Impl, batch: int) -> None:
    z = torch.randn(3, batch, 7, generator=torch.Generator().manual_seed(0)).to(impl.device)
    z[0, 1] = -math.inf
    z = leaf(z)
    loss = F.collaborative_consistency(
        z, None, teacher="final", kl_weight=[0.0, 1.0, 1.0], impl=impl.name
    )
    (g,) = torch.autograd.grad(loss, z)
    assert loss.isfinite() and g.isfinite().all() and not g[0].any()


@pytest.mark.parametrize("batch", [4, 40])
def test_a_sample_without_a_label_may_have_no_class(impl: Impl, batch: int) -> None:
    """Soft labels of 0 ask for nothing, not even for a class."""
    z = torch.randn(1, batch, 7, generator=torch.Generator().manual_seed(0)).to(impl.device)
    z[:, 1] = -math.inf
    target = torch.full((batch, 7), 1 / 7, device=impl.device)
    target[1] = 0
    for name in (impl.name, "reference"):
        z = leaf(z)
        loss = F.collaborative_consistency(z, target, reduction="none", impl=name)
        (g,) = torch.autograd.grad(loss.sum(), z)
        assert loss[1] == 0 and not g[:, 1].any(), name
        assert loss.isfinite().all() and g.isfinite().all(), name


def test_a_divergence_that_became_nothing_stays_so(impl: Impl) -> None:
    """Infinite in the first chunk, of classes that the last one leaves no probability."""
    z = torch.zeros(2, 1, 40_000, device=impl.device)
    z[0, :, 3], z[:, :, -1] = -math.inf, 4000
    assert F.collaborative_consistency(z, None, temperature=1.0, impl=impl.name) == 0


@pytest.mark.parametrize("divergence", ["kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("detach", [True, False])
def test_the_lowest_number_masks_in_every_chunk(
    impl: Impl, detach: bool, teacher: str, divergence: str
) -> None:
    z = torch.zeros(2, 1, 5000 if impl.interpreted else 40_000)
    z[:, :, 1] = 1.0
    z[0, :, 3] = z[:, :, 4] = torch.finfo(torch.float32).min
    wide = leaf(z.double().masked_fill(z < -1e30, -math.inf))
    z = leaf(z.to(impl.device))
    got, truth = (
        F.collaborative_consistency(
            x, None, teacher=teacher, divergence=divergence, detach_teacher=detach, impl=name
        )
        for x, name in ((z, impl.name), (wide, "reference"))
    )
    torch.testing.assert_close(got.detach().cpu().double(), truth.detach(), rtol=1e-4, atol=1e-5)
    if truth.isfinite():
        (g,) = torch.autograd.grad(got, z)
        (exact,) = torch.autograd.grad(truth, wide)
        torch.testing.assert_close(g.cpu().double(), exact, rtol=1e-3, atol=1e-6)
