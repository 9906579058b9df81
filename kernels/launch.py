"""The one place from which kernels are launched, so that launches can be counted."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch

from .constants import Constants
from .numerics import IEEE, TF32, TF32X2, TF32X3


def launch(kernel, programs: int, device: torch.device, *args, **options) -> None:
    """Run ``programs`` programs of a Triton kernel on the device of its tensors."""
    if device.type == "xpu":
        options.pop("maxnreg", None)  # NVIDIA's compiler alone knows it
    elif torch.version.hip:
        options = for_amd(options)
    if device.type == "cpu":  # under TRITON_INTERPRET=1
        kernel[(programs,)](*args, **options)
        return
    module = torch.get_device_module(device)
    if device.index == module.current_device():
        kernel[(programs,)](*args, **options)
    else:
        with module.device(device):
            kernel[(programs,)](*args, **options)


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
