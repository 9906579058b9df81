"""How a launch is repeated: once through Triton, then by what Triton has compiled."""

from __future__ import annotations

import contextlib
import math
import threading
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton
from gpu_stubs import specialised
from torch.utils._python_dispatch import TorchDispatchMode

from bench.gpu import host
from imcl_fast.kernels import consistency, dependence, kept, launch, pairwise, scaling
from imcl_fast.kernels.launch import Launch

CPU = torch.device("cpu")
THROUGH_TRITON, BY_ITSELF = "through Triton", "by itself"


class Kernel:
    """One of Triton's, compiled at once."""

    def __init__(self, compiled: bool = True) -> None:
        self.pre_run_hooks: list = []
        self.seen: list[tuple] = []
        self.compiled = types.SimpleNamespace(
            run=lambda *args: self.seen.append((BY_ITSELF, *args)),
            function="function", packed_metadata="metadata",
        ) if compiled else None  # fmt: skip

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*args: Any, **options: Any) -> Any:
            self.seen.append((THROUGH_TRITON, grid, args, options))
            return self.compiled

        return run

    @property
    def ways(self) -> list[str]:
        return [way for way, *_ in self.seen]


@pytest.fixture(autouse=True)
def stream(monkeypatch: pytest.MonkeyPatch) -> str:
    """The one that every device has."""
    active = types.SimpleNamespace(get_current_stream=lambda index: f"stream of {index}")
    monkeypatch.setattr(launch, "driver", types.SimpleNamespace(active=active))
    return "stream of None"


def repeated(kernel: Kernel, device: torch.device = CPU) -> Launch:
    return Launch(kernel, 7, device, C="constants", num_warps=4)


def test_triton_is_asked_once(stream: str) -> None:
    kernel = Kernel()
    again = repeated(kernel)
    again("x", 1)
    again("y", 2)
    assert kernel.seen == [
        (THROUGH_TRITON, (7,), ("x", 1), {"C": "constants", "num_warps": 4}),
        (BY_ITSELF, 7, 1, 1, stream, "function", "metadata", None, None, None, "y", 2, "constants"),
    ]


def enter_hook() -> contextlib.AbstractContextManager:
    hook = triton.knobs.runtime.launch_enter_hook
    return _while(lambda: hook.add(print), lambda: hook.remove(print))


def exit_hook() -> contextlib.AbstractContextManager:
    hook = triton.knobs.runtime.launch_exit_hook
    return _while(lambda: hook.add(print), lambda: hook.remove(print))


def lone_hook() -> contextlib.AbstractContextManager:
    return _set(triton.knobs.runtime, "launch_enter_hook", print)


def debugging() -> contextlib.AbstractContextManager:
    return _set(triton.knobs.runtime, "debug", True)


def instrumented() -> contextlib.AbstractContextManager:
    return _set(triton.knobs.compilation, "instrumentation_mode", "fpsan")


@contextlib.contextmanager
def _while(begin: Any, end: Any) -> Iterator[None]:
    begin()
    try:
        yield
    finally:
        end()


def _set(knobs: Any, name: str, value: Any) -> contextlib.AbstractContextManager:
    before = getattr(knobs, name)
    return _while(lambda: setattr(knobs, name, value), lambda: setattr(knobs, name, before))


@pytest.mark.parametrize("watch", [enter_hook, exit_hook, lone_hook, debugging, instrumented])
def test_what_watches_launches_sees_all(watch: Any) -> None:
    """And what is compiled meanwhile, for a debugger, isn't kept."""
    kernel, other = Kernel(), Kernel()
    again, meanwhile = repeated(kernel), repeated(other)
    again()
    with watch():
        for _ in range(2):
            again()
            meanwhile()
    again()
    for _ in range(2):
        meanwhile()
    assert kernel.ways == [THROUGH_TRITON] * 3 + [BY_ITSELF]
    assert other.ways == [THROUGH_TRITON] * 3 + [BY_ITSELF]


def test_hooks_of_a_kernel_see_all() -> None:
    kernel = Kernel()
    again = repeated(kernel)
    again()
    kernel.pre_run_hooks.append(print)
    again()
    assert kernel.ways == [THROUGH_TRITON] * 2


@pytest.mark.parametrize("unknown", ["interpreter", "version", "AMD", "Intel"])
def test_what_is_not_known_goes_through_triton(
    unknown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = CPU
    if unknown == "version":
        monkeypatch.setattr(triton, "__version__", "3.60.0")
    elif unknown == "AMD":
        monkeypatch.setattr(torch.version, "hip", "6.4")
        monkeypatch.setattr(launch, "for_amd", lambda options: options)
    elif unknown == "Intel":
        device = torch.device("xpu", 0)
        monkeypatch.setattr(torch.xpu, "current_device", lambda: 0)
    kernel = Kernel(compiled=unknown != "interpreter")
    again = repeated(kernel, device)
    for _ in range(3):
        again()
    assert kernel.ways == [THROUGH_TRITON] * 3


def test_a_launch_is_on_the_device_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first as well as the others, with that device's stream; another stays the current one."""
    current = [0]

    @contextlib.contextmanager
    def on(device: torch.device) -> Iterator[None]:
        before, current[0] = current[0], device.index
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", on)
    kernel = Kernel()
    where: list[int] = []
    kernel.seen = types.SimpleNamespace(append=lambda seen: where.append(current[0]))  # type: ignore
    again = [repeated(kernel, torch.device("cuda", index)) for index in (0, 1)]
    for _ in range(2):
        for each in again:
            each()
    assert where == [0, 1, 0, 1] and current == [0]


@pytest.mark.slow
def test_triton_itself_is_asked_once() -> None:
    """Where Triton is as it is, over a libcuda that does nothing but count: a second step launches
    once each way, which Triton need not look for, and fills nothing."""
    found = {row["name"]: row for row in host.over_nothing(calls=1)}
    for name, row in found.items():
        assert row["launches"] == (1 if "consistency" in name else 2), row
        assert row["found by Triton"] == 0, row
        inputs = {"representation of one layer": 1, "representation of four layers": 4,
                  "kernels of 20 layers": 20}  # fmt: skip
        # Of the similarities the loss, the state and the gradients; of the consistency the loss,
        # the terms and the gradient.
        assert len(row["made"]) == 2 + inputs.get(name, 1), row
        assert all("empty" in made for made in row["made"]), row


# ---- Plans ---------------------------------------------------------------------------------


def test_a_launch_is_of_one_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it is called with: it takes the code that Triton found for it the first time."""
    codes: dict[Launch, object] = {}

    def found(self: Launch, *args: Any) -> None:
        code = specialised(args, by_value=True)
        assert codes.setdefault(self, code) == code

    def lying(*shape: int, of: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A tensor that begins at any multiple of its elements' size, of any strides."""
        skipped, kind = (int(torch.randint(n, ())) for n in (4, 3))
        whole = torch.rand(of * math.prod(shape) + skipped).to(dtype)[skipped:]
        if kind == 0:
            return whole[: math.prod(shape)].view(shape)
        if kind == 1:
            return whole[: math.prod(shape)].view(shape[::-1]).permute(*range(len(shape))[::-1])
        return whole.view(*shape[:-1], -1)[..., : shape[-1]]

    monkeypatch.setattr(Launch, "__call__", found)
    monkeypatch.setattr(scaling, "LARGE_GRADIENT", 0)
    torch.manual_seed(0)
    for _ in range(60):
        n, d, classes = (int(torch.randint(1, 4, ())) for _ in range(3))
        two, far, half = (int(torch.randint(2, ())) for _ in range(3))
        dtype = (torch.float32, torch.bfloat16)[half]
        xs = [lying(1 + n, 16 * d, of=2), lying(2, d, dtype=dtype)][: 1 + two]
        grad = lying(2)[two]
        options = (0, False, 1e-12, False, 0)
        for keep in (False, True):
            _, state = pairwise.forward(xs, *options, keep)
        pairwise.backward(grad, xs, state, *options)
        samples = [x.view_as(x) for x in (lying(n, d, dtype=dtype), lying(n, 2, of=2))]
        grams, means = dependence.forward(samples, [1.0, 1.0])
        s = torch.rand(grams.numel() + far)[far:].view_as(grams)
        dependence.backward(s, samples, means)
        logits = [lying(n, classes, of=2, dtype=dtype) for _ in range(2)]
        target = [None, torch.zeros(n + two, dtype=torch.int64)[two:],
                  lying(n, classes)][int(torch.randint(3, ()))]  # fmt: skip
        weights = [(None, lying(size))[int(torch.randint(2, ()))] for size in (classes, n)]
        consistency.forward(
            logits, target, *weights, [1.0, 1.0], [0.5, 0.5], [2], [1.0 + 0.5 * two], [0], [True],
            [0], [0.5], 0.1 * two, (-1, 2**40)[far], False, 0, bool(n % 2),
        )  # fmt: skip
        scaling.scale_(lying(n, 16 * d), grad)
    assert len(codes) > 60


def test_what_a_call_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The state, the loss and the gradients; of the consistency terms too, of the dependence Grams
    and summands."""
    monkeypatch.setattr(Launch, "__call__", lambda *_: None)
    x = torch.randn(2, 5, 4, 4)
    logits, target = torch.randn(3, 4, 10), torch.arange(4)

    def pairwise_both() -> None:
        loss, state = pairwise.forward([x], 0, True, 1e-12, True, 0, True)
        pairwise.backward(loss, [x], state, 0, True, 1e-12, True, 0)

    def consistency_both() -> None:
        consistency.forward(
            [logits], target, None, None, [1.0] * 3, [1.0] * 3, [3], [2.0], [0], [True], [0],
            [0.5], 0.0, -100, False, 0, True,
        )  # fmt: skip

    def dependence_both() -> None:
        grams, means = dependence.forward([x, x], [1.0, 1.0])
        dependence.backward(grams, [x, x], means)

    class Made(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    for call, made in ((pairwise_both, 3), (consistency_both, 3), (dependence_both, 5)):
        call()
        names: list[str] = []
        with Made():
            call()
        assert len(names) == made and all("empty" in name for name in names), names


# ---- Scratch ----------------------------------------------------------------------------


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The current stream is its last; nothing has scratch yet."""
    found = [0]
    monkeypatch.setattr(kept, "_stream", lambda device: found[-1])
    monkeypatch.setattr(kept, "_scratch", {})
    return found


def test_scratch_is_kept_and_grows(streams: list[int]) -> None:
    first = kept.scratch(CPU, 10, torch.float32)
    assert kept.scratch(CPU, first.size, torch.float32) is first
    assert first.size >= 10 and first.partials.shape == (first.size,)
    assert first.partials.dtype == torch.float32 and not first.ticket.any()
    assert first.ticket.dim() == 0 and first.ticket.dtype == torch.int32
    larger = kept.scratch(CPU, first.size + 1, torch.float32)
    assert larger.size > first.size
    for each in (first, larger):  # what Triton compiles kernels for
        assert each.partials.data_ptr() % 16 == each.ticket.data_ptr() % 16 == 0
        assert each.ticket.data_ptr() + 16 <= each.partials.data_ptr()
    # Launches on their way may still use the smaller one.
    (all_of_it,) = kept._scratch.values()
    assert all_of_it == [first, larger]


def test_scratch_is_no_one_elses(streams: list[int]) -> None:
    """Neither another stream's, nor another thread's, nor of another dtype."""
    found = [kept.scratch(CPU, 10, torch.float32), kept.scratch(CPU, 10, torch.float64)]
    other = threading.Thread(target=lambda: found.append(kept.scratch(CPU, 10, torch.float32)))
    other.start()
    other.join()
    streams.append(1)
    found.append(kept.scratch(CPU, 10, torch.float32))
    assert len({each.ticket.data_ptr() for each in found}) == len(found)
    assert len({each.partials.data_ptr() for each in found}) == len(found)
    streams.append(0)
    assert kept.scratch(CPU, 10, torch.float32) is found[0]


def test_memory_is_held_for_the_stream_that_reads_it(
    streams: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table that is let go of isn't another's before a side stream has read it."""
    readers: list[str] = []
    memory: Any = types.SimpleNamespace(record_stream=readers.append)
    monkeypatch.setattr(kept, "capturing", lambda device: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream {streams[-1]}")
    device = torch.device("cuda", 0)
    kept.hold(memory, device)
    streams.append(5)
    kept.hold(memory, device)
    assert readers == ["stream 5"]
