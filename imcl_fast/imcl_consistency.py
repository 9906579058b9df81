"""Ways 1 and 2 of an ``IMCL`` and the network's own cross entropy: one call for all heads."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from . import calls, validation
from .dtypes import widest
from .imcl_state import IMCLState
from .imcl_step import IMCLStep
from .schemas import ConsistencyOptions


class HeadsConsistency:
    """All heads of an ``IMCL`` in one call; keeps the options of the latest."""

    def __init__(self) -> None:
        self._options: tuple[tuple, ConsistencyOptions] | None = None

    def __call__(
        self, imcl: IMCLState, step: IMCLStep, logits: Tensor, target: Tensor | None, own: bool
    ) -> tuple[Tensor, Tensor]:
        """The loss of ways 1 and 2 and, if ``own``, the network's own cross entropy; the terms
        (2, H), cross entropies and KL of the auxiliary heads, the network's own and the views."""
        heads = [step.head_logits[i] for i in sorted(step.head_logits)]
        options = self._current(imcl, len(heads), own, _ignored(imcl, target))
        masks = step.mask, step.padding.of_logits
        return _call(imcl, heads, logits, step.views, target, masks, options)

    def own(
        self, imcl: IMCLState, logits: Tensor, target: Tensor, masks: tuple[Any, Any]
    ) -> tuple[Tensor, Tensor]:
        """The network's own cross entropy alone, and the terms (2, 1)."""
        options = calls.consistency_options(
            1, ce_weight=1.0, kl_weight=0.0, groups=None, temperature=1.0, teacher="others",
            detach_teacher=True, label_smoothing=imcl.label_smoothing,
            ignore_index=_ignored(imcl, target), reduction="mean", binary=_binary(imcl),
        )  # fmt: skip
        return _call(imcl, [], logits, None, target, masks, options)

    def _current(self, imcl: IMCLState, n: int, own: bool, ignored: int) -> ConsistencyOptions:
        """The options, made again if what they are made of has changed."""
        if torch.compiler.is_compiling():  # a cache would be one more guard
            return _options(imcl, n, own, ignored)
        made_of = n, *_made_of(imcl, own, ignored)
        if self._options is None or self._options[0] != made_of:
            self._options = made_of, _options(imcl, n, own, ignored)
        return self._options[1]


def _call(
    imcl: IMCLState,
    heads: list[Tensor],
    logits: Tensor,
    views: Tensor | None,
    target: Any,
    masks: tuple[Any, Any],
    options: ConsistencyOptions,
) -> tuple[Tensor, Tensor]:
    if imcl._no_logits:
        raise ValueError(f"{imcl._no_logits}; or pass criterion=, the loss that it is meant for")
    stacks = [*heads, logits] if views is None else [*heads, logits, views]
    weight = None
    if imcl.class_dim is not None:
        _check_target(logits, target, imcl.class_dim)
        stacks = _classes_last(imcl, heads, logits, views)
        weight = _weight(imcl, masks, stacks)
        if imcl.class_dim == 1 and isinstance(target, Tensor) and target.is_floating_point():
            target = target.movedim(1, -1)
    checked = validation.target(target, stacks, options.ignore_index, options.binary)
    return calls.consistency(stacks, checked, options, imcl.impl, sample_weight=weight)


def _classes_last(
    imcl: IMCLState, heads: list[Tensor], logits: Tensor, views: Tensor | None
) -> list[Tensor]:
    """Dense logits as (h, B, *samples, K), all as large as the network's own."""
    dim = cast(int, imcl.class_dim)
    own = logits.movedim(dim, 1)
    size = own.shape[2:]
    stacks = [imcl._resize(head, size).movedim(1, -1).unsqueeze(0) for head in heads]
    stacks.append(own.movedim(1, -1).unsqueeze(0))
    if views is not None:
        maps = imcl._resize(views.flatten(0, 1).movedim(imcl._resize.class_dim, 1), size)
        stacks.append(maps.movedim(1, -1).unflatten(0, views.shape[:2]))
    return stacks


def _weight(imcl: IMCLState, masks: tuple[Any, Any], stacks: list[Tensor]) -> Tensor | None:
    """1 for the tokens, or pixels, that a mask of their shape says count, 0 for others; None:
    all do.

    Raises:
        ValueError: the first mask, which the user gave, is of no shape that anything has.
    """
    samples = stacks[0].shape[1:-1]
    own = masks[0]
    # Layers, which are not asked in eval mode, may have other positions than the logits.
    if own is not None and own.shape != samples and not (
        imcl.layers and own.dim() > 1 and len(own) == samples[0]
    ):  # fmt: skip
        raise ValueError(
            f"token_mask: expected shape {tuple(samples)}, a value for each position of the "
            f"logits, got {tuple(own.shape)}"
        )
    for mask in masks:
        if isinstance(mask, Tensor) and mask.shape == samples:
            return (mask != 0).to(widest(stacks))
    return None


def _check_target(logits: Tensor, target: Any, class_dim: int) -> None:
    if not isinstance(target, Tensor):
        return
    samples = {1: logits.shape[:1] + logits.shape[2:], -1: logits.shape[:-1]}
    if target.shape == (logits.shape if target.is_floating_point() else samples[class_dim]):
        return
    hint, found = "", target.shape
    if found == samples[-class_dim]:
        hint = f"; if the classes are there, pass class_dim={-class_dim}"
    elif class_dim == 1 and len(found) == len(samples[1]) and found[:1] == samples[1][:1]:
        hint = (
            "; logits smaller than the labels are resized with logits=lambda output: "
            "torch.nn.functional.interpolate(output.logits, size)"
        )
    raise ValueError(
        f"target: expected class indices {tuple(samples[class_dim])}, or probabilities "
        f"{tuple(logits.shape)} of a floating dtype, for logits {tuple(logits.shape)} with the "
        f"classes in dimension {class_dim}, got shape {tuple(found)} of {target.dtype}{hint}"
    )


def _ignored(imcl: IMCLState, target: Any) -> int:
    """Probabilities know no ignored class, and a negative number is none."""
    soft = isinstance(target, Tensor) and target.is_floating_point()
    return validation.IGNORED if soft else imcl.ignore_index


def _made_of(imcl: IMCLState, own: bool, ignored: int) -> tuple:
    return (
        own,
        ignored,
        imcl.output_weight,
        imcl.multilayer_weight,
        imcl.views,
        imcl.output_temperature,
        imcl.multilayer_temperature,
        imcl.multilayer_teacher,
        imcl.label_smoothing,
        imcl.activation,
    )


def _options(imcl: IMCLState, n: int, own: bool, ignored: int) -> ConsistencyOptions:
    """Of ``n`` auxiliary heads, without which there is no way 2."""
    views = imcl.views if imcl.output_weight else 0
    output = imcl.output_weight / imcl.views
    multilayer = imcl.multilayer_weight if n else 0.0
    groups = 2 if views else 1
    return calls.consistency_options(
        n + 1 + views,
        ce_weight=[multilayer / max(n, 1)] * n + [float(own)] + [output] * views,
        kl_weight=[multilayer / (n + 1)] * (n + 1) + [output] * views,
        groups=[n + 1, views][:groups],
        temperature=[imcl.multilayer_temperature, imcl.output_temperature][:groups],
        teacher=[imcl.multilayer_teacher, "pairwise"][:groups],
        detach_teacher=True,
        label_smoothing=imcl.label_smoothing,
        ignore_index=ignored,
        reduction="mean",
        binary=_binary(imcl),
    )


def _binary(imcl: IMCLState) -> bool:
    return imcl.activation == "sigmoid"
