"""Loads the compiled extension and tells PyTorch the shapes its operators return.

``csrc/registration.cpp`` registers the operators as ``torch.ops.imcl_fast.*``;
their fake kernels stand here, beside the load. ``pairwise`` and ``consistency``
are None where the extension isn't there, and ``LOAD_ERROR`` says why.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from .algebra.consistency import REDUCE_NONE
from .algebra.pairwise import SIGNED, is_dual

STATS_PER_HEAD = 6  # csrc/cpu/consistency.h: what the backward needs of a sample and head
LIBRARY = Path(__file__).with_name("_operators.so")


class Operation(NamedTuple):
    """One implementation of one operation."""

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
pairwise: Operation | None = None
consistency: Operation | None = None


def _accumulation_dtype(xs: Sequence[Tensor]) -> torch.dtype:
    return torch.float64 if any(x.dtype == torch.float64 for x in xs) else torch.float32


def _pairwise_forward(xs, penalty, center, eps, batched, precision, keep):
    state = []
    for x in xs if keep else []:
        matrices, n = (x.shape[0], x.shape[1]) if batched else (1, x.shape[0])
        d = x.numel() // max(matrices * n, 1)
        if penalty == SIGNED:
            size = d + n
        else:
            size = d * d + n if is_dual(penalty, n, d) else n * n
        size += n if center else 0
        state.append(x.new_empty((matrices, size), dtype=_accumulation_dtype([x])))
    return xs[0].new_empty((), dtype=_accumulation_dtype(xs)), state


def _pairwise_backward(grad, xs, state, penalty, center, eps, batched, precision):
    return [torch.empty_like(x) for x in xs]


def _consistency_forward(
    logits, target, ce_weight, kl_weight, groups, temperature, teacher, detach,
    label_smoothing, ignore_index, reduction,
):
    dtype = _accumulation_dtype(logits)
    heads, batch = len(ce_weight), logits[0].shape[-2]
    loss = logits[0].new_empty((batch,) if reduction == REDUCE_NONE else (), dtype=dtype)
    terms = logits[0].new_empty((2, heads), dtype=dtype)
    return loss, terms, logits[0].new_empty((batch, heads, STATS_PER_HEAD), dtype=dtype)


def _consistency_backward(grad, logits, target, stats, *_):
    return [torch.empty_like(block) for block in logits]


if build_info is not None:
    torch.library.register_fake("imcl_fast::pairwise_forward")(_pairwise_forward)
    torch.library.register_fake("imcl_fast::pairwise_backward")(_pairwise_backward)
    torch.library.register_fake("imcl_fast::consistency_forward")(_consistency_forward)
    torch.library.register_fake("imcl_fast::consistency_backward")(_consistency_backward)
    _ops = torch.ops.imcl_fast
    pairwise = Operation(_ops.pairwise_forward.default, _ops.pairwise_backward.default)
    consistency = Operation(_ops.consistency_forward.default, _ops.consistency_backward.default)
