"""Ways 1 and 2 of an ``IMCL`` and the network's own cross entropy: one call for all heads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import functional, validation
from .autograd import ConsistencyOptions
from .imcl_step import IMCLStep

if TYPE_CHECKING:
    from .imcl import IMCL

IGNORED = -100  # target of samples that count for nothing


class HeadsConsistency:
    """All heads of an ``IMCL`` in one call; keeps the options of the latest."""

    def __init__(self) -> None:
        self._options: tuple[tuple, ConsistencyOptions] | None = None

    def __call__(
        self, imcl: IMCL, step: IMCLStep, logits: Tensor, target: Tensor | None, own: bool
    ) -> tuple[Tensor, Tensor]:
        """The loss of ways 1 and 2 and, if ``own``, the network's own cross entropy; the terms
        (2, H), cross entropies and KL of the auxiliary heads, the network's own and the views."""
        blocks = [step.head_logits[i] for i in sorted(step.head_logits)]
        blocks.append(logits)
        if step.views is not None:
            blocks.append(step.views)
        checked = validation.target(target, blocks, IGNORED)
        return functional._consistency(blocks, checked, self._current(imcl, own), imcl.impl)

    def _current(self, imcl: IMCL, own: bool) -> ConsistencyOptions:
        """The options, made again if what they are made of has changed."""
        if torch.compiler.is_compiling():  # a cache would be one more guard
            return _options(imcl, own)
        made_of = _made_of(imcl, own)
        if self._options is None or self._options[0] != made_of:
            self._options = made_of, _options(imcl, own)
        return self._options[1]


def _made_of(imcl: IMCL, own: bool) -> tuple:
    return (
        own,
        imcl.output_weight,
        imcl.multilayer_weight,
        imcl.views,
        imcl.output_temperature,
        imcl.multilayer_temperature,
        imcl.multilayer_teacher,
        imcl.label_smoothing,
    )


def _options(imcl: IMCL, own: bool) -> ConsistencyOptions:
    n, views = len(imcl.heads), imcl.views if imcl.output_weight else 0
    output = imcl.output_weight / imcl.views
    groups = 2 if views else 1
    return functional._consistency_options(
        n + 1 + views,
        ce_weight=[imcl.multilayer_weight / max(n, 1)] * n + [float(own)] + [output] * views,
        kl_weight=[imcl.multilayer_weight / (n + 1)] * (n + 1) + [output] * views,
        groups=[n + 1, views][:groups],
        temperature=[imcl.multilayer_temperature, imcl.output_temperature][:groups],
        teacher=[imcl.multilayer_teacher, "pairwise"][:groups],
        detach_teacher=True,
        label_smoothing=imcl.label_smoothing,
        ignore_index=IGNORED,
        reduction="mean",
    )
