"""Collaborative consistency: cross entropy and distillation between H heads."""

from __future__ import annotations

import math
from itertools import cycle, product

import pytest
import torch
import torch.nn.functional as TF
from conftest import (
    DTYPES,
    HALVES,
    Impl,
    assert_same_bits,
    bits,
    cases,
    check_consistency,
    dtype_name,
    leaf,
    threads,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import REDUCTIONS, TEACHERS, Heads, heads, lay_out

from imcl_fast import calls
from imcl_fast import functional as F
from imcl_fast.schemas import ConsistencyOptions


def spec(
    heads: int, batch: int, classes: int, *, stacked: bool = False, seed: int = 0,
    layout: str = "contiguous", size: float = 2.0, ignored: float | None = 0.0,
) -> Heads:
    """One group of heads with the default options, which the tests below override."""
    stacks = (heads,) if stacked else (0,) * heads
    return Heads(
        batch, classes, stacks, (layout,) * len(stacks), (heads,), (2.0,), ("others",), (True,),
        (1.0,) * heads, (1.0,) * heads, size=size, ignored=ignored, seed=seed,
    )


# --- the reference itself, from the definition


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reference_is_the_definition(teacher: str, reduction: str) -> None:
    t, smoothing, count, batch, classes = 1.7, 0.2, 4, 5, 6
    ce_weight, kl_weight = [1.0, 0.5, 0.0, 2.0], [0.3, 0.0, 1.0, 0.7]
    logits, target = spec(count, batch, classes).build(torch.float64)
    target[1] = -100

    def softmax(row: list[float]) -> list[float]:
        total = sum(math.exp(v) for v in row)
        return [math.exp(v) / total for v in row]

    def divergence(q: list[float], p: list[float]) -> float:
        return sum(a * math.log(a / b) for a, b in zip(q, p, strict=True))

    samples, ce_terms, kl_terms = [], [0.0] * count, [0.0] * count
    for b in range(batch):
        z = [head[b].tolist() for head in logits]
        p = [softmax([v / t for v in row]) for row in z]
        total = 0.0
        for h in range(count):
            if target[b] == -100:
                continue
            label = [smoothing / classes] * classes
            label[int(target[b])] += 1 - smoothing
            ce = -sum(w * math.log(v) for w, v in zip(label, softmax(z[h]), strict=True))
            among = [j for j in range(count) if teacher == "mean" or j != h]
            if teacher == "pairwise":
                kl = sum(divergence(p[j], p[h]) for j in among) / len(among)
            elif teacher == "final":
                kl = divergence(p[-1], p[h]) if h < count - 1 else 0.0
            else:
                mean = [sum(z[j][k] for j in among) / len(among) for k in range(classes)]
                kl = divergence(softmax([v / t for v in mean]), p[h])
            ce_terms[h] += ce
            kl_terms[h] += t * t * kl
            total += ce_weight[h] * ce + kl_weight[h] * t * t * kl
        samples.append(total)
    counted = batch - 1
    divisor = 1 if reduction == "sum" else counted
    expected = samples if reduction == "none" else [sum(samples) / divisor]
    loss, terms = F.collaborative_consistency(
        logits, target, temperature=t, ce_weight=ce_weight, kl_weight=kl_weight, teacher=teacher,
        label_smoothing=smoothing, reduction=reduction, return_terms=True, impl="reference",
    )
    assert loss.reshape(-1).tolist() == pytest.approx(expected, rel=1e-12)
    assert terms["cross_entropy"].tolist() == pytest.approx([v / divisor for v in ce_terms])
    assert terms["kl"].tolist() == pytest.approx([v / divisor for v in kl_terms])


# --- drawn


@settings(max_examples=2 * settings.default.max_examples)
@given(drawn=heads(), dtype=st.sampled_from(DTYPES))
def test_drawn(impl: Impl, drawn: Heads, dtype: torch.dtype) -> None:
    logits, target = drawn.build(dtype, impl.device)
    check_consistency(impl, logits, target, **drawn.options())


@given(drawn=heads(), dtypes=st.permutations(DTYPES))
def test_blocks_of_different_dtypes(impl: Impl, drawn: Heads, dtypes) -> None:
    logits, target = drawn.build(torch.float64, impl.device)
    logits = [z.to(dtype) for z, dtype in zip(logits, cycle(dtypes), strict=False)]
    check_consistency(impl, logits, target, **drawn.options())


# --- every combination of the options


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_teachers(impl: Impl, teacher: str, detach: bool, reduction: str) -> None:
    turn = TEACHERS.index(teacher) + 4 * detach + 8 * REDUCTIONS.index(reduction)
    for dtype, ignored in cases(impl, product(DTYPES, (0.0, 0.4, None)), turn):
        logits, target = spec(4, 11, 21, seed=3, ignored=ignored).build(dtype, impl.device)
        check_consistency(
            impl, logits, target, teacher=teacher, detach_teacher=detach, reduction=reduction,
            ce_weight=[1.0, 0.0, 2.0, 0.5], kl_weight=[0.5, 1.0, 0.0, 3.0],
            label_smoothing=0.1, temperature=3.0,
        )


@pytest.mark.parametrize("count", range(1, 9))
def test_head_counts(impl: Impl, count: int) -> None:
    for i, teacher in enumerate(TEACHERS):
        for stacked, detach in cases(impl, product((False, True), (True, False)), count + i):
            logits, target = spec(count, 6, 19, stacked=stacked).build(torch.float32, impl.device)
            check_consistency(impl, logits, target, teacher=teacher, detach_teacher=detach)


@pytest.mark.parametrize("classes", [1, 2, 3, 10, 31, 33, 100, 127, 1000, 1003])
def test_class_counts(impl: Impl, classes: int) -> None:
    for i, teacher in enumerate(TEACHERS):
        for dtype in cases(impl, DTYPES, classes + i):
            logits, target = spec(3, 5, classes).build(dtype, impl.device)
            check_consistency(impl, logits, target, teacher=teacher, label_smoothing=0.05)


def test_class_counts_that_are_odd_and_large(impl: Impl) -> None:
    """Rows begin on no multiple of 16 bytes: a GPU's threads share such classes out otherwise."""
    for teacher in cases(impl, TEACHERS, 0):
        logits, target = spec(3, 2, 4_099).build(torch.float32, impl.device)
        check_consistency(impl, logits, target, teacher=teacher, label_smoothing=0.1)


@pytest.mark.parametrize("teacher", TEACHERS)
def test_fifty_thousand_classes(impl: Impl, teacher: str) -> None:
    among = ((torch.float32, True), (torch.float32, False), (torch.bfloat16, True))
    for dtype, detach in cases(impl, among, TEACHERS.index(teacher)):
        logits, target = spec(3, 2, 50_000, stacked=True).build(dtype, impl.device)
        check_consistency(
            impl, logits, target, teacher=teacher, detach_teacher=detach, label_smoothing=0.1
        )


@pytest.mark.parametrize("batch", [1, 2, 7, 64, 129])
def test_batches(impl: Impl, batch: int) -> None:
    for reduction in cases(impl, REDUCTIONS, batch):
        logits, target = spec(5, batch, 37, ignored=0.2).build(torch.float32, impl.device)
        check_consistency(impl, logits, target, reduction=reduction)


def test_groups(impl: Impl) -> None:
    """Groups of their own temperature and teacher: the same as a call for each group."""
    for dtype in DTYPES:
        logits, target = spec(8, 9, 17).build(dtype, impl.device)
        options = {
            "ce_weight": [0.1 * h for h in range(8)], "kl_weight": [1 - 0.1 * h for h in range(8)]
        }
        for teachers in (("others", "pairwise", "final", "mean"), ("mean", "final") * 2):
            check_consistency(
                impl, logits, target, groups=[3, 1, 2, 2], temperature=[1.0, 2.0, 4.0, 0.5],
                teacher=list(teachers), detach_teacher=[True, False, False, True], **options,
            )
    together = F.collaborative_consistency(
        logits, target, groups=[3, 5], temperature=[1, 4], teacher=["pairwise", "others"],
        impl=impl.name,
    )
    first = F.collaborative_consistency(
        logits[:3], target, temperature=1, teacher="pairwise", impl=impl.name
    )
    second = F.collaborative_consistency(
        logits[3:], target, temperature=4, teacher="others", impl=impl.name
    )
    assert together.item() == pytest.approx(first.item() + second.item(), rel=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_layouts(impl: Impl, dtype: torch.dtype) -> None:
    """The heads one tensor, separate, in stacks, and with a stride between classes."""
    layouts = ("contiguous", "transposed", "reversed", "sliced", "misaligned",
               "expanded_first", "expanded_last")  # fmt: skip
    shared = ((0, 0, 0, 0), (4,), (1, 3), (0, 2, 0), (2, 0, 1))
    for i, layout in enumerate(layouts):
        for stacks in cases(impl, shared, DTYPES.index(dtype) + i):
            drawn = spec(4, 10, 23)._replace(stacks=stacks, layouts=(layout,) * len(stacks))
            logits, target = drawn.build(dtype, impl.device)
            check_consistency(impl, logits, target)


def test_stacked_and_separate_heads_are_the_same(impl: Impl) -> None:
    z, target = spec(4, 7, 23, stacked=True).build(torch.float32, impl.device)
    stacked = leaf(z[0])
    separate = [leaf(head.clone()) for head in z[0]]
    mixed = [leaf(z[0][:1].clone()), leaf(z[0][1].clone()), leaf(z[0][2:].clone())]
    results = []
    for logits in (stacked, separate, mixed):
        loss = F.collaborative_consistency(logits, target, impl=impl.name)
        gradients = torch.autograd.grad(loss, logits)
        flat = torch.cat([g.reshape(-1, 7, 23) for g in gradients])
        results.append((loss, flat))
    for loss, flat in results[1:]:
        torch.testing.assert_close(loss, results[0][0])
        torch.testing.assert_close(flat, results[0][1])


def test_strided_target(impl: Impl) -> None:
    logits, target = spec(3, 8, 5).build(torch.float32, impl.device)
    spaced = lay_out(target.unsqueeze(1).expand(8, 3), "contiguous")[:, 1]
    assert spaced.stride() == (3,)
    check_consistency(impl, logits, spaced)
    check_consistency(impl, logits, target[:1].expand(8))


# --- against what PyTorch has


def test_one_head_is_cross_entropy(impl: Impl) -> None:
    logits, target = spec(1, 9, 14, ignored=0.3).build(torch.float32, impl.device)
    for reduction in REDUCTIONS:
        got = F.collaborative_consistency(
            logits, target, label_smoothing=0.1, reduction=reduction, impl=impl.name
        )
        expected = TF.cross_entropy(logits[0], target, label_smoothing=0.1, reduction=reduction)
        torch.testing.assert_close(got, expected)


# --- targets that don't count


@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 3, 255, 2**32 + 1, -(2**63)])
def test_ignore_index(impl: Impl, ignore_index: int) -> None:
    for dtype in (torch.float32, torch.float16):
        logits, target = spec(3, 12, 7).build(dtype, impl.device)
        target[1] = 1  # as which 32 bits of 2^32 + 1 would be taken
        target[[0, 4, 11]] = ignore_index
        for reduction in REDUCTIONS:
            check_consistency(
                impl, logits, target, ignore_index=ignore_index, reduction=reduction,
                label_smoothing=0.1,
            )


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_all_ignored(impl: Impl, reduction: str, teacher: str) -> None:
    logits, target = spec(3, 6, 7, ignored=1.0).build(torch.float32, impl.device)
    logits = [leaf(z) for z in logits]
    loss, terms = F.collaborative_consistency(
        logits, target, teacher=teacher, reduction=reduction, return_terms=True, impl=impl.name
    )
    gradients = torch.autograd.grad(loss.sum(), logits)
    assert torch.count_nonzero(loss) == 0
    assert all(torch.count_nonzero(t) == 0 for t in (*terms.values(), *gradients))


@pytest.mark.parametrize("batch", [6, 37])  # the kernels' ways for few samples and for many
def test_ignored_samples_may_hold_anything(impl: Impl, batch: int) -> None:
    """They count for nothing at all, NaN and infinity included."""
    logits, target = spec(3, batch, 7).build(torch.float32, impl.device)
    target[2::17] = -100
    clean = [leaf(z.clone()) for z in logits]
    logits[0][2::17, 3], logits[1][2::17] = math.nan, math.inf
    dirty = [leaf(z) for z in logits]
    results = []
    for zs in (clean, dirty):
        loss = F.collaborative_consistency(zs, target, impl=impl.name)
        results.append([loss, *torch.autograd.grad(loss, zs)])
    assert_same_bits(*results)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_zero_size_batch(impl: Impl, reduction: str) -> None:
    for target in (None, torch.zeros(0, dtype=torch.int64, device=impl.device)):
        for dtype in DTYPES:
            z = torch.zeros(3, 0, 7, dtype=dtype, device=impl.device, requires_grad=True)
            loss, terms = F.collaborative_consistency(
                z, target, reduction=reduction, return_terms=True, impl=impl.name
            )
            (g,) = torch.autograd.grad(loss.sum(), z)
            assert loss.shape == ((0,) if reduction == "none" else ())
            assert loss.sum().item() == 0
            assert all(t.shape == (3,) and torch.count_nonzero(t) == 0 for t in terms.values())
            assert g.shape == z.shape and g.dtype == dtype


def unchecked_options(count: int, **changes) -> ConsistencyOptions:
    """For ``calls.consistency``, which doesn't look at the labels, as nobody can on a GPU."""
    given = dict(
        temperature=2.0, ce_weight=1.0, kl_weight=1.0, teacher="others", detach_teacher=True,
        label_smoothing=0.0, ignore_index=-100, reduction="none", groups=None,
    )  # fmt: skip
    return calls.consistency_options(count, **{**given, **changes})


def check_gradient_of_unknown(impl: Impl, options: ConsistencyOptions, batch: int) -> None:
    """Of samples of which the second has a label that is no class nothing else is spoilt."""
    z = leaf(torch.randn(2, batch, 5, generator=torch.Generator().manual_seed(0)).to(impl.device))
    target = torch.arange(batch, device=impl.device) % 5
    target[1] = 5
    loss, _ = calls.consistency([z], target, options, impl.name)
    (g,) = torch.autograd.grad(loss.sum(), z)
    unknown = [i == 1 for i in range(batch)]
    assert loss.isnan().tolist() == unknown
    assert all(head.isnan().any(-1).tolist() == unknown for head in g)


@pytest.mark.parametrize("label", [-1, 5])
def test_a_label_out_of_range_that_nobody_checked_is_no_class(impl: Impl, label: int) -> None:
    """On a GPU, and in a trace, the labels can't be looked at beforehand."""
    logits = [leaf(z) for z in spec(2, 3, 5, size=1.0).build(torch.float32, impl.device)[0]]
    target = torch.tensor([0, label, 4], device=impl.device)
    loss, _ = calls.consistency(logits, target, unchecked_options(len(logits)), impl.name)
    assert loss.isnan().tolist() == [False, True, False]


# --- extreme values


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("size", [1e4, 300, 1e-4])
def test_extreme_logits(impl: Impl, size: float, detach: bool, teacher: str) -> None:
    """exp(1e4) overflows every dtype, products of exp(-300) underflow in some samples, and a
    divergence of 1e-8 is next to nothing."""
    for dtype in DTYPES:
        logits, target = spec(3, 5, 9, size=size).build(dtype, impl.device)
        check_consistency(impl, logits, target, teacher=teacher, detach_teacher=detach)


@pytest.mark.parametrize("teacher", TEACHERS)
def test_shifted_logits(impl: Impl, teacher: str) -> None:
    """Softmax doesn't see a constant added to every class, exact in float32 here."""
    logits, target = spec(3, 5, 9, size=1.0).build(torch.float32, impl.device)
    logits = [torch.round(z * 64) / 64 for z in logits]
    loss = F.collaborative_consistency(logits, target, teacher=teacher, impl=impl.name)
    shifted = [z + 4096 for z in logits]
    moved = F.collaborative_consistency(shifted, target, teacher=teacher, impl=impl.name)
    assert moved.item() == pytest.approx(loss.item(), rel=1e-3)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("teacher", TEACHERS)
def test_non_finite_input_gives_non_finite_loss(impl: Impl, teacher: str, bad: float) -> None:
    among = product((torch.float32, *HALVES), range(3), (True, False))
    turn = TEACHERS.index(teacher) + 5 * (math.isnan(bad) + 2 * (bad > 0))
    for dtype, head, labelled in cases(impl, among, turn):
        for classes, place in ((7, 0), (40, 39)):
            logits, target = spec(3, 4, classes).build(dtype, impl.device)
            logits[head][1, place] = bad
            loss = F.collaborative_consistency(
                logits, target if labelled else None, teacher=teacher, impl=impl.name
            )
            assert not torch.isfinite(loss), (dtype, head, labelled)


@pytest.mark.parametrize("bits", [0x7FC00001, 0x7FC001FF, -0x3FFFFF, 0x7FFFFFFF])
def test_a_nan_is_one_whatever_its_lowest_bits(impl: Impl, bits: int) -> None:
    for count in (1, 2):
        logits = torch.randn(count, 8, 40, generator=torch.Generator().manual_seed(0))
        logits.view(torch.int32)[0, 0, 3] = bits
        assert logits.isnan().sum() == 1
        z = logits.to(impl.device).requires_grad_()
        target = torch.zeros(8, dtype=torch.long, device=impl.device)
        loss = F.collaborative_consistency(z, target, teacher="pairwise", impl=impl.name)
        assert loss.isnan()
        (gradient,) = torch.autograd.grad(loss, z)
        assert not gradient[0, 0].isfinite().all()


# --- determinism


@pytest.mark.parametrize("teacher", TEACHERS)
def test_runs_are_bitwise_equal(impl: Impl, teacher: str) -> None:
    logits, target = spec(5, 64, 301, ignored=0.1).build(torch.float32, impl.device)
    logits = [leaf(z) for z in logits]

    def run():
        loss = F.collaborative_consistency(
            logits, target, teacher=teacher, detach_teacher=False, impl=impl.name
        )
        return [loss, *torch.autograd.grad(loss, logits)]

    first = run()
    for _ in range(2):
        assert_same_bits(run(), first)


@pytest.mark.parametrize("teacher", TEACHERS)
def test_thread_count_changes_no_bit(impl: Impl, teacher: str) -> None:
    if impl.name != "cpp":
        pytest.skip(f"{impl.name}: PyTorch doesn't promise this of its own CPU kernels")
    for shape in ((5, 200, 301), (3, 2, 50_000), (4, 1001, 10)):
        for reduction in REDUCTIONS:
            logits, target = spec(*shape, ignored=0.1).build(torch.float32)
            logits = [leaf(z) for z in logits]
            results = []
            for count in (1, 2, 3):
                with threads(count):
                    loss, terms = F.collaborative_consistency(
                        logits, target, teacher=teacher, reduction=reduction, return_terms=True,
                        impl=impl.name,
                    )
                    gradients = torch.autograd.grad(loss.sum(), logits)
                    results.append([loss, *terms.values(), *gradients])
            assert_same_bits(results[0], results[1])
            assert_same_bits(results[0], results[2])


def test_terms_are_those_of_the_loss(impl: Impl) -> None:
    """Weighted, the terms add up to the loss, and asking for them doesn't change it."""
    logits, target = spec(3, 6, 7, ignored=0.3).build(torch.float32, impl.device)
    ce_weight, kl_weight = [1.0, 0.5, 2.0], [0.0, 1.0, 3.0]
    for reduction in ("mean", "sum"):
        options = {"ce_weight": ce_weight, "kl_weight": kl_weight, "reduction": reduction}
        loss, terms = F.collaborative_consistency(
            logits, target, return_terms=True, impl=impl.name, **options
        )
        total = sum(
            w * t
            for name, weights in (("cross_entropy", ce_weight), ("kl", kl_weight))
            for w, t in zip(weights, terms[name].tolist(), strict=True)
        )
        assert loss.item() == pytest.approx(total, rel=1e-5)
        plain = F.collaborative_consistency(logits, target, impl=impl.name, **options)
        assert bits(plain).equal(bits(loss))


# --- many samples, which are taken side by side


@pytest.mark.parametrize("batch", [3, 40])
def test_the_gradient_of_a_label_out_of_range_is_none(impl: Impl, batch: int) -> None:
    check_gradient_of_unknown(impl, unchecked_options(2), batch)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_one_sample_of_many_is_not_finite(impl: Impl, bad: float) -> None:
    z = torch.randn(40, 7, generator=torch.Generator().manual_seed(0)).to(impl.device)
    z[21, 3] = bad
    target = torch.zeros(40, dtype=torch.long, device=impl.device)
    loss = F.collaborative_consistency([z], target, reduction="none", impl=impl.name)
    assert loss.isfinite().logical_not().tolist() == [i == 21 for i in range(40)]


def test_more_samples_than_are_counted_at_a_time(impl: Impl) -> None:
    """On a CPU 65,536, in a program of Triton's 1,024; those that count are unevenly spread."""
    batch, from_, to = (1100, 1030, 1100) if impl.name != "cpp" else (70_000, 66_000, 66_500)
    z = leaf(torch.randn(batch, 3, generator=torch.Generator().manual_seed(0)).to(impl.device))
    target = torch.arange(batch, device=impl.device) % 3
    target[: batch // 3] = target[from_:to:2] = -100
    (got,) = torch.autograd.grad(F.collaborative_consistency([z], target, impl=impl.name), z)
    (truth,) = torch.autograd.grad(TF.cross_entropy(z, target), z)
    torch.testing.assert_close(got, truth, rtol=1e-4, atol=0)
