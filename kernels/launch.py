"""The one place from which kernels are launched, so that launches can be counted."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
from triton import knobs
from triton.runtime import driver

from .constants import Constants
from .numerics import IEEE, TF32, TF32X2, TF32X3

_KNOWN = ("3.6.", "3.7.")  # of Triton, where a compiled kernel is launched as below


class Launch:
    """A launch of a kernel that is repeated with other tensors: all of it but its arguments.

    Triton compiles a kernel anew for other dtypes, for an integer that is 1, and for pointers and
    integers that are multiples of 16 or aren't. Who keeps a Launch sees to it that all this stays,
    so the code of the first time is that of every time, and its own launcher takes it: in a tenth
    of the time in which Triton finds it again.
    """

    def __init__(self, kernel, programs: int, device: torch.device, **options) -> None:
        """``options``: C, the last of the kernel's parameters, and the compiler's."""
        if device.type == "xpu":
            options.pop("maxnreg", None)  # NVIDIA's compiler alone knows it
        elif torch.version.hip:
            options = for_amd(options)
        self.kernel, self.programs, self.device, self.options = kernel, programs, device, options
        # For AMD's GPUs the code also depends on how large a tensor's memory is.
        self._keeps = (
            device.type != "xpu" and not torch.version.hip and triton.__version__.startswith(_KNOWN)
        )
        # Of torch, where there can be several devices of that type.
        self._module = getattr(torch, device.type) if device.type in ("cuda", "xpu") else None
        self._again: Callable[[tuple], None] | None = None

    def __call__(self, *args) -> None:
        """Launch with these arguments, the kernel's but for C, on the device's current stream."""
        module = self._module
        if module is None or self.device.index == module.current_device():
            self._launch(args)
        else:
            with module.device(self.device):
                self._launch(args)

    def _launch(self, args: tuple) -> None:
        if self._again is not None and not _is_watched(self.kernel):
            self._again(args)
            return
        compiled = self.kernel[(self.programs,)](*args, **self.options)
        if self._keeps and compiled is not None and not _is_watched(self.kernel):
            self._again = self._launcher_of(compiled)

    def _launcher_of(self, compiled: Any) -> Callable[[tuple], None]:
        run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
        programs, index, constants = self.programs, self.device.index, self.options["C"]
        hooks = None, None, None

        def again(args: tuple) -> None:
            stream = driver.active.get_current_stream(index)
            run(programs, 1, 1, stream, function, metadata, *hooks, *args, constants)

        return again


def _is_watched(kernel: Any) -> bool:
    """Whether Triton has more to do with a launch than to launch: a profiler or a debugger."""
    runtime = knobs.runtime
    return bool(
        kernel.pre_run_hooks
        or _calls(runtime.launch_enter_hook)
        or _calls(runtime.launch_exit_hook)
        or runtime.debug
        or knobs.compilation.instrumentation_mode
        or getattr(runtime, "add_stages_inspection_hook", None)
    )


def _calls(hook: Any) -> Any:
    """What a chain of hooks calls, or a hook that stands alone."""
    return getattr(hook, "calls", hook)


def for_amd(options: dict[str, Any]) -> dict[str, Any]:
    """The options of a launch as Triton takes them for AMD's GPUs.

    Their compiler has no register limit, and most of them no TensorFloat-32; their matrix
    cores multiply float32 as it is.
    """
    options = {name: value for name, value in options.items() if name != "maxnreg"}
    return {**options, "C": _without_tensor_float(options["C"])}


@functools.lru_cache(maxsize=256)
def _without_tensor_float(constants: Constants) -> Constants:
    products = {name: getattr(constants, name) for name in constants.PRODUCTS}
    return dataclasses.replace(
        constants,
        **{name: IEEE for name, value in products.items() if value in (TF32, TF32X2, TF32X3)},
    )
