"""Details of the functions, of the references and of which implementation takes a call, of which
a fault went unseen by the tests of the operations."""

import math

import pytest
import torch
from conftest import leaf
from torch._subclasses import FakeTensorMode

import imcl_fast
from imcl_fast import functional as F
from imcl_fast import implementations, operators

pytestmark = pytest.mark.usefixtures("one_thread")

every_impl = pytest.mark.parametrize("impl", ["reference", "torch", "cpp"])


@pytest.fixture(autouse=True)
def numbers():
    torch.manual_seed(0)


# What is taken


@every_impl
def test_features_and_kernels_may_have_many_dimensions(impl):
    for function, first in ((F.representation_similarity, 2), (F.kernel_similarity, 1)):
        x = torch.randn(5, 2, 3, 1, 2, 2, dtype=torch.float64)
        expected = function(x.flatten(first), impl="reference")
        torch.testing.assert_close(function(x, impl=impl), expected)


def test_heads_in_one_tensor_may_have_four_spatial_dimensions():
    z, y = torch.randn(2, 2, 3, 2, 2, 2, 2), torch.randint(0, 3, (2, 2, 2, 2, 2))
    expected = F.collaborative_consistency(list(z), y)
    torch.testing.assert_close(F.collaborative_consistency(z, y), expected)


def test_indices_may_be_unsigned_and_wide():
    z, y = torch.randn(2, 4, 5), torch.tensor([0, 4, 255, 1])
    got = F.collaborative_consistency(z, y.to(torch.uint64), ignore_index=255)
    torch.testing.assert_close(got, F.collaborative_consistency(z, y, ignore_index=255))


@every_impl
def test_of_a_mask_any_number_but_0_counts(impl):
    x, keep = torch.randn(3, 4, 6), torch.rand(3, 6) > 0.4
    expected = F.representation_similarity(x, mask=keep, impl=impl)
    mask = keep * torch.tensor([1, -1, 3, 2, -2, 127])
    for dtype in (torch.int8, torch.int64):
        assert F.representation_similarity(x, mask=mask.to(dtype), impl=impl).equal(expected)


def test_the_module_of_mixtures_hands_sample_weights_on():
    z, y = torch.randn(2, 4, 5), torch.tensor([1, 4, 0, 1])
    share = torch.tensor([1.0, 0.0, 2.0, 0.5])
    got = imcl_fast.JensenShannonLoss()(z, y, sample_weight=share)
    assert got.equal(F.jensen_shannon(z, y, sample_weight=share))


# What comes out


@every_impl
def test_masked_layers_are_averaged(impl):
    xs, keep = [torch.randn(3, n, 6) for n in (4, 5)], torch.rand(3, 6) > 0.4
    each = [F.representation_similarity(x, mask=keep, impl=impl) for x in xs]
    got = F.representation_similarity(xs, mask=keep, impl=impl)
    torch.testing.assert_close(got, sum(each) / 2)


@every_impl
def test_where_centred_rows_die(impl):
    """At 1e-5 of the norm that they had before."""
    noise = torch.randn(2, 4, 30, dtype=torch.float64)
    noise = noise - noise.mean(-1, keepdim=True)
    noise = noise / noise.norm(dim=-1, keepdim=True)
    ratio = torch.tensor([1.3, 0.8, 1.3, 1.3], dtype=torch.float64).view(4, 1)
    x = leaf(noise + 1e5 / 30**0.5 / ratio)
    (g,) = torch.autograd.grad(F.representation_similarity(x, center=True, impl=impl), x)
    assert g.any(-1).tolist() == 2 * [[True, False, True, True]]


@every_impl
def test_samples_that_are_ignored_have_no_gradient_whatever_they_are(impl):
    z, y = torch.randn(2, 4, 5), torch.tensor([1, -100, 0, 4])
    z[0, 1, 2], z[1, 1] = math.nan, math.inf
    z.requires_grad_()
    for loss in (F.collaborative_consistency, F.jensen_shannon):
        (g,) = torch.autograd.grad(loss(z, y, impl=impl), z)
        assert g.isfinite().all() and not g[:, 1].any()


def with_a_head_without_classes(target, **options):
    """The loss, and the gradient of logits of which head 0 has no class left in one sample."""
    z = torch.randn(3, 4, 7)
    z[0, 1] = -math.inf
    z = leaf(z)
    loss = F.collaborative_consistency(z, target, kl_weight=0.0, **options)
    return loss, *torch.autograd.grad(loss, z)


@every_impl
@pytest.mark.parametrize("divergence", ["kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("teacher", ["others", "mean", "final", "pairwise"])
@pytest.mark.parametrize("detach", [True, False])
def test_a_head_without_classes_that_weighs_nothing(detach, teacher, divergence, impl):
    loss, g = with_a_head_without_classes(
        None, teacher=teacher, divergence=divergence, detach_teacher=detach, impl=impl
    )
    assert loss == 0 and not g.any()


@every_impl
@pytest.mark.parametrize("labels", [torch.arange(4), torch.full((4, 7), 0.5)], ids=["int", "soft"])
def test_the_same_of_its_cross_entropy(labels, impl):
    loss, g = with_a_head_without_classes(labels, ce_weight=[0.0, 1.0, 1.0], impl=impl)
    assert loss.isfinite() and g.isfinite().all() and not g[0].any()


@every_impl
def test_of_samples_that_are_mostly_alike_the_bandwidth_is_1(impl):
    x = torch.zeros(6, 4)
    x[5] = 0.5  # two thirds of the pairs are of identical samples
    got = F.dependence(x, x, estimator="biased", impl=impl)
    # sigma^2 D = 1
    expected = F.dependence(x, x, estimator="biased", bandwidth=0.5, impl=impl)
    torch.testing.assert_close(got, expected)
    assert got > 0


@every_impl
@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
def test_what_is_no_number_beside_what_is_constant_is_none(estimator, impl):
    x = torch.randn(6, 3)
    x[1, 0] = math.nan
    options = {"estimator": estimator, "normalize": True, "impl": impl}
    assert F.dependence(x, torch.ones(6, 4), **options).isnan()


# Compiled code


def test_compiled_code_knows_the_widest_dtype_of_all():
    xs = [torch.randn(6, 5, dtype=dtype) for dtype in (torch.float32, torch.float64)]
    options = (0, False, 1e-12, False, 0, True)
    loss, state = operators.pairwise.forward(xs, *options)
    with FakeTensorMode() as mode:
        fake, told = operators.pairwise.forward([mode.from_tensor(x) for x in xs], *options)
    assert fake.dtype == loss.dtype == torch.float64
    assert [(x.shape, x.dtype) for x in told] == [(x.shape, x.dtype) for x in state]


def test_compiled_code_takes_logits_of_mixed_strides():
    xs = [torch.randn(5, 9), torch.randn(9, 5).T, torch.randn(2, 5, 9)]
    torch.compiler.reset()
    loss = F.collaborative_consistency
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    leaves = [leaf(x) for x in xs]
    results = [torch.autograd.grad(each(leaves, None), leaves) for each in (loss, compiled)]
    torch.testing.assert_close(*results)


# Which implementation


def test_on_a_gpu_it_is_triton(monkeypatch):
    monkeypatch.setattr(implementations, "why_not", lambda *_: None)
    for operation in ("pairwise", "consistency", "dependence"):
        assert implementations.choose("auto", operation, torch.device("cuda", 0)) == "triton"


def test_dtypes_of_all_tensors_are_asked_for(monkeypatch):
    seen = []

    def choose(impl, operation, device, dtypes):
        seen.append([operation, *dtypes])
        return "torch"

    monkeypatch.setattr(implementations, "choose", choose)
    x, y = torch.randn(6, 5), torch.randn(6, 5, dtype=torch.float64)
    F.kernel_similarity([x, y])
    F.dependence(x, y)
    F.collaborative_consistency([x, y], None)
    both = [torch.float32, torch.float64]
    assert seen == [["pairwise", *both], ["dependence", *both], ["consistency", torch.float64]]


def test_float64_is_not_for_triton_on_a_gpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for dtypes in ([torch.float64], [torch.float32, torch.float64]):
        assert "float64" in implementations.why_not("triton", "cuda", dtypes)
        implementations._warn_fallback.cache_clear()
        with pytest.warns(RuntimeWarning, match="float64"):
            found = implementations.choose("auto", "pairwise", torch.device("cuda"), dtypes)
        assert found == "torch"


def test_triton_is_for_intels_gpus_too(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert implementations.why_not("triton", "xpu") is None
    assert "these are on mps" in implementations.why_not("triton", "mps")


def test_triton_compiles_with_what_cc_names_or_with_clang(monkeypatch):
    missing = implementations._why_not_c_compiler.__wrapped__
    monkeypatch.setattr(implementations.shutil, "which", lambda name: None)
    monkeypatch.setenv("CC", "/opt/bin/icx")
    assert missing() is None
    monkeypatch.delenv("CC")
    assert missing() is not None
    which = {"clang": "/usr/bin/clang"}.get
    monkeypatch.setattr(implementations.shutil, "which", which)
    assert missing() is None


@pytest.mark.parametrize("name", ["", *(f"pytorch-triton{of}" for of in ("", "-rocm", "-xpu"))])
def test_pytorchs_own_triton_is_found_by_its_names(name, monkeypatch):
    def version(package):
        if package != (name or "triton"):
            raise implementations.PackageNotFoundError(package)
        return "3.6.0"

    monkeypatch.setattr(implementations, "version", version)
    assert implementations._triton_version.__wrapped__() == "3.6.0"
