"""Which implementations exist, which can run here, and which one ``impl="auto"`` takes."""

from __future__ import annotations

import functools
import os
import shutil
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import operators, tracing
from .algebra import consistency as algebra_consistency
from .algebra import dependence as algebra_dependence
from .algebra import pairwise as algebra_pairwise

IMPLEMENTATIONS = ("auto", "cpp", "triton", "cuda", "torch", "reference")

# What ``impl="auto"`` tries in turn on tensors of a GPU, the faster one first, for each
# operation. "cuda" isn't among them: on the first GPU its backward pass crashed (docs/gpu.md).
GPU_PREFERENCE = {
    "pairwise": ("triton",),
    "consistency": ("triton",),
    "dependence": ("triton",),
}
TRITON_VERSION = (3, 6)  # the oldest that takes tuples of tensors as the kernels pass them

_PAIRWISE = {
    "cpp": operators.pairwise,
    "cuda": operators.pairwise,  # one operator, the device chooses
    "triton": operators.triton_pairwise,
    "torch": operators.Pairwise(algebra_pairwise.forward, algebra_pairwise.backward),
}
_CONSISTENCY = {
    "cpp": operators.consistency,
    "cuda": operators.consistency,
    "triton": operators.triton_consistency,
    "torch": algebra_consistency.forward,
}

_DEPENDENCE = {
    "cpp": operators.gram,
    "cuda": operators.gram,
    "triton": operators.triton_gram,
    "torch": operators.Gram(algebra_dependence.gram_forward, algebra_dependence.gram_backward),
}


def why_not(
    impl: str,
    device: str,
    dtypes: Sequence[torch.dtype] = (),
    index: int | None = None,
) -> str | None:
    """Why ``impl`` can't run on tensors of that device type, or None where it can.

    ``index`` is that of the device among those of its type; None is the current one.
    """
    if impl in ("torch", "reference"):
        return None
    if impl == "cpp":
        if device != "cpu":
            return f"it runs on CPU tensors only, and these are on {device}"
        return operators.LOAD_ERROR or None
    if impl == "triton":
        return _why_not_triton(device, dtypes)
    if impl == "cuda":
        reason = _why_not_cuda(device)
        if reason is not None or device != "cuda":
            return reason
        return _why_not_capability(torch.cuda.current_device() if index is None else index)
    raise ValueError(f"impl: expected one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}")


def _why_not_triton(device: str, dtypes: Sequence[torch.dtype]) -> str | None:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device == "cpu" and not interpreted:
        return "it runs on CPU tensors only under TRITON_INTERPRET=1, for tests"
    if device not in ("cpu", "cuda", "xpu"):
        return f"it runs on CUDA, ROCm and XPU tensors, and these are on {device}"
    if torch.float64 in dtypes and not interpreted:
        return "its kernels take float64 under TRITON_INTERPRET=1 only"
    reason = _why_not_triton_version()
    if reason is None and interpreted:
        return _why_not_interpreter()
    return _why_not_c_compiler() if reason is None and device == "cuda" else reason


@functools.cache
def _why_not_interpreter() -> str | None:
    found, numpy = _triton_version() or "", version("numpy")
    if _numbers(found) >= (3, 7) or _numbers(numpy) < (2, 4):
        return None
    return (
        f"the interpreter of Triton {found} doesn't run with NumPy {numpy}; "
        "`pip install 'triton>=3.7'`, or 'numpy<2.4'"
    )


@functools.cache
@tracing.constant
def _why_not_c_compiler() -> str | None:
    # Where Triton looks for the one that makes what launches a kernel.
    if os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"):
        return None
    return (
        "Triton needs a C compiler to launch its kernels, and there is no gcc or clang; install "
        "one, or set CC"
    )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


@functools.cache
def _triton_version() -> str | None:
    for name in ("triton", "pytorch-triton", "pytorch-triton-rocm", "pytorch-triton-xpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


@functools.cache
def _why_not_triton_version() -> str | None:
    found = _triton_version()
    wanted = ".".join(map(str, TRITON_VERSION))
    if found is None:
        return f"Triton is not installed; `pip install 'triton>={wanted}'`"
    if _numbers(found) < TRITON_VERSION:
        return f"it needs Triton {wanted} or later, and {found} is installed"
    return None


def _why_not_cuda(device: str) -> str | None:
    if operators.build_info is None:
        return operators.LOAD_ERROR
    if not operators.build_info.cuda_architectures():
        return (
            "the compiled extension was built without CUDA kernels; build it again where "
            "nvcc is found, with IMCL_FAST_BUILD=cuda"
        )
    if device != "cuda" or torch.version.hip:
        where = "an AMD GPU" if torch.version.hip else device
        return f"it runs on tensors of an NVIDIA GPU only, and these are on {where}"
    return None


@functools.cache
def _why_not_capability(index: int) -> str | None:
    assert operators.build_info is not None
    major, minor = torch.cuda.get_device_capability(index)
    built = operators.build_info.cuda_architectures().split(";")
    sources = list(filter(None, operators.build_info.cuda_ptx().split(";")))
    if any(_runs(name, major, minor) for name in built):
        return None
    # The driver compiles PTX for what is newer, but for that of one architecture's own.
    if any(name.isdigit() and int(name) <= 10 * major + minor for name in sources):
        return None
    return (
        f"the compiled extension holds kernels for sm_{', sm_'.join(built)}, and this GPU is "
        f"sm_{major}{minor}; build it again with TORCH_CUDA_ARCH_LIST={major}.{minor}"
    )


def _runs(name: str, major: int, minor: int) -> bool:
    """Whether machine code made for ``name``, 80 or 90a, runs on a GPU: within its major version,
    and of one architecture's own ("a") on that alone."""
    number = int(name.rstrip("af"))
    if number // 10 != major:
        return False
    return number % 10 == minor if name.endswith("a") else number % 10 <= minor


def choose(
    impl: str, operation: str, device: torch.device, dtypes: Sequence[torch.dtype] = ()
) -> str:
    """The implementation of ``"pairwise"``, ``"consistency"`` or ``"dependence"`` to run on such
    tensors: the one asked for, or the fastest there is.

    Raises:
        ValueError: ``impl`` is not the name of an implementation.
        RuntimeError: the implementation asked for can't run, and why.
    """
    if _transformed():
        if impl not in ("auto", "reference"):
            raise RuntimeError(
                f'impl="{impl}" can\'t run under torch.func (grad, vmap, jvp and the like) or '
                'torch.autograd.forward_ad; pass impl="auto", which is the reference there'
            )
        return "reference"
    if impl == "auto":
        if device.type == "meta":  # there is nothing to compute
            return "torch"
        return _fastest(operation, device.type, dtypes, device.index)
    reason = why_not(impl, device.type, dtypes, device.index)
    if reason is not None:
        raise RuntimeError(
            f'impl="{impl}" can\'t run: {reason}. Use impl="auto"; '
            "`python -m imcl_fast.env` prints what can run here"
        )
    return impl


@tracing.constant
def _transformed() -> bool:
    """Whether torch.func is at work, also while its transform is compiled, or forward_ad."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


@tracing.constant
def _fastest(
    operation: str, device: str, dtypes: Sequence[torch.dtype], index: int | None
) -> str:
    candidates = ("cpp",) if device == "cpu" else GPU_PREFERENCE[operation]
    reasons = []
    for name in candidates:
        reason = why_not(name, device, dtypes, index)
        if reason is None:
            return name
        reasons.append(f"{name}: {reason}")
    if not torch.compiler.is_compiling():
        _warn_fallback(device, "; ".join(reasons))
    return "torch"


def as_they_lie(tensors: Sequence[Any]) -> list[Any]:
    """Tensors whose memory holds their values, for Triton's launchers, which PyTorch's dispatcher
    doesn't see: of the imaginary part of a conjugate it holds the negative ones."""
    if torch.compiler.is_compiling():  # operators are called, as they are of any compiled code
        return list(tensors)
    return [x.resolve_neg() if isinstance(x, Tensor) else x for x in tensors]


def pairwise(impl: str) -> operators.Pairwise:
    """The pairwise penalty under a chosen implementation other than ``reference``."""
    implementation = _PAIRWISE[impl]
    assert implementation is not None  # choose() has seen that it can run
    return implementation


def consistency(impl: str) -> Callable:
    """The consistency under a chosen implementation other than ``reference``."""
    implementation = _CONSISTENCY[impl]
    assert implementation is not None
    return implementation


def dependence(impl: str) -> operators.Gram:
    """The Grams of samples under a chosen implementation other than ``reference``."""
    implementation = _DEPENDENCE[impl]
    assert implementation is not None
    return implementation


@functools.cache
def _warn_fallback(device: str, reasons: str) -> None:
    warnings.warn(
        f"imcl_fast: no fused kernel for these {device} tensors ({reasons}); "
        'falling back to impl="torch", which is slower',
        RuntimeWarning,
        stacklevel=5,
    )
