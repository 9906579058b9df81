"""What every test shares: the implementations under test and how accurate they must be.

The oracle is ``impl="reference"`` in float64, on the very values the tested
implementation was given. Every bound is on errors that were first divided by a
natural scale: the magnitude of the terms whose sum the value is (``pairwise_scales``,
``consistency_scales``), not the value itself, for sums cancel. In that measure

* float64 must be within 1e-10: its rounding is 1e-16, and only a wrong formula
  is further away;
* float32 may err twice as much as the naive definition does in float32, plus
  ``UNITS`` rounding units, because that error can be 0 by luck. A product rounded
  to bfloat16 or TensorFloat-32 is some thousand times outside;
* float16 and bfloat16 may err twice as much as the naive definition does in the
  same dtype, plus one rounding unit of the dtype (``eps / 2``), plus the above. The
  unit is relative to the scale for gradients, for a kernel may round the factors of
  its products as well as the result, but relative to the value for losses, which are
  float32. The naive definition is at times all wrong in these dtypes (it overflows,
  or flushes to zero), so that what it allows is capped at ``HALF_UNITS`` units;
* under ``set_float32_matmul_precision("medium")`` the factors of products of float32
  may be rounded to bfloat16, under ``"high"`` by GPU kernels to TensorFloat-32, and there are
  up to ``FACTORS`` such factors.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import cuda_emulation
import hypothesis
import pytest
import torch
from torch import Tensor

from imcl_fast import functional as F
from imcl_fast import implementations

UNITS = 8
HALF_UNITS = 32
FACTORS = 4
TENSOR_FLOAT_32_EPS = 2.0**-10
FLOAT64_BOUND = 1e-10

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
HALVES = (torch.bfloat16, torch.float16)
# The reference is the oracle: it is tested by itself, against plain loops.
ALWAYS_TESTED = ("torch", "cpp")

# Derandomised, so that a run can be repeated; without a database and a deadline,
# which are what makes runs on a busy machine differ. Explaining a failure takes minutes.
hypothesis.settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    database=None,
    # Triton's interpreter takes a millisecond where a kernel takes none.
    max_examples=4 if os.environ.get("TRITON_INTERPRET") == "1" else 30,
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


if os.environ.get("CUDA_ON_CPU") == "1":
    # impl="cuda" takes CPU tensors then: its kernels, compiled by g++.
    _emulated = cuda_emulation.load()
    implementations._PAIRWISE["cuda"] = _emulated.pairwise
    implementations._CONSISTENCY["cuda"] = _emulated.consistency
    implementations._why_not_cuda = lambda device: (
        None if device == "cpu" else f"it is emulated on CPU tensors, and these are on {device}"
    )


def _gpu_or_cpu(name: str) -> str:
    return "cuda" if name in ("triton", "cuda") and torch.cuda.is_available() else "cpu"


def _reason(name: str) -> str | None:
    return implementations.why_not(name, _gpu_or_cpu(name))


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
    return usable(Impl(request.param, _gpu_or_cpu(request.param)))


def cases(impl: Impl, among: Sequence, turn: int) -> list:
    """All cases of a test; one of them, each in its turn, where it is interpreted: Triton's
    interpreter and the emulator take seconds for what a GPU does in microseconds."""
    among = list(among)
    return [among[turn % len(among)]] if impl.interpreted else among


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


def loss_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


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


def assert_accurate(
    what: str,
    got: Tensor,
    truth: Tensor,
    reference: Tensor,
    scale: Tensor,
    dtype: torch.dtype,
    *,
    factor_eps: float = 0.0,
) -> None:
    """``got`` is as near to ``truth`` as the module says; ``reference`` is the naive, in dtype.

    ``scale`` broadcasts to the values; where it is 0 so must they be, exactly.
    ``factor_eps`` is that of the dtype that factors of float32 may be rounded to.
    """
    got_dtype = got.dtype
    got, truth, reference = (t.detach().cpu().double() for t in (got, truth, reference))
    assert torch.isfinite(got).all(), f"{what}: not finite"
    scale = scale.expand_as(truth)
    assert (got[scale == 0] == 0).all(), f"{what}: not exactly 0"
    error = (got - truth).abs()
    unit = torch.finfo(dtype).eps / 2
    if dtype == torch.float64:
        allowed = torch.tensor(FLOAT64_BOUND, dtype=torch.float64)
    else:
        naive = 2 * _worst((reference - truth).abs(), scale)
        if dtype in HALVES:
            naive = naive.clamp(max=HALF_UNITS * unit)
            if got_dtype == dtype:
                naive = naive + unit
                smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
                error = (error - smallest).clamp(min=0)
            else:
                error = (error - unit * truth.abs()).clamp(min=0)
        else:
            naive = naive.clamp(min=FACTORS * factor_eps / 2)
        allowed = naive + UNITS * torch.finfo(torch.float32).eps
    worst = _worst(error, scale)
    assert worst <= allowed, f"{what}: error {worst:.3g} of its scale, {allowed:.3g} allowed"


def _worst(error: Tensor, scale: Tensor) -> Tensor:
    """The largest error over its scale, 0 if there are none; an error that is no number is 0."""
    relative = torch.where(scale > 0, error / scale.clamp(min=1e-300), 0.0)
    relative = torch.where(torch.isfinite(relative), relative, 0.0)
    return relative.max() if relative.numel() else relative.new_zeros(())


def pairwise_scales(
    xs: Sequence[Tensor],
    *,
    penalty: str = "square",
    center: bool = False,
    eps: float = 1e-12,
    batched: bool,
) -> tuple[Tensor, list[Tensor]]:
    """Magnitudes of the terms of the penalty (), and of each input's gradient.

    A cosine carries a rounding error relative to 1, not to itself, and centring one
    relative to what it subtracts: ``condition``. So c_ij contributes |phi(c)| and
    |phi'(c)| * condition to the value, and to the gradient of row i, over its norm,
    |phi'(c)| and |phi''(c)| * condition times row j. The dual and signed forms subtract
    the diagonal from a sum over all pairs, and so carry the number of live rows.

    The sign of a cosine that rounding may have turned is not judged, and neither is
    the gradient of a row with such a cosine under the penalty "abs".
    """
    value = torch.zeros((), dtype=torch.float64)
    gradients = []
    for x in xs:
        # Products of halves are exact in float32, but their centred rows may be rounded.
        rounds = center and x.dtype in HALVES
        unit = torch.finfo(x.dtype if rounds else torch.float32).eps
        least = unit / 2 if rounds else UNITS * unit  # what assert_accurate allows at any rate
        x = x.detach().cpu().double()
        rows = x.flatten(2) if batched else x.flatten(1).unsqueeze(0)
        matrices, n, d = rows.shape
        raw = rows.norm(dim=-1)
        limit = torch.full_like(raw, eps)
        if center:
            rows = rows - rows.mean(-1, keepdim=True)
            limit = (1e-5 * raw).clamp(min=eps)
        norm = rows.norm(dim=-1)
        live = norm > limit
        inverse = torch.where(live, 1 / norm, 0.0).unsqueeze(-1)
        direction = (rows * inverse).abs()
        # The worst row counts for its matrix: each pair carries the error of both.
        condition = 1.0
        if center and live.any():
            condition = torch.where(live, raw / norm, 1.0).amax(-1).view(-1, 1, 1)
        pairs = (live.unsqueeze(1) & live.unsqueeze(2)).double()
        pairs = pairs * (1 - torch.eye(n, dtype=torch.float64))
        c = (rows * inverse) @ (rows * inverse).transpose(1, 2) * pairs
        if penalty == "square":
            phi, slope, bend = c * c, 2 * c.abs(), 2 * pairs
        else:
            phi, slope, bend = c.abs(), pairs, 0 * pairs
            if penalty == "abs":
                bend = pairs * (c.abs() <= UNITS * unit * condition) * 2 / least
        k = 1 / (len(xs) * max(matrices, 1) * n * (n - 1))
        value = value + k * (phi + slope * condition).sum()
        if penalty == "signed" or (penalty == "square" and 2 * d <= n):
            value = value + k * live.sum()
        weight = slope * condition + bend * condition + torch.eye(n, dtype=torch.float64)
        along = (weight * c.abs()).sum(-1, keepdim=True) + 1
        row = (2 * k * inverse * (weight @ direction + along * direction)).amax(-1, keepdim=True)
        gradients.append(row.expand_as(rows).reshape(x.shape))
    return value, gradients


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
    naive_loss, naive = run("reference", xs)
    true_loss, truth = run("reference", [leaf(x.cpu(), dtype=torch.float64) for x in xs])
    value_scale, scales = pairwise_scales(xs, batched=batched, **options)
    factor_eps = 0.0
    if precision == "medium":
        factor_eps = torch.finfo(torch.bfloat16).eps
    elif precision == "high" and impl.name in ("triton", "cuda"):
        factor_eps = TENSOR_FLOAT_32_EPS
    assert_accurate(
        "loss", loss, true_loss, naive_loss, value_scale, dtype, factor_eps=factor_eps
    )
    for i, (x, g) in enumerate(zip(xs, gradients, strict=True)):
        assert_layout(g, x)
        assert_accurate(
            f"gradient {i}", g, truth[i], naive[i], scales[i] * gradient_scale, x.dtype,
            factor_eps=factor_eps,
        )


def consistency_scales(
    logits: Sequence[Tensor],
    target: Tensor | None,
    *,
    temperature: Sequence[float],
    teacher: Sequence[str],
    groups: Sequence[int],
    detach_teacher: Sequence[bool],
    ce_weight: Sequence[float],
    kl_weight: Sequence[float],
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> tuple[Tensor, Tensor, Tensor]:
    """Magnitudes of the terms of the loss () or (B,), of its terms (2, H), of dz (H, B, K).

    A logit carries a rounding error relative to the largest one, and so does the
    logarithm of every probability: ``spread``. The gradient's terms are probabilities
    of the head, its teacher and the label times their weights.
    """
    z = torch.cat([b.detach().cpu().double().reshape(-1, *b.shape[-2:]) for b in logits])
    heads, batch, classes = z.shape
    counted = torch.ones(batch, dtype=torch.bool)
    label = torch.zeros(batch, classes, dtype=torch.float64)
    if target is not None:
        counted = target.cpu() != ignore_index
        label += label_smoothing / classes
        index = torch.where(counted, target.cpu(), 0).unsqueeze(-1)
        label.scatter_add_(-1, index, torch.ones(batch, 1, dtype=torch.float64))
    largest = z.abs().amax((0, 2)) if batch else z.new_zeros(0)
    ce_weight, kl_weight = (torch.tensor(w).double().abs() for w in (ce_weight, kl_weight))

    spread = 1 + largest + torch.tensor(float(classes)).log()  # [B]
    ce = spread.expand(heads, batch) * (0.0 if target is None else 1.0)
    dz = ce_weight.view(-1, 1, 1) * ce.unsqueeze(-1) * (z.softmax(-1) + label)
    kl = torch.zeros(heads, batch, dtype=torch.float64)
    first = 0
    for size, t, kind, detached in zip(groups, temperature, teacher, detach_teacher, strict=True):
        mine = slice(first, first + size)
        first += size
        if size == 1:
            continue
        spread = 1 + largest / t + torch.tensor(float(classes)).log()
        kl[mine] = t * t * spread
        if kind == "final":
            kl[first - 1] = 0
        group = z[mine] / t
        p = group.softmax(-1)
        q = p
        if kind == "others":
            q = ((group.sum(0) - group) / (size - 1)).softmax(-1)
        elif kind == "mean":
            q = group.mean(0).softmax(-1).expand_as(p)
        either = torch.maximum(p, q).amax(0)  # [B, K]
        weight = kl_weight[mine].view(-1, 1, 1)
        dz[mine] += t * weight * spread.unsqueeze(-1) * 2 * either
        if not detached:
            dz[mine] += t * weight.sum() * spread.square().unsqueeze(-1) * either
    # Probabilities under the smallest float are 0.
    dz = dz + 1e-30 * (ce_weight + kl_weight).view(-1, 1, 1)
    dz = torch.where(counted.unsqueeze(-1), dz, 0.0)
    ce, kl = torch.where(counted, ce, 0.0), torch.where(counted, kl, 0.0)
    value = ce_weight @ ce + kl_weight @ kl
    terms = torch.stack([ce, kl]).sum(-1)
    count = counted.sum().clamp(min=1)
    if reduction == "none":
        return value, terms / count, dz
    if reduction == "sum":
        return value.sum(), terms, dz
    return value.sum() / count, terms / count, dz / count


def check_consistency(
    impl: Impl, logits: Sequence[Tensor], target: Tensor | None, **options
) -> None:
    """Loss, terms, gradients and their layout against the float64 reference."""
    logits = [leaf(z) for z in logits]
    before = [bits(z) for z in logits] + ([] if target is None else [bits(target)])
    dtype = max((z.dtype for z in logits), key=lambda t: torch.finfo(t).bits)
    if len({z.dtype for z in logits}) > 1 and dtype in HALVES:
        dtype = torch.float32  # what float16 and bfloat16 promote to
    batch, classes = logits[0].shape[-2:]
    heads = sum(len(z) if z.dim() == 3 else 1 for z in logits)
    groups = options.get("groups") or [heads]
    defaults = {
        "temperature": 2.0, "teacher": "others", "detach_teacher": True,
        "ce_weight": 1.0, "kl_weight": 1.0,
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

    def run(name: str, inputs: Sequence[Tensor], target: Tensor | None):
        loss, terms = F.collaborative_consistency(
            inputs, target, impl=name, return_terms=True, **options
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

    loss, terms, gradients = run(impl.name, logits, target)
    after = [bits(z) for z in logits] + ([] if target is None else [bits(target)])
    assert all(a.equal(b) for a, b in zip(after, before, strict=True)), "an input was written"
    assert loss.shape == ((batch,) if options.get("reduction") == "none" else ())
    assert loss.dtype == terms.dtype == loss_dtype(dtype)
    naive_loss, naive_terms, naive = run("reference", logits, target)
    true_loss, true_terms, truth = run(
        "reference",
        [leaf(z.cpu(), torch.float64) for z in logits],
        None if target is None else target.cpu(),
    )
    named = {name: options[name] for name in
             ("label_smoothing", "ignore_index", "reduction") if name in options}
    scale, term_scale, dz = consistency_scales(logits, target, **spelled, **named)
    assert_accurate("loss", loss, true_loss, naive_loss, scale, dtype)
    assert_accurate("terms", terms, true_terms, naive_terms, term_scale, dtype)
    dz = dz * grad.double().cpu().view(-1, 1)
    first = 0
    for i, (z, g) in enumerate(zip(logits, gradients, strict=True)):
        assert_layout(g, z)
        count = len(z) if z.dim() == 3 else 1
        block = dz[first : first + count].reshape(z.shape)
        first += count
        # Computed in the dtype all blocks promote to, and rounded to its own.
        assert_accurate(f"gradient {i}", g, truth[i], naive[i], block, z.dtype)
