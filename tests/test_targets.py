"""Targets as torch's cross entropy takes them: probabilities, class weights, sample weights."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as TF
from conftest import DTYPES, Impl, assert_same_bits, cases, check_consistency, leaf
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import REDUCTIONS, TEACHERS, Targets, targets
from torch import Tensor

import imcl_fast
from imcl_fast import calls
from imcl_fast import functional as F
from imcl_fast.models import import_torchvision

CLASSES = 7


def logits(heads: int = 3, batch: int = 6, classes: int = CLASSES, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(heads, batch, classes, generator=generator, dtype=torch.float64)


def probabilities(batch: int = 6, classes: int = CLASSES, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, classes, generator=generator, dtype=torch.float64)


# --- the reference itself: cross entropies of torch, and divergences by loops


@given(drawn=targets())
def test_reference_is_torchs_cross_entropy(drawn: Targets) -> None:
    """Of any target and weights, value and gradient; but where torch divides by 0, it is 0."""
    heads, target, weights = drawn.build(torch.float64)
    options = {
        "label_smoothing": drawn.heads.label_smoothing, "reduction": drawn.heads.reduction
    }
    heads = [leaf(z) for z in heads]
    got, terms = F.collaborative_consistency(
        heads, target, weight=weights["weight"], kl_weight=0, return_terms=True,
        impl="reference", **options,
    )  # fmt: skip
    rows = [row for z in heads for row in (z if z.dim() == 3 else z.unsqueeze(0))]
    if target is None:
        assert not got.any()
        return
    each = [TF.cross_entropy(z, target, weight=weights["weight"], **options) for z in rows]
    expected = torch.stack(each).sum(0)
    if expected.isnan().any():
        assert got == 0 and options["reduction"] == "mean"
        return
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    averaged = options | {"reduction": "sum" if options["reduction"] == "sum" else "mean"}
    each = [TF.cross_entropy(z, target, weight=weights["weight"], **averaged) for z in rows]
    each = torch.stack(each).detach()
    torch.testing.assert_close(terms["cross_entropy"], each.nan_to_num(0), rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad(got.sum(), heads)
    for g, e in zip(gradients, torch.autograd.grad(expected.sum(), heads), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_what_a_sample_weight_is(kind: str, reduction: str) -> None:
    """A factor of all of a sample's loss; the mean is by the weights, each loss by its own."""
    z, share = logits(), torch.tensor([2.0, 0.5, 0.0, 1.0, 3.0, 0.25], dtype=torch.float64)
    target = torch.tensor([3, -100, 1, 0, 6, 2]) if kind == "indices" else probabilities()
    weight = torch.linspace(0, 2, CLASSES, dtype=torch.float64)
    losses = {}
    for name in ("ce", "kl"):
        only = {"kl_weight": 0} if name == "ce" else {"ce_weight": 0}
        losses[name] = share * F.collaborative_consistency(
            z, target, weight=weight, reduction="none", impl="reference", **only
        )
    got, terms = F.collaborative_consistency(
        z, target, weight=weight, sample_weight=share, reduction=reduction, return_terms=True,
        impl="reference",
    )  # fmt: skip
    counted = share
    if kind == "indices":
        counted = share * (target >= 0)
        divisors = {"ce": (counted * weight[target.clamp(min=0)]).sum(), "kl": counted.sum()}
    else:
        divisors = {"ce": counted.sum(), "kl": counted.sum()}
    means = {name: loss.sum() / divisors[name] for name, loss in losses.items()}
    expected = {
        "none": losses["ce"] + losses["kl"], "sum": (losses["ce"] + losses["kl"]).sum(),
        "mean": means["ce"] + means["kl"],
    }  # fmt: skip
    torch.testing.assert_close(got, expected[reduction])
    for name, term in (("ce", terms["cross_entropy"]), ("kl", terms["kl"])):
        whole = losses[name].sum() if reduction == "sum" else means[name]
        torch.testing.assert_close(term.sum(), whole)


# --- every implementation


@settings(max_examples=2 * settings.default.max_examples)
@given(drawn=targets(), dtype=st.sampled_from(DTYPES))
def test_drawn(impl: Impl, drawn: Targets, dtype: torch.dtype) -> None:
    heads, target, weights = drawn.build(dtype, impl.device)
    check_consistency(impl, heads, target, **drawn.heads.options(), **weights)


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("classes", [1, 2, 17, 1000, 9000])
def test_class_counts(impl: Impl, classes: int, teacher: str) -> None:
    """Also more classes than a tile, or a chunk, holds."""
    among = product(("indices", "probabilities"), (True, False), (0.0, 0.1), (True, False))
    turn = TEACHERS.index(teacher) + classes
    for kind, weighted, smoothing, detach in cases(impl, among, turn):
        if classes > 1000 and not detach:
            continue
        z = logits(5, 3, classes).float().to(impl.device)
        target = torch.tensor([0, classes - 1, -100])
        if kind == "probabilities":
            target = probabilities(3, classes).float()
        weight = probabilities(1, classes, 2)[0].float().to(impl.device) if weighted else None
        check_consistency(
            impl, [z], target.to(impl.device), weight=weight, label_smoothing=smoothing,
            teacher=teacher, detach_teacher=detach,
            sample_weight=torch.tensor([1.0, 0.5, 2.0], device=impl.device),
        )  # fmt: skip


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint32]
)
def test_indices_of_any_width(impl: Impl, dtype: torch.dtype) -> None:
    z, ignored = logits().to(impl.device), -100 if dtype.is_signed else 255
    target = torch.tensor([0, 3, ignored, 1, 6, 2], device=impl.device)
    options = {"ignore_index": ignored, "impl": impl.name}
    assert_same_bits(
        [F.collaborative_consistency(z, target.to(dtype), **options)],
        [F.collaborative_consistency(z, target, **options)],
    )


def test_one_hot_probabilities_are_indices(impl: Impl) -> None:
    z = logits().float().to(impl.device)
    target = torch.tensor([0, 3, 5, 1, 6, 2], device=impl.device)
    one_hot = TF.one_hot(target, CLASSES).float()
    for smoothing in (0.0, 0.2):
        results = []
        for given_target in (target, one_hot):
            heads = leaf(z)
            loss = F.collaborative_consistency(
                heads, given_target, label_smoothing=smoothing, impl=impl.name
            )
            results.append([loss, *torch.autograd.grad(loss, heads)])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_weights_of_1_change_nothing(impl: Impl) -> None:
    z, target = logits().float().to(impl.device), torch.tensor([0, 3, -100, 1, 6, 2])
    target = target.to(impl.device)
    for reduction in REDUCTIONS:
        plain = F.collaborative_consistency(z, target, reduction=reduction, impl=impl.name)
        weighted = F.collaborative_consistency(
            z, target, weight=torch.ones(CLASSES, device=impl.device),
            sample_weight=torch.ones(6, device=impl.device), reduction=reduction, impl=impl.name,
        )  # fmt: skip
        torch.testing.assert_close(weighted, plain, rtol=1e-6, atol=0)


@pytest.mark.parametrize("times", [1, 6])  # the kernels' ways for few samples and for many
@pytest.mark.parametrize("kind", ["indices", "probabilities", "none"])
def test_a_sample_of_weight_0_may_hold_anything(impl: Impl, kind: str, times: int) -> None:
    """It is as good as ignored: NaN and infinity are not even looked at."""
    z = logits().float().repeat(1, times, 1).to(impl.device)
    share = torch.tensor([1.0, 0.0, 2.0, 1.0, 0.0, 1.0], device=impl.device).repeat(times)
    target = None
    if kind != "none":
        target = torch.tensor([0, 3, 5, 1, 6, 2]) if kind == "indices" else probabilities().float()
        target = torch.cat([target] * times).to(impl.device)
    results = []
    for dirty in (False, True):
        heads = z.clone()
        if dirty:
            heads[0, 1, 2], heads[1, 4] = math.nan, math.inf
            if kind == "probabilities":
                target[1] = math.nan
        heads = leaf(heads)
        loss = F.collaborative_consistency(heads, target, sample_weight=share, impl=impl.name)
        (gradient,) = torch.autograd.grad(loss, heads)
        assert not gradient[:, share == 0].any()
        results.append([loss, gradient])
    assert_same_bits(*results)


def test_classes_of_probability_0_may_be_masked(impl: Impl) -> None:
    """As if they were not there; where a masked class has a probability, the loss is infinite."""
    open_ = torch.tensor([0, 1, 3, 4, 6])
    z, target = logits().float(), probabilities().float()
    target[:, [2, 5]] = 0
    for low in (-math.inf, torch.finfo(torch.float32).min):
        masked = z.clone()
        masked[..., [2, 5]] = low
        heads = leaf(masked.to(impl.device))
        loss = F.collaborative_consistency(heads, target.to(impl.device), impl=impl.name)
        (gradient,) = torch.autograd.grad(loss, heads)
        rest = leaf(z[..., open_].double())
        truth = F.collaborative_consistency(
            rest, target[:, open_].double(), impl="reference"
        )
        (true_gradient,) = torch.autograd.grad(truth, rest)
        torch.testing.assert_close(loss.cpu().double(), truth, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            gradient.cpu()[..., open_].double(), true_gradient, rtol=1e-4, atol=1e-6
        )
        assert not gradient[..., [2, 5]].any()
        wrong = target.clone()
        wrong[3, 5] = 0.25
        loss = F.collaborative_consistency(heads, wrong.to(impl.device), impl=impl.name)
        assert loss.item() == math.inf


def test_a_class_of_weight_0_may_be_masked(impl: Impl) -> None:
    z, target = logits().float(), torch.tensor([0, 2, 5, 1, 6, 2])
    z[..., 2] = -math.inf
    weight = torch.ones(CLASSES)
    weight[2] = 0
    for smoothing in (0.0, 0.1):
        options = {"weight": weight, "label_smoothing": smoothing}
        truth = F.collaborative_consistency(z.double(), target, impl="reference", **options)
        got = F.collaborative_consistency(
            z.to(impl.device), target.to(impl.device), label_smoothing=smoothing,
            weight=weight.to(impl.device), impl=impl.name,
        )  # fmt: skip
        assert truth.isfinite()
        torch.testing.assert_close(got.cpu().double(), truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("label", [-1, CLASSES])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_label_out_of_range_that_nobody_checked_has_no_weight(
    impl: Impl, reduction: str, label: int
) -> None:
    z = leaf(logits().float().to(impl.device))
    target = torch.tensor([0, label, 5, 1, 6, 2], device=impl.device)
    options = calls.consistency_options(
        3, temperature=2.0, ce_weight=1.0, kl_weight=1.0, teacher="others", detach_teacher=True,
        label_smoothing=0.1, ignore_index=-100, reduction=reduction, groups=None,
    )  # fmt: skip
    weight = torch.ones(CLASSES, device=impl.device)
    loss, _ = calls.consistency([z], target, options, impl.name, weight)
    (gradient,) = torch.autograd.grad(loss.sum(), z)
    if reduction == "none":
        assert loss.isnan().tolist() == [False, True, False, False, False, False]
    else:
        assert loss.isnan()
    assert gradient[:, 1].isnan().all() and gradient[:, 2:].isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["target", "weight", "sample_weight"])
def test_what_is_not_finite_is_never_a_quiet_number(impl: Impl, name: str, bad: float) -> None:
    for kind in ("indices", "probabilities"):
        if name == "target" and kind == "indices":
            continue
        target = torch.tensor([0, 3, 5, 1, 6, 2]) if kind == "indices" else probabilities().float()
        arguments = {
            "target": target, "weight": torch.ones(CLASSES), "sample_weight": torch.ones(6)
        }
        arguments[name].view(-1)[3] = bad
        arguments = {key: value.to(impl.device) for key, value in arguments.items()}
        z = logits().float().to(impl.device)
        loss = F.collaborative_consistency(z, impl=impl.name, **arguments)
        assert not loss.isfinite()


@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck(impl: Impl, reduction: str, kind: str) -> None:
    heads = [leaf(z) for z in logits(2, 3, 4).to(impl.device)]
    target = torch.tensor([3, -100, 1]) if kind == "indices" else probabilities(3, 4)
    weight = torch.tensor([0.5, 2.0, 0.0, 1.0], dtype=torch.float64, device=impl.device)
    share = torch.tensor([1.0, 3.0, 0.5], dtype=torch.float64, device=impl.device)

    def function(*heads: Tensor) -> Tensor:
        return F.collaborative_consistency(
            heads, target.to(impl.device), weight=weight, sample_weight=share,
            detach_teacher=False, reduction=reduction, label_smoothing=0.2, impl=impl.name,
        )  # fmt: skip

    assert torch.autograd.gradcheck(function, heads, fast_mode=impl.interpreted)


def test_reference_is_differentiable_twice() -> None:
    heads = [leaf(z) for z in logits(2, 2, 3)]
    weight = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
    for target in (torch.tensor([2, 0]), probabilities(2, 3)):
        assert torch.autograd.gradgradcheck(
            lambda *heads, y=target: F.collaborative_consistency(
                heads, y, weight=weight, sample_weight=weight[:2], detach_teacher=False,
                impl="reference",
            ),
            heads,
        )


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3),
        torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(8, 4),
    )


def test_mixed_labels_train_a_network(impl: Impl) -> None:
    """What mixup makes of a batch: ``imcl(x, probabilities)``, all four ways."""
    model = network().to(impl.device)
    x, y = torch.randn(6, 3, 8, 8, device=impl.device), torch.tensor([0, 1, 2, 3, 0, 1])
    one_hot = TF.one_hot(y, 4).float().to(impl.device)
    mixed = 0.7 * one_hot + 0.3 * one_hot.flip(0)
    imcl = imcl_fast.IMCL(model, x, impl=impl.name)
    out = imcl(0.7 * x + 0.3 * x.flip(0), mixed)
    out.loss.backward()
    expected = TF.cross_entropy(out.logits, mixed)
    torch.testing.assert_close(out.terms["cross_entropy"], expected.detach())
    assert all(p.grad.isfinite().all() for p in imcl.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", ["MixUp", "CutMix"])
def test_torchvisions_mixtures_train_a_network(name: str) -> None:
    import_torchvision()
    v2 = pytest.importorskip("torchvision.transforms.v2")
    model = network()
    mixture = getattr(v2, name)(num_classes=4)
    x, y = mixture(torch.randn(6, 3, 8, 8), torch.tensor([0, 1, 2, 3, 0, 1]))
    assert y.shape == (6, 4) and ((y > 0) & (y < 1)).any()
    imcl = imcl_fast.IMCL(model, x)
    out = imcl(x, y)
    out.loss.backward()
    torch.testing.assert_close(out.terms["cross_entropy"], TF.cross_entropy(out.logits, y).detach())
    assert all(p.grad.isfinite().all() for p in imcl.parameters() if p.grad is not None)


@pytest.mark.parametrize("index", [0, 3])
def test_probabilities_know_no_ignored_class(index):
    z = torch.randn(2, 5, 4)
    with pytest.raises(ValueError, match=f"^ignore_index: .* as target, got {index}"):
        F.collaborative_consistency(z, z[0].softmax(-1), ignore_index=index)


def test_weights_that_require_a_gradient_will_do_where_there_is_none():
    z, y, weight = torch.randn(2, 5, 4), torch.arange(5) % 4, torch.rand(5, requires_grad=True)
    with torch.no_grad():
        got = F.collaborative_consistency(z, y, sample_weight=weight)
    torch.testing.assert_close(
        got, F.collaborative_consistency(z, y, sample_weight=weight.detach())
    )


def test_a_class_of_weight_0_may_be_masked_in_many_samples(impl: Impl) -> None:
    z = torch.randn(2, 40, CLASSES, generator=torch.Generator().manual_seed(0)).to(impl.device)
    z[:, :, 2] = -math.inf
    weight = torch.ones(CLASSES, device=impl.device)
    weight[2] = 0
    y = torch.arange(40, device=impl.device) % CLASSES
    assert F.collaborative_consistency(z, y, weight=weight, impl=impl.name).isfinite()


@pytest.mark.parametrize("batch", [4, 40])
def test_weights_of_classes_may_lie_apart(impl: Impl, batch: int) -> None:
    z = torch.randn(batch, 7, generator=torch.Generator().manual_seed(0)).to(impl.device)
    weight = torch.rand(7, 2, generator=torch.Generator().manual_seed(1)).to(impl.device)[:, 1]
    target = torch.arange(batch, device=impl.device) % 7
    got = F.collaborative_consistency([z], target, weight=weight, impl=impl.name)
    torch.testing.assert_close(got, TF.cross_entropy(z, target, weight=weight))
