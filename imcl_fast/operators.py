"""Loads the compiled extension and tells PyTorch the shapes its operators return.

``csrc/registration.cpp`` registers the operators as ``torch.ops.imcl_fast.*``;
their fake kernels stand here, beside the load. ``pairwise``, ``consistency`` and ``gram``
are None where the extension isn't there, and ``LOAD_ERROR`` says why. The Triton
kernels are operators too, ``torch.ops.imcl_fast.triton_*``, for ``torch.compile``
only: eager code calls their launchers, which is quicker than the dispatcher.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from . import dense
from .algebra.consistency import REDUCE_NONE
from .algebra.pairwise import SIGNED, is_dual
from .build_facts import BUILT, BuildFacts
from .dtypes import accumulation, kept, widest
from .kernels.dependence_plan import means_size
from .kernels.plan import state_size
from .schemas import LAYOUT, SCHEMAS

LIBRARY = Path(__file__).with_name("_operators.so")


class Pairwise(NamedTuple):
    """One implementation of the pairwise penalty; one of the consistency is a function."""

    forward: Callable
    backward: Callable


class Gram(NamedTuple):
    """One implementation of the Grams of samples."""

    forward: Callable
    backward: Callable


def _load() -> tuple[ModuleType | BuildFacts | None, str]:
    if not LIBRARY.exists():
        return None, "the compiled extension isn't there: it was not built when installing"
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        return None, f"the compiled extension doesn't load: {error}"
    if not all(hasattr(getattr(torch.ops.imcl_fast, name, None), LAYOUT) for name in SCHEMAS):
        return None, (
            "the compiled extension is of another version than the Python code: build it again, "
            "or install the package again"
        )
    facts = BuildFacts(LIBRARY)
    try:
        from . import _build_info  # type: ignore[attr-defined]
    except ImportError:  # a wheel for every Python
        return facts, ""
    # In a checkout it may be of an earlier build than the library, which another Python shares.
    of_one_build = all(
        getattr(_build_info, name)() == getattr(facts, name)() for name in BUILT
    )
    return _build_info if of_one_build else facts, ""


build_info, LOAD_ERROR = _load()
pairwise: Pairwise | None = None
consistency: Callable | None = None
gram: Gram | None = None


def _matrices(x, batched):
    """Number of matrices, rows and columns."""
    matrices, n = (x.shape[0], x.shape[1]) if batched else (1, x.shape[0])
    return matrices, n, math.prod(x.shape[2 if batched else 1 :])


def _by_dtype(xs: Sequence[Tensor], sizes: Iterable[int]) -> list[Tensor]:
    """A tensor of so many elements in all for each dtype of xs, in order of appearance."""
    total: dict[torch.dtype, int] = {}
    for x, size in zip(xs, sizes, strict=True):
        total[x.dtype] = total.get(x.dtype, 0) + size
    return [
        xs[0].new_empty(size, dtype=accumulation(dtype))
        for dtype, size in total.items()
    ]


def _gpu_pairwise_forward(xs, penalty, center, eps, batched, precision, keep):
    sizes = (
        matrices * state_size(penalty, center, n, d)
        for matrices, n, d in (_matrices(x, batched) for x in xs)
    )
    state = _by_dtype(xs, sizes) if keep else []
    return xs[0].new_empty((), dtype=widest(xs)), state


def _symmetric_size(n):
    """As of csrc/cpu/symmetric.h: what of n by n numbers the CPU keeps."""
    first = n // 16 * 16
    return first // 2 * (2 * n - first + 16) + (n - first) ** 2


def _pairwise_forward(xs, penalty, center, eps, batched, precision, keep):
    if xs[0].device.type != "cpu":
        return _gpu_pairwise_forward(xs, penalty, center, eps, batched, precision, keep)
    sizes: dict[torch.dtype, int] = {}  # as States of csrc/cpu/operators.cpp lays them out
    for x in xs if keep else []:
        matrices, n, d = _matrices(x, batched)
        means = 2 * n if center else 0
        if penalty == SIGNED:
            size = d + n + means
        elif is_dual(penalty, n, d):
            size = _symmetric_size(d) + n + means
        elif n > d:  # in tiles
            size = n + means
        else:
            size = _symmetric_size(n) + means
        dtype = accumulation(x.dtype)
        sizes[dtype] = sizes.get(dtype, 0) + (matrices * size + 15) // 16 * 16
    state = [xs[0].new_empty(size, dtype=dtype) for dtype, size in sizes.items()]
    return xs[0].new_empty((), dtype=widest(xs)), state


def _pairwise_backward(grad, xs, state, penalty, center, eps, batched, precision):
    return [torch.empty_like(x) for x in xs]


def _consistency(logits, target, weight, sample_weight, ce_weight, *options):
    *_, reduction, keep = options
    dtype, of_gradients = widest(logits), kept(logits[0].dtype)
    size = dense.samples(logits[0]) if reduction == REDUCE_NONE else ()
    loss = logits[0].new_empty(size, dtype=dtype)
    terms = logits[0].new_empty((2, len(ce_weight)), dtype=dtype)
    if keep and all(stack.is_contiguous() for stack in logits):
        shape = (len(ce_weight), *dense.samples(logits[0]), logits[0].shape[-1])
        gradients = [logits[0].new_empty(shape, dtype=of_gradients)]
    else:
        gradients = [torch.empty_like(stack, dtype=of_gradients) for stack in logits if keep]
    return loss, terms, gradients


def _gram_forward(xs, scale):
    if xs[0].device.type != "cpu":
        return _gpu_gram_forward(xs, scale)
    batch, dtype = xs[0].shape[0], widest(xs)
    means = [x.new_empty((math.prod(x.shape[1:]),), dtype=dtype) for x in xs]
    return xs[0].new_empty((len(xs), batch, batch), dtype=dtype), means


def _gpu_gram_forward(xs, scale):
    means = _by_dtype(xs, (means_size(math.prod(x.shape[1:])) for x in xs))
    batch = xs[0].shape[0]
    return xs[0].new_empty((len(xs), batch, batch), dtype=widest(xs)), means


def _gram_backward(s, xs, means):
    return [torch.empty_like(x) for x in xs]


def overload(name: str) -> Callable:
    """The registered operator of the present layout."""
    return getattr(getattr(torch.ops.imcl_fast, name), LAYOUT)


def _registered(name: str, fake: Callable) -> Callable:
    torch.library.register_fake(f"imcl_fast::{name}.{LAYOUT}")(fake)
    return overload(name)


if build_info is not None:
    pairwise = Pairwise(
        _registered("pairwise", _pairwise_forward),
        _registered("pairwise_backward", _pairwise_backward),
    )
    consistency = _registered("consistency", _consistency)
    gram = Gram(
        _registered("gram_forward", _gram_forward), _registered("gram_backward", _gram_backward)
    )


def _launcher(module: str, name: str) -> Callable:
    """A launcher of kernels/, imported when first called: importing Triton takes a second."""

    def launch(*args):
        return getattr(import_module(f".kernels.{module}", __package__), name)(*args)

    return launch


_triton_scale_ = _launcher("scaling", "scale_")
_triton = torch.library.Library("imcl_fast", "FRAGMENT")


def _as_operator(operation: str, launch: Callable, fake: Callable) -> Callable:
    """The launcher itself, or its operator while ``torch.compile`` traces."""
    name = f"triton_{operation}"
    full_name = f"{name}.{LAYOUT}"
    _triton.define(full_name + SCHEMAS[operation])
    _triton.impl(full_name, launch, "CompositeExplicitAutograd")
    torch.library.register_fake(f"imcl_fast::{full_name}", lib=_triton)(fake)
    operator = overload(name)

    def call(*args):
        return (operator if torch.compiler.is_compiling() else launch)(*args)

    return call


triton_pairwise = Pairwise(
    _as_operator("pairwise", _launcher("pairwise", "forward"), _gpu_pairwise_forward),
    _as_operator("pairwise_backward", _launcher("pairwise", "backward"), _pairwise_backward),
)
triton_consistency = _as_operator("consistency", _launcher("consistency", "forward"), _consistency)
triton_gram = Gram(
    _as_operator("gram_forward", _launcher("dependence", "forward"), _gpu_gram_forward),
    _as_operator("gram_backward", _launcher("dependence", "backward"), _gram_backward),
)


def scaling_of(consistency: Callable) -> Callable:
    """What multiplies the gradients of an implementation of the consistency where they lie."""
    return _triton_scale_ if consistency is triton_consistency else _scale_


def _scale_(gradient: Tensor, scale: Tensor) -> Tensor:
    # Where the number lies in the host's memory, looking at it waits for no device.
    if scale.device.type == "cpu" and scale.dim() == 0 and scale.item() == 1:
        return gradient
    return gradient.mul_(scale)
