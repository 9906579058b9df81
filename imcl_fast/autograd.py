"""The autograd Functions, one for each operation, the same for every implementation but the
reference.

A forward saves its inputs (which the network keeps anyway) and the small state
of its kernel; the backward is one more kernel, scaled by ``grad_output`` where
that lies. They trace under ``torch.compile`` because the operators they call
have fake kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd import Function

from . import operators
from .algebra import dependence as algebra


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Autocast would round what the losses accumulate; the inputs' dtypes say enough."""
    # Of meta tensors, which have no values to round, PyTorch can't say.
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def _without_grad() -> AbstractContextManager[None]:
    """``no_grad``, which costs as much as an operation, only in a double backward."""
    return torch.no_grad() if torch.is_grad_enabled() else nullcontext()


class PairwisePenalty(Function):
    """apply(implementation, options, *xs) -> loss ()."""

    @staticmethod
    def forward(ctx, *args) -> Tensor:
        # Not named parameters: Dynamo takes as many of them for granted, ctx included.
        implementation, options, *xs = args
        keep = any(ctx.needs_input_grad)
        loss, state = implementation.forward(xs, *options, keep)
        ctx.save_for_backward(*xs, *state)
        ctx.implementation, ctx.options, ctx.layers = implementation, options, len(xs)
        ctx.strides = [x.stride() for x in xs]
        return loss

    @staticmethod
    def backward(ctx, grad: Tensor):
        saved = list(ctx.saved_tensors)
        xs, state = saved[: ctx.layers], saved[ctx.layers :]
        with _without_grad(), without_autocast(grad.device):
            if _lie_otherwise(xs, ctx.strides):
                # The state is in the order that the inputs lay in, and what unpacks them
                # (save_on_cpu with pinned memory) has made contiguous ones.
                _, state = ctx.implementation.forward(xs, *ctx.options, True)
            if _is_several(grad):  # operators have no batching rule, and this is linear in it
                one = xs[0].new_ones((), dtype=grad.dtype)
                dxs = ctx.implementation.backward(one, xs, state, *ctx.options)
                dxs = [(grad * dx).to(dx.dtype) for dx in dxs]
            else:
                dxs = ctx.implementation.backward(grad, xs, state, *ctx.options)
        dxs = _first_order_only(dxs, [grad, *xs])
        return None, None, *_needed(dxs, ctx.needs_input_grad[2:])


class CollaborativeConsistency(Function):
    """apply(implementation, options, target, weight, sample_weight, *logits)
    -> (loss () or of the samples' sizes, terms (2, H)).

    The forward already makes the gradient, in the logits' dtype, while the exponentials are at
    hand; the backward only scales it, in place unless the graph is kept for another, and on a CPU
    by 1 not at all. That of float16 is kept in float32, and rounded after a GradScaler's factor,
    not before.
    """

    @staticmethod
    def forward(ctx, *args) -> tuple[Tensor, Tensor]:
        implementation, options, target, weight, sample_weight, *logits = args
        keep = any(ctx.needs_input_grad)
        loss, terms, gradients = implementation(
            logits, target, weight, sample_weight, *options, keep
        )
        ctx.mark_non_differentiable(terms)
        if not torch.compiler.is_compiling():
            ctx.set_materialize_grads(False)  # a gradient of the terms would be filled with zeros
        ctx.save_for_backward(*logits, *gradients)
        ctx.implementation, ctx.stacks, ctx.unused = implementation, len(logits), [True]
        return loss, terms

    @staticmethod
    def backward(ctx, grad: Tensor | None, _terms):
        if grad is None:  # whoever differentiates the loss has none
            return (None,) * (5 + ctx.stacks)
        saved = ctx.saved_tensors
        logits, gradients = saved[: ctx.stacks], saved[ctx.stacks :]
        # (*samples, 1), or one number: without a dimension a GPU would round it to bfloat16 first,
        # and with one the CPU would make float32 of the gradient.
        scale = grad if grad.dim() == 0 and grad.device.type == "cpu" else grad.unsqueeze(-1)
        scale_ = None
        if _is_last_use(grad):
            scale_ = operators.scaling_of(ctx.implementation)
            _use_up(ctx.unused)
        with _without_grad():
            scaled = [_scaled(g, scale, logits[0].dtype, scale_) for g in gradients]
            dz = _as_stacks(scaled, logits)
        dz = _first_order_only(dz, [grad, *logits])
        return *[None] * 5, *_needed(dz, ctx.needs_input_grad[5:])


class SampleGrams(Function):
    """apply(implementation, scale, *xs) -> Grams (n, B, B) of the samples, centred over them but
    for a shift of all, which nothing made of them sees.

    They come out in float64 where there is one, and so does their gradient come in: what is made
    of them subtracts nearly equal numbers, and they are small.
    """

    @staticmethod
    def forward(ctx, *args) -> Tensor:
        implementation, scale, *xs = args
        grams, means = implementation.forward(xs, scale)
        ctx.save_for_backward(*xs, *means)
        ctx.implementation, ctx.scale, ctx.accumulation = implementation, scale, grams.dtype
        ctx.strides = [x.stride() for x in xs]
        return grams if grams.device.type == "mps" else grams.double()

    @staticmethod
    def backward(ctx, grad: Tensor):
        saved = list(ctx.saved_tensors)
        xs, means = saved[: len(ctx.scale)], saved[len(ctx.scale) :]
        with without_autocast(grad.device), _without_grad():
            s = grad + grad.mT
            s = s - s.mean(-1, keepdim=True)
            s = s - s.mean(-2, keepdim=True)
            if any(factor != 1 for factor in ctx.scale):
                s = torch.stack([f * each for f, each in zip(ctx.scale, s, strict=True)])
            if _lie_otherwise(xs, ctx.strides):  # as of PairwisePenalty's state
                _, means = ctx.implementation.forward(xs, ctx.scale)
            if _is_several(grad):  # operators have no batching rule
                dxs = algebra.products(s.to(ctx.accumulation), xs, algebra.means(xs))
            else:
                dxs = ctx.implementation.backward(s.to(ctx.accumulation), xs, means)
        dxs = _first_order_only(dxs, [grad, *xs])
        return None, None, *_needed(dxs, ctx.needs_input_grad[2:])


def _lie_otherwise(xs: Sequence[Tensor], strides: Sequence[tuple[int, ...]]) -> bool:
    """Whether what was saved has come back in another order, as of save_on_cpu."""
    return [x.stride() for x in xs] != strides


def _use_up(unused: list[bool]) -> None:
    """Of threads that run backward through one graph at once, none of which keeps it, one may write
    to what was saved; to the others PyTorch says the same, if it gets there in time."""
    try:
        unused.pop()  # atomic
    except IndexError:
        raise RuntimeError(
            "Trying to backward through the graph a second time: saved values are freed in the "
            "first backward pass. Pass retain_graph=True to run several"
        ) from None


def _is_several(grad: Tensor) -> bool:
    """Whether it is the gradients of several losses at once, of PyTorch's older vmap
    (is_grads_batched, jacobian(vectorize=True))."""
    return not torch.compiler.is_compiling() and torch._C._functorch.is_legacy_batchedtensor(grad)


def _is_last_use(grad: Tensor) -> bool:
    """Whether the saved tensors die with this backward, so that they may be overwritten."""
    if torch.compiler.is_compiling() or torch._C._functorch.is_batchedtensor(grad):
        return False
    # Of several, and of ones without values, no number can be looked at, and what one of them
    # writes to would be everyone's.
    if type(grad) is not Tensor or _is_several(grad):
        return False
    return not _keeps_graph()


# What PyTorch's own compiler asks before it reuses saved memory; where a release lacks it,
# nothing is overwritten.
_keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def _scaled(
    gradient: Tensor, scale: Tensor, dtype: torch.dtype, scale_: Callable | None
) -> Tensor:
    """gradient * scale, in one pass; by ``scale_`` in the same memory where that is allowed."""
    if gradient.dtype == dtype and scale_ is not None:
        return scale_(gradient, scale)
    return (gradient * scale).to(dtype)


def _as_stacks(gradients: list[Tensor], logits: Sequence[Tensor]) -> Sequence[Tensor]:
    """Gradients shaped like the logits, from one for each or one (H, B, K) of all heads."""
    if len(gradients) == len(logits) and gradients[0].shape == logits[0].shape:
        return gradients
    if all(stack.dim() == 2 for stack in logits):
        return gradients[0].unbind()
    stacked, first, stacks = gradients[0], 0, []
    for z in logits:
        if z.dim() > 2:
            stacks.append(stacked.narrow(0, first, len(z)))
            first += len(z)
        else:
            stacks.append(stacked[first])
            first += 1
    return stacks


class _FirstOrderOnly(Function):
    """Hands gradients through, and says what to do when they are differentiated again."""

    @staticmethod
    def forward(ctx, count: int, *tensors: Tensor):
        return tuple(tensor.view_as(tensor) for tensor in tensors[:count])

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            "imcl_fast: the fused losses can be differentiated once only; for double "
            'backward (create_graph=True) pass impl="reference"'
        )


def _first_order_only(gradients, sources):
    """Tie the gradients to what they depend on, so that a double backward is an error."""
    if not torch.is_grad_enabled() or not any(s.requires_grad for s in sources):
        return gradients
    return _FirstOrderOnly.apply(len(gradients), *gradients, *sources)


def _needed(gradients, needs):
    return (g if need else None for g, need in zip(gradients, needs, strict=True))
