"""What a wrong line in a Triton kernel would spoil on a GPU's sizes, shown on the interpreter's:
two chunks of classes, rooms and sums of more programs than it has."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from conftest import TESTED, Impl, check_consistency, check_pairwise, leaf
from test_consistency import unchecked_options

from imcl_fast import calls
from imcl_fast import functional as F
from imcl_fast.kernels import (
    autotune,
    config,
    consistency,
    dependence,
    launch,
    pairwise,
    plan,
    reduction,
)

if "triton" not in TESTED:
    pytest.skip("Triton runs on a GPU or under TRITON_INTERPRET=1", allow_module_level=True)

TRITON = Impl("triton", "cuda" if torch.cuda.is_available() else "cpu")
DEVICE = TRITON.device


@triton.jit
def totals_kernel(partials, results, count):
    sums = reduction.totals(partials, count, 3, 4, 128, tl.float32)
    which = tl.arange(0, 4)
    tl.store(results + which, sums, mask=which < 3)


@pytest.mark.parametrize("count", [1, 128, 300])
def test_sums_of_more_programs_than_are_added_up_at_a_time(count: int) -> None:
    """A GPU has more programs than are added up at a time; the interpreter's kernels have few."""
    x = torch.arange(3.0 * count, device=DEVICE).view(3, count) % 7
    found = torch.empty(3, device=DEVICE)
    totals_kernel[(1,)](x, found, count)
    assert found.equal(x.sum(1))


def test_there_is_room_for_what_all_programs_of_a_gpu_leave(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """There is room for all that a GPU's programs leave."""
    chosen, asked, made = consistency.consistency_config, [], consistency.scratch

    def few(*of):
        return chosen(*of)._replace(samples=1, programs=300)

    monkeypatch.setattr(consistency, "consistency_config", few)
    monkeypatch.setattr(consistency, "scratch", lambda *of: asked.append(of[1]) or made(*of))
    monkeypatch.setattr(launch.Launch, "__call__", lambda *_: None)
    F.collaborative_consistency(torch.randn(2, 300, 3, device=DEVICE), None, impl="triton")
    assert asked == [300 * (2 * 2 + 2)]  # CE and KL of each head, the loss, the weights


def test_a_label_of_more_than_32_bits_is_no_class() -> None:
    z = leaf(torch.randn(2, 3, 5, device=DEVICE))
    target = torch.tensor([0, 2**32 + 1, 1], device=DEVICE)
    loss, _ = calls.consistency([z], target, unchecked_options(2), "triton", None)
    assert loss.isnan().tolist() == [False, True, False]


def test_the_second_of_two_widths_counts() -> None:
    x, y = torch.randn(6, 1, device=DEVICE), torch.randn(6, 7, device=DEVICE)
    losses = [F.dependence(x, y, bandwidth=1.0, impl=name) for name in ("triton", "torch")]
    torch.testing.assert_close(*losses)


def test_the_gradient_of_an_unknown_label_with_class_weights_is_none() -> None:
    z = leaf(torch.randn(1, 3, 5, device=DEVICE))
    options = unchecked_options(
        1, temperature=1.0, kl_weight=0.0, label_smoothing=0.1, reduction="sum"
    )
    loss, _ = calls.consistency(
        [z], torch.tensor([0, 7, 1], device=DEVICE), options, "triton", torch.ones(5, device=DEVICE)
    )
    (gradient,) = torch.autograd.grad(loss, z)
    assert gradient.isnan().flatten(1)[0].view(3, 5).all(1).tolist() == [False, True, False]


def test_there_is_room_for_the_programs_of_all_dtypes_and_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For what the programs of all dtypes leave, and a counter for every tile and part."""
    asked = []
    monkeypatch.setattr(launch.Launch, "__call__", lambda *_: None)
    for module, name in ((pairwise, "scratch"), (dependence, "tickets")):
        made = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *of, made=made: asked.append(of[1]) or made(*of))
    xs = [torch.randn(2, 65, 80, device=DEVICE), torch.randn(3, 4, 5, device=DEVICE).half()]
    pairwise.forward(xs, 0, False, 1e-12, True, 0, True)
    x = torch.randn(5, 600, device=DEVICE)
    dependence.forward([x, x], [1.0, 1.0])
    (part,), *_ = dependence._forward(plan.layout([x, x]), x.device)
    assert asked == [2 * 3 + 3, part.plan.gram.programs]
    assert part.plan.divided


def test_a_part_of_a_transposed_weight_s_rows() -> None:
    """A part of a transposed weight's rows."""
    check_pairwise(TRITON, [torch.randn(5, 8, device=DEVICE)[:, :4].T], batched=False)


def test_the_first_of_several_representations_may_be_the_narrow_one() -> None:
    """The first of them may be the narrow one"""
    x, y = torch.randn(6, 3, device=DEVICE), torch.randn(6, 900, device=DEVICE)
    losses = [F.dependence(x, y, impl=name) for name in ("triton", "torch")]
    torch.testing.assert_close(*losses)
    lay = plan.layout([x, y])
    (part,), *_ = dependence._forward(lay, x.device)
    assert part.plan.divided


def test_pairwise_teachers_learn_from_all_chunks() -> None:
    """Of pairwise teachers that learn too, classes in several chunks"""
    z = torch.randn(2, 1, 5000, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    check_consistency(TRITON, [z], None, teacher="pairwise", detach_teacher=False)


# Two chunks of classes


def risen(heads: int, batch: int = 1) -> torch.Tensor:
    """The larger logits in the second of them."""
    z = torch.randn(heads, batch, 5000, generator=torch.Generator().manual_seed(0))
    z[..., 2500:] += 3
    return z.to(DEVICE)


def test_one_head_of_several_chunks() -> None:
    """It has a pass of its own."""
    target = torch.tensor([4999, 3], device=DEVICE)
    check_consistency(TRITON, [risen(1, 2)], target, label_smoothing=0.1)


@pytest.mark.parametrize("temperature", [0.5, 2.5, 3.0])
def test_temperatures_that_are_no_small_power(temperature: float) -> None:
    target = torch.tensor([3], device=DEVICE)
    check_consistency(TRITON, [risen(2)], target, temperature=temperature)


@pytest.mark.parametrize("divergence", ["kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("teacher", ["others", "pairwise"])
@pytest.mark.parametrize("detach", [True, False])
def test_the_label_among_several_chunks(detach: bool, teacher: str, divergence: str) -> None:
    """The gradient of its class is stored once more."""
    target = torch.tensor([3], device=DEVICE)
    check_consistency(TRITON, [risen(2)], target, teacher=teacher, divergence=divergence,
                      detach_teacher=detach, ce_weight=0.01)  # fmt: skip


@pytest.mark.parametrize("divergence", ["kl", "jsd"])
def test_pairs_without_a_gradient(divergence: str) -> None:
    z = risen(2)
    got, truth = (
        F.collaborative_consistency(x, None, teacher="pairwise", divergence=divergence, impl=name)
        for x, name in ((z, "triton"), (z.double(), "reference"))
    )
    torch.testing.assert_close(got.double(), truth, rtol=1e-5, atol=0)


def test_each_group_has_its_beta() -> None:
    z = torch.randn(5, 4, 7, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    check_consistency(TRITON, [z], None, groups=[2, 3], divergence="jsd", beta=[0.2, 0.7])


# More elements than 32 bits count


@pytest.mark.parametrize(
    ("size", "stride"),
    [((1, 3, 5), (8, 2**30, 1)), ((3, 2, 5), (2**30, 8, 1)), ((1, 2, 3), (4, 1, 2**30))],
    ids=str,
)
def test_logits_may_lie_far_apart(size, stride) -> None:
    room = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=DEVICE)  # most is never touched
    z = room.as_strided(size, stride)
    z.copy_(torch.randn(size, generator=torch.Generator().manual_seed(0)))
    check_consistency(TRITON, [z], torch.arange(size[1], device=DEVICE))


@pytest.mark.parametrize("shape", [(1, 2, 2**30 + 1), (1, 2**30 + 1, 2)])
@pytest.mark.parametrize("made", ["pairwise", "dependence"])
def test_rows_and_columns_beyond_32_bits_are_refused(made: str, shape: tuple) -> None:
    layers = (plan.Layer(shape, (0, 0, 0), True),)
    with pytest.raises(RuntimeError, match=r"at most 2\^30 rows and columns .*pass impl="):
        if made == "pairwise":
            plan.plan(layers, 4, 0, False, True, DEVICE)
        else:
            plan.geometry(layers, 4, False)


def test_layers_that_lie_alike_share_the_offsets_of_their_columns() -> None:
    """Also a layer and its gradient; where they don't, each has its own."""
    lie = plan.geometry((plan.Layer((2, 4, 3, 5), (60, 15, 5, 1), True),) * 3, 4, True)
    assert lie.offsets == [*range(15)]
    assert len({r[f] for r in lie.records for f in (plan.X_OFFSETS, plan.DX_OFFSETS)}) == 1
    cropped = plan.Layer((2, 4, 3, 5), (400, 100, 10, 1), True)
    lie = plan.geometry((cropped, plan.Layer((2, 4, 15), (60, 15, 1), True)), 4, True)
    own = [10 * i + j for i in range(3) for j in range(5)]
    assert lie.offsets == [*own, *range(15), *range(15)]
    (x, dx), (other, again) = ((r[plan.X_OFFSETS], r[plan.DX_OFFSETS]) for r in lie.records)
    assert x + 15 == dx and dx + 15 == other == again


# Autotuning


def test_a_candidate_of_more_programs_has_more_room(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, made = [], consistency.scratch

    def best(operation, bucket, dtype, device, candidates, run):
        run(candidates[-1])
        return candidates[-1]

    def scratch(device, count, dtype):
        asked.append(count)
        return made(device, count, dtype)

    found = config.ConsistencyConfig(1, 32, 4, 1, 255)
    monkeypatch.setattr(autotune, "wanted", lambda device: True)
    monkeypatch.setattr(autotune, "best", best)
    monkeypatch.setattr(consistency, "scratch", scratch)
    monkeypatch.setattr(consistency, "_call", consistency._Call)  # not one that is kept
    monkeypatch.setattr(consistency, "consistency_config", lambda *_: found)
    monkeypatch.setattr(launch.Launch, "__call__", lambda *_: None)
    F.collaborative_consistency(torch.randn(2, 300, 3, device=DEVICE), None, impl="triton")
    assert asked == [8 * 6] * 2  # the candidate's programs, and sums of each
