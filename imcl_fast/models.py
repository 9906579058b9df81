"""The networks that this package trains itself; ``IMCL`` takes any other as well."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import nn

# Kept alive: the operators a library defines go with it.
_stand_ins: list[torch.library.Library] = []


def resnet18(classes: int, *, width: int = 64, channels: int = 3) -> nn.Module:
    """torchvision's ResNet-18 for small images, at any width.

    Its stem is that of the CIFAR networks of arXiv 1512.03385 (a 3x3 convolution, no
    pooling); the stages ``layer1`` to ``layer4`` have ``width`` times 1, 2, 4 and 8
    channels, and halve the resolution from ``layer2`` on.

    Args:
        classes: outputs of the classifier ``fc``, at least 1.
        width: channels of ``layer1``; torchvision's own is 64.
        channels: of the input images.

    Raises:
        ImportError: torchvision isn't installed.
        ValueError: a number is less than 1.
    """
    for name, value in (("classes", classes), ("width", width), ("channels", channels)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected an int of at least 1, got {value!r}")
    resnet = import_torchvision().models.resnet
    network = resnet.resnet18()
    network.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
    network.bn1 = nn.BatchNorm2d(width)
    network.maxpool = nn.Identity()
    network.inplanes = width  # what _make_layer takes as the channels that come in
    for stage in range(4):
        layer = network._make_layer(
            resnet.BasicBlock, width * 2**stage, blocks=2, stride=1 if stage == 0 else 2
        )
        setattr(network, f"layer{stage + 1}", layer)
    network.fc = nn.Linear(8 * width, classes)
    for module in network.modules():  # torchvision's own initialisation, of the new layers too
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return network


def import_torchvision() -> ModuleType:
    """torchvision, also where its compiled operators don't match the torch installed.

    A torchvision from the package index beside a CPU-only torch fails to import because
    it describes operators that weren't loaded. Its networks need none of them.
    """
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _stand_ins.append(library)
        import torchvision
    except ImportError as error:
        raise ImportError(
            "the ResNet comes with torchvision, which isn't installed: install the version "
            "that belongs to your torch, for example pip install torchvision==0.28.0 beside "
            "torch 2.13.0"
        ) from error
    return torchvision
