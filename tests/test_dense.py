"""Dense and token outputs: every pixel is a sample, and so are its loss and its gradient.

The truth is what the float64 reference makes of the samples one below the other, (B, K).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy
import pytest
import torch
import torch.nn.functional as TF
from bounds import assert_accurate, consistency_noise, loss_dtype
from conftest import DTYPES, Impl, assert_layout, assert_same_bits, bits, cases, leaf, threads
from hypothesis import given
from hypothesis import strategies as st
from strategies import REDUCTIONS, TEACHERS, lay_out
from torch import Tensor

from imcl_fast import functional as F

LAYOUTS = ("contiguous", "channels_last", "transposed", "reversed", "sliced", "misaligned",
           "expanded_first", "expanded_last")  # fmt: skip


class Dense(NamedTuple):
    """Logits (B, K, *spatial) or (B, *tokens, K) of some heads, their target and weights."""

    batch: int
    classes: int
    spatial: tuple[int, ...]
    class_dim: int = 1
    stacks: tuple[int, ...] = (0, 0)  # 0: without heads; h > 0: with h of them in front
    layouts: tuple[str, ...] = ("contiguous", "contiguous")
    kind: str = "indices"
    weighted: bool = False
    shares: str = "none"  # sample weights: "none", "batch" (B,), "all" (B, *spatial)
    teacher: str = "others"
    detach: bool = True
    smoothing: float = 0.0
    reduction: str = "mean"
    ignored: float = 0.3
    temperature: float = 2.0
    seed: int = 0

    def build(self, dtype: torch.dtype, device: str) -> tuple[list[Tensor], Tensor | None, dict]:
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        def spread(x: Tensor, dim: int) -> Tensor:  # classes, last as drawn, to their place
            return x.movedim(-1, dim if self.class_dim == 1 else -1)

        samples = (self.batch, *self.spatial)
        logits = []
        for heads, layout in zip(self.stacks, self.layouts, strict=True):
            shape = (heads, *samples) if heads else samples
            z = spread(2 * normal(*shape, self.classes), 2 if heads else 1)
            logits.append(lay_out(z.to(dtype).to(device), layout))
        target = torch.randint(0, self.classes, samples, generator=generator)
        target[torch.rand(samples, generator=generator) < self.ignored] = -100
        if self.kind == "probabilities":
            target = spread(torch.rand(*samples, self.classes, generator=generator).to(dtype), 1)
        if self.kind == "none":
            target = None
        weights = {"weight": None, "sample_weight": None}
        if self.weighted:
            weights["weight"] = (normal(self.classes).abs() + 0.25).to(dtype).to(device)
        if self.shares != "none":
            shape = samples[:1] if self.shares == "batch" else samples
            share = normal(*shape).abs() * (torch.rand(shape, generator=generator) < 0.8)
            weights["sample_weight"] = share.to(dtype).to(device)
        if target is not None:
            target = lay_out(target.to(device), ("contiguous", "reversed")[self.seed % 2])
        return logits, target, weights

    def options(self) -> dict:
        return {
            "teacher": self.teacher, "detach_teacher": self.detach, "temperature": self.temperature,
            "label_smoothing": self.smoothing, "reduction": self.reduction,
        }  # fmt: skip

    def told(self) -> dict:
        """``class_dim`` where shapes don't tell."""
        return {"class_dim": self.class_dim}


def rows(x: Tensor, heads: bool, class_dim: int) -> Tensor:
    """(h, N, K) of dense logits, or of their gradients."""
    x = x if heads else x.unsqueeze(0)
    return (x.movedim(2, -1) if class_dim == 1 else x).flatten(1, -2)


def check(impl: Impl, drawn: Dense, dtype: torch.dtype) -> None:
    logits, target, weights = drawn.build(dtype, impl.device)
    logits = [leaf(z) for z in logits]
    given_ = [*logits, *(x for x in (target, *weights.values()) if x is not None)]
    before = [bits(x) for x in given_]
    options, samples = drawn.options(), (drawn.batch, *drawn.spatial)
    loss, terms = F.collaborative_consistency(
        logits, target, impl=impl.name, return_terms=True, **options, **weights, **drawn.told()
    )
    grad = torch.linspace(0.5, 1.5, loss.numel(), dtype=torch.float64).view(loss.shape)
    gradients = torch.autograd.grad(loss, logits, grad.to(loss))
    assert all(bits(x).equal(b) for x, b in zip(given_, before, strict=True)), "input written"
    assert loss.shape == (samples if drawn.reduction == "none" else ())

    def flat(x: Tensor | None, name: str) -> Tensor | None:
        if x is None:
            return None
        wide = x.to(loss_dtype(dtype)).double().cpu() if x.is_floating_point() else x.cpu()
        if name == "target" and wide.is_floating_point():
            return rows(wide, False, drawn.class_dim)[0]
        if name == "sample_weight":
            wide = wide.reshape(*wide.shape, *[1] * (len(samples) - wide.dim())).expand(samples)
        return wide if name == "weight" else wide.flatten()

    y = flat(target, "target")
    weights = {name: flat(x, name) for name, x in weights.items()}
    flattened = [
        rows(z.detach(), heads > 0, drawn.class_dim)
        for z, heads in zip(logits, drawn.stacks, strict=True)
    ]
    wide = [leaf(z.cpu(), torch.float64) for z in flattened]
    true_loss, true_terms = F.collaborative_consistency(
        wide, y, impl="reference", return_terms=True, **options, **weights
    )
    # A final head that only teaches is in no graph of the reference's.
    truth = torch.autograd.grad(
        true_loss, wide, grad.reshape(true_loss.shape), materialize_grads=True
    )
    heads = sum(max(h, 1) for h in drawn.stacks)
    loss_noise, terms_noise, dz_noise = consistency_noise(
        flattened, y, temperature=[drawn.temperature], teacher=[drawn.teacher], groups=[heads],
        detach_teacher=[drawn.detach], ce_weight=[1.0] * heads, kl_weight=[1.0] * heads,
        reduction=drawn.reduction, label_smoothing=drawn.smoothing, **weights,
    )  # fmt: skip
    of_loss = loss_dtype(dtype)
    assert_accurate("loss", loss.reshape(true_loss.shape), true_loss, loss_noise, of_loss)
    assert_accurate("terms", torch.stack([*terms.values()]), torch.stack([*true_terms.values()]),
                    terms_noise, of_loss)  # fmt: skip
    noises = (dz_noise * grad.flatten()).split([max(h, 1) for h in drawn.stacks])
    for i, (z, g) in enumerate(zip(logits, gradients, strict=True)):
        if torch.ops.aten.is_non_overlapping_and_dense(z):
            assert_layout(g, z)
        assert g.shape == z.shape and g.dtype == z.dtype
        got = rows(g, drawn.stacks[i] > 0, drawn.class_dim)
        assert_accurate(f"gradient {i}", got, truth[i], noises[i], dtype)


@st.composite
def dense(draw: st.DrawFn) -> Dense:
    stacks = tuple(draw(st.lists(st.integers(0, 2), min_size=1, max_size=3)))
    return Dense(
        batch=draw(st.integers(1, 3)),
        classes=draw(st.sampled_from([1, 2, 3, 8, 9, 21, 40])),
        spatial=tuple(draw(st.lists(st.sampled_from([1, 2, 3, 5, 8, 16, 19]), min_size=1,
                                    max_size=2))),
        class_dim=draw(st.sampled_from([1, -1])),
        stacks=stacks,
        layouts=tuple(draw(st.sampled_from(LAYOUTS)) for _ in stacks),
        kind=draw(st.sampled_from(["indices", "indices", "probabilities", "none"])),
        weighted=draw(st.booleans()),
        shares=draw(st.sampled_from(["none", "batch", "all"])),
        teacher=draw(st.sampled_from(TEACHERS)),
        detach=draw(st.booleans()),
        smoothing=draw(st.sampled_from([0.0, 0.1])),
        reduction=draw(st.sampled_from(REDUCTIONS)),
        ignored=draw(st.sampled_from([0.0, 0.3, 1.0])),
        temperature=draw(st.sampled_from([1.0, 2.0, 3.0])),
        seed=draw(st.integers(0, 10**6)),
    )  # fmt: skip


@given(drawn=dense(), dtype=st.sampled_from(DTYPES))
def test_drawn(impl: Impl, drawn: Dense, dtype: torch.dtype) -> None:
    if drawn.kind == "none" and 0 not in drawn.stacks:  # without a target one has no heads
        drawn = drawn._replace(kind="indices")
    check(impl, drawn, dtype)


def test_a_target_of_another_type_is_named() -> None:
    z = torch.randn(2, 5, 4, 4)
    for target in (numpy.zeros((2, 4, 4)), [[0]]):
        with pytest.raises(TypeError, match="target: expected a Tensor or None, got"):
            F.collaborative_consistency([z], target)


@pytest.mark.parametrize("layout", LAYOUTS[:6])
@pytest.mark.parametrize("classes", [5, 21, 200])
def test_images(impl: Impl, classes: int, layout: str) -> None:
    """More pixels than a block, and a last one that is not full."""
    among = [(t, d) for t in TEACHERS for d in (True, False)]
    for i, (teacher, detach) in enumerate(cases(impl, among, classes)):
        size = (2, 3) if impl.interpreted else (9, 13)
        drawn = Dense(
            2, classes, size, layouts=(layout,) * 3, stacks=(0,) * 3, teacher=teacher,
            detach=detach, smoothing=0.1 * (i % 2), reduction=REDUCTIONS[i % 3],
        )  # fmt: skip
        check(impl, drawn, DTYPES[1 + i % 3])


@pytest.mark.parametrize("classes", [10, 100])
def test_tokens(impl: Impl, classes: int) -> None:
    for teacher in cases(impl, TEACHERS, classes):
        check(impl, Dense(3, classes, (7,), -1, teacher=teacher), torch.float32)


def test_volumes(impl: Impl) -> None:
    """Nothing collapses: four axes of samples."""
    drawn = Dense(2, 5, (2, 3, 4), layouts=("sliced", "reversed"), shares="all")
    check(impl, drawn, torch.float32)


@pytest.mark.parametrize("rank", [3, 4])
def test_labels_of_cropped_volumes(impl: Impl, rank: int) -> None:
    """Nothing collapses, and each label is a sample of its own: as many axes as there can be."""
    generator = torch.Generator().manual_seed(0)
    larger = torch.randn(2, 3, 5, *[3] * rank, generator=generator).to(impl.device)
    inside = (slice(2), slice(1, 4), *[slice(1, 3)] * rank)
    stacks = [leaf(z[inside]) for z in larger]
    y = torch.rand(3, 5, *[3] * rank, generator=generator).to(impl.device)[inside]
    wide = [leaf(z.cpu(), torch.float64) for z in stacks]
    losses, gradients = [], []
    for heads, name in ((stacks, impl.name), (wide, "reference")):
        target = y if heads is stacks else y.cpu().double()
        loss = F.collaborative_consistency(heads, target, activation="sigmoid", impl=name)
        losses.append(loss)
        gradients.append(torch.autograd.grad(loss, heads))
    torch.testing.assert_close(losses[0].cpu().double(), losses[1], rtol=1e-5, atol=0)
    for got, true in zip(*gradients, strict=True):
        assert (got.cpu().double() - true).norm() <= 1e-5 * true.norm()


def test_one_dense_head_is_torchs_cross_entropy(impl: Impl) -> None:
    z = torch.randn(2, 6, 5, 7, generator=torch.Generator().manual_seed(1)).to(impl.device)
    target = torch.randint(0, 6, (2, 5, 7), generator=torch.Generator().manual_seed(2))
    target[0, :2] = 255
    target = target.to(impl.device)
    weight = torch.rand(6, generator=torch.Generator().manual_seed(3)).to(impl.device)
    for y, ignored in ((target, 255), (torch.softmax(z.flip(0), 1), -100)):
        for reduction in REDUCTIONS:
            options = {
                "weight": weight, "reduction": reduction, "label_smoothing": 0.1,
                "ignore_index": ignored,
            }  # fmt: skip
            heads = leaf(z)
            got = F.collaborative_consistency(heads, y, impl=impl.name, **options)
            (gradient,) = torch.autograd.grad(got.sum(), heads)
            expected = TF.cross_entropy(heads, y, **options)
            (true,) = torch.autograd.grad(expected.sum(), heads)
            torch.testing.assert_close(got, expected)
            torch.testing.assert_close(gradient, true)


def test_what_the_shape_of_the_target_tells() -> None:
    z = torch.randn(2, 3, 4, dtype=torch.float64)
    dense_, tokens = torch.zeros(2, 4, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.int64)

    def loss(logits, target, **options) -> Tensor:
        return F.collaborative_consistency(logits, target, impl="reference", **options)

    first = loss([z.movedim(1, -1).reshape(-1, 3)], dense_.flatten())
    torch.testing.assert_close(loss([z], dense_), first)
    torch.testing.assert_close(loss([z], dense_, class_dim=1), first)
    last = loss([z.reshape(-1, 4)], tokens.flatten())
    torch.testing.assert_close(loss([z], tokens), last)
    torch.testing.assert_close(loss([z], tokens, class_dim=-1), last)
    heads = torch.stack([z, 2 * z])
    torch.testing.assert_close(loss(heads, dense_), loss([z, 2 * z], dense_))
    torch.testing.assert_close(loss([heads[:1], 2 * z], tokens), loss([z, 2 * z], tokens))
    soft = z.softmax(1)
    torch.testing.assert_close(
        loss([z], soft, class_dim=1),
        loss([z.movedim(1, -1).reshape(-1, 3)], soft.movedim(1, -1).reshape(-1, 3)),
    )
    image = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    soft = image.softmax(1)
    torch.testing.assert_close(
        loss([image], soft), loss([image.flatten(2)], soft.flatten(2), class_dim=1)
    )
    torch.testing.assert_close(
        loss([image, 2 * image], None, class_dim=1),
        loss([image.movedim(1, -1).reshape(-1, 3), 2 * image.movedim(1, -1).reshape(-1, 3)], None),
    )


def test_heads_in_one_tensor_agree_without_a_target() -> None:
    image = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    heads = [image, 2 * image, image - 1]

    def loss(logits, class_dim) -> Tensor:
        return F.collaborative_consistency(logits, None, class_dim=class_dim, impl="reference")

    for class_dim, stack in ((1, torch.stack(heads)), (-1, torch.stack(heads).movedim(2, -1))):
        expected = loss(list(stack), class_dim)
        assert expected > 0.1
        torch.testing.assert_close(loss(stack, class_dim), expected)
        torch.testing.assert_close(loss([stack[:2], stack[2]], class_dim), expected)
        torch.testing.assert_close(loss([stack[0], stack[1:]], class_dim), expected)
        alone = stack[0].clone().requires_grad_()  # one head of a sequence
        value = loss([alone], class_dim)
        assert value == 0 and not torch.autograd.grad(value, alone)[0].any()
    assert loss([image[..., 0]], 1) == 0
    tokens = torch.randn(3, 2, 4, dtype=torch.float64)  # (h, B, K)
    torch.testing.assert_close(loss(tokens, -1), loss(list(tokens), None))


SQUARE = torch.randn(2, 4, 4)
IMAGE = torch.randn(2, 3, 4, 5)
ERRORS = {
    "as many classes as tokens": (
        [SQUARE], torch.zeros(2, 4, dtype=torch.int64), {}, r"^class_dim: expected 1 .*\(2, 4, 4\)"
    ),
    "probabilities of tokens": ([SQUARE], SQUARE, {}, r"^class_dim: expected 1 .*\(2, 4, 4\)"),
    "no target": ([IMAGE], None, {}, r"^logits: expected .*class_dim.*\(2, 3, 4, 5\)"),
    "another target": (
        [IMAGE], torch.zeros(2, 5, 4, dtype=torch.int64), {}, r"^logits: expected .*\(2, 5, 4\)"
    ),
    "indices per image": (
        [IMAGE], torch.zeros(2, dtype=torch.int64), {}, r"^logits: expected .*such a target"
    ),
    "told otherwise": (
        [torch.randn(2, 3, 4)], torch.zeros(2, 3, dtype=torch.int64), {"class_dim": 1},
        r"^target: expected .*\(2, 3\)",
    ),
    "one head and no target": (
        torch.randn(2, 3, 4), None, {"class_dim": 1}, r"^logits: expected heads .*\(2, 3, 4\)"
    ),
    "no dimension of classes": ([IMAGE], None, {"class_dim": 2}, r"^class_dim: expected .*got 2"),
    "other images": (
        [IMAGE, IMAGE[:, :, :3]], torch.zeros(2, 4, 5, dtype=torch.int64), {},
        r"^logits\[1\]: expected .*\(2, 3, 3, 5\)",
    ),
    "weights of other samples": (
        [IMAGE], torch.zeros(2, 4, 5, dtype=torch.int64), {"sample_weight": torch.ones(4, 5)},
        r"^sample_weight: expected shape \(2, 4, 5\), got \(4, 5\)",
    ),
    "a class that isn't there": (
        [IMAGE], torch.full((2, 4, 5), 3), {}, r"^target: expected classes in \[0, 3\).* got 3"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_what_the_shape_does_not_tell_is_asked_for(name: str) -> None:
    logits, target, options, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        F.collaborative_consistency(logits, target, impl="torch", **options)


def test_thread_count_changes_no_bit(impl: Impl) -> None:
    if impl.name != "cpp":
        pytest.skip(f"{impl.name}: PyTorch doesn't promise this of its own CPU kernels")
    for layout in ("contiguous", "channels_last"):
        drawn = Dense(3, 21, (31, 33), layouts=(layout,) * 2, weighted=True)
        logits, target, weights = drawn.build(torch.float32, "cpu")
        logits = [leaf(z) for z in logits]
        results = []
        for count in (1, 2, 3):
            with threads(count):
                loss = F.collaborative_consistency(logits, target, impl="cpp", **weights)
                results.append([loss, *torch.autograd.grad(loss, logits)])
        assert_same_bits(results[0], results[1])
        assert_same_bits(results[0], results[2])


def test_no_logit_is_copied() -> None:
    """Whatever memory is asked for, it is not the logits' again, but for the gradient."""
    z = [torch.randn(4, 21, 32, 32) for _ in range(3)]
    target = torch.randint(0, 21, (4, 32, 32))
    with torch.profiler.profile(profile_memory=True) as profile:
        F.collaborative_consistency(z, target, impl="cpp")
    taken = sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())
    assert taken < z[0].nbytes / 4


@pytest.mark.parametrize("class_dim", [1, -1])
def test_class_dim_of_a_mixture(class_dim):
    z, y = torch.randn(3, 5, 5), torch.arange(15).view(3, 5) % 5  # as many tokens as classes
    got = F.jensen_shannon([z], y, class_dim=class_dim)
    rows = z.movedim(class_dim, -1).reshape(15, 5)
    torch.testing.assert_close(got, F.jensen_shannon([rows], y.flatten()))
    with pytest.raises(ValueError, match="^class_dim: expected 1 for logits"):
        F.jensen_shannon([z], y)


def test_logits_that_are_the_same_everywhere(impl: Impl) -> None:
    """Of strides that are all 0: they collapse, those of the gradient don't."""
    z = leaf(torch.randn(5, device=impl.device).view(1, 5, 1, 1).expand(2, 5, 3, 4))
    target = torch.arange(24, device=impl.device).view(2, 3, 4) % 5
    (got,) = torch.autograd.grad(F.collaborative_consistency([z], target, impl=impl.name), z)
    (truth,) = torch.autograd.grad(TF.cross_entropy(z, target), z)
    torch.testing.assert_close(got, truth)
