"""Shapes of the feature maps and weights of the networks measured."""

from __future__ import annotations

from functools import cache

import torch
from torch import nn

from imcl_fast.models import import_torchvision

Shapes = tuple[tuple[int, ...], ...]

# What IMCL takes by default: the last block of each resolution. 32x32 images, then 224x224.
R18_FEATURES: Shapes = (
    (128, 64, 32, 32), (128, 128, 16, 16), (128, 256, 8, 8), (128, 512, 4, 4),
)  # fmt: skip
VGG16_FEATURES: Shapes = (
    (128, 64, 32, 32), (128, 128, 16, 16), (128, 256, 8, 8), (128, 512, 4, 4), (128, 512, 2, 2),
)  # fmt: skip
R50_FEATURES: Shapes = ((8, 256, 56, 56), (8, 512, 28, 28), (8, 1024, 14, 14), (8, 2048, 7, 7))
CONVNEXT_FEATURES: Shapes = ((8, 96, 56, 56), (8, 192, 28, 28), (8, 384, 14, 14), (8, 768, 7, 7))


def resnet18_weights() -> Shapes:
    """The 20 convolutions of a ResNet-18 with the CIFAR stem, also where there's no torchvision."""
    shapes: list[tuple[int, ...]] = [(64, 3, 3, 3)]
    channels = 64
    for width in (64, 128, 256, 512):
        for block in range(2):
            shapes += [(width, channels, 3, 3), (width, width, 3, 3)]
            if block == 0 and width != channels:
                shapes.append((width, channels, 1, 1))
            channels = width
    return tuple(shapes)


@cache
def weights(name: str) -> Shapes:
    """Those of the convolutions of a network of torchvision's."""
    with torch.device("meta"):
        network: nn.Module = import_torchvision().models.get_model(name, weights=None)
    return tuple(tuple(m.weight.shape) for m in network.modules() if isinstance(m, nn.Conv2d))
