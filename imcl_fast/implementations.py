"""Which implementations exist, which can run here, and which one ``impl="auto"`` takes."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import torch

from . import operators
from .algebra import consistency as algebra_consistency
from .algebra import pairwise as algebra_pairwise

IMPLEMENTATIONS = ("auto", "cpp", "triton", "cuda", "torch", "reference")

_ALGEBRA_PAIRWISE = operators.Pairwise(algebra_pairwise.forward, algebra_pairwise.backward)


def why_not(impl: str, device: str) -> str | None:
    """Why ``impl`` can't run on tensors of that device type, or None where it can."""
    if impl in ("torch", "reference"):
        return None
    if impl == "cpp":
        if device != "cpu":
            return f"it runs on CPU tensors only, and these are on {device}"
        return operators.LOAD_ERROR or None
    if impl in ("triton", "cuda"):
        return "this version of imcl_fast has no GPU kernels yet"
    raise ValueError(f"impl: expected one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}")


def choose(impl: str, device: torch.device) -> str:
    """The implementation to run: the one asked for, or the fastest there is.

    Raises:
        ValueError: ``impl`` is not the name of an implementation.
        RuntimeError: the implementation asked for can't run, and why.
    """
    if impl == "auto":
        if device.type == "cpu" and operators.build_info is not None:
            return "cpp"
        if not torch.compiler.is_compiling():
            _warn_fallback(device.type)
        return "torch"
    reason = why_not(impl, device.type)
    if reason is not None:
        raise RuntimeError(
            f'impl="{impl}" can\'t run: {reason}. Use impl="auto"; '
            "`python -m imcl_fast.env` prints what can run here"
        )
    return impl


def pairwise(impl: str) -> operators.Pairwise:
    """The pairwise penalty under a chosen implementation other than ``reference``."""
    return operators.pairwise if impl == "cpp" and operators.pairwise else _ALGEBRA_PAIRWISE


def consistency(impl: str) -> Callable:
    """The consistency under a chosen implementation other than ``reference``."""
    if impl == "cpp" and operators.consistency:
        return operators.consistency
    return algebra_consistency.forward


@functools.cache
def _warn_fallback(device: str) -> None:
    reason = why_not("cpp" if device == "cpu" else "triton", device)
    warnings.warn(
        f"imcl_fast: no fused kernel for {device} tensors ({reason}); "
        'falling back to impl="torch", which is slower',
        RuntimeWarning,
        stacklevel=4,
    )
