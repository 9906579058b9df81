"""Networks of training steps that ``imcl_fast.models`` has not: a transformer, and one for maps."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from imcl_fast import models

PATCH = 4
HEAD = 32  # channels of an attention head


def vit(classes: int, width: int, size: int) -> nn.Module:
    """torchvision's vision transformer, of six blocks, on patches of 4x4 pixels."""
    transformer: Any = models.import_torchvision().models.VisionTransformer
    return transformer(
        image_size=size, patch_size=PATCH, num_layers=6, num_heads=max(width // HEAD, 1),
        hidden_dim=width, mlp_dim=4 * width, num_classes=classes,
    )  # fmt: skip


class FCN(nn.Module):
    """A ResNet-18 without its pooling, a 1x1 convolution, and interpolation (arXiv 1411.4038)."""

    def __init__(self, classes: int, width: int, size: int) -> None:
        super().__init__()
        trunk = models.build("resnet18", classes, width=width, image_size=size)
        children = OrderedDict(trunk.named_children())
        for name in ("avgpool", "fc"):
            del children[name]
        self.trunk = nn.Sequential(children)
        self.classifier = nn.Conv2d(8 * width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(self.classifier(self.trunk(x)), x.shape[2:], mode="bilinear")


NETWORKS = {"vit": vit, "fcn_resnet18": FCN}
DENSE = ("fcn_resnet18",)  # whose labels are those of pixels
