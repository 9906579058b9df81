"""Batches whose images and labels are mixed with those of others: MixUp and CutMix."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from .. import validation
from .augmentation import seeded, transforms


class Mixing:
    """torchvision's MixUp (arXiv 1710.09412) and CutMix (arXiv 1905.04899) of whole batches.

    Args:
        mixup, cutmix: alpha of Beta(alpha, alpha), which the shares are drawn from; None leaves it
            out, and of both each batch has one or the other, at equal odds.
        classes: of the labels.

    Raises:
        ImportError: torchvision isn't installed.
        TypeError, ValueError: a number is outside its range.
    """

    def __init__(self, mixup: float | None, cutmix: float | None, classes: int) -> None:
        v2 = transforms()
        kinds: list[Any] = []
        for name, alpha, kind in (("mixup", mixup, v2.MixUp), ("cutmix", cutmix, v2.CutMix)):
            if alpha is not None:
                alpha = validation.number(name, alpha, low=0, high=math.inf, open_low=True)
                kinds.append(kind(alpha=alpha, num_classes=classes))
        self._transform = v2.RandomChoice(kinds)

    def __call__(self, images: Tensor, labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W), floating, and labels (B,) -> images, and labels' shares (B, K)
        float32, on their device. What is drawn depends on ``seed`` alone."""
        with seeded(seed):
            return self._transform(images, labels)
