"""A GPU that isn't there: what torch.cuda says of one, and Triton's launches recorded.

The launchers run as they are; the values come from the algebra.
"""

from __future__ import annotations

import collections
import contextlib
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from bench import rows
from imcl_fast import implementations
from imcl_fast.algebra import consistency as algebra_consistency
from imcl_fast.algebra import dependence as algebra_dependence
from imcl_fast.algebra import pairwise as algebra_pairwise
from imcl_fast.kernels import config, consistency, dependence, kept, launch, pairwise

PROCESSORS = 132
EVERY = os.environ.get("IMCL_FAST_TEST_ALL") == "1"
FEW = (  # rows: one of each kind
    "kernel R18 bfloat16", "representation R18 bfloat16 channels_last",
    "representation R18 float32 centred", "consistency 5 x 4 x 10 float32",
    "dependence 3 x R18, batch 64 float32",
)  # fmt: skip
KEYS: collections.Counter[str] = collections.Counter()  # launches of each kernel compiled
capturing = False


def key(kernel: Any, args: tuple, options: dict[str, Any]) -> str:
    """What Triton compiles a kernel anew for."""
    values = {**dict(zip(kernel.arg_names, args, strict=False)), **options}
    parts: list[object] = [kernel.__name__]
    for parameter in kernel.params:
        value = values[parameter.name]
        if parameter.is_constexpr:
            parts.append(repr(value))
        else:
            parts.append(specialised(value, not parameter.do_not_specialize))
    build = {k: options[k] for k in ("num_warps", "num_stages", "maxnreg") if k in options}
    return repr((*parts, build))


def specialised(value: Any, by_value: bool) -> object:
    if isinstance(value, torch.Tensor):
        return str(value.dtype), value.data_ptr() % 16 == 0
    if isinstance(value, tuple):
        return tuple(specialised(v, by_value) for v in value)
    if isinstance(value, int) and not isinstance(value, bool):
        kind = "i32" if -(2**31) <= value < 2**31 else "i64"
        if not by_value:
            return kind
        return 1 if value == 1 else (kind, value % 16 == 0)
    return type(value).__name__ if isinstance(value, float) else value


def _record(launched: launch.Launch, *args: Any) -> None:
    KEYS[key(launched.kernel, args, launched.options)] += 1


def few_rows(of: Callable[[], list[rows.Row]] = rows.gpu_rows) -> list[rows.Row]:
    """What is walked through in place of all rows."""
    return [row for row in of() if EVERY or row.name in FEW]


@contextlib.contextmanager
def _unseen() -> Iterator[None]:
    """The algebra may copy and fill what a kernel doesn't."""
    global capturing
    before, capturing = capturing, False
    try:
        with _disable_current_modes():
            yield
    finally:
        capturing = before


# The launchers' own results, of the shapes that a GPU would leave, with the algebra's values.
_launch_forward, _launch_backward = pairwise.forward, pairwise.backward
_launch_consistency = consistency.forward
_launch_grams, _launch_products = dependence.forward, dependence.backward


def _forward(xs, *options):
    _, state = _launch_forward(xs, *options)
    with _unseen():
        return algebra_pairwise.forward(xs, *options)[0], state


def _backward(grad, xs, state, *options):
    _launch_backward(grad, xs, state, *options)
    with _unseen():
        _, mine = algebra_pairwise.forward(xs, *options, True)
        return algebra_pairwise.backward(grad, xs, mine, *options)


def _consistency(*arguments):
    *_, gradients = _launch_consistency(*arguments)
    with _unseen():
        loss, terms, values = algebra_consistency.forward(*arguments)
    if len(gradients) == len(values):
        return loss, terms, values
    heads = [v if v.dim() == 3 else v.unsqueeze(0) for v in values]
    return loss, terms, [torch.cat(heads).to(g.dtype) for g in gradients]


def _grams(xs, scale):
    _, means = _launch_grams(xs, scale)
    with _unseen():
        return algebra_dependence.gram_forward(xs, scale)[0], means


def _products(s, xs, means):
    _launch_products(s, xs, means)
    with _unseen():
        _, mine = algebra_dependence.gram_forward(xs, [1.0] * len(xs))
        return algebra_dependence.gram_backward(s, xs, mine)


def _why_not_triton(device: str, dtypes=()) -> str | None:
    if device not in ("cpu", "cuda"):
        return f"it runs on CUDA, ROCm and XPU tensors, and these are on {device}"
    if torch.float64 in dtypes:
        return "its kernels take float64 under TRITON_INTERPRET=1 only"
    return None


class Device:
    type = "cuda"


def record_launches() -> None:
    """impl="triton" takes CPU tensors from now on, and refuses what it refuses on a GPU."""
    chosen = config.consistency_config
    consistency.consistency_config = lambda *sizes: chosen(*sizes[:-1], Device)
    sizes_of = config.dependence_config
    dependence.dependence_config = lambda *sizes: sizes_of(*sizes[:-1], Device)
    config.processors_of = lambda device: PROCESSORS
    launch.Launch.__call__ = _record
    kept.capturing = lambda device: capturing
    implementations._why_not_triton = _why_not_triton
    implementations._why_not_cuda = lambda device: "there is no GPU for it"
    pairwise.forward, pairwise.backward = _forward, _backward
    consistency.forward = _consistency
    dependence.forward, dependence.backward = _grams, _products


# ---- torch.cuda ------------------------------------------------------------------------


class _NoCopies(TorchFunctionMode):
    """What copies numbers to the device while capturing is an error."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if capturing and function is torch.tensor:
            raise RuntimeError(
                "Cannot copy between CPU and CUDA tensors during CUDA graph capture unless the "
                "CPU tensor is pinned."
            )
        return function(*args, **(kwargs or {}))


class _Event:
    def __init__(self, **_: Any) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: _Event) -> float:
        return 1e3 * (end.at - self.at)


class _Stream:
    def wait_stream(self, other: object) -> None: ...


class _Graph:
    def replay(self) -> None: ...


@contextlib.contextmanager
def _capture(graph: object) -> Iterator[None]:
    global capturing
    capturing = True
    try:
        yield
    finally:
        capturing = False


def pretend_cuda() -> None:
    """torch.cuda is there, and works on the CPU."""
    _NoCopies().__enter__()
    torch.compile = lambda function: function  # the compiler asks the driver itself
    torch.compiler.reset = lambda: None  # of which even that takes a second to import
    for name, value in {
        "is_available": lambda: True, "Event": _Event, "Stream": _Stream,
        "current_stream": lambda *_: _Stream(), "stream": lambda _: contextlib.nullcontext(),
        "CUDAGraph": _Graph, "graph": _capture, "synchronize": lambda *_: None,
    }.items():  # fmt: skip
        setattr(torch.cuda, name, value)
