"""How the Triton kernels are launched: how often, and what with.

Their values are tested with those of the other implementations, where they can run: on a
GPU, or on the CPU under TRITON_INTERPRET=1.
"""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from conftest import TESTED, dtype_name
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from imcl_fast import functional as F
from imcl_fast.kernels import autotune, consistency, dependence, numerics, pairwise, scaling
from imcl_fast.kernels.launch import Launch

if "triton" not in TESTED:
    pytest.skip("Triton runs on a GPU or under TRITON_INTERPRET=1", allow_module_level=True)

@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels launched."""
    names: list[str] = []
    launch_it = Launch.__call__

    def counted(self, *args):
        names.append(self.kernel.__name__)
        launch_it(self, *args)

    monkeypatch.setattr(Launch, "__call__", counted)
    return names


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("center", [False, True])
def test_four_layers_take_one_launch_each_way(launches: list[str], center: bool) -> None:
    shapes = [(2, 6, 4, 4), (2, 12, 3, 3), (2, 70, 2, 2), (2, 33, 1, 1)]  # primal and dual
    features = [torch.randn(s, device=DEVICE, requires_grad=True) for s in shapes]
    loss = F.representation_similarity(features, center=center, impl="triton")
    assert launches == ["forward_kernel"]
    loss.backward()
    assert launches == ["forward_kernel", "backward_kernel"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
def test_a_large_gradient_is_scaled_in_one_launch(
    launches: list[str], monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """To what PyTorch's multiplication makes of it."""
    z = torch.randn(3, 5, 3000, device=DEVICE, dtype=dtype, requires_grad=True)

    def scaled(by: float) -> Tensor:
        launches.clear()
        loss = F.collaborative_consistency(z, None, impl="triton")
        return torch.autograd.grad(loss, z, torch.tensor(by, device=DEVICE))[0]

    factors = (1.0, 0.3, math.nan)
    expected = [scaled(by) for by in factors]
    assert launches == ["consistency_kernel"]
    monkeypatch.setattr(scaling, "LARGE_GRADIENT", z.numel())
    for by, gradient in zip(factors, expected, strict=True):
        torch.testing.assert_close(scaled(by), gradient, rtol=0, atol=0, equal_nan=True)
        assert launches == ["consistency_kernel", "_scale_kernel"]


def test_twenty_layers_take_one_launch_each_way(launches: list[str]) -> None:
    weights = [
        torch.randn(8 + i, 3 + i % 4, *((3, 3) if i % 3 else (1, 1)), device=DEVICE)
        for i in range(20)
    ]
    # Odd sizes, permuted and misaligned ones: none of them takes a launch of its own.
    weights[3] = weights[3].contiguous(memory_format=torch.channels_last)
    weights[5] = torch.randn(weights[5].numel() + 1, device=DEVICE)[1:].view(weights[5].shape)
    weights = [w.requires_grad_() for w in weights]
    F.kernel_similarity(weights, impl="triton").backward()
    assert launches == ["forward_kernel", "backward_kernel"]


def test_the_consistency_takes_one_launch(launches: list[str]) -> None:
    heads = [torch.randn(4, 10, device=DEVICE, requires_grad=True) for _ in range(5)]
    target = torch.tensor([1, 2, 3, -100], device=DEVICE)
    loss = F.collaborative_consistency(
        heads, target, groups=[3, 2], teacher=["others", "pairwise"], impl="triton"
    )
    loss.backward()
    assert launches == ["consistency_kernel"]


def test_views_and_layers_of_a_dependence_take_one_launch_each_way(launches: list[str]) -> None:
    shapes = [(9, 4, 5), (9, 70), (9, 3, 2, 2)]
    views = [[torch.randn(s, device=DEVICE) for s in shapes] for _ in range(3)]
    # Other strides, and a tensor off 16 bytes: neither takes a launch of its own.
    views[0][0] = views[0][0].mT.contiguous().mT
    views[1][1] = torch.randn(9 * 70 + 1, device=DEVICE)[1:].view(9, 70)
    views = [[x.requires_grad_() for x in view] for view in views]
    loss = F.view_dependence(views, impl="triton")
    assert launches == ["gram_kernel"]
    loss.backward()
    assert launches == ["gram_kernel", "product_kernel"]


def test_what_counts_the_parts_of_a_gram() -> None:
    """Counters are 0 after a launch; more of them are others, and a graph has its own."""
    from imcl_fast.kernels import kept

    device = torch.empty(0, device=DEVICE).device
    x, y = torch.randn(2, 5, 600, device=DEVICE)
    grams = [F.dependence(x, y, impl="triton")]
    counters = kept.tickets(device, 1)
    assert kept.tickets(device, len(counters)) is counters and not counters.any()
    more = kept.tickets(device, len(counters) + 1)
    assert len(more) == 2 * len(counters) and more.data_ptr() != counters.data_ptr()
    grams.append(F.dependence(x, y, impl="triton"))
    assert grams[1].equal(grams[0]) and not more.any()


def test_geometry_is_made_once() -> None:
    """A second step with other tensors of the same shapes uploads nothing."""
    from imcl_fast.kernels.plan import plan

    for _ in range(2):
        x = torch.randn(2, 5, 4, 4, device=DEVICE, requires_grad=True)
        F.representation_similarity(x, impl="triton").backward()
        before = plan.cache_info().misses
    x = torch.randn(2, 5, 4, 4, device=DEVICE, requires_grad=True)
    F.representation_similarity(x, impl="triton").backward()
    assert plan.cache_info().misses == before
    # Another stride is another plan.
    y = torch.randn(2, 4, 4, 5, device=DEVICE).movedim(-1, 1).requires_grad_()
    F.representation_similarity(y, impl="triton").backward()
    assert plan.cache_info().misses == before + 1


def test_calls_are_planned_once() -> None:
    """Whatever their numbers are; and what a kernel is compiled for is another plan."""
    heads = [torch.randn(4, 10, device=DEVICE, requires_grad=True) for _ in range(3)]
    target = torch.arange(4, device=DEVICE)
    views = [torch.randn(5, 7, device=DEVICE, requires_grad=True) for _ in range(2)]
    plans = (pairwise._forward, pairwise._backward, consistency._call, dependence._forward,
             dependence._backward)  # fmt: skip

    def step(weight: float, eps: float, smoothing: float = 0.1, **options) -> int:
        """How many plans it makes."""
        before = sum(made.cache_info().misses for made in plans)
        loss = F.kernel_similarity(heads, eps=eps, impl="triton")
        loss = loss + F.collaborative_consistency(
            [3.0 * head for head in heads], target, kl_weight=weight, label_smoothing=smoothing,
            temperature=2.5 + weight, impl="triton", **options,
        )  # fmt: skip
        (loss + F.dependence(*views, impl="triton")).backward()
        return sum(made.cache_info().misses for made in plans) - before

    step(1.0, 1e-12)
    assert step(0.3, 1e-6) == step(2.1, 0.0) == 0
    assert step(1.0, 1e-12, 0.0) == 1
    assert step(1.0, 1e-12, ignore_index=2**40) == 1


def test_a_step_fills_nothing() -> None:
    """The ticket lasts: the last program leaves it at 0, where each call would launch a fill."""
    from imcl_fast.kernels import kept

    x = torch.randn(2, 5, 4, 4, device=DEVICE, requires_grad=True)
    losses = [F.representation_similarity(x, impl="triton")]
    with Operators() as seen:
        losses += [F.representation_similarity(x, impl="triton") for _ in range(2)]
    assert not [name for name in seen.names if "zero" in name or "fill" in name]
    assert losses[1].equal(losses[0]) and losses[2].equal(losses[0])
    assert kept.scratch(x.device, 1, losses[0].dtype).ticket.item() == 0


def test_a_call_that_ends_between_its_launches_spoils_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ctrl-C while the kernel for a second dtype compiles: the counter isn't at 0 then."""
    from imcl_fast.kernels import launch

    xs = [torch.randn(2, 4, 3, 3), torch.randn(2, 5, 2, 2).half()]
    ys = [torch.randn(3, 6, 3, 3), torch.randn(3, 5, 2, 2).half()]
    given = [[x.to(DEVICE) for x in part] for part in (xs, ys, ys[:1])]
    expected = [F.representation_similarity(part, impl="triton") for part in given]
    real, launched = launch.Launch.__call__, []

    def interrupted(self, *arguments) -> None:
        launched.append(self)
        if len(launched) == 2:
            raise KeyboardInterrupt
        real(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(launch.Launch, "__call__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            F.representation_similarity(given[0], impl="triton")
    for part, loss in zip(given, expected, strict=True):
        assert F.representation_similarity(part, impl="triton").equal(loss)


def test_a_first_call_that_lacks_memory_breaks_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    from imcl_fast.kernels import kept

    x = torch.randn(2, 4, 3, 3, device=DEVICE)
    expected = F.representation_similarity(x, impl="triton")

    def lacks(*_: object) -> None:
        raise torch.OutOfMemoryError("once")

    with monkeypatch.context() as patch:
        patch.setattr(kept, "_scratch", {})
        with patch.context() as once:
            once.setattr(kept, "_new_scratch", lacks)
            with pytest.raises(torch.OutOfMemoryError, match="once"):
                F.representation_similarity(x, impl="triton")
        assert F.representation_similarity(x, impl="triton").equal(expected)


def test_memory_that_holds_negative_values_is_read_as_what_it_means() -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, 4, 6, dtype=torch.cfloat, generator=generator).to(DEVICE).conj().imag
    x = torch.randn(2, 5, 4, 4, dtype=torch.cfloat, generator=generator).to(DEVICE).conj().imag
    target = torch.randn(4, 6, dtype=torch.cfloat, generator=generator).to(DEVICE).conj().imag
    assert z.is_neg() and x.is_neg() and target.is_neg()
    for loss, given in (
        (lambda x: F.representation_similarity(x, impl="triton"), x),
        (lambda z: F.collaborative_consistency(z, target, impl="triton"), z),
        (lambda x: F.dependence(x, target[:, :3], impl="triton"), z[0]),
    ):
        values = []
        for each in (given, given.resolve_neg().clone()):
            leaf = each.detach().requires_grad_()
            value = loss(leaf)
            values.append([value.detach(), *torch.autograd.grad(value, leaf)])
        torch.testing.assert_close(*values)


def test_an_incoming_gradient_is_read_as_what_it_means(monkeypatch) -> None:
    from imcl_fast.kernels import scaling

    monkeypatch.setattr(scaling, "LARGE_GRADIENT", 0)
    x, z, y = (torch.randn(2, 4, 6, generator=torch.manual_seed(i)).to(DEVICE) for i in range(3))
    grad = torch.tensor(1 + 2j, device=DEVICE).conj().imag
    assert grad.is_neg()
    for loss, given in (
        (lambda x: F.representation_similarity(x, impl="triton"), x),
        (lambda x: F.kernel_similarity(x, impl="triton"), x),
        (lambda z: F.collaborative_consistency(z, None, impl="triton"), z),
        (lambda x: F.dependence(x[0], y[0], impl="triton"), x),
    ):
        leaf = given.clone().requires_grad_()
        values = [torch.autograd.grad(loss(leaf), leaf, g) for g in (grad, grad.resolve_neg())]
        torch.testing.assert_close(*values)
        assert values[0][0].any()


class Operators(TorchDispatchMode):
    """The names of those that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def test_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every launch has a ticket of its own, tables are kept, and nothing new is uploaded."""
    from imcl_fast.kernels import kept

    x = torch.randn(2, 5, 4, 4, device=DEVICE)
    F.representation_similarity(x, impl="triton")
    F.dependence(*x.flatten(2).mT.contiguous(), impl="triton", estimator="biased")
    monkeypatch.setattr(kept, "capturing", lambda device: True)
    mine = [kept.scratch(x.device, 1, x.dtype).ticket.data_ptr() for _ in range(3)]
    assert len(set(mine)) == 3 and all(address % 16 == 0 for address in mine)
    monkeypatch.setattr(kept, "_of_graphs", {})
    F.representation_similarity(x, impl="triton")
    F.representation_similarity(x, impl="triton")
    assert len(kept._of_graphs) == 1
    F.dependence(*x.flatten(2).mT.contiguous(), impl="triton", estimator="biased")
    assert len(kept._of_graphs) == 2
    assert kept.tickets(x.device, 3).tolist() == [0, 0, 0]
    with pytest.raises(RuntimeError, match="run the step once before"):
        kept.on_device(torch.zeros(1), torch.device("meta"))
    monkeypatch.setitem(kept._tickets, x.device, [])
    ticket = kept.scratch(x.device, 1, x.dtype).ticket
    assert ticket.item() == 0  # one that the graph sets to 0 itself


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_fast_path_is_taken(layout: str) -> None:
    """Dense aligned layers are planned to be read 16 bytes at a time, in the order they lie in;
    what the compiler makes of it is in test_compiled_code.py."""
    from imcl_fast.kernels import plan as plans

    x = torch.empty(2, 8, 4, 4)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    made = plans.plan(
        (plans.Layer(*plans.layout([x])[0][1:]),), 4, 0, False, True, torch.device("cpu")
    )
    record = made.table[2 : 2 + plans.FIELDS].tolist()
    assert record[plans.FAST] == 1
    assert made.rows_unit == (layout == "channels_last")


@triton.jit
def parts_kernel(x, bfloat16_parts, tf32_parts):
    """Each (parts, 256) of x (256)."""
    i = tl.arange(0, 256)
    first, second, third = numerics.bfloat16_parts(tl.load(x + i))
    tl.store(bfloat16_parts + i, first)
    tl.store(bfloat16_parts + 256 + i, second)
    tl.store(bfloat16_parts + 512 + i, third)
    first, second = numerics.tf32_parts(tl.load(x + i))
    tl.store(tf32_parts + i, first)
    tl.store(tf32_parts + 256 + i, second)


def test_parts_of_a_number_add_up_to_it() -> None:
    """The interpreter's products aren't made of parts, so these are tested by themselves."""
    x = torch.randn(256, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    x = x * 10.0 ** torch.arange(-20, 12, device=DEVICE).repeat(8)
    x[:3] = torch.tensor([0.0, -0.0, 1.0])
    thirds = torch.empty(3, 256, dtype=torch.bfloat16, device=DEVICE)
    halves = torch.empty(2, 256, device=DEVICE)
    parts_kernel[(1,)](x, thirds, halves)
    # On the CPU: powers of 2 are not exact on a GPU.
    x, thirds, halves = x.double().cpu(), thirds.double().cpu(), halves.double().cpu()
    error = (thirds.sum(0) - x).abs()
    assert (error <= 2.0**-23 * x.abs()).all()
    assert halves.sum(0).equal(x)
    for bits, part in zip((10, 12), halves, strict=True):  # after the leading one
        mantissa = part / 2.0 ** part.abs().clamp_min(1e-300).log2().floor()
        assert (mantissa * 2**bits).frac().eq(0).all()


def test_float64_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    from imcl_fast import implementations

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    reason = implementations.why_not("triton", "cuda", [torch.float64])
    assert reason is not None and "float64" in reason


def test_a_large_gradient_of_single_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has a factor of its own, wherever a gradient is scaled by a kernel of Triton's."""
    monkeypatch.setattr(scaling, "LARGE_GRADIENT", 1)
    z = torch.randn(6, 5, device=DEVICE, requires_grad=True)
    y, by = torch.arange(6, device=DEVICE) % 5, torch.arange(1.0, 7, device=DEVICE)
    got = F.collaborative_consistency([z], y, reduction="none", impl="triton")
    truth = torch.nn.functional.cross_entropy(z, y, reduction="none")
    torch.testing.assert_close(*(torch.autograd.grad(loss, z, by)[0] for loss in (got, truth)))


def test_winners_that_are_none_are_looked_for_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A cache that another release wrote, or that is damaged; and each dtype has its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(autotune, "_time", lambda run: run())
    module = SimpleNamespace(get_device_name=lambda device: "gpu")
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    file = autotune.cache_file()
    file.parent.mkdir(parents=True)

    def best(dtype: torch.dtype, *times: float) -> str:
        return autotune.best(
            "op", (1,), dtype, torch.device("xpu"), ["a", "b"], lambda c: times["ab".index(c)]
        )

    for text in ("[1]", "{", '{"op|gpu|torch.float32|1": 2}', '{"op|gpu|torch.float32|1": "1"}'):
        file.write_text(text)
        monkeypatch.setattr(autotune, "_winners", None)
        assert best(torch.float32, 2.0, 1.0) == "b"
    assert best(torch.float32, 1.0, 2.0) == "b"  # it is kept
    assert best(torch.float16, 1.0, 2.0) == "a"
