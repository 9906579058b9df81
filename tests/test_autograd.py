"""The autograd Functions: what is asked of them beyond the right values."""

from __future__ import annotations

import threading

import pytest
import torch
from bounds import unit
from conftest import Impl, assert_same_bits, bits, dtype_name, leaf, usable
from strategies import PENALTIES, TEACHERS, Matrices, lay_out
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from imcl_fast import functional as F

# One input for each form of the penalty (primal, dual, signed, centred) and for each
# teacher; functions of a list of tensors, so that every test can run all of them.
PAIRWISE = {
    "primal": ((3, 6, 5, 4), {}),
    "dual": ((3, 12, 2, 2), {}),
    "abs": ((2, 6, 3, 3), {"penalty": "abs"}),
    "signed": ((2, 6, 3, 3), {"penalty": "signed"}),
    "centred": ((2, 6, 4, 4), {"center": True}),
    "centred dual": ((2, 12, 4), {"center": True}),
    "centred signed": ((2, 12, 4), {"center": True, "penalty": "signed"}),
}
CONSISTENCY = {
    "others": {"teacher": "others"},
    "mean": {"teacher": "mean", "label_smoothing": 0.1, "reduction": "sum"},
    "final": {"teacher": "final", "detach_teacher": False},
    "pairwise": {"teacher": "pairwise", "reduction": "none"},
    "groups": {"teacher": ["pairwise", "others"], "groups": [1, 2], "temperature": [1.0, 3.0]},
}
CASES = [*(("representation", name) for name in PAIRWISE), ("kernel", "weights"),
         *(("consistency", name) for name in CONSISTENCY)]
NAMES = ["-".join(case) for case in CASES]


def case(kind: str, name: str, impl: Impl, dtype: torch.dtype = torch.float32):
    """(function of a list of tensors that returns the loss, the list)."""
    if kind == "representation":
        shape, options = PAIRWISE[name]
        xs = [Matrices(shape, True, seed=i, dead=0.1 * i).build(dtype, impl.device)
              for i in range(3)]
        return lambda xs: F.representation_similarity(xs, impl=impl.name, **options), xs
    if kind == "kernel":
        xs = [Matrices(shape, False, seed=1).build(dtype, impl.device)
              for shape in ((8, 5, 3, 3), (12, 4), (9, 2))]
        return lambda xs: F.kernel_similarity(xs, impl=impl.name), xs
    generator = torch.Generator().manual_seed(0)
    xs = [torch.randn(5, 9, generator=generator, dtype=torch.float64).to(impl.device, dtype)
          for _ in range(3)]
    target = torch.tensor([3, 0, -100, 8, 4], device=impl.device)
    options = CONSISTENCY[name]
    return lambda xs: F.collaborative_consistency(xs, target, impl=impl.name, **options), xs


# --- gradcheck


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 4), (1, 6, 3), (1, 6, 2)], ids=str)
def test_gradcheck_pairwise(impl: Impl, shape, center: bool, penalty: str) -> None:
    xs = [leaf(Matrices(shape, True, seed=i, offset=0.2).build(torch.float64, impl.device))
          for i in range(2)]
    assert torch.autograd.gradcheck(
        lambda *xs: F.representation_similarity(
            xs, penalty=penalty, center=center, impl=impl.name
        ),
        xs,
        # One random projection of the Jacobian where every element would take a minute.
        fast_mode=impl.interpreted,
    )


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck_consistency(impl: Impl, teacher: str, reduction: str) -> None:
    """Only a teacher that isn't detached has the gradient of finite differences."""
    generator = torch.Generator().manual_seed(0)
    xs = [torch.randn(3, 4, generator=generator, dtype=torch.float64).to(impl.device)
          for _ in range(3)]
    target = torch.tensor([3, -100, 1], device=impl.device)

    def function(*xs: Tensor) -> Tensor:
        return F.collaborative_consistency(
            xs, target, teacher=teacher, detach_teacher=False, reduction=reduction,
            label_smoothing=0.2, temperature=1.5, ce_weight=[1, 0, 2], kl_weight=[0.5, 2, 1],
            impl=impl.name,
        )

    assert torch.autograd.gradcheck(
        function, [leaf(x) for x in xs], fast_mode=impl.interpreted
    )


def test_gradcheck_of_strided_inputs(impl: Impl) -> None:
    for layout in ("channels_last", "transposed", "sliced"):
        x = Matrices((1, 3, 2, 2), True, layout, seed=2).build(torch.float64, impl.device)
        assert torch.autograd.gradcheck(
            lambda x: F.representation_similarity(x, impl=impl.name),
            leaf(x),
            fast_mode=impl.interpreted,
        )
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, 2, 4, generator=generator, dtype=torch.float64).to(impl.device)
    for layout in ("transposed", "reversed", "sliced"):
        assert torch.autograd.gradcheck(
            lambda z: F.collaborative_consistency(z, None, detach_teacher=False, impl=impl.name),
            leaf(lay_out(z, layout)),
            fast_mode=impl.interpreted,
        )


# --- the graph


@pytest.mark.parametrize("kind,name", CASES, ids=NAMES)
def test_backward_twice_gives_the_same_bits(impl: Impl, kind: str, name: str) -> None:
    function, xs = case(kind, name, impl)
    xs = [leaf(x) for x in xs]
    loss = function(xs).sum()
    first = torch.autograd.grad(loss, xs, retain_graph=True)
    second = torch.autograd.grad(loss, xs, retain_graph=True)
    third = torch.autograd.grad(2 * loss, xs)
    assert_same_bits(first, second)
    assert_same_bits([2 * g for g in first], third)  # a power of 2 rounds nothing
    assert any(torch.count_nonzero(g) for g in first)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, xs)


@pytest.mark.parametrize("kind,name", CASES, ids=NAMES)
def test_gradients_of_a_kept_graph_are_the_users_own(impl: Impl, kind: str, name: str) -> None:
    function, xs = case(kind, name, impl)
    xs = [leaf(x) for x in xs]
    loss = function(xs).sum()
    first = torch.autograd.grad(loss, xs, retain_graph=True)
    kept = [bits(g) for g in first]
    for g in first:
        g.zero_()
    second = torch.autograd.grad(loss, xs)
    assert all(bits(g).equal(k) for g, k in zip(second, kept, strict=True))


@pytest.mark.parametrize("kind,name", CASES, ids=NAMES)
def test_inputs_are_not_written(impl: Impl, kind: str, name: str) -> None:
    function, xs = case(kind, name, impl)
    xs = [leaf(x) for x in xs]
    before, versions = [bits(x) for x in xs], [x._version for x in xs]
    grad = torch.tensor(1.5, device=impl.device)
    loss = function(xs)
    torch.autograd.grad(loss, xs, grad.expand(loss.shape))
    assert all(bits(x).equal(b) for x, b in zip(xs, before, strict=True))
    assert [x._version for x in xs] == versions
    assert grad.item() == 1.5


@pytest.mark.parametrize("kind,name", CASES, ids=NAMES)
def test_an_input_changed_before_backward(impl: Impl, kind: str, name: str) -> None:
    """Is an error, or makes no difference: never the gradient of something in between."""
    function, xs = case(kind, name, impl)
    xs = [leaf(x) for x in xs]
    expected = torch.autograd.grad(function(xs).sum(), xs)
    loss = function(xs).sum()
    with torch.no_grad():
        xs[0].mul_(2)
    try:
        got = torch.autograd.grad(loss, xs)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        assert_same_bits(got, expected)


@pytest.mark.parametrize("kind,name", CASES, ids=NAMES)
def test_only_the_gradients_needed(impl: Impl, kind: str, name: str) -> None:
    function, xs = case(kind, name, impl)
    xs = [leaf(x) for x in xs]
    every = torch.autograd.grad(function(xs).sum(), xs)
    # The interpreter takes a second for each: every input once with and once without.
    for needed in (1, 6) if impl.interpreted else range(1, 8):
        some = [x if needed >> i & 1 else x.detach() for i, x in enumerate(xs)]
        wanted = [x for x in some if x.requires_grad]
        got = torch.autograd.grad(function(some).sum(), wanted)
        expected = [g for i, g in enumerate(every) if needed >> i & 1]
        if kind == "consistency" or needed == 7:
            assert_same_bits(got, expected)
        else:  # in a call of their own, whose mean is rounded by itself
            for g, e in zip(got, expected, strict=True):
                assert (g.double() - e.double()).norm() <= 8 * unit(e.dtype) * e.double().norm()
        for x in xs:
            x.grad = None
        function(some).sum().backward()
        assert [x.grad is not None for x in xs] == [bool(needed >> i & 1) for i in range(3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
def test_a_gradient_is_scaled_where_it_lies_unless_the_graph_is_kept(
    impl: Impl, dtype: torch.dtype
) -> None:
    """The one that the forward has made: a second would take as much memory as the logits. By 1
    nothing is done where the number is at hand."""

    class Scalings(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if str(function).startswith("aten.mul") and args[0].dim() > 0:
                self.seen.append(str(function))
            return function(*args, **(kwargs or {}))

    z = leaf(torch.randn(3, 5, 7, device=impl.device, dtype=dtype))
    once = {}
    for last in (2.0, 1.0):
        loss = F.collaborative_consistency(z, None, impl=impl.name)
        at_hand = impl.device == "cpu" and impl.name != "triton"
        in_place = [] if last == 1 and at_hand else ["aten.mul_.Tensor"]
        for factor, kept, expected in (
            (1.0, True, ["aten.mul.Tensor"]),
            (2.0, True, ["aten.mul.Tensor"]),
            (last, False, in_place),
        ):
            grad = torch.tensor(factor, device=impl.device)
            with Scalings() as scalings:
                (got,) = torch.autograd.grad(loss, z, grad, retain_graph=kept)
            assert scalings.seen == expected
            assert_same_bits([once.setdefault(factor, got.clone())], [got])
    assert torch.equal(2 * once[1.0], once[2.0])


def test_a_backward_fills_nothing(impl: Impl) -> None:
    """The terms have no gradient, and none is made for them: on a GPU it would be a launch."""

    class Filled(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    z = leaf(torch.randn(3, 5, 7, device=impl.device))
    loss = F.collaborative_consistency(z, None, impl=impl.name)
    one, seen = torch.ones((), device=impl.device), []
    with Filled():
        torch.autograd.grad(loss, z, one)
    assert seen and not [name for name in seen if "zero" in name or "fill" in name]


def test_no_grad_output_is_no_gradient(impl: Impl) -> None:
    class Forgetful(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return None

    z = leaf(torch.randn(3, 5, 7, device=impl.device))
    Forgetful.apply(F.collaborative_consistency(z, None, impl=impl.name)).backward()
    assert z.grad is None or not z.grad.any()


@pytest.mark.parametrize("kind,name", CASES, ids=NAMES)
def test_without_a_gradient(impl: Impl, kind: str, name: str) -> None:
    function, xs = case(kind, name, impl)
    tracked = function([leaf(x) for x in xs])
    with torch.no_grad():
        under_no_grad = function([leaf(x) for x in xs])
    with torch.inference_mode():
        under_inference = function(xs)
    detached = function(xs)
    assert tracked.requires_grad
    for loss in (under_no_grad, under_inference, detached):
        assert not loss.requires_grad
        torch.testing.assert_close(loss, tracked.detach())


@pytest.mark.parametrize("name", ["consistency", "representation"])
def test_threads_that_run_backward_at_once_are_right_or_refused(name: str) -> None:
    """Without retain_graph only one may; what it scales in place was the other's gradient."""
    usable(Impl("cpp", "cpu"))
    factor, errors = torch.tensor(2.0), []

    def run(loss: Tensor, x: Tensor, ready: threading.Barrier, found: list) -> None:
        ready.wait()
        try:
            found.append(torch.autograd.grad(loss, x, factor)[0].clone())
        except RuntimeError as error:
            errors.append(str(error))

    for _ in range(40):
        if name == "consistency":
            x = leaf(torch.randn(3, 64, 1000))
            loss = F.collaborative_consistency(x, None, impl="cpp")
        else:
            x = leaf(torch.randn(8, 32, 16, 16))
            loss = F.representation_similarity(x, impl="cpp")
        (truth,) = torch.autograd.grad(loss, x, factor, retain_graph=True)
        arguments = loss, x, threading.Barrier(2), []
        both = [threading.Thread(target=run, args=arguments) for _ in range(2)]
        for thread in both:
            thread.start()
        for thread in both:
            thread.join()
        for gradient in arguments[-1]:
            torch.testing.assert_close(gradient, truth)
    # PyTorch itself says it, or that what was saved has been written to, if it gets there in time.
    known = ("graph a second time", "modified by an inplace operation")
    assert not [each for each in errors if not any(why in each for why in known)]


@pytest.mark.parametrize("name", ["consistency", "binary", "representation", "dependence"])
@pytest.mark.parametrize("by", ["cpp", "torch"])
def test_a_teacher_may_be_of_inference_mode(by: str, name: str) -> None:
    """Beside what learns; autograd keeps no such tensors for a backward pass."""
    impl = usable(Impl(by, "cpu"))
    functions = {
        "consistency": lambda *z: F.collaborative_consistency(
            z, torch.tensor([0, 2, 1, 0], device=impl.device), teacher="final",
            ce_weight=[1.0, 0.0], impl=impl.name,
        ),
        "binary": lambda *z: F.collaborative_consistency(
            z, (z[0].detach() > 0).float(), activation="sigmoid", teacher="final", impl=impl.name
        ),
        "representation": lambda *x: F.representation_similarity(
            [each.unsqueeze(-1) for each in x], impl=impl.name
        ),
        "dependence": lambda *x: F.dependence(*x, impl=impl.name),
    }  # fmt: skip
    z = leaf(torch.randn(4, 5, device=impl.device))
    with torch.inference_mode():
        teacher = torch.randn(4, 5, device=impl.device)
    got = torch.autograd.grad(functions[name](z, teacher), z)
    assert_same_bits(got, torch.autograd.grad(functions[name](z, teacher.clone()), z))


@pytest.mark.parametrize("kind,name", CASES, ids=NAMES)
def test_gradient_flows_through_a_graph(impl: Impl, kind: str, name: str) -> None:
    """Into the tensors that the inputs were computed from, and out of what used the loss."""
    function, xs = case(kind, name, impl, torch.float64)
    xs = [leaf(x) for x in xs]
    loss = function([torch.tanh(x) for x in xs]).sum() ** 2
    got = torch.autograd.grad(loss, xs)
    function, _ = case(kind, name, Impl("reference", impl.device), torch.float64)
    expected = torch.autograd.grad(function([torch.tanh(x) for x in xs]).sum() ** 2, xs)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind,name", CASES, ids=NAMES)
def test_grad_output_of_zero_is_a_gradient_of_zero(impl: Impl, kind: str, name: str) -> None:
    function, xs = case(kind, name, impl)
    xs = [leaf(x) for x in xs]
    for g in torch.autograd.grad(0 * function(xs).sum(), xs):
        assert torch.count_nonzero(g) == 0


def test_each_sample_has_its_own_grad_output(impl: Impl) -> None:
    _, xs = case("consistency", "others", impl)
    xs = [leaf(x) for x in xs]
    loss = F.collaborative_consistency(xs, None, reduction="none", impl=impl.name)
    picked = torch.zeros(5, device=impl.device)
    picked[3] = 1
    for g in torch.autograd.grad(loss, xs, picked):
        assert torch.count_nonzero(g[3]) > 0
        assert torch.count_nonzero(g) == torch.count_nonzero(g[3])


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_only_products_are_rounded_to_bfloat16(impl: Impl, reduction: str) -> None:
    """1/3 is not a number of bfloat16: a gradient times the next one would be off by 0.2 %, all of
    it in the same direction."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(3, 40, 70, generator=generator).to(impl.device, torch.bfloat16)

    def gradient(z: Tensor, impl: str) -> Tensor:
        z = leaf(z)
        loss = F.collaborative_consistency(z, None, reduction=reduction, impl=impl)
        return torch.autograd.grad(loss, z, torch.full_like(loss, 1 / 3))[0]

    got, truth = gradient(z, impl.name).double(), gradient(z.double(), "reference")
    assert float((got * truth).sum() / truth.square().sum()) == pytest.approx(1, abs=4e-4)


# --- the second derivative


@pytest.mark.parametrize("kind,name", CASES, ids=NAMES)
def test_double_backward_is_an_error_that_says_what_to_do(
    impl: Impl, kind: str, name: str
) -> None:
    function, xs = case(kind, name, impl)
    xs = [leaf(x) for x in xs]
    gradients = torch.autograd.grad(function(xs).sum(), xs, create_graph=True)
    with pytest.raises(RuntimeError, match='impl="reference"'):
        torch.autograd.grad(sum(g.square().sum() for g in gradients), xs)


@pytest.mark.parametrize("kind,name", CASES, ids=NAMES)
def test_double_backward_of_grad_output_is_an_error(impl: Impl, kind: str, name: str) -> None:
    """The gradient depends on grad_output too, though nothing else may require one."""
    function, xs = case(kind, name, impl)
    xs = [leaf(x) for x in xs]
    scale = torch.ones((), device=impl.device, requires_grad=True)
    (g,) = torch.autograd.grad(scale * function(xs).sum(), xs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match='impl="reference"'):
        torch.autograd.grad(g.sum(), scale)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_reference_can_be_differentiated_twice_pairwise(penalty: str) -> None:
    x = leaf(Matrices((1, 3, 3), True, seed=1).build(torch.float64))
    for center in (False, True):
        assert torch.autograd.gradgradcheck(
            lambda x, center=center: F.representation_similarity(
                x, penalty=penalty, center=center, impl="reference"
            ),
            x,
        )


@pytest.mark.parametrize("teacher", TEACHERS)
def test_reference_can_be_differentiated_twice_consistency(teacher: str) -> None:
    generator = torch.Generator().manual_seed(0)
    xs = [leaf(torch.randn(1, 3, generator=generator, dtype=torch.float64)) for _ in range(3)]
    target = torch.tensor([2])
    assert torch.autograd.gradgradcheck(
        lambda *xs: F.collaborative_consistency(
            xs, target, teacher=teacher, detach_teacher=False, impl="reference"
        ),
        xs,
    )


def test_terms_have_no_gradient(impl: Impl) -> None:
    z = torch.randn(3, 4, 5, device=impl.device, requires_grad=True)
    loss, terms = F.collaborative_consistency(
        z, torch.arange(4, device=impl.device), return_terms=True, impl=impl.name
    )
    assert loss.requires_grad and not any(term.requires_grad for term in terms.values())
