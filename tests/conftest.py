"""What every test shares: the implementations under test, and the checks of a result.

How accurate it must be is said in bounds.py.
"""

from __future__ import annotations

import contextlib
import math
import os
import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import cuda_emulation
import hypothesis
import numpy as np
import pytest
import torch
from bounds import (
    assert_accurate,
    consistency_noise,
    loss_dtype,
    mixture_noise,
    pairwise_noise,
    unit,
)
from torch import Tensor

from imcl_fast import functional as F
from imcl_fast import implementations
from imcl_fast.imcl import IMCL

# TensorFloat-32 has 10 bits after the first, and what goes beyond them may be cut off.
TENSOR_FLOAT_32_UNIT = 2.0**-10 / 3**0.5

GPU = ("triton", "cuda")
# Those whose kernels run on the CPU in this process, hence slowly.
INTERPRETED = tuple(
    name
    for name, variable in (("triton", "TRITON_INTERPRET"), ("cuda", "CUDA_ON_CPU"))
    if os.environ.get(variable) == "1"
)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
HALVES = (torch.bfloat16, torch.float16)
# The reference is the oracle: it is tested by itself, against plain loops.
ALWAYS_TESTED = ("torch", "cpp")

# Most tests look at all ways in one call. What a call computes by default test_schedule asks.
INTERVALS = ("representation_interval", "kernel_interval")
DEFAULT_INTERVALS = {name: IMCL.__init__.__kwdefaults__[name] for name in INTERVALS}
IMCL.__init__.__kwdefaults__.update(dict.fromkeys(INTERVALS, 1))

# Derandomised, so that a run can be repeated; without a database and a deadline,
# which are what makes runs on a busy machine differ. Explaining a failure takes minutes.
hypothesis.settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    database=None,
    # Triton's interpreter takes a millisecond where a kernel takes none.
    max_examples=3 if "triton" in INTERPRETED else 30,
    phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate, hypothesis.Phase.shrink),
)
hypothesis.settings.load_profile("repeatable")


class Impl(NamedTuple):
    """An implementation under test and the device its tests put tensors on."""

    name: str
    device: str

    @property
    def interpreted(self) -> bool:
        """Whether a GPU's kernels run on the CPU, very slowly."""
        return self.name in ("triton", "cuda") and self.device == "cpu"


if "cuda" in INTERPRETED:
    # impl="cuda" takes CPU tensors then: its kernels, compiled by g++.
    _emulated = cuda_emulation.load()
    implementations._PAIRWISE["cuda"] = _emulated.pairwise
    implementations._CONSISTENCY["cuda"] = _emulated.consistency
    implementations._DEPENDENCE["cuda"] = _emulated.gram
    implementations._why_not_cuda = lambda device: (
        None if device == "cpu" else f"it is emulated on CPU tensors, and these are on {device}"
    )


if "triton" in INTERPRETED:
    from triton.runtime import interpreter

    def _fma(_builder: object, x, y, z):
        """Rounded once, as hardware does; the interpreter's own rounds the product, too."""
        exact = x.data.astype(np.float64) * y.data + z.data
        return interpreter.TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

    interpreter.InterpreterBuilder.create_fma = _fma

    def _of_bools(name: str, position: int) -> None:
        """The interpreter's operation, which refuses masks of numbers, as all do from 3.9 on."""
        operation = getattr(interpreter.InterpreterBuilder, name)

        def strict(self, *args):
            if args[position].data.dtype != bool:
                raise TypeError(f"{name}: a mask of {args[position].data.dtype}")
            return operation(self, *args)

        setattr(interpreter.InterpreterBuilder, name, strict)

    _of_bools("create_masked_load", 1)
    _of_bools("create_masked_store", 2)


def gpu_or_cpu(name: str) -> str:
    return "cuda" if name in ("triton", "cuda") and torch.cuda.is_available() else "cpu"


def _reason(name: str) -> str | None:
    return implementations.why_not(name, gpu_or_cpu(name))


TESTED = tuple(
    name
    for name in implementations.IMPLEMENTATIONS
    if name in ALWAYS_TESTED or (name in ("triton", "cuda") and _reason(name) is None)
)


def pytest_report_header() -> list[str]:
    """Says which implementations no test will run, and why."""
    return [
        f"imcl_fast: impl={name!r} is not tested here: {_reason(name)}"
        for name in ("triton", "cuda")
        if name not in TESTED
    ]


@pytest.fixture(scope="session", params=TESTED)
def impl(request: pytest.FixtureRequest) -> Impl:
    """Every implementation that can run here, and ``cpp``, which must."""
    return usable(Impl(request.param, gpu_or_cpu(request.param)))


def cases(impl: Impl, among: Sequence, turn: int) -> list:
    """All cases of a test; one of them, each in its turn, where it is interpreted: Triton's
    interpreter and the emulator take seconds for what a GPU does in microseconds."""
    among = list(among)
    return [among[turn % len(among)]] if impl.interpreted else among


# How what takes Triton's interpreter long begins, where a shorter case of it is left: many tiles of
# classes, many runs, many heads, the other reductions of a gradcheck. `make test-slow` has it.
SLOW_INTERPRETED = (
    "test_whole_chunks_are_masked", "test_heads_mask_different_chunks[triton-others",
    "test_heads_mask_different_chunks[triton-mean", "test_heads_mask_different_chunks[triton-pair",
    "test_fifty_thousand_classes", "test_runs_are_bitwise_equal",
    "test_gradcheck_consistency[triton-sum", "test_gradcheck_consistency[triton-none",
    "test_gradcheck_consistency[triton-mean-mean", "test_gradcheck_consistency[triton-mean-final",
    "test_gradcheck[triton-sum", "test_gradcheck[triton-none", "test_gradcheck[triton-jsd",
    "test_gradcheck[triton-kl", "test_gradcheck[triton-reverse_kl-sigmoid",
    "test_extreme_logits[triton-300", "test_mixture_sizes[triton-5-9000",
    "test_matmul_precision[triton-(256", "test_head_counts[triton-6", "test_head_counts[triton-7",
    "test_class_counts[triton-9000", "test_a_thousand_matrices",
    "test_compiled_in_one_graph", "test_module_makes_views_dependent[triton",
    "test_options[triton-7", "test_options[triton-10", "test_batches[triton-63",
)  # fmt: skip


# Of a test of many cases so many are left, drawn by their names, where Triton's interpreter takes
# them; at least a quarter in the emulator, and of the algebra in plain PyTorch, whose cases take
# longer than the kernels' own. `make test-slow` has the others.
FEW_CASES, SHARE_OF_CASES = 4, 0.25


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    of_test: dict[str, list[pytest.Item]] = {}
    for item in items:
        if any(name in item.name for name in INTERPRETED) or _of_fixture(item) == "torch":
            of_test.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for mine in of_test.values():
        drawn = sorted(mine, key=lambda item: zlib.crc32(item.name.encode()))
        left = 0 if "triton" in INTERPRETED else round(SHARE_OF_CASES * len(mine))
        spared = drawn[max(left, FEW_CASES):]
        for item in mine:
            if item in spared or item.name.startswith(SLOW_INTERPRETED):
                item.add_marker(pytest.mark.slow)


def _of_fixture(item: pytest.Item) -> str | None:
    """The implementation that a test has of ``impl``."""
    case = getattr(item, "callspec", None)
    return None if case is None else case.params.get("impl")


def usable(impl: Impl) -> Impl:
    reason = implementations.why_not(impl.name, impl.device)
    if reason is None:
        return impl
    left_out = os.environ.get("IMCL_FAST_BUILD") == "0"
    if impl == Impl("cpp", "cpu") and not left_out:
        # On a CPU the compiled kernels are the point of the package; a skip would
        # let a build that lost them pass.
        pytest.fail(f"cpp: {reason} (IMCL_FAST_BUILD=0 says that is on purpose)")
    pytest.skip(f"{impl.name}: {reason}")


@contextlib.contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Work this small gains nothing from a second thread, and loses much on a busy machine."""
    with threads(1):
        yield


@pytest.fixture(scope="session")
def digits():
    from imcl_fast import data  # the tests for a GPU need none of it

    return data.load("digits")


def leaf(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A leaf on the same memory (or, with ``dtype``, a copy) that requires a gradient."""
    x = x.detach()
    return (x if dtype is None else x.to(dtype)).requires_grad_()


def bits(x: Tensor) -> Tensor:
    """The bytes of the values, so that equality tells -0 from 0 and finds NaN equal to NaN."""
    # Into new memory: a view as bytes needs a stride of 1, which one element needn't have.
    copy = torch.empty(x.numel(), dtype=x.dtype)
    return copy.copy_(x.detach().reshape(-1)).view(torch.uint8)


def assert_same_bits(a: Sequence[Tensor], b: Sequence[Tensor]) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        assert torch.equal(bits(x), bits(y))


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def assert_layout(gradient: Tensor, x: Tensor) -> None:
    """A gradient has the dtype, device and shape of its input, and its memory format if dense."""
    assert gradient.dtype == x.dtype
    assert gradient.device == x.device
    assert gradient.shape == x.shape
    assert not gradient.requires_grad
    dense = torch.ops.aten.is_non_overlapping_and_dense(x)
    expected = x.stride() if dense else torch.empty_like(x).stride()
    # The stride of a single element, or of none, says nothing.
    for size, got, stride in zip(x.shape, gradient.stride(), expected, strict=True):
        assert size <= 1 or got == stride or not x.numel(), (gradient.stride(), expected)


def check_pairwise(
    impl: Impl,
    xs: Sequence[Tensor],
    *,
    batched: bool,
    precision: str = "highest",
    **options,
) -> None:
    """Value, gradients and their layout against the float64 reference, inputs as they lie."""
    function = F.representation_similarity if batched else F.kernel_similarity
    xs = [leaf(x) for x in xs]
    before = [bits(x) for x in xs]
    dtype = min((x.dtype for x in xs), key=lambda t: torch.finfo(t).bits)
    widest = max((x.dtype for x in xs), key=lambda t: torch.finfo(t).bits)
    # As a GradScaler would: float16 can't hold the gradient of a mean over so many pairs.
    rows = [x.shape[:2] if batched else (1, x.shape[0]) for x in xs]
    pairs = len(xs) * max(matrices * n * (n - 1) for matrices, n in rows)
    gradient_scale = float(min(max(pairs, 1), 2**15))

    def run(name: str, inputs: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
        loss = function(inputs, impl=name, **options)
        return loss, torch.autograd.grad(loss * gradient_scale, inputs)

    with matmul_precision(precision):
        loss, gradients = run(impl.name, xs)
    assert loss.shape == () and loss.dtype == loss_dtype(widest)
    assert all(bits(x).equal(b) for x, b in zip(xs, before, strict=True)), "an input was written"
    true_loss, truth = run("reference", [leaf(x.cpu(), dtype=torch.float64) for x in xs])
    noises = []
    for x, (matrices, n) in zip(xs, rows, strict=True):
        factor = unit(x.dtype) if x.dtype in HALVES else 0.0
        if x.dtype == torch.float32 and precision == "medium":
            factor = unit(torch.bfloat16)
        elif x.dtype == torch.float32 and precision == "high" and impl.name in GPU:
            factor = TENSOR_FLOAT_32_UNIT
        share = 1 / (len(xs) * max(matrices, 1) * n * (n - 1))
        noises.append(pairwise_noise(x, share=share, batched=batched, factor=factor, **options))
    loss_noise = torch.stack([noise for noise, _ in noises]).norm()
    assert_accurate("loss", loss, true_loss, loss_noise, loss_dtype(dtype))
    for i, (x, g) in enumerate(zip(xs, gradients, strict=True)):
        assert_layout(g, x)
        noise = noises[i][1] * gradient_scale
        assert_accurate(f"gradient {i}", g, truth[i], noise, x.dtype)


def widened(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """On the CPU, in float64 once rounded to what kernels take beside logits of ``dtype``."""
    if x is None or not x.is_floating_point():
        return x if x is None else x.cpu()
    return x.to(loss_dtype(dtype)).cpu().double()


def check_consistency(
    impl: Impl, logits: Sequence[Tensor], target: Tensor | None, **options
) -> None:
    """Loss, terms, gradients and their layout against the float64 reference."""
    logits = [leaf(z) for z in logits]
    weights = {name: options.pop(name, None) for name in ("weight", "sample_weight")}
    given = [*logits, *(x for x in (target, *weights.values()) if x is not None)]
    before = [bits(x) for x in given]
    dtype = max((z.dtype for z in logits), key=lambda t: torch.finfo(t).bits)
    if len({z.dtype for z in logits}) > 1 and dtype in HALVES:
        dtype = torch.float32  # what float16 and bfloat16 promote to
    batch = logits[0].shape[-2]
    heads = sum(len(z) if z.dim() == 3 else 1 for z in logits)
    groups = options.get("groups") or [heads]
    defaults = {
        "temperature": 2.0, "teacher": "others", "detach_teacher": True,
        "ce_weight": 1.0, "kl_weight": 1.0, "divergence": "kl", "beta": 0.5,
    }
    spelled = {"groups": groups}
    for name, default in defaults.items():
        value = options.get(name, default)
        count = heads if name.endswith("weight") else len(groups)
        spelled[name] = list(value) if isinstance(value, (list, tuple)) else [value] * count
    generator = torch.Generator().manual_seed(batch)
    if options.get("reduction") == "none":
        grad = torch.rand(batch, generator=generator, dtype=torch.float64) + 0.5
    else:
        grad = torch.tensor(1.5 * max(batch, 1) if options.get("reduction") != "sum" else 1.5)

    def run(name: str, inputs: Sequence[Tensor], target: Tensor | None, weights: dict):
        loss, terms = F.collaborative_consistency(
            inputs, target, impl=name, return_terms=True, **options, **weights
        )
        # The graph of the reference leaves out the heads that nothing pulls at.
        loose = name == "reference"
        if loose and not loss.requires_grad:
            gradients = tuple(torch.zeros_like(z) for z in inputs)
        else:
            gradients = torch.autograd.grad(loss, inputs, grad.to(loss), materialize_grads=loose)
        assert list(terms) == ["cross_entropy", "kl"]
        assert not any(term.requires_grad for term in terms.values())
        return loss, torch.stack([terms["cross_entropy"], terms["kl"]]), gradients

    loss, terms, gradients = run(impl.name, logits, target, weights)
    after = [bits(x) for x in given]
    assert all(a.equal(b) for a, b in zip(after, before, strict=True)), "an input was written"
    assert loss.shape == ((batch,) if options.get("reduction") == "none" else ())
    assert loss.dtype == terms.dtype == loss_dtype(dtype)

    target = widened(target, dtype)
    weights = {name: widened(x, dtype) for name, x in weights.items()}
    true_loss, true_terms, truth = run(
        "reference", [leaf(z.cpu(), torch.float64) for z in logits], target, weights
    )
    named = {
        name: options[name]
        for name in ("ignore_index", "reduction", "label_smoothing", "activation")
        if name in options
    }
    loss_noise, terms_noise, dz_noise = consistency_noise(
        logits, target, **spelled, **named, **weights
    )
    assert_accurate("loss", loss, true_loss, loss_noise, loss_dtype(dtype))
    assert_accurate("terms", terms, true_terms, terms_noise, loss_dtype(dtype))
    sizes = [len(z) if z.dim() == 3 else 1 for z in logits]
    noises = (dz_noise * grad.double()).split(sizes)
    for i, (z, g) in enumerate(zip(logits, gradients, strict=True)):
        assert_layout(g, z)
        assert_accurate(f"gradient {i}", g, truth[i], noises[i], z.dtype)


def check_mixture(
    impl: Impl, logits: Sequence[Tensor], target: Tensor, *, pi: float | Sequence[float] = 0.5,
    sample_weight: Tensor | None = None, **options,
) -> None:
    """Loss, gradients and their layout against the float64 reference."""
    logits = [leaf(z) for z in logits]
    given_ = [*logits, target, *([] if sample_weight is None else [sample_weight])]
    before = [bits(x) for x in given_]
    dtype, batch = logits[0].dtype, logits[0].shape[-2]
    count = sum(len(z) if z.dim() == 3 else 1 for z in logits)
    grad = torch.tensor(1.5 if options.get("reduction") == "sum" else 1.5 * max(batch, 1))
    if options.get("reduction") == "none":
        grad = torch.linspace(0.5, 1.5, batch, dtype=torch.float64)

    def run(name: str, inputs: Sequence[Tensor], target: Tensor, share: Tensor | None):
        loss = F.jensen_shannon(
            inputs, target, pi=pi, sample_weight=share, impl=name, **options
        )
        return loss, torch.autograd.grad(loss, inputs, grad.to(loss))

    loss, gradients = run(impl.name, logits, target, sample_weight)
    assert all(bits(x).equal(b) for x, b in zip(given_, before, strict=True)), "input written"
    assert loss.shape == ((batch,) if options.get("reduction") == "none" else ())
    assert loss.dtype == loss_dtype(dtype)
    wide, target, sample_weight = (
        [leaf(z.cpu(), torch.float64) for z in logits], widened(target, dtype),
        widened(sample_weight, dtype),
    )
    true_loss, truth = run("reference", wide, target, sample_weight)
    spelled = pi if isinstance(pi, Sequence) else [pi, *[(1 - pi) / count] * count]
    factor = -1 / ((1 - spelled[0]) * math.log(1 - spelled[0]))
    if not options.get("normalize", True):
        factor = 1.0
    named = {k: v for k, v in options.items() if k != "normalize"}
    loss_noise, dz_noise = mixture_noise(
        logits, target, pi=spelled, factor=factor, sample_weight=sample_weight, **named
    )
    assert_accurate("loss", loss, true_loss, loss_noise, loss_dtype(dtype))
    noises = (dz_noise * grad.double()).split([len(z) if z.dim() == 3 else 1 for z in logits])
    for i, (z, g) in enumerate(zip(logits, gradients, strict=True)):
        assert_layout(g, z)
        assert_accurate(f"gradient {i}", g, truth[i], noises[i], z.dtype)
