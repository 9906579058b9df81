"""What only a GPU can show: no synchronisation, graphs, launches as the profiler counts them.

The values are tested by the other files, which put their tensors on the GPU where there is
one; ``make gpu`` runs them all there.
"""

from __future__ import annotations

import pytest
import torch
from conftest import TESTED
from torch.profiler import ProfilerActivity, profile

import imcl_fast
from imcl_fast import functional as F

if not torch.cuda.is_available():
    pytest.skip("needs a GPU, and torch sees none", allow_module_level=True)

FUSED = [name for name in ("triton", "cuda") if name in TESTED]
FEATURES = [(8, 64, 32, 32), (8, 128, 16, 16), (8, 256, 8, 8), (8, 512, 4, 4)]


def features() -> list[torch.Tensor]:
    return [torch.randn(s, device="cuda", requires_grad=True) for s in FEATURES]


def weights() -> list[torch.Tensor]:
    shapes = [(32 + 8 * i, 16 + 3 * i, *((3, 3) if i % 3 else (1, 1))) for i in range(20)]
    return [torch.randn(s, device="cuda", requires_grad=True) for s in shapes]


def heads() -> list[torch.Tensor]:
    return [torch.randn(128, 1000, device="cuda", requires_grad=True) for _ in range(5)]


def views() -> list[torch.Tensor]:
    """Two of them of each layer, side by side."""
    return [x for one, two in zip(features(), features(), strict=True) for x in (one, two)]


TARGET = torch.arange(128, device="cuda")
OPERATIONS = {
    "representation": (features, lambda xs, impl: F.representation_similarity(xs, impl=impl)),
    "kernel": (weights, lambda xs, impl: F.kernel_similarity(xs, impl=impl)),
    "consistency": (
        heads,
        lambda xs, impl: F.collaborative_consistency(xs, TARGET, impl=impl),
    ),
    "dependence": (views, lambda xs, impl: F.view_dependence([xs[::2], xs[1::2]], impl=impl)),
}
operations = pytest.mark.parametrize("operation", list(OPERATIONS))
fused = pytest.mark.parametrize("name", FUSED)


@fused
@operations
def test_a_step_never_synchronises(name: str, operation: str) -> None:
    make, loss_of = OPERATIONS[operation]
    for _ in range(2):  # the first step compiles, and uploads the geometry
        inputs, grad = make(), torch.ones((), device="cuda")
        torch.cuda.synchronize()
        try:
            torch.cuda.set_sync_debug_mode("error" if _ else "default")
            torch.autograd.grad(loss_of(inputs, name), inputs, grad)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@fused
@operations
def test_graph_capture(name: str, operation: str) -> None:
    make, loss_of = OPERATIONS[operation]
    inputs, grad = make(), torch.ones((), device="cuda")

    def step():
        loss = loss_of(inputs, name)
        return loss, torch.autograd.grad(loss, inputs, grad)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, gradients = step()
    for _ in range(3):  # replays see new values, and leave nothing behind for the next
        with torch.no_grad():
            for x in inputs:
                x.copy_(torch.randn_like(x))
        graph.replay()
        expected, others = step()
        torch.testing.assert_close(loss, expected, rtol=0, atol=0)
        for a, b in zip(gradients, others, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def kernels_of(run) -> list[str]:
    """Names of the kernels the device ran, copies and fills by the driver not among them."""
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        run()
        torch.cuda.synchronize()
    return [
        event.name
        for event in seen.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not event.name.startswith(("Memset", "Memcpy"))
    ]


@fused
@pytest.mark.parametrize("operation", ["representation", "kernel"])
def test_one_launch_each_way(name: str, operation: str) -> None:
    make, loss_of = OPERATIONS[operation]
    inputs, grad = make(), torch.ones((), device="cuda")
    torch.autograd.grad(loss_of(inputs, name), inputs, grad)
    losses = []
    assert len(kernels_of(lambda: losses.append(loss_of(inputs, name)))) == 1
    assert len(kernels_of(lambda: torch.autograd.grad(losses[0], inputs, grad))) == 1


@fused
def test_one_launch_forward_of_the_consistency(name: str) -> None:
    inputs = heads()
    loss_of = OPERATIONS["consistency"][1]
    loss_of(inputs, name)
    assert len(kernels_of(lambda: loss_of(inputs, name))) == 1


@fused
@operations
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_results_repeat_bit_by_bit(name: str, operation: str, dtype: torch.dtype) -> None:
    """Many times, for a race between a product and the next load shows once in a while."""
    make, loss_of = OPERATIONS[operation]
    inputs = [x.detach().to(dtype).requires_grad_() for x in make()]
    first = torch.autograd.grad(loss_of(inputs, name), inputs)
    for _ in range(50):
        again = torch.autograd.grad(loss_of(inputs, name), inputs)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@fused
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_training_step_under_autocast(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 32, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2),
        torch.nn.Conv2d(32, 64, 3, padding=1), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(), torch.nn.Linear(64, 10),
    ).cuda().to(memory_format=torch.channels_last)  # fmt: skip
    x = torch.randn(32, 3, 16, 16, device="cuda").contiguous(memory_format=torch.channels_last)
    y = torch.randint(0, 10, (32,), device="cuda")
    imcl = imcl_fast.IMCL(model, x, layers=["1", "4"], impl=name)
    optimizer = torch.optim.SGD(imcl.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=dtype):
            loss = imcl(x, y).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.detach())
    losses = torch.stack(losses)
    assert torch.isfinite(losses).all()
    assert losses[-1] < losses[0]
