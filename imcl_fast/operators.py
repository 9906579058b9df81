"""Loads the compiled extension and tells PyTorch the shapes its operators return.

``csrc/registration.cpp`` registers the operators as ``torch.ops.imcl_fast.*``;
their fake kernels stand here, beside the load. ``pairwise`` and ``consistency``
are None where the extension isn't there, and ``LOAD_ERROR`` says why.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from .algebra.consistency import REDUCE_NONE
from .algebra.pairwise import SIGNED, is_dual

LIBRARY = Path(__file__).with_name("_operators.so")


class Pairwise(NamedTuple):
    """One implementation of the pairwise penalty; one of the consistency is a function."""

    forward: Callable
    backward: Callable


def _load() -> tuple[ModuleType | None, str]:
    if not LIBRARY.exists():
        return None, "the compiled extension isn't there: it was not built when installing"
    try:
        torch.ops.load_library(LIBRARY)
        from . import _build_info  # type: ignore[attr-defined]
    except (ImportError, OSError) as error:
        return None, f"the compiled extension doesn't load: {error}"
    return _build_info, ""


build_info, LOAD_ERROR = _load()
pairwise: Pairwise | None = None
consistency: Callable | None = None


def _accumulation_dtype(xs: Sequence[Tensor]) -> torch.dtype:
    return torch.float64 if any(x.dtype == torch.float64 for x in xs) else torch.float32


def _pairwise_forward(xs, penalty, center, eps, batched, precision, keep):
    state = []
    for x in xs if keep else []:
        matrices, n = (x.shape[0], x.shape[1]) if batched else (1, x.shape[0])
        d = math.prod(x.shape[2 if batched else 1 :])
        means = n if center else 0
        if penalty == SIGNED:
            size = d + n + means
        elif is_dual(penalty, n, d):
            size = d * d + n + means
        else:
            size = n * n + means
        state.append(x.new_empty((matrices, size), dtype=_accumulation_dtype([x])))
    return xs[0].new_empty((), dtype=_accumulation_dtype(xs)), state


def _pairwise_backward(grad, xs, state, penalty, center, eps, batched, precision):
    return [torch.empty_like(x) for x in xs]


def _consistency(logits, target, ce_weight, *options):
    *_, reduction, keep = options
    dtype = _accumulation_dtype(logits)
    size = (logits[0].shape[-2],) if reduction == REDUCE_NONE else ()
    loss = logits[0].new_empty(size, dtype=dtype)
    terms = logits[0].new_empty((2, len(ce_weight)), dtype=dtype)
    if keep and all(block.is_contiguous() for block in logits):
        gradients = [logits[0].new_empty((len(ce_weight), *logits[0].shape[-2:]), dtype=dtype)]
    else:
        gradients = [torch.empty_like(block, dtype=dtype) for block in logits if keep]
    return loss, terms, gradients


if build_info is not None:
    torch.library.register_fake("imcl_fast::pairwise_forward")(_pairwise_forward)
    torch.library.register_fake("imcl_fast::pairwise_backward")(_pairwise_backward)
    torch.library.register_fake("imcl_fast::consistency")(_consistency)
    pairwise = Pairwise(
        torch.ops.imcl_fast.pairwise_forward.default,
        torch.ops.imcl_fast.pairwise_backward.default,
    )
    consistency = torch.ops.imcl_fast.consistency.default
