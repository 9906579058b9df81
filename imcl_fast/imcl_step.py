"""What one training call of an ``IMCL`` collects while its network runs."""

from __future__ import annotations

import warnings
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import Function

from . import calls, kernel_weights, padding
from .imcl_state import IMCLState
from .outputs import Padding
from .schedule import Turn
from .taps import Step

EPS = 1e-12  # of the similarities


class _Joined(Function):
    """The logits and those of the views, whose backward passes begin together.

    FSDP2 gathers the weights of a unit again when a gradient reaches what the unit returned. The
    views were computed beside that, and their backward pass, as the later one, would come first.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, views: Tensor) -> tuple[Tensor, Tensor]:
        return logits.clone(), views.view_as(views)  # FSDP2 wants no views

    @staticmethod
    def backward(ctx, logits: Tensor, views: Tensor) -> tuple[Tensor, Tensor]:
        return logits, views


class IMCLStep(Step):
    """See the module; the work on a layer is done when its features exist."""

    def __init__(self, imcl: IMCLState, turn: Turn, counts: bool) -> None:
        super().__init__()
        self.imcl = imcl
        self.turn = turn
        self.counts = counts  # on the schedule
        self.mask: Tensor | None = None
        self.kernel: Tensor | None = None
        # Those to be compared when the network has run, or where those were that have been before.
        self.kernels: kernel_weights.Weights | None = None
        self.compared: tuple[kernel_weights.Weights, list[Tensor]] = {}, []
        self.similar = bool(imcl.representation_weight and turn.representation)
        self.similarities: list[Tensor] = []
        self.head_logits: dict[int, Tensor] = {}
        self.views: Tensor | None = None
        self.sharded = False  # whether FSDP2 has the classifier's weight

    @property
    def padding(self) -> Padding:
        return Padding.of(self.keywords)

    def begins(self) -> None:
        """The network is about to run: other parameters may have taken their places since, those
        of torch.func.functional_call."""
        where, weights = self.compared
        if any(a is not b for a, b in zip(kernel_weights.parameters(where), weights, strict=True)):
            self.kernel = cast(Any, self.imcl)._kernel_similarity(where, self.turn)

    def instead_of(self, output: Any) -> Any:
        if not self.sharded or self.views is None or not isinstance(output, Tensor):
            return None
        output, self.views = _Joined.apply(output, self.views)
        return output

    def take(self, layer: int | None, module: nn.Module, features: Tensor) -> None:
        if layer is None:
            self._classifier_finished(module, features)
        else:
            self._layer_finished(layer, features)

    def _layer_finished(self, index: int, features: Tensor) -> None:
        """The penalty and the auxiliary head of a layer, as soon as its features exist.

        They are in cache now; and since autograd runs backward in reverse order, the
        penalty's gradient will be made when the backward pass reaches this layer, where
        the layer's own is due, and not all layers' at once at the start.
        """
        imcl = self.imcl
        mask = self._mask(index, features)
        if self.similar:
            seen = features if mask is None else padding.neutral(features, mask, imcl.center)
            kind = calls.PENALTIES.index(imcl.representation_penalty)
            self.similarities.append(
                calls.pairwise([seen], kind, imcl.center, EPS, True, imcl.impl)
            )
        if index in imcl._head_of:
            self.head_logits[index] = imcl.heads[imcl._head_of[index]](features, mask)

    def _mask(self, index: int, features: Tensor) -> Tensor | None:
        """Which positions of a layer count, (B, 1, *spatial); None: all of them."""
        path = self.imcl.layers[index]
        found = self.padding.of_layer(path)
        if self.mask is None and found[0] is None:
            return None
        shape = (len(features), *features.shape[2:])
        for mask, name in ((self.mask, "token_mask"), found):
            if isinstance(mask, Tensor):
                if tuple(mask.shape) == shape:
                    return padding.broadcast(mask, features)
                told = (
                    f"{name}: expected shape {shape}, a value for each position of the layer "
                    f"{path!r}, got {tuple(mask.shape)}"
                )
                if mask is self.mask:
                    raise ValueError(told)
                if not (self.imcl._told_of_mask or torch.compiler.is_compiling()):
                    self.imcl._told_of_mask = True
                    warnings.warn(
                        f"{told}; its padding counts. A mask that fits is passed as token_mask",
                        stacklevel=2,
                    )
                return None
        return None

    def _classifier_finished(self, classifier: nn.Module, features: Tensor) -> None:
        """The dropout views, (V, B, K), or as dense logits, by one more run of the classifier."""
        imcl = self.imcl
        if imcl.output_weight:
            views = features.expand(imcl.views, *features.shape)  # [V, B, F], or dense
            views = torch.dropout(views, imcl.dropout, imcl.training)
            # Not a call of the module, which would run this very hook again, unless that sleeps
            # and FSDP2's hooks have to gather the weight.
            run = classifier if self.over and self.sharded else classifier.forward
            logits = run(views.flatten(0, 1))
            self.views = logits.view(imcl.views, len(features), *logits.shape[1:])
