"""The registered operators by themselves: schema, fake kernels and dispatch, on every device."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import DTYPES, Impl, dtype_name
from strategies import TEACHERS
from test_compile import features, labels, logits, weights

from imcl_fast import calls, implementations, operators, schemas
from imcl_fast import functional as F
from imcl_fast.calls import DIVERGENCES

# Gradients come from the autograd Functions: the operators themselves have none.
OPCHECKS = ("test_schema", "test_faketensor")
MIXTURE = len(DIVERGENCES)


@pytest.fixture
def pairwise(impl: Impl) -> operators.Pairwise:
    if impl.name == "triton":  # called as they are, but by a compiler
        return operators.Pairwise(
            operators.overload("triton_pairwise"), operators.overload("triton_pairwise_backward")
        )
    return implementations.pairwise(_with_operators(impl))


@pytest.fixture
def consistency(impl: Impl) -> Callable:
    if impl.name == "triton":
        return operators.overload("triton_consistency")
    return implementations.consistency(_with_operators(impl))


@pytest.fixture
def gram(impl: Impl) -> operators.Gram:
    if impl.name == "triton":
        return operators.Gram(
            operators.overload("triton_gram_forward"), operators.overload("triton_gram_backward")
        )
    return implementations.dependence(_with_operators(impl))


def _with_operators(impl: Impl) -> str:
    if impl.name == "torch":
        pytest.skip("torch: its algebra is no operator")
    return impl.name


def pairwise_samples(device: str = "cpu") -> list[tuple]:
    """Arguments of pairwise_forward."""
    samples = []
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for penalty in range(3):
            for center in (False, True):
                options = schemas.PairwiseOptions(penalty, center, 1e-12, True, 0)
                samples.append((features(dtype, device), *options, True))
    square = schemas.PairwiseOptions(0, False, 1e-12, True, 0)
    of_weights = square._replace(batched=False)
    samples.append((weights(device=device), *of_weights._replace(precision=2), True))
    samples.append((weights(device=device), *of_weights, False))
    mixed = [features(torch.float64, device)[0], *features(torch.float16, device)[1:]]
    samples.append((mixed, *square, True))
    empty = [torch.zeros(0, 4, 3, device=device), torch.zeros(0, 9, 2, device=device)]
    samples.append((empty, *square._replace(center=True), True))
    # Remainders of what a state is padded to, and more tiles than one.
    sizes = ((67, 70), (131, 5), (9, 1), (70, 41), (48, 50), (16, 17), (150, 37), (96, 48))
    tiles = [torch.randn(1, n, d, device=device) for n, d in sizes]
    for penalty in range(3):
        options = schemas.PairwiseOptions(penalty, penalty > 0, 1e-12, True, 0)
        samples.append((tiles, *options, True))
    return samples


def consistency_samples(device: str = "cpu") -> list[tuple]:
    """Arguments of consistency."""
    samples = []
    for dtype in (torch.float64, torch.float32, torch.float16):
        for kind in range(len(TEACHERS)):
            for reduction in range(3):
                options = schemas.ConsistencyOptions(
                    [1.0] * 4, [0.5] * 4, [1, 3], [1.0, 2.0], [0, kind], [True, False], [0, 0],
                    [0.5, 0.5], 0.1, -100, False, reduction,
                )
                target = labels(device) if kind % 2 else None
                samples.append((logits(dtype, device), target, None, None, *options, kind != 1))
    options = schemas.ConsistencyOptions(
        [1.0] * 2, [1.0] * 2, [2], [2.0], [0], [True], [0], [0.5], 0.0, -100, False, 0
    )
    transposed = torch.randn(2, 7, 5, device=device).transpose(1, 2)
    for z in (torch.zeros(2, 0, 3, device=device), transposed):
        samples.append(([z], None, None, None, *options, True))
    for divergence in range(1, MIXTURE + 1):
        for binary in (False, True):
            z = torch.randn(3, 4, 5, 1, device=device)
            target = torch.rand(4, 5, 2, device=device)
            if not binary:
                z, target = z[..., 0], torch.tensor([3, 1, 0, -100], device=device)
            options = schemas.ConsistencyOptions(
                [1.0] * 3, [0.5] * 3, [3], [1.0], [0], [divergence == MIXTURE], [divergence],
                [0.25], 0.1, -100, binary, 2,
            )
            samples.append(([z], target, None, None, *options, True))
    return samples


def gram_samples(device: str = "cpu") -> list[tuple]:
    """Arguments of gram_forward."""
    shapes = {
        torch.float64: ((6, 5, 3), (6, 4)),
        torch.float32: ((70, 3), (70, 16)),  # more samples than a tile
        torch.float16: ((8, 9), (8,), (8, 0)),  # whose means take as much as those of 12, 4, 0
    }
    samples = [
        ([torch.randn(s, device=device).to(dtype) for s in each], [1.0, *[2.0] * (len(each) - 1)])
        for dtype, each in shapes.items()
    ]
    mixed = [
        torch.randn(6, n, device=device).to(dtype)
        for n, dtype in ((5, torch.float32), (4, torch.bfloat16), (3, torch.float32))
    ]
    return [*samples, (mixed, [1.0, 1.0, 0.5])]


@pytest.mark.parametrize("sample", range(len(pairwise_samples())))
def test_pairwise(impl: Impl, pairwise: operators.Pairwise, sample: int) -> None:
    arguments = pairwise_samples(impl.device)[sample]
    forward, backward = pairwise
    torch.library.opcheck(forward, arguments, test_utils=OPCHECKS)
    loss, state = forward(*arguments)
    if not arguments[-1]:
        assert state == []
        return
    xs, options = arguments[0], arguments[1:-1]
    grad = torch.ones_like(loss)
    torch.library.opcheck(backward, (grad, xs, state, *options), test_utils=OPCHECKS)


@pytest.mark.parametrize("penalty", range(3))
def test_what_a_cpu_keeps_is_no_larger_than_the_input(penalty: int) -> None:
    """But for two numbers of each row, in the accumulation dtype."""
    for n, d in ((128, 65), (130, 129), (100, 100), (64, 300), (201, 100), (300, 20), (5, 1)):
        x = torch.randn(8, n, d)
        _, (state,) = operators.pairwise.forward([x], penalty, True, 1e-12, True, 0, True)
        assert state.numel() < x.numel() + 8 * 2 * n + 16


@pytest.mark.parametrize(("n", "d", "edge"), [(64, 300, 64), (131, 132, 131), (300, 40, 40)])
def test_a_cpu_keeps_half_of_a_symmetric_matrix(n: int, d: int, edge: int) -> None:
    """And the blocks of 16 by 16 on its diagonal; of the dual form a norm of each row."""
    x = torch.randn(8, n, d)
    _, (state,) = operators.pairwise.forward([x], 0, False, 1e-12, True, 0, True)
    norms = n if edge == d else 0
    assert edge**2 / 2 < state.numel() / 8 - norms <= edge * (edge + 16) / 2


STATM = Path("/proc/self/statm")


@pytest.mark.skipif(not STATM.exists(), reason="no /proc to read how much memory there is")
@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13),
    reason="PyTorch before 2.13 doesn't tell extensions what went wrong",
)
def test_a_tensor_that_finds_no_memory_says_what_pytorch_says() -> None:
    """Scripts that look for a batch size search the message for it."""
    z = torch.empty(1, 1).expand(1 << 24, 1 << 26).detach().requires_grad_()  # 4 PiB
    with pytest.raises(RuntimeError, match="you tried to allocate") as raised:
        F.collaborative_consistency(z, None, kl_weight=0.0, impl="cpp")
    with pytest.raises(RuntimeError, match="you tried to allocate") as theirs:
        torch.empty_like(z)
    assert str(raised.value)[:20] == str(theirs.value)[:20]


def test_a_large_call_gives_its_working_memory_back() -> None:
    def resident() -> int:
        return int(STATM.read_text().split()[1]) * resource.getpagesize()

    for n in (8, 3000):
        before = resident()
        operators.pairwise.forward([torch.randn(n, n)], 0, False, 1e-12, False, 0, False)
    assert resident() - before < 2**24  # of over 2**25


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_gradients_are_kept_in_the_dtype_of_the_logits(
    impl: Impl, dtype: torch.dtype, layout: str
) -> None:
    """But for float16, which a loss scale is there for."""
    z = torch.randn(2, 5, 7, device=impl.device).to(dtype)
    z = z if layout == "contiguous" else z.mT.contiguous().mT
    options = schemas.ConsistencyOptions(
        [1.0] * 2, [1.0] * 2, [2], [2.0], [0], [True], [0], [0.5], 0.0, -100, False, 0
    )
    call = implementations.consistency(impl.name)
    loss, terms, gradients = call([z], None, None, None, *options, True)
    assert {g.dtype for g in gradients} == {torch.float32 if dtype == torch.float16 else dtype}
    assert loss.dtype == terms.dtype == (dtype if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("sample", range(len(consistency_samples())))
def test_consistency(impl: Impl, consistency: Callable, sample: int) -> None:
    arguments = consistency_samples(impl.device)[sample]
    torch.library.opcheck(consistency, arguments, test_utils=OPCHECKS)
    *_, gradients = consistency(*arguments)
    assert bool(gradients) == arguments[-1]


@pytest.mark.parametrize("sample", range(len(gram_samples())))
def test_gram(impl: Impl, gram: operators.Gram, sample: int) -> None:
    xs, scale = gram_samples(impl.device)[sample]
    torch.library.opcheck(gram.forward, (xs, scale), test_utils=OPCHECKS)
    grams, means = gram.forward(xs, scale)
    torch.library.opcheck(gram.backward, (grams, xs, means), test_utils=OPCHECKS)


@pytest.mark.parametrize("penalty", ["square", "abs", "signed"])
def test_what_is_kept_of_square_matrices(penalty):
    from imcl_fast import functional as F
    w = torch.randn(20, 20, requires_grad=True)
    torch.compiler.reset()
    compiled = torch.compile(F.kernel_similarity, fullgraph=True, backend="aot_eager")
    (expected,) = torch.autograd.grad(F.kernel_similarity(w, penalty=penalty, impl="cpp"), w)
    (got,) = torch.autograd.grad(compiled(w, penalty=penalty, impl="cpp"), w)
    assert torch.equal(got, expected)
    from torch._subclasses import FakeTensorMode
    options = ([w.detach()], calls.PENALTIES.index(penalty), False, 1e-12, False, 0, True)
    _, (state,) = operators.pairwise.forward(*options)
    plain = w.detach()
    with FakeTensorMode() as mode:
        _, (fake,) = operators.pairwise.forward([mode.from_tensor(plain)], *options[1:])
    assert fake.shape == state.shape
