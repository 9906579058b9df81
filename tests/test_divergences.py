"""Other divergences than KL(q || p): reverse KL, JSD, those of independent labels, and the
generalised Jensen-Shannon divergence of a label and heads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as TF
from conftest import (
    DTYPES,
    Impl,
    assert_layout,
    assert_same_bits,
    cases,
    check_consistency,
    check_mixture,
    dtype_name,
    leaf,
    threads,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import REDUCTIONS, TEACHERS, Heads, Targets, heads, lay_out, targets
from test_consistency import check_gradient_of_unknown, spec
from test_masked_classes import check as check_masked
from test_masked_classes import masked
from torch import Tensor

import imcl_fast
from imcl_fast import calls
from imcl_fast import functional as F

OTHER = ("reverse_kl", "jsd")
KINDS = tuple(product(("kl", *OTHER), ("softmax", "sigmoid")))[1:]  # all but the default


def numbers(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(shape, generator=generator, dtype=torch.float64)


def probabilities(*shape: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator, dtype=torch.float64)


def divergences(z: Tensor, impl: str = "reference", **options) -> Tensor:
    """The term of every head, (H,), without labels."""
    return F.collaborative_consistency(z, None, return_terms=True, impl=impl, **options)[1]["kl"]


# --- the reference itself, from other definitions


def plain_teachers(z: Tensor, h: int, teacher: str) -> list[Tensor]:
    """Logits of the teachers of head h, of z/T (H, B, K)."""
    others = [z[j] for j in range(len(z)) if j != h]
    if teacher == "pairwise":
        return others
    if teacher == "final":
        return [z[-1]] if h < len(z) - 1 else []
    return [torch.stack(others if teacher == "others" else list(z)).mean(0)]


def generalized_jsd(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """As those who distil language models write it (arXiv 2306.13649), (B,)."""
    student, teacher = student.log_softmax(-1), teacher.log_softmax(-1)
    mixture = torch.logsumexp(
        torch.stack([student + math.log(1 - beta), teacher + math.log(beta)]), 0
    )
    of_teacher = TF.kl_div(mixture, teacher, reduction="none", log_target=True).sum(-1)
    of_student = TF.kl_div(mixture, student, reduction="none", log_target=True).sum(-1)
    return beta * of_teacher + (1 - beta) * of_student


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("name", OTHER)
def test_reference_is_the_definition(name: str, teacher: str) -> None:
    t, beta, z = 1.7, 0.3, numbers(4, 5, 6)
    got = divergences(z, divergence=name, beta=beta, teacher=teacher, temperature=t)
    for h in range(4):
        expected = torch.zeros(5, dtype=torch.float64)
        taught_by = plain_teachers(z / t, h, teacher)
        for q in taught_by:
            if name == "jsd":
                each = generalized_jsd(z[h] / t, q, beta)
            else:
                p = (z[h] / t).log_softmax(-1)
                each = TF.kl_div(q.log_softmax(-1), p.exp(), reduction="none").sum(-1)
            expected += each / len(taught_by)
        torch.testing.assert_close(got[h], t * t * expected.mean())


def test_reference_of_jsd_near_its_limits() -> None:
    """beta -> 0 is KL, beta -> 1 reverse KL, times the beta and 1 - beta it vanishes with."""
    z = numbers(3, 5, 6)
    small = 1e-7
    low, high = (divergences(z, divergence="jsd", beta=b) for b in (small, 1 - small))
    torch.testing.assert_close(low / small, divergences(z), rtol=1e-4, atol=0)
    expected = divergences(z, divergence="reverse_kl")
    torch.testing.assert_close(high / small, expected, rtol=1e-4, atol=0)


def test_reference_of_jsd_is_symmetric_and_bounded() -> None:
    z = 40 * numbers(2, 50, 3)
    one, other = divergences(z, divergence="jsd", temperature=1.0)
    torch.testing.assert_close(one, other)
    assert 0 < one <= math.log(2)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reference_is_torchs_binary_cross_entropy(reduction: str) -> None:
    """Value and gradient, summed over the labels and averaged over the samples."""
    z, y, weight, share = numbers(3, 5, 4), probabilities(5, 4), probabilities(4), probabilities(5)
    z.requires_grad_()
    for smoothing, labels in ((0.0, y), (0.2, 0.8 * y + 0.1)):
        got = F.collaborative_consistency(
            z, y, kl_weight=0, activation="sigmoid", weight=weight, sample_weight=share,
            label_smoothing=smoothing, reduction=reduction, impl="reference",
        )  # fmt: skip
        each = sum(
            TF.binary_cross_entropy_with_logits(head, labels, weight, reduction="none")
            for head in z
        )
        each = each.sum(-1) * share
        mean = each.sum() / share.sum()
        expected = {"none": each, "sum": each.sum(), "mean": mean}[reduction]
        torch.testing.assert_close(got, expected)
        gradients = (torch.autograd.grad(loss.sum(), z) for loss in (got, expected))
        torch.testing.assert_close(*gradients)
    plain = F.collaborative_consistency(
        z[0], y, activation="sigmoid", reduction="mean", impl="reference"
    )
    torch.testing.assert_close(plain / 4, TF.binary_cross_entropy_with_logits(z[0], y))


@pytest.mark.parametrize("teacher", TEACHERS)
def test_reference_is_torchs_divergence_of_bernoullis(teacher: str) -> None:
    t, z = 1.7, numbers(3, 5, 4)
    bernoulli = torch.distributions.Bernoulli
    for name in ("kl", "reverse_kl"):
        got = divergences(
            z, divergence=name, activation="sigmoid", teacher=teacher, temperature=t
        )
        for h in range(3):
            taught_by = [bernoulli(logits=q) for q in plain_teachers(z / t, h, teacher)]
            p, expected = bernoulli(logits=z[h] / t), torch.zeros((), dtype=torch.float64)
            for q in taught_by:
                pair = (q, p) if name == "kl" else (p, q)
                each = torch.distributions.kl_divergence(*pair).sum(-1).mean()
                expected = expected + each / len(taught_by)
            torch.testing.assert_close(got[h], t * t * expected)


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("name", ("kl", *OTHER))
def test_reference_of_one_label_is_two_classes(name: str, teacher: str) -> None:
    z, y = numbers(3, 5, 1), probabilities(5, 1)
    options = {
        "divergence": name, "teacher": teacher, "label_smoothing": 0.1, "return_terms": True,
        "impl": "reference",
    }  # fmt: skip
    got = F.collaborative_consistency(z, y, activation="sigmoid", **options)
    two = torch.cat([z, torch.zeros_like(z)], -1), torch.cat([y, 1 - y], -1)
    expected = F.collaborative_consistency(*two, **options)
    torch.testing.assert_close(got, expected)


def scaled_js(labels: Tensor, logits: Tensor, pi: Sequence[float]) -> Tensor:
    """The authors' loss, (B,): sum of pi_i KL(p_i || m) over Z."""
    p = [labels, *logits.softmax(-1)]
    m = sum(w * each for w, each in zip(pi, p, strict=True))
    kl = [TF.kl_div(m.log(), each, reduction="none").sum(-1) for each in p]
    total = sum(w * each for w, each in zip(pi, kl, strict=True))
    return -total / ((1 - pi[0]) * math.log(1 - pi[0]))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_reference_of_the_mixture_is_the_authors_loss(kind: str, reduction: str) -> None:
    z, y, share = numbers(3, 5, 4), torch.tensor([3, 0, 2, 2, 1]), probabilities(5)
    labels = TF.one_hot(y, 4).double()
    if kind == "probabilities":
        y = labels = numbers(5, 4).softmax(-1)
    for pi, spelled in ((0.4, [0.4, 0.2, 0.2, 0.2]), ([0.1, 0.2, 0.3, 0.4],) * 2):
        got = F.jensen_shannon(
            z, y, pi=pi, label_smoothing=0.1, sample_weight=share, reduction=reduction,
            impl="reference",
        )  # fmt: skip
        each = share * scaled_js(0.9 * labels + 0.1 / 4, z, spelled)
        mean = each.sum() / share.sum()
        torch.testing.assert_close(got, {"none": each, "sum": each.sum(), "mean": mean}[reduction])
    z_norm = -0.6 * math.log(0.6)
    got, expected = (
        F.jensen_shannon(z, y, pi=0.4, normalize=n, impl="reference") for n in (False, True)
    )
    torch.testing.assert_close(got, z_norm * expected)


def test_reference_of_the_mixture_near_its_limits() -> None:
    """Of one head: cross entropy, and 1 - p_y."""
    z, y = numbers(1, 5, 4), torch.tensor([3, 0, 2, 2, 1])
    low, high = (F.jensen_shannon(z, y, pi=pi, impl="reference") for pi in (1e-7, 1 - 1e-12))
    torch.testing.assert_close(low, TF.cross_entropy(z[0], y), rtol=1e-5, atol=0)
    of_label = z[0].softmax(-1).gather(1, y.unsqueeze(1))
    torch.testing.assert_close(high, (1 - of_label).mean(), rtol=0.1, atol=0)


def test_reference_of_the_mixture_is_a_loss_and_a_consistency() -> None:
    """Proposition of the authors: JS of the label and the mean head, and JS of the heads."""
    z, y, pi = numbers(2, 5, 4), torch.tensor([3, 0, 2, 2, 1]), 0.3
    whole = F.jensen_shannon(z, y, pi=pi, normalize=False, impl="reference")
    mean = z.softmax(-1).mean(0).log()
    of_label = F.jensen_shannon(mean, y, pi=pi, normalize=False, impl="reference")
    among = divergences(z, divergence="jsd", beta=0.5, temperature=1.0)[0]
    torch.testing.assert_close(whole, of_label + (1 - pi) * among)


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("name,activation", KINDS)
def test_reference_is_differentiable_twice(name: str, activation: str, teacher: str) -> None:
    z, y = numbers(3, 2, 3), probabilities(2, 3)
    z[1, 0, 2] = 0.25

    def loss(x: Tensor) -> Tensor:
        return F.collaborative_consistency(
            torch.cat([x, torch.full_like(x[..., :1], -math.inf)], -1),
            torch.cat([y, torch.zeros_like(y[:, :1])], -1), divergence=name, beta=0.3,
            activation=activation, teacher=teacher, detach_teacher=False, impl="reference",
        )  # fmt: skip

    assert torch.autograd.gradcheck(loss, leaf(z))
    assert torch.autograd.gradgradcheck(loss, leaf(z))


def test_reference_of_the_mixture_is_differentiable_twice() -> None:
    z, y = leaf(numbers(2, 2, 3)), torch.tensor([2, 0])

    def loss(x: Tensor) -> Tensor:
        column = torch.full_like(x[..., :1], -math.inf)
        return F.jensen_shannon(torch.cat([x, column], -1), y, impl="reference")

    assert torch.autograd.gradcheck(loss, z) and torch.autograd.gradgradcheck(loss, z)


# --- drawn


class Other(NamedTuple):
    """Heads with a target and weights, divergences of the groups, and an activation."""

    targets: Targets
    divergence: tuple[str, ...]
    beta: tuple[float, ...]
    activation: str

    def build(self, dtype: torch.dtype, device: str) -> tuple[list[Tensor], Tensor | None, dict]:
        logits, target, weights = self.targets.build(dtype, device)
        options = {
            **self.targets.heads.options(), **weights, "divergence": list(self.divergence),
            "beta": list(self.beta), "activation": self.activation,
        }  # fmt: skip
        return logits, target, options


@st.composite
def others(draw: st.DrawFn) -> Other:
    activation = draw(st.sampled_from(["softmax", "sigmoid"]))
    drawn = draw(targets())
    if activation == "sigmoid" and drawn.kind == "indices":
        drawn = drawn._replace(kind="probabilities")
    groups = len(drawn.heads.groups)
    names = st.sampled_from(("kl", *OTHER, *OTHER))
    betas = st.sampled_from([0.1, 0.5, 0.75])
    return Other(
        drawn,
        tuple(draw(st.lists(names, min_size=groups, max_size=groups))),
        tuple(draw(st.lists(betas, min_size=groups, max_size=groups))),
        activation,
    )


@settings(max_examples=3 * settings.default.max_examples)
@given(drawn=others(), dtype=st.sampled_from(DTYPES))
def test_drawn(impl: Impl, drawn: Other, dtype: torch.dtype) -> None:
    logits, target, options = drawn.build(dtype, impl.device)
    check_consistency(impl, logits, target, **options)


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("name,activation", KINDS)
def test_teachers(impl: Impl, name: str, activation: str, detach: bool, teacher: str) -> None:
    turn = TEACHERS.index(teacher) + 5 * KINDS.index((name, activation)) + 2 * detach
    for dtype, reduction in cases(impl, product(DTYPES, REDUCTIONS), turn):
        logits, target = spec(4, 11, 21, seed=3, ignored=0.2).build(dtype, impl.device)
        if activation == "sigmoid":
            target = probabilities(11, 21).to(dtype).to(impl.device)
        check_consistency(
            impl, logits, target, teacher=teacher, detach_teacher=detach, reduction=reduction,
            divergence=name, beta=0.3, activation=activation, label_smoothing=0.1,
            ce_weight=[1.0, 0.0, 2.0, 0.5], kl_weight=[0.5, 1.0, 0.0, 3.0], temperature=3.0,
        )  # fmt: skip


@pytest.mark.parametrize("classes", [1, 2, 3, 10, 31, 33, 127, 1000, 9000])
def test_class_counts(impl: Impl, classes: int) -> None:
    """Also more classes than a tile, or a chunk, holds."""
    among = product(KINDS, TEACHERS, (True, False))
    for i, ((name, activation), teacher, detach) in enumerate(cases(impl, among, classes)):
        logits, target = spec(3, 5, classes).build(DTYPES[i % 4], impl.device)
        if activation == "sigmoid":
            target = probabilities(5, classes).to(impl.device)
        check_consistency(
            impl, logits, target, divergence=name, activation=activation, teacher=teacher,
            detach_teacher=detach,
        )  # fmt: skip


@pytest.mark.parametrize("teacher", [name for name in TEACHERS if name != "pairwise"])
@pytest.mark.parametrize("name", ["kl", "reverse_kl", "jsd"])
def test_the_largest_logit_is_in_the_last_chunk(impl: Impl, name: str, teacher: str) -> None:
    """What was summed over the chunks before is then taken relative to another maximum."""
    if impl.name == "triton" and impl.interpreted:
        pytest.skip("the interpreter takes minutes for so many chunks")
    logits, _ = spec(2, 3, 9000).build(torch.float32, impl.device)
    logits = [torch.sort(z, -1).values for z in logits]
    check_consistency(impl, logits, None, divergence=name, teacher=teacher)


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_head_counts(impl: Impl, count: int) -> None:
    for (name, activation), teacher in cases(impl, product(KINDS, TEACHERS), count):
        logits, _ = spec(count, 6, 19, stacked=True).build(torch.float32, impl.device)
        check_consistency(
            impl, logits, None, divergence=name, activation=activation, teacher=teacher
        )


@pytest.mark.parametrize("layout", ["transposed", "reversed", "sliced", "expanded_last"])
def test_layouts(impl: Impl, layout: str) -> None:
    for stacks, (name, activation) in cases(
        impl, product(((0, 0, 0, 0), (1, 3)), KINDS), len(layout)
    ):
        drawn = spec(4, 10, 23)._replace(stacks=stacks, layouts=(layout,) * len(stacks))
        logits, target = drawn.build(torch.float32, impl.device)
        if activation == "sigmoid":
            target = lay_out(probabilities(10, 23), layout).to(impl.device)
        check_consistency(impl, logits, target, divergence=name, activation=activation)


@pytest.mark.parametrize("teacher", ["others", "pairwise"])
@pytest.mark.parametrize("batch", [3, 40])
def test_a_head_s_part_of_the_jsd_has_its_digits_near_the_limit(
    impl: Impl, batch: int, teacher: str
) -> None:
    """1 - beta is no difference of rounded numbers."""
    z = numbers(2, batch, 9)
    beta = 1 - 1e-5

    def gradient(z: torch.Tensor, name: str) -> torch.Tensor:
        z = leaf(z)
        loss = F.collaborative_consistency(
            z, None, divergence="jsd", beta=beta, teacher=teacher, impl=name
        )
        return torch.autograd.grad(loss, z)[0]

    truth = gradient(z, "reference")
    error = (gradient(z.float().to(impl.device), impl.name).cpu() - truth).norm() / truth.norm()
    assert error < 1e-5


def test_equal_heads_have_no_divergence(impl: Impl) -> None:
    z = leaf(torch.randn(9, 14, device=impl.device))
    for (name, activation), teacher in product((("kl", "softmax"), *KINDS), TEACHERS):
        loss = F.collaborative_consistency(
            [z, z, z], None, teacher=teacher, divergence=name, activation=activation,
            impl=impl.name,
        )  # fmt: skip
        (g,) = torch.autograd.grad(loss, z)
        assert abs(loss.item()) < 1e-5
        assert g.abs().max() < 1e-6


# --- dense outputs


@pytest.mark.parametrize("class_dim", [1, -1])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_dense(impl: Impl, activation: str, class_dim: int) -> None:
    """Every pixel is a sample, whatever lies between its classes."""
    rows, y, share = numbers(3, 2 * 3 * 5, 4), probabilities(2 * 3 * 5, 4), probabilities(2, 3, 5)
    for name, reduction in cases(impl, product(("kl", *OTHER), REDUCTIONS), class_dim):
        options = {
            "divergence": name, "activation": activation, "reduction": reduction,
            "detach_teacher": False,
        }  # fmt: skip
        wide = leaf(rows)
        truth = F.collaborative_consistency(
            wide, y, sample_weight=share.flatten(), impl="reference", **options
        )
        (expected,) = torch.autograd.grad(truth.sum(), wide)
        z, labels = rows.view(3, 2, 3, 5, 4), y.view(2, 3, 5, 4)
        if class_dim == 1:
            z, labels = z.movedim(-1, 2).contiguous(), labels.movedim(-1, 1).contiguous()
        z = leaf(z.to(impl.device))
        got = F.collaborative_consistency(
            z, labels.to(impl.device), sample_weight=share.to(impl.device), class_dim=class_dim,
            impl=impl.name, **options,
        )  # fmt: skip
        torch.testing.assert_close(got.cpu().flatten(), truth.flatten())
        (g,) = torch.autograd.grad(got.sum(), z)
        assert_layout(g, z)
        g = g.movedim(2, -1) if class_dim == 1 else g
        torch.testing.assert_close(g.cpu().reshape(expected.shape), expected)


# --- masks, and samples that don't count


@given(drawn=masked(), dtype=st.sampled_from(DTYPES), kind=st.sampled_from(KINDS))
def test_masked_classes(impl: Impl, drawn, dtype: torch.dtype, kind: tuple[str, str]) -> None:
    """Where a reverse KL is infinite it has no gradient."""
    logits, target, _ = drawn.build(dtype, impl)
    name, activation = kind
    if activation == "sigmoid":
        target = None
    options = {**drawn.heads.options(), "divergence": name, "activation": activation}
    if name == "reverse_kl":
        options["detach_teacher"] = False  # what the check takes for that
    check_masked(impl, logits, target, **options)


def test_jsd_of_masked_classes_is_finite(impl: Impl) -> None:
    """Of heads that have no class in common, log 2, and its gradient is 0 or finite."""
    z = torch.tensor([[[0.0, 0, -math.inf, -math.inf]], [[-math.inf, -math.inf, 0, 0]]])
    z = leaf(z.to(impl.device))
    for detach in (True, False):
        loss = F.collaborative_consistency(
            z, None, divergence="jsd", temperature=1.0, kl_weight=[1, 0], teacher="pairwise",
            detach_teacher=detach, impl=impl.name,
        )  # fmt: skip
        (g,) = torch.autograd.grad(loss, z)
        assert loss.item() == pytest.approx(math.log(2))
        assert g.isfinite().all() and (g[z == -math.inf] == 0).all()


@pytest.mark.parametrize("gap", [-100.0, -101.9, -102.5, -103.2, -103.6, -103.9, -104.5])
def test_probabilities_of_which_shares_are_0(impl: Impl, gap: float) -> None:
    """A share of the smallest numbers rounds to 0 where these don't, and with it a mixture."""
    target = torch.tensor([0], device=impl.device)
    for count, pi in ((1, 0.5), (5, 0.5), (5, 0.9), (2, 0.1)):
        z = leaf(torch.tensor([[[0.0, gap]]]).expand(count, 1, 2).contiguous().to(impl.device))
        losses = [F.jensen_shannon(z, target, pi=pi, impl=impl.name)]
        if count > 1:
            losses += [
                F.collaborative_consistency(
                    z, None, divergence="jsd", beta=beta, temperature=1.0, teacher=teacher,
                    detach_teacher=False, impl=impl.name,
                )
                for beta in (0.1, 0.5) for teacher in ("others", "pairwise")
            ]  # fmt: skip
        for loss in losses:
            (g,) = torch.autograd.grad(loss, z, retain_graph=True)
            assert loss.item() == pytest.approx(0, abs=1e-6)
            assert g.abs().max().item() == pytest.approx(0, abs=1e-6)


def test_a_masked_label_does_not_hold(impl: Impl) -> None:
    """Masked in every head, and not to hold: as if it were not there."""
    z, y = numbers(3, 5, 4), probabilities(5, 4)
    for low in (-math.inf, torch.finfo(torch.float64).min):
        column = torch.full_like(z[..., :1], low)
        with_it = leaf(torch.cat([z, column], -1).to(impl.device))
        without = leaf(z.to(impl.device))
        labels = torch.cat([y, torch.zeros_like(y[:, :1])], -1)
        results = []
        for x, t in ((with_it, labels), (without, y)):
            loss = F.collaborative_consistency(
                x, t.to(impl.device), activation="sigmoid", impl=impl.name
            )
            results.append((loss, torch.autograd.grad(loss, x)[0]))
        torch.testing.assert_close(results[0][0], results[1][0])
        torch.testing.assert_close(results[0][1][..., :4], results[1][1])
        assert (results[0][1][..., 4] == 0).all()


@pytest.mark.parametrize("name,activation", KINDS)
def test_what_doesnt_count_may_hold_anything(impl: Impl, name: str, activation: str) -> None:
    z, y = numbers(3, 6, 7).float().to(impl.device), probabilities(6, 7).float().to(impl.device)
    share = torch.tensor([1.0, 2, 0, 1, 1, 1], device=impl.device)
    dirty = z.clone()
    dirty[0, 2, 3], dirty[1, 2] = math.nan, math.inf
    results = []
    for x in (leaf(z), leaf(dirty)):
        loss = F.collaborative_consistency(
            x, y, divergence=name, activation=activation, sample_weight=share, impl=impl.name
        )
        results.append([loss, *torch.autograd.grad(loss, x)])
    assert_same_bits(*results)
    assert (results[0][1][:, 2] == 0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name,activation", KINDS)
def test_non_finite_input_gives_non_finite_loss(
    impl: Impl, name: str, activation: str, bad: float
) -> None:
    turn = KINDS.index((name, activation)) + 3 * math.isnan(bad)
    for teacher, head in cases(impl, product(TEACHERS, range(3)), turn):
        z = numbers(3, 4, 7).float().to(impl.device)
        z[head, 1, 2] = bad
        loss = F.collaborative_consistency(
            z, None, teacher=teacher, divergence=name, activation=activation, impl=impl.name
        )
        assert not torch.isfinite(loss), (teacher, head)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_zero_size_batch(impl: Impl, reduction: str) -> None:
    for name, activation in KINDS:
        z = torch.zeros(3, 0, 7, device=impl.device, requires_grad=True)
        loss, terms = F.collaborative_consistency(
            z, torch.zeros(0, 7, device=impl.device), divergence=name, activation=activation,
            reduction=reduction, return_terms=True, impl=impl.name,
        )  # fmt: skip
        (g,) = torch.autograd.grad(loss.sum(), z)
        assert loss.shape == ((0,) if reduction == "none" else ()) and loss.sum().item() == 0
        assert all(t.shape == (3,) and not t.any() for t in terms.values()) and g.shape == z.shape
    loss = F.jensen_shannon(
        z, torch.zeros(0, dtype=torch.int64, device=impl.device), reduction=reduction,
        impl=impl.name,
    )  # fmt: skip
    (g,) = torch.autograd.grad(loss.sum(), z)
    assert loss.shape == ((0,) if reduction == "none" else ()) and loss.sum().item() == 0


# --- the mixture of a label and heads


class Mixture(NamedTuple):
    heads: Heads
    pi: float
    shares: tuple[float, ...] | None  # of the heads
    normalize: bool
    soft: bool
    weighted: bool

    def options(self) -> dict:
        pi = self.pi
        if self.shares is not None:
            pi = [pi, *((1 - pi) * share / sum(self.shares) for share in self.shares)]
        return {
            "pi": pi, "normalize": self.normalize, "reduction": self.heads.reduction,
            "label_smoothing": self.heads.label_smoothing,
        }  # fmt: skip


@st.composite
def mixtures(draw: st.DrawFn) -> Mixture:
    drawn = draw(heads())
    count = len(drawn.ce_weight)
    shares = st.lists(st.sampled_from([0.5, 1.0, 3.0]), min_size=count, max_size=count)
    if drawn.ignored is None:
        drawn = drawn._replace(ignored=0.0)
    return Mixture(
        drawn,
        draw(st.sampled_from([0.1, 0.5, 0.9])),
        draw(st.none() | shares.map(tuple)),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.booleans()),
    )


@settings(max_examples=2 * settings.default.max_examples)
@given(drawn=mixtures(), dtype=st.sampled_from(DTYPES))
def test_drawn_mixtures(impl: Impl, drawn: Mixture, dtype: torch.dtype) -> None:
    logits, target = drawn.heads.build(dtype, impl.device)
    assert target is not None
    if drawn.soft:
        target = numbers(drawn.heads.batch, drawn.heads.classes).softmax(-1)
        target = target.to(dtype).to(impl.device)
    share = None
    if drawn.weighted:
        share = probabilities(drawn.heads.batch).to(dtype).to(impl.device)
    check_mixture(impl, logits, target, sample_weight=share, **drawn.options())


@pytest.mark.parametrize("classes", [1, 2, 10, 33, 1000, 9000])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_mixture_sizes(impl: Impl, count: int, classes: int) -> None:
    for i, soft in enumerate(cases(impl, (False, True), count + classes)):
        logits, target = spec(count, 9, classes, ignored=0.2).build(DTYPES[i], impl.device)
        if soft:
            target = numbers(9, classes).softmax(-1).to(impl.device)
        check_mixture(impl, logits, target, pi=0.3)


def test_mixture_is_finite_whatever_is_masked(impl: Impl) -> None:
    """Also the label; a class masked by all is not there."""
    z = numbers(2, 3, 5)
    z[:, :, 4], z[0, 1, 2], z[:, 2, 3] = -math.inf, -math.inf, -math.inf
    target = torch.tensor([0, 2, 3])
    results = []
    for name, device in (("reference", "cpu"), (impl.name, impl.device)):
        for x in (z, z[..., :4]):
            x = leaf(x.to(device))
            loss = F.jensen_shannon(x, target.to(device), reduction="none", impl=name)
            (g,) = torch.autograd.grad(loss.sum(), x)
            assert loss.isfinite().all() and g.isfinite().all()
            assert (g[x == -math.inf] == 0).all()
            results.append((loss.detach().cpu(), g[..., :4].cpu()))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


def test_dense_mixture(impl: Impl) -> None:
    rows, y = numbers(2, 2 * 3 * 5, 4), torch.arange(2 * 3 * 5) % 4
    y[3] = -100
    wide = leaf(rows)
    truth = F.jensen_shannon(wide, y, impl="reference")
    z = rows.view(2, 2, 3, 5, 4).movedim(-1, 2).contiguous().to(impl.device)
    z = leaf(z)
    got = F.jensen_shannon(z, y.view(2, 3, 5).to(impl.device), impl=impl.name)
    torch.testing.assert_close(got.cpu(), truth)
    (g,), (expected,) = torch.autograd.grad(got, z), torch.autograd.grad(truth, wide)
    torch.testing.assert_close(g.movedim(2, -1).cpu().reshape(expected.shape), expected)


@pytest.mark.parametrize("label", [-1, 5])
def test_a_label_out_of_range_that_nobody_checked_is_no_class(impl: Impl, label: int) -> None:
    z = leaf(numbers(2, 3, 5).float().to(impl.device))
    target = torch.tensor([0, label, 4], device=impl.device)
    options = calls.mixture_options(
        2, pi=0.5, normalize=True, label_smoothing=0.0, ignore_index=-100, reduction="none"
    )
    loss, _ = calls.consistency([z], target, options, impl.name)
    assert loss.isnan().tolist() == [False, True, False]


# --- the graph, the compiler, threads


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("name,activation", KINDS)
def test_gradcheck(impl: Impl, name: str, activation: str, teacher: str) -> None:
    z, y = numbers(3, 2, 4).to(impl.device), probabilities(2, 4).to(impl.device)
    assert torch.autograd.gradcheck(
        lambda x: F.collaborative_consistency(
            x, y, divergence=name, beta=0.3, activation=activation, teacher=teacher,
            detach_teacher=False, temperature=1.5, kl_weight=[0.5, 2, 1], impl=impl.name,
        ),
        leaf(z), fast_mode=impl.interpreted,
    )  # fmt: skip


def test_gradcheck_of_the_mixture(impl: Impl) -> None:
    z, y = numbers(2, 3, 4).to(impl.device), torch.tensor([3, -100, 1], device=impl.device)
    assert torch.autograd.gradcheck(
        lambda x: F.jensen_shannon(x, y, pi=[0.5, 0.2, 0.3], impl=impl.name), leaf(z),
        fast_mode=impl.interpreted,
    )  # fmt: skip


def test_compiled(impl: Impl) -> None:
    z, y = numbers(3, 4, 5).float().to(impl.device), probabilities(4, 5).float().to(impl.device)

    def loss(z: Tensor, y: Tensor) -> Tensor:
        both = F.collaborative_consistency(
            z, y, groups=[1, 2], divergence=["jsd", "reverse_kl"], activation="sigmoid",
            impl=impl.name,
        )  # fmt: skip
        return both + F.jensen_shannon(z, y, impl=impl.name)

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = []
    for function in (loss, compiled):
        x = leaf(z)
        value = function(x, y)
        results.append([value.detach(), *torch.autograd.grad(value, x)])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("name,activation", KINDS)
def test_thread_count_changes_no_bit(impl: Impl, name: str, activation: str) -> None:
    if impl.name != "cpp":
        pytest.skip(f"{impl.name}: PyTorch doesn't promise this of its own CPU kernels")
    z = numbers(4, 401, 30).float()
    results = []
    for count in (1, 3):
        with threads(count):
            x = leaf(z)
            loss = F.collaborative_consistency(
                x, None, divergence=name, activation=activation, impl=impl.name
            )
            results.append([loss, *torch.autograd.grad(loss, x)])
    assert_same_bits(*results)


# --- what is refused


def test_errors() -> None:
    z, y = torch.zeros(2, 4, 5), torch.zeros(4, dtype=torch.int64)
    refused = (
        (ValueError, {"divergence": "js"}, "divergence: expected one of kl, reverse_kl, jsd"),
        (TypeError, {"divergence": 2}, "divergence: expected one value or a sequence|a str"),
        (ValueError, {"divergence": ["kl", "jsd"]}, "divergence: expected 1 values"),
        (ValueError, {"beta": 0}, r'beta: .*\(0, 1\), got 0.*divergence="kl"'),
        (ValueError, {"beta": 1.0}, r'beta: .*\(0, 1\), got 1.0.*divergence="reverse_kl"'),
        (ValueError, {"beta": 1.5}, "beta: expected a number"),
        (ValueError, {"activation": "tanh"}, "activation: expected one of softmax, sigmoid"),
        (TypeError, {"activation": "sigmoid"}, r"target: .*\(4, 5\).*sigmoid, got torch.int64"),
        (ValueError, {"ignore_index": 3, "target": torch.zeros(4, 5)}, "ignore_index"),
    )
    for error, options, match in refused:
        options = {"activation": "softmax", **options}
        target = options.pop("target", y)
        with pytest.raises(error, match=match):
            F.collaborative_consistency(z, target, **options)
    with pytest.raises(ValueError, match="target: expected probabilities"):
        F.collaborative_consistency(z, torch.zeros(4), activation="sigmoid")


def test_errors_of_the_mixture() -> None:
    z, y = torch.zeros(2, 4, 5), torch.zeros(4, dtype=torch.int64)
    for pi in (0, 1, [0.5, 0.5], [0.5, 0.4, 0.2], [0.5, 0.5, 0.0], [1.5, -0.25, -0.25]):
        with pytest.raises(ValueError, match="pi: expected"):
            F.jensen_shannon(z, y, pi=pi)
    with pytest.raises(TypeError, match="pi: expected a number or a sequence of 3"):
        F.jensen_shannon(z, y, pi="half")
    with pytest.raises(TypeError, match="target: expected a Tensor"):
        F.jensen_shannon(z, None)


# --- the module


def test_the_modules_are_the_functions() -> None:
    z, y = numbers(2, 4, 5), torch.tensor([0, 4, 1, 2])
    plain = F.jensen_shannon(z, y)
    for options in (
        {"pi": [0.2, 0.5, 0.3]}, {"normalize": False}, {"label_smoothing": 0.1},
        {"ignore_index": 1}, {"reduction": "sum"}, {"impl": "torch", "pi": 0.1},
    ):  # fmt: skip
        loss = imcl_fast.JensenShannonLoss(**options)
        got, expected = loss(z, y), F.jensen_shannon(z, y, **options)
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
        assert not torch.isclose(got, plain), "the option changed nothing"
    target, plain = probabilities(4, 5), F.collaborative_consistency(z, probabilities(4, 5))
    for options in (
        {"divergence": "jsd"}, {"divergence": "jsd", "beta": 0.1}, {"activation": "sigmoid"}
    ):
        got = imcl_fast.CollaborativeConsistencyLoss(**options)(z, target)
        expected = F.collaborative_consistency(z, target, **options)
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
        assert not torch.isclose(got, plain), "the option changed nothing"


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_autocast_rounds_nothing(impl: Impl, dtype: torch.dtype) -> None:
    z = numbers(3, 4, 5).to(dtype).to(impl.device)
    for name, activation in KINDS:
        options = {"divergence": name, "activation": activation, "impl": impl.name}
        plain = F.collaborative_consistency(z, None, **options)
        with torch.autocast(impl.device, torch.bfloat16):
            assert F.collaborative_consistency(z, None, **options).equal(plain)


@pytest.mark.parametrize("teacher", ["others", "mean", "final", "pairwise"])
@pytest.mark.parametrize("divergence", ["kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("labelled", [True, False])
def test_the_oracle_takes_no_infinite_logit_for_a_masked_label(teacher, divergence, labelled):
    for head in range(2):
        z = torch.zeros(2, 1, 3, dtype=torch.float64)
        z[head, 0, 0] = math.inf
        loss = F.collaborative_consistency(
            z, torch.ones(1, 3, dtype=torch.float64) if labelled else None, teacher=teacher,
            divergence=divergence, activation="sigmoid", impl="reference",
        )  # fmt: skip
        # A final head that learns from nobody has no part in a divergence of the others' teacher.
        assert loss.isnan()


def test_weights_of_a_mixture_that_nearly_sum_to_1():
    z, y = torch.zeros(2, 3, 4), torch.zeros(3, dtype=torch.int64)
    F.jensen_shannon(z, y, pi=[0.5, 0.25, 0.25 + 1e-8])
    for wrong in (0.2499, 0.2501):
        with pytest.raises(ValueError, match="^pi: expected 3 weights"):
            F.jensen_shannon(z, y, pi=[0.5, 0.25, wrong])


def test_indices_are_no_target_of_a_sigmoid_whatever_their_dtype() -> None:
    z, y = numbers(2, 4, 5), torch.tensor([0, 4, 1, 2])
    with pytest.raises(ValueError, match=r"one of each label of a sigmoid, got .*float64$"):
        F.collaborative_consistency(z, y.double(), activation="sigmoid")


@pytest.mark.parametrize("batch", [3, 40])
def test_the_gradient_of_a_mixture_with_a_label_out_of_range_is_none(
    impl: Impl, batch: int
) -> None:
    options = calls.mixture_options(
        2, pi=0.5, normalize=True, label_smoothing=0.0, ignore_index=-100, reduction="none"
    )
    check_gradient_of_unknown(impl, options, batch)


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("classes", [5, 40_000])
def test_teachers_learn_from_all_chunks(
    impl: Impl, classes: int, teacher: str, divergence: str
) -> None:
    heads = 2 if classes > 5 else 3
    classes = min(classes, 5000) if impl.interpreted else classes  # two chunks on a GPU
    z = 3 * torch.randn(heads, 1, classes, generator=torch.Generator().manual_seed(0))
    z[0, :, : classes // 2] += 2
    x, wide = leaf(z.to(impl.device)), leaf(z.double())
    got, truth = (
        torch.autograd.grad(
            F.collaborative_consistency(
                each, None, teacher=teacher, divergence=divergence, detach_teacher=False, impl=name
            ),
            each,
        )[0]
        for each, name in ((x, impl.name), (wide, "reference"))
    )
    assert (got.cpu().double() - truth).norm() <= 1e-5 * truth.norm()
