"""What a call of Triton's kernels costs on the host, without a GPU.

    python -m bench.gpu.host

measures the calls of impl="triton" on tensors of the CPU, small ones, for their size is nothing to
the host. Plans, Triton and its launchers are those that a GPU has; under them is a libcuda that
does nothing (bench/driver/libcuda.c, which is compiled here). What is missing is the CUDA driver's
own time for a launch, and the memory is the C library's. What is too much: the labels of a
consistency are looked at, which no GPU waits for.

A call's time is what a tenth of the calls take less than. Beside it stands what PyTorch needs for
an autograd Function that takes the same tensors, does nothing, and makes gradients like them.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.utils._python_dispatch import TorchDispatchMode

from .. import render
from ..shapes import R18_FEATURES, resnet18_weights

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "bench/driver/libcuda.c"
PROCESSORS = 132  # of an H100, for which kernels are planned and compiled
CAPABILITY = 90
CALLS, WARM_UP = 400, 20


class Row(NamedTuple):
    name: str
    inputs: list[Tensor]
    loss: Callable[[], Tensor]


def rows() -> list[Row]:
    """The calls of a training step: way 3, way 4, and ways 1 and 2 together."""
    from imcl_fast import functional as F

    features = [
        torch.randn(2, *shape[1:]).bfloat16().contiguous(memory_format=torch.channels_last)
        for shape in R18_FEATURES
    ]
    weights = [torch.randn(n // 8, 4, *kernel) for n, _, *kernel in resnet18_weights()]
    heads = [torch.randn(8, 100).bfloat16() for _ in range(5)]
    labels = torch.randint(0, 100, (8,))
    for x in (*features, *weights, *heads):
        x.requires_grad_()
    options: dict[str, Any] = {"center": True, "impl": "triton"}
    return [
        Row("representation of one layer", features[:1],
            lambda: F.representation_similarity(features[0], **options)),
        Row("representation of four layers", features,
            lambda: F.representation_similarity(features, **options)),
        Row("kernels of 20 layers", weights, lambda: F.kernel_similarity(weights, impl="triton")),
        Row("consistency of 5 heads", heads,
            lambda: F.collaborative_consistency(heads, labels, impl="triton")),
    ]  # fmt: skip


class Nothing(Function):
    """Of the same tensors; what no implementation can do without."""

    @staticmethod
    def forward(ctx, *xs: Tensor) -> Tensor:
        ctx.save_for_backward(*xs)
        return torch.empty(())

    @staticmethod
    def backward(ctx, grad: Tensor):
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors)


def pretend() -> None:
    """Triton has a GPU, whose memory is the CPU's."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import driver as nvidia
    from triton.runtime import driver

    from imcl_fast import implementations
    from imcl_fast.kernels import config, consistency

    class Driver:
        utils, launcher_cls = nvidia.CudaUtils(), nvidia.CudaLauncher

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", CAPABILITY, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, _: int | None) -> int:
            return 0

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

    class Device:
        type = "cuda"

    driver.set_active(Driver())
    sizes_of = config.consistency_config
    consistency.consistency_config = lambda *sizes: sizes_of(*sizes[:-1], Device)
    config.processors_of = lambda device: PROCESSORS
    implementations._why_not_triton = lambda *_: None


class Made(TorchDispatchMode):
    """What makes or fills tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if any(word in name for word in ("empty", "zero", "full", "fill", "ones")):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


def measured(calls: int) -> list[dict[str, Any]]:
    """Of each row microseconds, and what its second call does."""
    from triton.runtime import JITFunction

    library = ctypes.CDLL("libcuda.so.1")
    launches = ctypes.c_long.in_dll(library, "launches")
    pretend()
    torch.set_num_threads(1)
    one = torch.ones(())
    found_by_triton, run = 0, JITFunction.run

    def counted(*args: Any, **options: Any) -> Any:
        nonlocal found_by_triton
        found_by_triton += 1
        return run(*args, **options)

    found = []
    for row in rows():
        def both(loss: Callable[[], Tensor], xs: Sequence[Tensor] = row.inputs) -> None:
            torch.autograd.grad(loss(), xs, one)

        def nothing(xs: Sequence[Tensor] = row.inputs) -> Tensor:
            return Nothing.apply(*xs)

        both(row.loss)
        JITFunction.run = counted
        before, found_by_triton = launches.value, 0
        with Made() as made:
            both(row.loss)
        JITFunction.run = run
        counts = {"launches": launches.value - before, "found by Triton": found_by_triton,
                  "made": made.names}  # fmt: skip
        times = {
            "forward": microseconds(row.loss, calls),
            "both": microseconds(lambda loss=row.loss: both(loss), calls),
            "nothing, forward": microseconds(nothing, calls),
            "nothing, both": microseconds(lambda: both(nothing), calls),
        }
        found.append({"name": row.name, **times, **counts})
    return found


def microseconds(call: Callable[[], object], calls: int) -> float:
    for _ in range(WARM_UP):
        call()
    times = []
    for _ in range(calls):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return 1e6 * sorted(times)[len(times) // 10]


def over_nothing(calls: int = CALLS) -> list[dict[str, Any]]:
    """``measured`` in a process that finds that libcuda."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "libcuda.so.1")
        subprocess.run(
            [os.environ.get("CC", "cc"), "-shared", "-fPIC", "-O1", f"-Wl,-soname,{library.name}",
             SOURCE, "-o", library], check=True,
        )  # fmt: skip
        environment = {name: value for name, value in os.environ.items()
                       if name not in ("TRITON_INTERPRET", "IMCL_FAST_AUTOTUNE")}  # fmt: skip
        environment |= {
            "LD_LIBRARY_PATH": os.pathsep.join(
                filter(None, [folder, os.environ.get("LD_LIBRARY_PATH")])
            ),
            "TRITON_LIBCUDA_PATH": folder,
        }
        said = subprocess.run(
            [sys.executable, "-m", "bench.gpu.host", str(calls)],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
        return json.loads(said.stdout)


def table(found: Sequence[dict[str, Any]]) -> str:
    head = ["us a call", "forward", "of nothing", "with backward", "of nothing"]
    columns = ("forward", "nothing, forward", "both", "nothing, both")
    return render.table(head, [[row["name"], *(f"{row[c]:.0f}" for c in columns)]
                               for row in found])  # fmt: skip


if __name__ == "__main__":
    if len(sys.argv) > 1:  # the process below
        print(json.dumps(measured(int(sys.argv[1]))))
    else:
        print(table(over_nothing()), end="")
