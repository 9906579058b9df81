"""Adversarial weight perturbation: gradients taken where the weights do worst."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from . import validation
from .dense_outputs import share_memory
from .dtypes import accumulation
from .imcl import IMCL


class Perturbation:
    r"""A step's gradients at adversarially perturbed weights (AWP, arXiv 2004.05884).

    ::

        optimizer.zero_grad()
        with Perturbation(network, 0.004) as perturbation:
            loss(batch).backward()  # the way up, from the weights as they are
            perturbation.move()
            loss(batch).backward()  # the gradients to learn from
        optimizer.step()

    ``move`` adds to each weight w of two or more dimensions :math:`\gamma |w| g/|g|`, where g is
    its gradient and the norms are over the whole of it; other parameters, and those whose gradient
    is 0, missing or not finite, stay. On leaving the block, by an exception too, the weights are
    the very bits that they were, and ``.grad`` holds what was computed after ``move``, added to
    what it held before the block.

    Buffers (the statistics of batch normalisation) are as the passes before ``move`` left them:
    those after it change nothing. Before and after it there may be as many passes as are
    accumulated, under autocast and with scaled losses, too. Weights are copied once.

    Args:
        model: whose weights are perturbed.
        gamma: at least 0, the length of the step in units of each weight's norm.
        ways: an ``IMCL`` whose calls these are: those after ``move`` are of the same turns of its
            schedule as those before. None takes those that ``model`` is or has.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
        RuntimeError: on leaving the block without one ``move``, or on a second.
    """

    def __init__(self, model: nn.Module, gamma: float, ways: IMCL | None = None) -> None:
        validation.module("model", model)
        self.gamma = validation.number("gamma", gamma, low=0, high=math.inf)
        self._model = model
        self._ways = [ways] if ways is not None else _ways_in(model)
        # Of each parameter the gradient there was, and what it held: DistributedDataParallel may
        # have it in a bucket that it writes to.
        self._gradients: list[tuple[nn.Parameter, Tensor | None, Tensor | None]] = []
        self._weights: list[tuple[nn.Parameter, Tensor]] = []
        self._buffers: list[tuple[nn.Module, str, Tensor | None, Tensor | None]] = []
        self._turns: list[Tensor] = []
        self._moved = False
        self._learns = False  # since the gradients of the way up have been cleared

    def __enter__(self) -> Perturbation:
        if self._gradients:
            raise RuntimeError("Perturbation: each block needs one of its own")
        modules = [self._model, *self._ways]
        parameters = dict.fromkeys(p for module in modules for p in module.parameters())
        self._gradients = [
            (p, p.grad, None if p.grad is None else p.grad.clone()) for p in parameters
        ]
        for parameter in parameters:
            parameter.grad = None
        self._turns = [ways.get_extra_state() for ways in self._ways]
        return self

    @torch.no_grad()
    def move(self) -> None:
        """Perturb the weights along the gradients there are, and clear these."""
        if self._moved:
            raise RuntimeError("Perturbation: expected one move() in the block, got a second")
        self._moved = True
        for parameter in self._model.parameters():
            if parameter.grad is not None and parameter.dim() > 1:
                self._weights.append((parameter, parameter.clone()))
                parameter.add_(_step(parameter, parameter.grad, self.gamma))
        self._buffers = [
            (module, name, buffer, None if buffer is None else buffer.clone())
            for module in self._model.modules()
            for name, buffer in module._buffers.items()
        ]
        for parameter, *_ in self._gradients:
            parameter.grad = None
        self._learns = True
        for ways, turn in zip(self._ways, self._turns, strict=True):
            ways.set_extra_state(turn)
            ways._heads_move.passes_over(ways.model.parameters())
        torch.clear_autocast_cache()  # of the weights as they were

    @torch.no_grad()
    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for weight, was in self._weights:
            weight.copy_(was)
        for module, name, buffer, value in self._buffers:
            if buffer is not None and value is not None and not _overlaps(buffer):
                buffer.copy_(value)
            module._buffers[name] = buffer  # which a module may have put another in place of
        self._weights, self._buffers = [], []
        for ways in self._ways:
            ways._heads_move.passes_over(ways.model.parameters())
        torch.clear_autocast_cache()
        for parameter, before, held in self._gradients:
            if not self._learns:  # an exception on the way up, of which nothing is to stay
                parameter.grad = None
            if before is None or held is None:
                continue
            new = parameter.grad
            if new is not None and share_memory(new, before):
                new.add_(held)
                continue
            before.copy_(held)
            parameter.grad = before if new is None else before.add_(new)
        if kind is None and not self._moved:
            raise RuntimeError(
                "Perturbation: expected a move() in the block, between the backward pass that "
                "finds the way and the one to learn from, got none"
            )


def _ways_in(model: nn.Module) -> list[IMCL]:
    return [module for module in model.modules() if isinstance(module, IMCL)]


def _overlaps(x: Tensor) -> bool:
    """Whether a buffer is expanded, which nothing can write to."""
    return any(n > 1 and stride == 0 for n, stride in zip(x.shape, x.stride(), strict=True))


def _step(weight: Tensor, grad: Tensor, gamma: float) -> Tensor:
    """Where a loss rises, gamma of the weight's norm away; no way is known without waiting."""
    grad = grad.to_dense() if grad.layout != torch.strided else grad  # of an embedding, perhaps
    # Half types have norms beyond their range.
    wide = accumulation(weight.dtype)
    size, slope = (torch.linalg.vector_norm(x, dtype=wide) for x in (weight, grad))
    scale = gamma * size / slope
    # Not a product with 0: 0 times infinity is NaN.
    return torch.where(scale.isfinite() & (scale > 0), grad * scale, 0).to(weight.dtype)
