"""What transforms the losses or runs around them: torch.compile, autocast, scaling."""

from __future__ import annotations

import pytest
import torch
from conftest import HALVES, Impl, assert_same_bits, dtype_name, leaf, matmul_precision
from strategies import Matrices
from torch import Tensor

from imcl_fast import calls, implementations
from imcl_fast import functional as F

# Inductor takes seconds for each graph, so that most graphs here are only traced
# and run by the tracer's own backend, which is where a graph breaks if it does.
TRACED = "aot_eager"


def representation(impl: str, **options):
    return lambda xs: F.representation_similarity(xs, impl=impl, **options)


def kernel(impl: str, **options):
    return lambda xs: F.kernel_similarity(xs, impl=impl, **options)


def consistency(impl: str, target: Tensor | None, **options):
    return lambda xs: F.collaborative_consistency(xs, target, impl=impl, **options)


def features(dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Tensor]:
    layouts = ("contiguous", "channels_last", "sliced")
    shapes = ((2, 6, 5, 4), (3, 12, 2, 2), (2, 5, 3, 3))
    return [
        Matrices(shape, True, layout, dead=0.1, seed=1).build(dtype, device)
        for shape, layout in zip(shapes, layouts, strict=True)
    ]


def weights(dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Tensor]:
    return [Matrices(shape, False, seed=2).build(dtype, device)
            for shape in ((8, 5, 3, 3), (12, 4), (9, 1, 2, 2))]


def logits(dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((5, 9), (2, 5, 9), (5, 9))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)
            for shape in shapes]


def labels(device: str = "cpu") -> Tensor:
    return torch.tensor([3, 0, -100, 8, 4], device=device)


def step(function, xs: list[Tensor]) -> list[Tensor]:
    """Value and gradients, with something before and after that a compiler could fuse."""
    loss = 3 * function([2 * x for x in xs]).sum()
    return [loss, *torch.autograd.grad(loss, xs)]


def assert_compiled_is_eager(function, xs: list[Tensor], backend: str) -> None:
    torch.compiler.reset()
    xs = [leaf(x) for x in xs]
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    for a, b in zip(step(compiled, xs), step(function, xs), strict=True):
        assert a.dtype == b.dtype and a.stride() == b.stride()
        # The compiler may round in another order, or not at all between two operations.
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


# --- torch.compile


def graphs(impl: Impl) -> dict:
    """One graph for each form of each operation."""
    features_, weights_, logits_ = (
        make(device=impl.device) for make in (features, weights, logits)
    )
    target = labels(impl.device)
    name = impl.name
    return {
        "square": (representation(name), features_),
        "centred": (representation(name, center=True), features_),
        "abs": (representation(name, penalty="abs"), features_),
        "signed": (representation(name, penalty="signed"), features_),
        "kernel": (kernel(name), weights_),
        "others": (consistency(name, target), logits_),
        "none": (consistency(name, None, teacher="pairwise", reduction="none"), logits_),
        "groups": (
            consistency(name, target, groups=[1, 3], teacher=["mean", "final"],
                        temperature=[1.0, 3.0], detach_teacher=False, label_smoothing=0.1),
            logits_,
        ),
    }


@pytest.mark.parametrize("graph", list(graphs(Impl("torch", "cpu"))))
def test_traced_without_a_break(impl: Impl, graph: str) -> None:
    assert_compiled_is_eager(*graphs(impl)[graph], TRACED)


@pytest.mark.parametrize("graph", ["square", "groups"])
def test_compiled_without_a_break(impl: Impl, graph: str) -> None:
    function, xs = graphs(impl)[graph]
    # The fewest layers, for the sake of the C++ compiler's time.
    assert_compiled_is_eager(function, xs[:1] if graph == "square" else xs, "inductor")


def test_traced_with_terms(impl: Impl) -> None:
    torch.compiler.reset()
    xs, target = logits(device=impl.device), labels(impl.device)

    def function(xs, target):
        loss, terms = F.collaborative_consistency(
            xs, target, return_terms=True, impl=impl.name
        )
        return loss, terms["cross_entropy"], terms["kl"]

    compiled = torch.compile(function, fullgraph=True, backend=TRACED)
    for a, b in zip(compiled(xs, target), function(xs, target), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("count", "tracked"), [(1, True), (1, False), (2, True), (3, False), (4, True)]
)
def test_traced_for_any_number_of_tensors(impl: Impl, count: int, tracked: bool) -> None:
    """Of layers and of heads; a tracer may take the arguments of a Function for one another."""
    xs = [torch.randn(6, 10, device=impl.device) for _ in range(count)]
    xs = [leaf(x) for x in xs] if tracked else xs
    for function in (kernel(impl.name), consistency(impl.name, None)):
        torch.compiler.reset()
        compiled = torch.compile(function, fullgraph=True, backend=TRACED)
        got = compiled(xs)
        assert got.requires_grad == tracked
        torch.testing.assert_close(got, function(xs))


def test_traced_in_half_precision(impl: Impl) -> None:
    for dtype in HALVES:
        torch.compiler.reset()
        for function, xs in (
            (representation(impl.name), features(dtype, impl.device)),
            (consistency(impl.name, None), logits(dtype, impl.device)),
        ):
            xs = [leaf(x) for x in xs]
            compiled = torch.compile(function, fullgraph=True, backend=TRACED)
            for a, b in zip(step(compiled, xs), step(function, xs), strict=True):
                assert a.dtype == b.dtype and a.shape == b.shape
                torch.testing.assert_close(a, b)


def test_traced_again_for_another_shape(impl: Impl) -> None:
    """The second shape makes the compiler take sizes for unknown."""
    torch.compiler.reset()
    function = representation(impl.name)
    compiled = torch.compile(function, fullgraph=True, backend=TRACED)
    for batch in (2, 3, 5):
        xs = [leaf(torch.randn(batch, 6, 5, 4, device=impl.device))]
        for a, b in zip(step(compiled, xs), step(function, xs), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    torch.compiler.reset()
    compiled = torch.compile(
        lambda z, y: F.collaborative_consistency(z, y, impl=impl.name),
        fullgraph=True, backend=TRACED,
    )
    for batch in (2, 3, 5):
        z = torch.randn(3, batch, 7, device=impl.device)
        y = torch.arange(batch, device=impl.device)
        torch.testing.assert_close(
            compiled(z, y), F.collaborative_consistency(z, y, impl=impl.name)
        )


def test_compiled_code_follows_the_matmul_precision(impl: Impl) -> None:
    """A precision set after compilation counts, as it does without."""
    torch.compiler.reset()
    function = kernel(impl.name)
    compiled = torch.compile(function, fullgraph=True, backend=TRACED)
    xs = [leaf(Matrices((96, 320), False).build(torch.float32, impl.device))]
    for precision in ("highest", "medium", "highest"):
        with matmul_precision(precision):
            assert_same_bits(step(compiled, xs), step(function, xs))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("precision", calls.PRECISIONS)
def test_the_matmul_precision_reaches_the_operation(
    precision: str, autocast: bool, impl: Impl, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever this CPU makes of it; compiled code has it as it was at first."""
    given: list[int] = []
    real = implementations.pairwise(impl.name)

    def forward(*arguments):
        given.append(arguments[5])
        return real.forward(*arguments)

    monkeypatch.setitem(implementations._PAIRWISE, impl.name, real._replace(forward=forward))
    expected = calls.PRECISIONS.index("medium" if autocast else precision)
    x = torch.randn(4, 6, device=impl.device)
    with matmul_precision(precision), torch.autocast(impl.device, torch.bfloat16, autocast):
        F.kernel_similarity(x, impl=impl.name)
        F.representation_similarity(x[None], impl=impl.name)
    assert given == [expected, expected]


def test_a_target_out_of_range_makes_a_traced_loss_nan(impl: Impl) -> None:
    """The check of its values would have to leave the graph."""
    torch.compiler.reset()
    compiled = torch.compile(
        lambda z, y: F.collaborative_consistency(z, y, impl=impl.name),
        fullgraph=True, backend=TRACED,
    )
    z = torch.randn(3, 4, 7, device=impl.device)
    for wrong in (7, -1, 1 << 40):
        y = torch.tensor([0, wrong, 6, 3], device=impl.device)
        assert torch.isnan(compiled(z, y)).all()


# --- autocast and gradient scaling


@pytest.mark.parametrize("dtype", HALVES, ids=dtype_name)
def test_autocast(impl: Impl, dtype: torch.dtype) -> None:
    """Losses are among what autocast leaves in float32, backward inside or outside of it; one to
    bfloat16 lets the factors of products be rounded, as the precision "medium" does."""
    target = labels(impl.device)
    precision = "medium" if dtype == torch.bfloat16 else torch.get_float32_matmul_precision()
    for function, xs in (
        (representation(impl.name), features(device=impl.device)),
        (representation(impl.name, penalty="signed", center=True), features(device=impl.device)),
        (kernel(impl.name), weights(device=impl.device)),
        (consistency(impl.name, target), logits(device=impl.device)),
        (consistency(impl.name, target, teacher="pairwise"), logits(device=impl.device)),
    ):
        xs = [leaf(x) for x in xs]
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        try:
            expected = step(function, xs)
        finally:
            torch.set_float32_matmul_precision(before)
        with torch.autocast(impl.device, dtype=dtype):
            inside = step(function, xs)
            loss = 3 * function([2 * x for x in xs]).sum()
        outside = [loss, *torch.autograd.grad(loss, xs)]
        assert loss.dtype == torch.float32
        assert_same_bits(inside, expected)
        assert_same_bits(outside, expected)


def test_autocast_of_a_network(impl: Impl) -> None:
    """Half precision features and logits of a float32 network reach its weights."""
    torch.manual_seed(0)
    convolution = torch.nn.Conv2d(3, 6, 3, device=impl.device)
    linear = torch.nn.Linear(6, 5, device=impl.device)
    x = torch.randn(4, 3, 8, 8, device=impl.device)
    y = torch.tensor([0, 1, 2, 3], device=impl.device)

    def loss_of(name: str) -> Tensor:
        features = convolution(x)
        z = linear(features.mean((2, 3)))
        return (
            F.representation_similarity(features, impl=name)
            + F.kernel_similarity(convolution.weight, impl=name)
            + F.collaborative_consistency([z, 2 * z], y, impl=name)
        )

    parameters = [*convolution.parameters(), *linear.parameters()]
    with torch.autocast(impl.device, dtype=torch.bfloat16):
        loss = loss_of(impl.name)
    got = torch.autograd.grad(loss, parameters)
    expected = torch.autograd.grad(loss_of("reference"), parameters)
    assert loss.dtype == torch.float32
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0.1, atol=0.02 * b.abs().max().item())


SCALE = 65536.0


def test_scaled_float16_gradients_do_not_underflow(impl: Impl) -> None:
    """A GradScaler's factor must enter before the gradient is rounded to float16.

    Unscaled, they would be a few of the smallest float16 (6e-8), or none.
    """
    generator = torch.Generator().manual_seed(0)
    xs = [torch.randn(shape, generator=generator).half().to(impl.device)
          for shape in ((16, 48, 10, 10), (32, 96, 6, 6))]
    zs = [(0.01 * torch.randn(4096, 40, generator=generator)).half().to(impl.device)
          for _ in range(2)]
    for name, function, inputs in (
        ("representation", F.representation_similarity, xs),
        ("centred", lambda xs, impl: F.representation_similarity(xs, center=True, impl=impl), xs),
        ("consistency",
         lambda zs, impl: F.collaborative_consistency(zs, None, kl_weight=0.01, impl=impl), zs),
    ):
        inputs = [leaf(x) for x in inputs]
        loss = function(inputs, impl=impl.name)
        scaled = torch.autograd.grad(loss * SCALE, inputs)
        doubles = [leaf(x, torch.float64) for x in inputs]
        truth = torch.autograd.grad(function(doubles, impl="reference"), doubles)
        for x, g, t in zip(inputs, scaled, truth, strict=True):
            assert t.abs().max() < 6e-8 * 50, name
            assert g.dtype == x.dtype
            t = t * SCALE
            error = (g.double() - t).abs().max() / t.abs().max()
            assert error < 2e-3, f"{name}: {error:.3g}"


def test_grad_scaler_step(impl: Impl) -> None:
    """Scaling, unscaling and the check for infinities see ordinary gradients."""
    weight = leaf(torch.randn(6, 10, device=impl.device))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scaler = torch.amp.GradScaler(impl.device, init_scale=2.0**16)
    before = weight.detach().clone()
    (expected,) = torch.autograd.grad(F.kernel_similarity(weight, impl=impl.name), weight)
    scaler.scale(F.kernel_similarity(weight, impl=impl.name)).backward()
    scaler.step(optimizer)
    scaler.update()
    torch.testing.assert_close(weight.detach(), before - 0.1 * expected)
