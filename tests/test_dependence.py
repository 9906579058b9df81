"""Dependence between representations against its naive definition in float64."""

from __future__ import annotations

import itertools
import math
import pickle
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
from bounds import SUM, assert_accurate, loss_dtype, unit
from conftest import (
    DTYPES,
    Impl,
    assert_layout,
    assert_same_bits,
    cases,
    dtype_name,
    leaf,
    threads,
    usable,
)
from hypothesis import given
from hypothesis import strategies as st
from strategies import LAYOUTS, lay_out
from torch import Tensor, nn

import imcl_fast
from bench.shapes import R18_FEATURES
from imcl_fast import dependence as module
from imcl_fast import functional as F
from imcl_fast import reference
from imcl_fast.algebra import dependence as algebra
from imcl_fast.kernels import dependence_plan, plan

OPTIONS = [
    {"kernel": kernel, "bandwidth": bandwidth, "estimator": estimator, "normalize": normalize}
    for kernel, bandwidth in (("linear", "median"), ("gaussian", "median"), ("gaussian", 0.7))
    for estimator, normalize in itertools.product(("biased", "unbiased"), (False, True))
]


def option_name(options: dict) -> str:
    return ", ".join(str(value) for value in options.values())


class Views(NamedTuple):
    """V views of L layers of B samples, whose features share a part."""

    batch: int
    shapes: tuple[tuple[int, ...], ...]  # of the features of a layer
    views: int = 2
    layouts: tuple[str, ...] = ("contiguous",)
    offset: float = 0.0  # of all features, in units of their deviation
    seed: int = 0

    def build(self, dtype: torch.dtype, device: str = "cpu") -> list[list[Tensor]]:
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        cause = normal(self.batch, 3)
        layouts = itertools.cycle(self.layouts)
        return [
            [
                leaf(lay_out((self.offset + normal(self.batch, *shape)
                              + (cause @ normal(3, math.prod(shape))).view(-1, *shape))
                             .to(dtype).to(device), next(layouts)))
                for shape in self.shapes
            ]
            for _ in range(self.views)
        ]  # fmt: skip


@st.composite
def drawn_views(draw: st.DrawFn) -> Views:
    shapes = st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple)
    layouts = [name for name in LAYOUTS if not name.startswith("expanded")]
    return Views(
        draw(st.sampled_from((4, 5, 7, 8, 15, 16, 17, 33))),
        tuple(draw(st.lists(shapes, min_size=1, max_size=3))),
        draw(st.integers(2, 4)),
        tuple(draw(st.lists(st.sampled_from(layouts), min_size=1, max_size=3))),
        draw(st.sampled_from((0.0, 0.5, 3.0))),
        draw(st.integers(0, 999)),
    )


Result = tuple[Tensor, list[Tensor]]


def run(views: Sequence[Sequence[Tensor]], impl: str, **options) -> Result:
    loss = F.view_dependence(views, impl=impl, **options)
    xs = [x for view in views for x in view]
    return loss.detach(), list(torch.autograd.grad(loss, xs))


def noise_of(views: Sequence[Sequence[Tensor]], truth: Result, **options) -> Result:
    """What rounding every number of the Grams once leaves of the loss (), and of each gradient
    (B,): from draws of such roundings, in float64. Norms of samples are those with their mean,
    which is taken off after it was rounded."""
    xs = [x.detach().cpu().double() for layer in zip(*views, strict=True) for x in layer]
    dtype = loss_dtype(views[0][0].dtype)
    width = module.check_bandwidth(options["bandwidth"])
    numbered = options["kernel"] == "gaussian" and width is not None
    scale = [1 / (width**2 * x[0].numel()) if numbered else 1.0 for x in xs]
    exact, means = algebra.gram_forward(xs, scale)
    generator = torch.Generator().manual_seed(0)
    losses, gradients = [], []
    for _ in range(6):
        grams = []
        for g, x, factor in zip(exact, xs, scale, strict=True):
            size = factor**0.5 * x.flatten(1).norm(dim=1)
            error = torch.randn(g.shape, generator=generator, dtype=torch.float64)
            own = torch.outer(size, g.diagonal().sqrt())
            grams.append(g + SUM * unit(dtype) * (error + error.T) / 2**0.5 * (own + own.T) / 2)
        grams = torch.stack(grams).requires_grad_()
        kernel = module.KERNELS.index(options["kernel"])
        kernels = algebra.kernels(grams.unflatten(0, (-1, len(views))), kernel, width is None, 0.0)
        values = algebra.hsic(kernels.values, module.ESTIMATORS.index(options["estimator"]))
        if options["normalize"]:
            values = algebra.cka(values, torch.zeros(()))
        pairs = len(views) * (len(views) - 1)
        loss = (values.sum() - values.diagonal(dim1=-2, dim2=-1).sum()) / pairs
        (d,) = torch.autograd.grad(loss, grams)
        s = torch.stack([f * (e + e.T) for f, e in zip(scale, d, strict=True)])
        losses.append(loss.detach() - truth[0])
        gradients.append([
            (dx - t.double()).flatten(1).norm(dim=1)
            for dx, t in zip(_by_view(algebra.gram_backward(s, xs, means), len(views)), truth[1],
                             strict=True)
        ])  # fmt: skip
    products = [
        SUM * unit(dtype) * (e.abs() @ x.flatten(1).abs()).norm(dim=1)
        for e, x in zip(s, xs, strict=True)
    ]
    spread = [
        torch.stack(each).square().mean(0).sqrt() + product
        for each, product in zip(zip(*gradients, strict=True), _by_view(products, len(views)),
                                 strict=True)
    ]  # fmt: skip
    return torch.stack(losses).square().mean().sqrt() + unit(dtype) * truth[0].abs(), spread


def _by_view(by_layer: Sequence[Tensor], views: int) -> list[Tensor]:
    return [x for v in range(views) for x in by_layer[v::views]]


def check(got: Result, views: Sequence[Sequence[Tensor]], **options) -> None:
    judge(got, views, *truth_of(views, **options))


def truth_of(views: Sequence[Sequence[Tensor]], **options) -> tuple[Result, Result]:
    """What is right, and its noise."""
    wide = [[leaf(x.detach().cpu().double()) for x in view] for view in views]
    truth = run(wide, "reference", **options)
    return truth, noise_of(views, truth, **options)


def judge(got: Result, views: Sequence[Sequence[Tensor]], truth: Result, noise: Result) -> None:
    dtype = loss_dtype(views[0][0].dtype)
    assert got[0].dtype == dtype
    assert_accurate("loss", got[0], truth[0], noise[0].reshape(1), dtype)
    xs = [x for view in views for x in view]
    for i, (g, t, n, x) in enumerate(zip(got[1], truth[1], noise[1], xs, strict=True)):
        assert_layout(g, x)
        assert_accurate(f"gradient {i}", g, t, n, x.dtype)


@given(drawn=drawn_views(), dtype=st.sampled_from(DTYPES), options=st.sampled_from(OPTIONS))
def test_drawn(impl: Impl, drawn: Views, dtype: torch.dtype, options: dict) -> None:
    views = drawn.build(dtype, impl.device)
    check(run(views, impl.name, **options), views, **options)


@pytest.mark.parametrize("turn", range(len(OPTIONS)))
def test_options(impl: Impl, turn: int) -> None:
    """More columns than a task takes, and than one works on at a time, in layouts of dense rows and
    of none; a batch wider than a panel."""
    dtype, options = DTYPES[turn % len(DTYPES)], OPTIONS[5 * turn % len(OPTIONS)]
    many = (3, 7, 11) if impl.interpreted else (3, 20, 41)
    layouts = ("contiguous", "sliced", "channels_last")
    views = Views(34, ((7, 60), many), 3, layouts, offset=0.5).build(dtype, impl.device)
    check(run(views, impl.name, **options), views, **options)


@pytest.mark.parametrize("batch", [63, 64, 65, 100])
def test_batches(impl: Impl, batch: int) -> None:
    """Samples that fill a tile of a GPU's kernels, and more of them, far from 0 in some columns."""
    options = OPTIONS[2 * batch % len(OPTIONS)]
    dtype = torch.float32 if batch % 2 else torch.bfloat16
    layouts = ("contiguous", "sliced")
    views = Views(batch, ((3, 32),), layouts=layouts, offset=2).build(dtype, impl.device)
    check(run(views, impl.name, **options), views, **options)


def test_views_of_several_dtypes(impl: Impl) -> None:
    options = {"kernel": "gaussian", "bandwidth": 0.7, "estimator": "biased", "normalize": False}
    dtypes = (torch.float16, torch.float32, torch.bfloat16)
    views = Views(9, ((4, 5), (6,)), 3).build(torch.float32, impl.device)
    mixed = [[leaf(x.to(t)) for x in view] for view, t in zip(views, dtypes, strict=True)]
    mixed[0][0], mixed[1][1] = leaf(mixed[0][0].bfloat16()), leaf(mixed[1][1].half())
    check(run(mixed, impl.name, **options), mixed, **options)


@pytest.mark.parametrize("options", OPTIONS, ids=option_name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
def test_the_bound_bites(dtype: torch.dtype, options: dict) -> None:
    """Zeros, -g, 1.1 g or 1.25 g, a loss off by 5 %, a layer of a view or a sample left out."""
    views = Views(12, ((4, 5), (30,)), 3).build(dtype)
    loss, gradients = run(views, "torch", **options)
    truth, noise = truth_of(views, **options)
    judge((loss, gradients), views, truth, noise)
    factor = 1.1 if dtype == torch.float32 else 1.25
    wrong = [(1.05 * loss, gradients), (math.nan * loss, gradients)]
    wrong += [(loss, [f * g for g in gradients]) for f in (0.0, -1.0, factor, math.inf)]
    for i in range(len(gradients)):
        wrong.append((loss, [0 * g if i == j else g for j, g in enumerate(gradients)]))
    one = gradients[0].clone()
    one[3] = 0
    for result in [*wrong, (loss, [one, *gradients[1:]])]:
        with pytest.raises(AssertionError):
            judge(result, views, truth, noise)


def test_each_feature_has_a_level_of_its_own(impl: Impl) -> None:
    """Every column's own mean is taken off, over more columns than a task takes, before its
    values are multiplied: small integers on levels so high that nothing else keeps them exact."""
    generator = torch.Generator().manual_seed(0)
    small = torch.randint(-3, 4, (2, 8, 3000), generator=generator, dtype=torch.float64)
    level = 2.0**16 * (torch.arange(3000) >= 1024)
    views = [[leaf((x + level).float().to(impl.device))] for x in small]
    options = {"kernel": "linear", "bandwidth": "median", "estimator": "biased"}
    loss, gradients = run(views, impl.name, **options)
    truth, exact = run([[leaf(x)] for x in small], "reference", **options)
    assert loss.item() == pytest.approx(truth.item(), rel=1e-5)
    for got, expected in zip(gradients, exact, strict=True):
        assert (got.cpu() - expected).norm() <= 1e-5 * expected.norm()


def test_two_tensors_are_two_views() -> None:
    (x,), (y,) = Views(9, ((4, 3),)).build(torch.float32)
    for options in OPTIONS:
        assert_same_bits(
            [F.dependence(x, y, **options)], [F.view_dependence([x, y], **options)]
        )


def test_layers_are_weighted_and_pairs_averaged() -> None:
    views = Views(9, ((4, 3), (5,)), 3).build(torch.float64)
    got = F.view_dependence(views, layer_weight=[0.5, -2.0])
    pairs = [(0, 1), (0, 2), (1, 2)]
    expected = sum(
        weight / 3 * F.dependence(views[v][layer], views[w][layer], impl="reference")
        for layer, weight in enumerate((0.5, -2.0))
        for v, w in pairs
    )
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


# --- known values


def test_known_values() -> None:
    """By hand: 4 samples on a line, at 0, 1, 2, 3, and in the corners of a square."""
    x = torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64).unsqueeze(1)
    biased = F.dependence(x, x, kernel="linear", estimator="biased")
    # H K H = x_c x_c^T, whose squared norm is |x_c|^4 = 5^2.
    assert biased.item() == pytest.approx(25 / 9, rel=1e-12)
    y = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64).unsqueeze(1)
    # <x_c, y_c> = 0: not correlated.
    assert F.dependence(x, y, kernel="linear", estimator="biased").item() == pytest.approx(0)
    assert F.dependence(x, -3 * x + 1, kernel="linear", estimator="biased", normalize=True).item() \
        == pytest.approx(1, rel=1e-12)  # fmt: skip
    # Squared distances 1 (three), 4 (two) and 9: the lower median is 1.
    k = torch.exp(-(x - x.T).square() / 2)
    h = torch.eye(4, dtype=torch.float64) - 0.25
    expected = (k @ h @ k @ h).trace() / 9
    torch.testing.assert_close(F.dependence(x, x, estimator="biased"), expected)


@pytest.mark.parametrize("estimator", module.ESTIMATORS)
def test_independent_representations_have_none(estimator: str) -> None:
    """Over many batches the unbiased estimate averages to 0; the biased one doesn't."""
    generator = torch.Generator().manual_seed(0)
    values = torch.stack([
        F.dependence(torch.randn(6, 2, generator=generator, dtype=torch.float64),
                     torch.randn(6, 3, generator=generator, dtype=torch.float64),
                     estimator=estimator)
        for _ in range(400)
    ])  # fmt: skip
    error = values.std() / len(values) ** 0.5
    assert (abs(values.mean()) < 3 * error) == (estimator == "unbiased")


@pytest.mark.parametrize("kernel", module.KERNELS)
def test_identical_views_have_a_cka_of_1(impl: Impl, kernel: str) -> None:
    ((x,), _) = Views(16, ((4, 5),)).build(torch.float32, impl.device)
    assert F.dependence(x, x, kernel=kernel, normalize=True, impl=impl.name).item() == \
        pytest.approx(1, rel=1e-5)  # fmt: skip


@pytest.mark.parametrize("name", ["reference", "torch", "cpp"])
@pytest.mark.parametrize("factor", [1e-90, 1e70])
@pytest.mark.parametrize("estimator", module.ESTIMATORS)
def test_a_cka_does_not_depend_on_the_size_of_its_kernels(
    estimator: str, factor: float, name: str
) -> None:
    (x,), (y,) = Views(8, ((6,),)).build(torch.float64, "cpu")
    options = {"kernel": "linear", "estimator": estimator, "normalize": True, "impl": name}
    expected = F.dependence(x, y, **options)
    (truth,) = torch.autograd.grad(expected, x)
    other = leaf(x.detach() * factor)
    got = F.dependence(other, y, **options)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got, other)[0] * factor, truth)


@pytest.mark.parametrize("bandwidth", [0.3, 0.06, 0.04])
def test_a_cka_of_narrow_kernels(impl: Impl, bandwidth: float) -> None:
    """All similarities but the largest few of a kernel are next to nothing beside its diagonal,
    which the unbiased estimate leaves out: here the truth is made of multiples of the others."""
    (x,), (y,) = Views(6, ((5,),)).build(torch.float32, impl.device)

    def hollow(x: Tensor) -> Tensor:
        distances = torch.cdist(x.double().cpu(), x.double().cpu()).square()
        least = distances[~torch.eye(len(x), dtype=torch.bool)].min()
        return (-(distances - least) / (2 * bandwidth**2 * x.shape[1])).exp().fill_diagonal_(0)

    def hsic(k: Tensor, l: Tensor) -> Tensor:  # noqa: E741
        n = len(k)
        return ((k @ l).trace() + k.sum() * l.sum() / ((n - 1) * (n - 2))
                - 2 * (k @ l).sum() / (n - 2))  # fmt: skip

    k, l = hollow(x), hollow(y)  # noqa: E741
    truth = hsic(k, l) / (hsic(k, k) * hsic(l, l)).sqrt()
    loss = F.dependence(x, y, bandwidth=bandwidth, normalize=True, impl=impl.name)
    assert loss.item() == pytest.approx(truth.item(), rel=1e-3, abs=1e-3)
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, [x, y]))


# --- degenerate


@pytest.mark.parametrize("options", OPTIONS, ids=option_name)
def test_constant_features_depend_on_nothing(impl: Impl, options: dict) -> None:
    (x,), (y,) = Views(8, ((6,),)).build(torch.float32, impl.device)
    constant = leaf(torch.full((8, 3), 2.5, device=impl.device))
    loss = F.dependence(x, constant, impl=impl.name, **options)
    assert loss.item() == 0
    for g in torch.autograd.grad(loss, [x, constant]):
        assert not g.any()


@pytest.mark.parametrize("options", OPTIONS, ids=option_name)
@pytest.mark.parametrize("name", ["auto", "reference"])
def test_representations_without_features_depend_on_nothing(
    impl: Impl, options: dict, name: str
) -> None:
    x = leaf(torch.randn(8, 3, device=impl.device))
    none = leaf(torch.empty(8, 0, device=impl.device))
    loss = F.dependence(x, none, impl=name if name == "reference" else impl.name, **options)
    assert loss.item() == 0 and not torch.autograd.grad(loss, x)[0].any()


@pytest.mark.parametrize("options", OPTIONS, ids=option_name)
@pytest.mark.parametrize("value", [0.0, 0.1, 1000.7])
def test_constant_features_depend_on_nothing_in_any_batch(
    impl: Impl, options: dict, value: float
) -> None:
    """What rounding leaves of their variance is above 0 for some numbers of samples."""
    for batch in (7, 13, 25, 50, 100):
        x = torch.randn(batch, 6, generator=torch.Generator().manual_seed(batch)).to(impl.device)
        first = leaf(torch.full((batch, 3), value, device=impl.device))
        second = leaf(torch.full((batch, 5), 0.3, device=impl.device))
        for other in (leaf(x), second):
            loss = F.dependence(other, first, impl=impl.name, **options)
            assert loss.item() == 0
            for g in torch.autograd.grad(loss, [other, first]):
                # HSIC's is a product with what rounding leaves of the centred features.
                assert not g.any() if options["normalize"] else (g.abs() <= 1e-6).all()


def unlike_in_one(batch: int, generator: torch.Generator) -> Tensor:
    """Features of which one sample has any, as after a ReLU."""
    x = torch.zeros(batch, 24)
    x[batch // 2] = torch.rand(24, generator=generator)
    return x


def all_as_unlike(batch: int, generator: torch.Generator) -> Tensor:
    """Every sample has a feature of its own."""
    return (0.5 + torch.rand((), generator=generator)) * torch.eye(batch)


KERNELS_AND_WIDTHS = [(o["kernel"], o["bandwidth"]) for o in OPTIONS[::4]]


@pytest.mark.parametrize(("kernel", "bandwidth"), KERNELS_AND_WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=dtype_name)
@pytest.mark.parametrize("make", [unlike_in_one, all_as_unlike])
def test_a_kernel_that_has_no_variance_has_no_cka(
    impl: Impl, make: Callable, dtype: torch.dtype, kernel: str, bandwidth: float | str
) -> None:
    """To the unbiased estimator. Divided by what rounding leaves of it, gradients were 1e16."""
    generator = torch.Generator().manual_seed(0)
    options = {"kernel": kernel, "bandwidth": bandwidth, "normalize": True}
    for batch in cases(impl, (4, 5, 6, 7, 12, 33, 64), 0):
        x = leaf(make(batch, generator).to(impl.device, dtype))
        y = leaf(torch.randn(batch, 7, generator=generator).to(impl.device, dtype))
        z = leaf(make(batch, generator).to(impl.device, dtype))
        for name, other in itertools.product((impl.name, "reference"), (y, z)):
            loss = F.dependence(x, other, impl=name, **options)
            assert loss.item() == 0, (batch, name)
            assert not any(g.any() for g in torch.autograd.grad(loss, [x, other])), (batch, name)


@pytest.mark.parametrize("kernel", module.KERNELS)
def test_a_small_variance_is_one(impl: Impl, kernel: str) -> None:
    """A thousandth of what all samples have in common: far above what rounding leaves."""
    generator = torch.Generator().manual_seed(1)
    part = torch.randn(2, 12, 5, generator=generator).cumsum(0)
    x, y = (leaf((torch.cat([torch.eye(12), 1e-2 * p], 1)).to(impl.device)) for p in part)
    got = F.dependence(x, y, kernel=kernel, normalize=True, impl=impl.name)
    truth = F.dependence(x.double(), y.double(), kernel=kernel, normalize=True, impl="reference")
    assert abs(truth.item()) > 0.05
    assert got.item() == pytest.approx(truth.item(), rel=1e-2)


@pytest.mark.parametrize("kernel", module.KERNELS)
def test_a_variance_beside_a_long_sample_is_one(impl: Impl, kernel: str) -> None:
    """Which through the mean is in all samples, and makes what rounding may leave larger."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 512 if impl.name == "torch" else 32_768, generator=generator)
    y = x + 0.5 * torch.randn(x.shape, generator=generator)
    x[0] *= 100
    x, y = (leaf(each.to(impl.device)) for each in (x, y))
    got = F.dependence(x, y, kernel=kernel, normalize=True, impl=impl.name)
    truth = F.dependence(x.double(), y.double(), kernel=kernel, normalize=True, impl="reference")
    assert abs(truth.item()) > 0.05
    assert got.item() == pytest.approx(truth.item(), rel=0.1)  # rounding, but no 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=dtype_name)
@pytest.mark.parametrize("columns", [3, 40, 3000])
def test_of_identical_samples_the_median_distance_is_0(
    impl: Impl, columns: int, dtype: torch.dtype
) -> None:
    """And not what rounding leaves of it, in any implementation: of kernels from differences."""
    generator = torch.Generator().manual_seed(columns)
    for batch in cases(impl, (14, 16, 31), 0):
        x = torch.randn(batch, columns, generator=generator)
        x[batch // 7 :] = x[-1].clone()
        x = x[torch.randperm(batch, generator=generator)].to(dtype)
        y = torch.randn(batch, 2, generator=generator).to(dtype)
        squared = (x.double().unsqueeze(1) - x.double()).square().sum(-1)
        others = (y.double().unsqueeze(1) - y.double()).square().sum(-1)
        pairs = torch.triu_indices(batch, batch, 1)
        assert squared[pairs[0], pairs[1]].median() == 0
        of_y = (-others / (2 * others[pairs[0], pairs[1]].median())).exp()
        expected = reference._hsic((-squared / 2).exp(), of_y, "unbiased").item()
        for name in (impl.name, "reference"):
            got = F.dependence(x.to(impl.device), y.to(impl.device), impl=name)
            assert got.item() == pytest.approx(expected, rel=1e-4), (batch, name)


def test_a_dependence_is_not_lost_beside_variances(impl: Impl) -> None:
    """Linear HSIC grows with the scale of both sides, and a variance with the square of its own."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 8, generator=generator).to(impl.device)
    y = x + torch.randn(32, 8, generator=generator).to(impl.device)
    expected = F.dependence(x, y, kernel="linear", impl=impl.name).item()
    for scale in (2.0**10, 2.0**20, 2.0**30):
        found = F.dependence(scale * x, y, kernel="linear", impl=impl.name).item()
        assert found / scale**2 == pytest.approx(expected, rel=1e-5)


def test_the_median_by_sorting_is_the_median() -> None:
    for count in (1, 2, 5, 6, 91):
        x = torch.randn(3, count, generator=torch.Generator().manual_seed(count))
        assert torch.equal(algebra._middle(x), x.median(-1).values)


def test_what_has_no_features_depends_on_nothing(impl: Impl) -> None:
    """A Gram of no columns is made by somebody."""
    (x,), (y,) = Views(8, ((6,),)).build(torch.float32, impl.device)
    nothing = leaf(torch.zeros(8, 2, 0, device=impl.device))
    torch.full((4, 8, 8), math.nan, device=impl.device)  # as a rule the Grams come to lie there
    loss = F.view_dependence([[x, x], [nothing, y]], impl=impl.name)
    assert loss.item() == F.dependence(x, y, impl=impl.name).item()
    gradients = torch.autograd.grad(loss, [x, y, nothing])
    assert gradients[0].any() and gradients[2].shape == nothing.shape


def test_an_unbiased_variance_below_0_gives_no_cka(impl: Impl) -> None:
    # Every sample but one apart from all others alike: U-centred, nothing is left.
    x = leaf(torch.eye(4, dtype=torch.float64, device=impl.device))
    generator = torch.Generator().manual_seed(0)
    y = leaf(torch.randn(4, 3, generator=generator, dtype=torch.float64).to(impl.device))
    own = F.dependence(x, x, impl="reference")
    assert own.item() <= 1e-30
    loss = F.dependence(x, y, normalize=True, impl=impl.name)
    reference = F.dependence(x, y, normalize=True, impl="reference")
    assert loss.item() == pytest.approx(reference.item(), abs=1e-12)
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(loss, [x, y]))


@pytest.mark.parametrize("options", OPTIONS, ids=option_name)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_number_gives_none(impl: Impl, options: dict, bad: float) -> None:
    (x,), (y,) = Views(8, ((6,),)).build(torch.float32, impl.device)
    with torch.no_grad():
        x[2, 3] = bad
    assert F.dependence(x, y, impl=impl.name, **options).isnan()
    constant = torch.ones_like(y)
    assert F.dependence(x, constant, impl=impl.name, **options).isnan()
    assert F.dependence(constant, x, impl=impl.name, **options).isnan()


def test_an_empty_batch_gives_0(impl: Impl) -> None:
    x, y = (leaf(torch.zeros(shape, device=impl.device)) for shape in ((0, 4), (0, 2, 2)))
    loss = F.dependence(x, y, impl=impl.name)
    assert loss.item() == 0
    assert [g.shape for g in torch.autograd.grad(loss, [x, y])] == [x.shape, y.shape]


# --- as PyTorch's own


@pytest.mark.parametrize("options", OPTIONS, ids=option_name)
def test_gradcheck(impl: Impl, options: dict) -> None:
    (x,), (y,) = Views(6, ((2, 3),)).build(torch.float64, impl.device)
    if options["bandwidth"] == "median" and options["kernel"] == "gaussian":
        options = {**options, "bandwidth": 1.3}  # the median is a constant to the gradient
    assert torch.autograd.gradcheck(
        lambda x, y: F.dependence(x, y, impl=impl.name, **options), (x, y),
        fast_mode=impl.interpreted,
    )  # fmt: skip


def test_compiled_in_one_graph(impl: Impl) -> None:
    views = Views(8, ((4, 5), (9,)), 3).build(torch.float32, impl.device)
    loss, gradients = run(views, impl.name)
    torch._dynamo.reset()
    compiled = torch.compile(F.view_dependence, fullgraph=True, backend="aot_eager")
    again = compiled(views, impl=impl.name)
    xs = [x for view in views for x in view]
    torch.testing.assert_close(again, loss)
    for g, h in zip(torch.autograd.grad(again, xs), gradients, strict=True):
        torch.testing.assert_close(g, h)


@given(drawn=drawn_views(), count=st.sampled_from((1, 2, 3)))
def test_every_number_of_threads_gives_the_same_bits(drawn: Views, count: int) -> None:
    usable(Impl("cpp", "cpu"))
    views = drawn._replace(shapes=(*drawn.shapes, (1100,))).build(torch.float32)
    loss, gradients = run(views, "cpp")
    with threads(count):
        again, same = run(views, "cpp")
    assert_same_bits([again, *same], [loss, *gradients])


def test_inputs_and_the_incoming_gradient_are_not_written(impl: Impl) -> None:
    views = Views(8, ((4, 5),), 2).build(torch.float32, impl.device)
    before = [x.detach().clone() for view in views for x in view]
    loss = F.view_dependence(views, impl=impl.name)
    grad = torch.tensor(2.0, device=impl.device)
    xs = [x for view in views for x in view]
    first = torch.autograd.grad(loss, xs, grad, retain_graph=True)
    assert_same_bits(list(torch.autograd.grad(loss, xs, grad)), list(first))
    assert grad.item() == 2
    assert_same_bits([x.detach() for x in xs], before)


def test_a_view_without_gradient_gets_none(impl: Impl) -> None:
    (x,), (y,) = Views(8, ((4, 5),), 2).build(torch.float32, impl.device)
    loss = F.dependence(x, y.detach(), impl=impl.name)
    (g,) = torch.autograd.grad(loss, [x])
    assert_same_bits([g], [torch.autograd.grad(F.dependence(x, y, impl=impl.name), [x])[0]])


def test_second_derivatives_name_the_reference(impl: Impl) -> None:
    (x,), (y,) = Views(8, ((4, 5),), 2).build(torch.float64, impl.device)
    (g,) = torch.autograd.grad(F.dependence(x, y, impl=impl.name), [x], create_graph=True)
    with pytest.raises(RuntimeError, match='impl="reference"'):
        g.sum().backward()


def test_autocast_rounds_nothing(impl: Impl) -> None:
    views = Views(8, ((4, 5),), 2).build(torch.float32, impl.device)
    expected = F.view_dependence(views, impl=impl.name)
    with torch.autocast(impl.device, torch.bfloat16):
        assert_same_bits([F.view_dependence(views, impl=impl.name)], [expected])


# --- the Module


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kernel": "linear", "estimator": "biased", "normalize": True},
        {"bandwidth": 0.5, "layer_weight": [1.0, -2.0]},
    ],
    ids=str,
)
def test_module_is_the_function(impl: Impl, options: dict) -> None:
    views = Views(8, ((4, 5), (9,)), 3).build(torch.float32, impl.device)
    module = imcl_fast.ViewDependence(impl=impl.name, **options)
    expected = F.view_dependence(views, impl=impl.name, **options)
    assert_same_bits([module(views)], [expected])
    assert_same_bits([pickle.loads(pickle.dumps(module))(views)], [expected])
    assert not options or not expected.equal(F.view_dependence(views, impl=impl.name))
    assert f"impl={impl.name!r}" in repr(module)


def test_module_makes_views_dependent(impl: Impl) -> None:
    """A few steps up the gradient raise the CKA of two views."""
    generator = torch.Generator().manual_seed(0)
    views = [leaf(torch.randn(12, 3, 4, generator=generator).to(impl.device)) for _ in range(2)]
    module = imcl_fast.ViewDependence(normalize=True, impl=impl.name)
    optimizer = torch.optim.Adam(views, lr=0.05, maximize=True)
    values = []
    for _ in range(20):
        optimizer.zero_grad()
        value = module(views)
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] > values[0] + 0.3


def small_network() -> nn.Module:
    """Of inputs (B, 2, 6)."""
    return nn.Sequential(nn.Conv1d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3))


def test_quality_agnostic_hands_the_implementation_on(impl: Impl) -> None:
    x = torch.randn(2, 5, 2, 6, generator=torch.Generator().manual_seed(0)).to(impl.device)
    y = torch.tensor([0, 1, 2, 0, 1], device=impl.device)
    network = small_network().to(impl.device)
    losses = [
        imcl_fast.QualityAgnostic(network, x[0], ["0"], alpha=1.0, layer_weight=[1.0], impl=name)
        (x, y).loss
        for name in (impl.name, "reference")
    ]  # fmt: skip
    torch.testing.assert_close(*losses)


# --- how the Triton kernels share out the columns, without Triton


@pytest.mark.parametrize("batch", [4, 64, 65, 300])
def test_every_column_is_in_one_part_and_parts_run_at_once(batch: int) -> None:
    shapes = [(batch, *shape[1:]) for shape in R18_FEATURES for _ in range(3)]
    shapes += [(batch,), (batch, 0), (batch, 17)]
    layers = tuple(
        plan.Layer(shape, torch.empty(shape, device="meta").stride(), True) for shape in shapes
    )
    at_once = 264
    made = dependence_plan.dependence_plan(
        layers, tuple(range(len(layers))), 2, 32, 64, at_once, torch.device("cpu")
    )
    count = len(layers)
    starts, records = made.table[: 2 * count].view(2, count), made.table[2 * count :]
    records = records[: count * plan.FIELDS].view(count, plan.FIELDS)
    row_tiles = -(-batch // 64)
    for start, part, field, tiles in zip(
        starts, (made.gram, made.product), (plan.FORWARD, plan.BACKWARD),
        (row_tiles * (row_tiles + 1) // 2, row_tiles), strict=True,
    ):  # fmt: skip
        parts = records[:, field]
        columns = records[:, plan.COLUMNS]
        before = (parts - 1) * part.span  # columns, of the last part
        assert (before + part.span >= columns).all()
        assert (before <= (columns - 1).clamp(min=0)).all()
        assert torch.equal(start, tiles * (parts.cumsum(0) - parts))
        assert part.programs == tiles * parts.sum()
        assert part.programs <= max(at_once, tiles * count + at_once)
        if tiles == 1:
            assert at_once / 2 < part.programs <= at_once + 2  # but for what has no columns


# --- errors


def test_triton_says_why_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x, network = torch.randn(2, 5, 2, 6), small_network()
    quality_agnostic = imcl_fast.QualityAgnostic(network, x[0], ["0"], impl="triton")
    for call in (
        lambda: F.dependence(*x, impl="triton"),
        lambda: F.view_dependence(list(x), impl="triton"),
        lambda: imcl_fast.ViewDependence(impl="triton")(list(x)),
        lambda: quality_agnostic(x, torch.zeros(5).long()),
    ):
        with pytest.raises(RuntimeError, match='impl="triton" can.t run: .*TRITON_INTERPRET=1'):
            call()


X = torch.zeros(4, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: F.dependence(X, [X]), TypeError, "y: expected a Tensor, got list"),
        (lambda: F.dependence(X, X[:3]), ValueError, "y: expected 4 samples, as x, got shape"),
        (lambda: F.dependence(X[:3], X[:3]), ValueError,
         "x: expected at least 4 samples, got 3; the biased estimator does with 2"),
        (lambda: F.dependence(X[:1], X[:1], estimator="biased"), ValueError,
         "x: expected at least 2 samples, got 1$"),
        (lambda: F.dependence(X, X.long()), TypeError, "y.*expected float16"),
        (lambda: F.dependence(X, X, kernel="rbf"), ValueError, "kernel: expected one of linear"),
        (lambda: F.dependence(X, X, bandwidth="mean"), ValueError, "bandwidth: expected a number"),
        (lambda: F.dependence(X, X, bandwidth=0), ValueError, "bandwidth: expected a number in"),
        (lambda: F.dependence(X, X, bandwidth=1e-170), ValueError, "bandwidth: expected a number"),
        (lambda: F.dependence(X, X, bandwidth=1e160), ValueError, "bandwidth: expected a number"),
        (lambda: F.dependence(X, X, estimator="fair"), ValueError, "estimator: expected one of"),
        (lambda: F.dependence(X, X, normalize=1), TypeError, "normalize: expected a bool"),
        (lambda: F.view_dependence(X), TypeError, "views: expected a sequence of Tensors"),
        (lambda: F.view_dependence([X]), ValueError, "views: expected at least 2 views, got 1"),
        (lambda: F.view_dependence([[X], [X, X]]), ValueError, r"views\[1\]: expected as many"),
        (lambda: F.view_dependence([X, X[:2]]), ValueError, r"views\[1\]\[0\]: expected 4 samples"),
        (lambda: F.view_dependence([X, X], layer_weight=[1, 2]), ValueError, "layer_weight"),
        (lambda: imcl_fast.ViewDependence(bandwidth=0), ValueError, "bandwidth: expected a number"),
        (lambda: imcl_fast.ViewDependence(normalize=1), TypeError, "normalize: expected a bool"),
    ],
)  # fmt: skip
def test_errors(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("impl", ["auto", "torch", "reference"])
def test_tensors_on_two_devices_are_named(impl):
    x = torch.randn(5, 3)
    with pytest.raises(ValueError, match=r"^y: expected all tensors on one device \(cpu, as x\)"):
        F.dependence(x, x.to("meta"), impl=impl)


def test_a_bandwidth_of_numpys_is_compiled_as_a_number():
    import numpy
    torch.compiler.reset()
    loss = imcl_fast.ViewDependence(bandwidth=numpy.float64(0.5), impl="torch")
    views = [torch.randn(6, 3), torch.randn(6, 4)]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(views), loss(views))
    assert type(loss.bandwidth) is float


def test_one_float64_makes_the_result_float64():
    x, y = torch.randn(6, 3), torch.randn(6, 4, dtype=torch.float64)
    for pair in ((x, y), (y, x)):
        got, expected = F.dependence(*pair), F.dependence(x.double(), y)
        assert got.dtype == torch.float64
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("impl", ["torch", "cpp", "reference"])
def test_the_median_is_a_constant_to_the_gradient(impl):
    x = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    width = (torch.pdist(x.detach()).square().median() / 3).sqrt().item()
    y = x.detach().flip(0).clone()
    gradients = [
        torch.autograd.grad(F.dependence(x, y, bandwidth=b, impl=impl), x)[0]
        for b in ("median", width)
    ]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("impl", ["torch", "cpp", "reference"])
def test_samples_may_be_single_numbers(impl):
    x, y = torch.randn(6, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    for kernel in ("linear", "gaussian"):
        got = F.dependence(x, y, kernel=kernel, impl=impl)
        torch.testing.assert_close(got, F.dependence(x[:, None], y, kernel=kernel))


@pytest.mark.parametrize("impl", ["torch", "cpp"])
def test_the_first_of_several_widths_may_be_1(impl):
    xs = [torch.randn(6, d, dtype=torch.float64, requires_grad=True) for d in (4, 3)]
    got, expected = (  # 1/(sigma^2 D) is 1 of the first
        torch.autograd.grad(F.dependence(*xs, bandwidth=0.5, impl=name), xs)
        for name in (impl, "reference")
    )
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("impl", ["torch", "cpp"])
def test_autocast_does_not_round_the_gradient(impl):
    x, y = torch.randn(6, 40, requires_grad=True), torch.randn(6, 30)
    (expected,) = torch.autograd.grad(F.dependence(x, y, impl=impl), x)
    loss = F.dependence(x, y, impl=impl)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (got,) = torch.autograd.grad(loss, x)
    assert torch.equal(got, expected)


def test_features_that_do_not_collapse(impl: Impl) -> None:
    """Repeated in the middle; samples between their features; in several parts."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(6, 4, generator=generator)
    wide = 9 * (30 if impl.interpreted else 300)
    for x in (
        torch.randn(6, 3, 1, 7, generator=generator).expand(-1, -1, 4, -1),
        torch.randn(3, 6, 5, generator=generator).transpose(0, 1),
        torch.randn(5, 6, 9, wide // 9, generator=generator).transpose(0, 1),
    ):
        leaves = leaf(x.to(impl.device)), leaf(x.double().contiguous())
        got, truth = (
            torch.autograd.grad(F.dependence(x, of, bandwidth=1.0, impl=name), x)[0]
            for x, of, name in (
                (leaves[0], y.to(impl.device), impl.name), (leaves[1], y.double(), "reference")
            )
        )  # fmt: skip
        assert (got.cpu().double() - truth).norm() <= 1e-4 * truth.norm()
