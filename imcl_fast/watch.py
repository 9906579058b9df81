"""The ways around a forward pass that is not ``IMCL``'s own: see ``IMCL.watch``."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .imcl_output import IMCLOutput
from .imcl_step import IMCLStep
from .taps import Tape


class Watched(Protocol):
    """What a ``Watch`` asks of an ``IMCL``, which lies above it."""

    _tape: Tape

    def _begin(self, token_mask: Tensor | None = None) -> IMCLStep: ...

    def _end(self, step: IMCLStep) -> None: ...

    def _objective(self, step: IMCLStep, target: Any, task: bool = True) -> IMCLOutput: ...


class Watch:
    """What ``IMCL.watch`` gives: the ways of the one forward pass inside a ``with`` block."""

    def __init__(self, imcl: Watched, token_mask: Tensor | None) -> None:
        self._imcl, self._token_mask = imcl, token_mask
        self._step: IMCLStep | None = None
        self._over = False
        self._output: IMCLOutput | None = None

    def __enter__(self) -> Watch:
        if self._step is not None:
            raise RuntimeError("watch: each block needs a watch of its own, imcl.watch()")
        self._step = self._imcl._begin(self._token_mask)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        assert self._step is not None
        self._imcl._tape.step = None
        if kind is not None:
            return
        runs = len(self._step.outputs)
        if runs != 1:
            raise RuntimeError(
                f"watch: expected one forward pass of the model in the block, got {runs}; call the "
                "model that IMCL was built around (imcl.model) once, with the whole batch; after "
                "remove_hooks none is seen"
            )
        self._imcl._end(self._step)
        self._over = True

    def loss(self, target: Tensor | None = None) -> Tensor:
        """All that the ways add to a loss, weighted: everything but the network's own task loss.

        Args:
            target: as ``IMCL``'s, of the heads' and views' cross entropies; None leaves these out.

        Raises:
            RuntimeError: the block has not been left, or was left by an exception.
            ValueError, TypeError: ``target`` is wrong.
        """
        if not self._over or self._step is None:
            raise RuntimeError(
                "watch: expected loss() after the block, when the model has run, not within or "
                "before it"
            )
        self._output = self._imcl._objective(self._step, target, task=False)
        return self._output.loss

    @property
    def terms(self) -> dict[str, Tensor]:
        """The parts of ``loss``, as ``IMCLOutput.terms``."""
        if self._output is None:
            raise RuntimeError("watch: expected terms to be read after loss(), which computes them")
        return self._output.terms


def ran(model: nn.Module, tape: Tape) -> list[RemovableHandle]:
    """Hooks of the whole model that hand what it gets and returns to the step under way."""
    return [
        model.register_forward_pre_hook(_Runs(tape), with_kwargs=True),
        model.register_forward_hook(_Ran(tape)),
    ]


class _Runs:
    def __init__(self, tape: Tape) -> None:
        self.tape = tape

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self.tape.step is not None:
            self.tape.step.keywords = kwargs
            if not torch.compiler.is_compiling():
                self.tape.step.begins()


class _Ran:
    def __init__(self, tape: Tape) -> None:
        self.tape = tape

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        if self.tape.step is not None:
            self.tape.step.outputs.append(output)


def zero(model: nn.Module) -> Tensor:
    """What no way adds, on the network's device."""
    parameter = next(model.parameters(), None)
    device = None if parameter is None else parameter.device
    # As any loss, to call backward() on.
    return torch.zeros((), device=device, requires_grad=torch.is_grad_enabled())
