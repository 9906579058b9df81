"""K labels that hold or not, each by itself: as many samples of two classes.

sigmoid(z) is the first of softmax(z, 0). So the logits (B, K) of labels are those of B K samples,
of a second class whose logit is 0 and is nowhere: they are views (B, K, 1), and the operators are
told that they are binary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .algebra.consistency import REDUCE_MEAN, REDUCE_NONE
from .schemas import ConsistencyOptions


def as_samples(
    logits: Sequence[Tensor],
    target: Tensor | None,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    options: ConsistencyOptions,
) -> tuple:
    """Options, target (*samples, K, 2), no weight of the classes, sample weight
    (*samples, K) and logits (h, *samples, K, 1)."""
    if target is not None:
        target = target * (1 - options.label_smoothing) + options.label_smoothing / 2
        target = torch.stack([target, 1 - target], -1)
        if weight is not None:
            target = target * weight.unsqueeze(-1)
    if sample_weight is not None:
        labels = logits[0].shape[-1]
        sample_weight = sample_weight.unsqueeze(-1).expand(*sample_weight.shape, labels)
    stacks = [(z if z.dim() > 2 else z.unsqueeze(0)).unsqueeze(-1) for z in logits]
    return options._replace(label_smoothing=0.0), target, None, sample_weight, *stacks


def of_samples(
    loss: Tensor, terms: Tensor, labels: int, reduction: int
) -> tuple[Tensor, Tensor]:
    """Loss and terms summed over the labels, from the operator's."""
    if reduction == REDUCE_NONE:
        return loss.sum(-1), terms * labels
    if reduction == REDUCE_MEAN:
        return loss * labels, terms * labels
    return loss, terms
