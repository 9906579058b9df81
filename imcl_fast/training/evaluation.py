"""What a network makes of images: its predictions and its cross entropy."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import outputs
from ..modes import evaluating


@torch.no_grad()
def predict(
    network: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    autocast: contextlib.AbstractContextManager | None = None,
) -> tuple[Tensor, Tensor]:
    """The predicted class (N,) int64 of every image, and the sum () of the cross entropies.

    The network runs in eval mode, as it would when deployed, and is left as it was. It alone runs
    within ``autocast``: what makes the images, here as in training, doesn't.
    """
    autocast = autocast or contextlib.nullcontext()
    predictions, total = [], torch.zeros((), dtype=torch.float64)
    with evaluating(network):
        for images, labels in batches:
            with autocast:
                logits = outputs.logits(network(images))
            logits = logits.float()
            predictions.append(logits.argmax(1))
            loss = F.cross_entropy(logits, labels, reduction="sum")
            total = total.to(logits.device) + loss.double()
    empty = torch.zeros(0, dtype=torch.int64, device=total.device)
    return torch.cat([empty, *predictions]), total
