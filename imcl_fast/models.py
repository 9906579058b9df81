"""The networks that this package trains itself; ``IMCL`` takes any other as well."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import torch
from torch import nn

from . import validation

# Kept alive: the operators a library defines go with it.
_stand_ins: list[torch.library.Library] = []

RESNETS = {
    "resnet18": ("BasicBlock", (2, 2, 2, 2)),
    "resnet34": ("BasicBlock", (3, 4, 6, 3)),
    "resnet50": ("Bottleneck", (3, 4, 6, 3)),
}
VGG16 = ((1, 1), (2, 2), (4, 4, 4), (8, 8, 8), (8, 8, 8))  # channels over width, by stage
NAMES = (*RESNETS, "vgg16_bn")

SMALL = 64  # images below this many pixels get a stem that keeps their resolution
SMALLEST = 8


def build(
    name: str,
    classes: int,
    *,
    channels: int = 3,
    image_size: int = 32,
    width: int | None = None,
    stem_stride: int = 1,
) -> nn.Module:
    """A network of torchvision's for images of a size, at any width.

    Args:
        name: one of ``NAMES``.
        classes: outputs of the classifier, at least 1.
        channels: of the input images.
        image_size: height and width of the images that it is for, at least 8 pixels.
        width: channels of the first stage; None is torchvision's own, 64. The stages
            after it have 2, 4 and 8 times as many.
        stem_stride: of the first convolution, 1 or 2. With 2 everything is at half the
            resolution, a quarter of the work, and images must have at least 16 pixels.

    ResNets have four stages, ``layer1`` to ``layer4``, and halve the resolution from
    ``layer2`` on. Below 64 pixels their stem is that of the CIFAR networks of
    arXiv 1512.03385 (a 3x3 convolution, no pooling); from 64 on torchvision's own, which
    divides it by four and has no other stride.

    VGG-16 has batch normalisation, and one linear layer on globally pooled features in
    place of the three that torchvision has for 224 pixels. It halves the resolution five
    times, but for the halvings that would leave a stage less than 2 pixels.

    Raises:
        ImportError: torchvision isn't installed.
        TypeError, ValueError: an argument is outside its range.
    """
    validation.choice("name", name, NAMES)
    width = 64 if width is None else width
    numbers = (("classes", classes, 1), ("channels", channels, 1), ("width", width, 1),
               ("image_size", image_size, SMALLEST))  # fmt: skip
    for argument, value, low in numbers:
        if not validation.is_integer(value) or value < low:
            raise ValueError(f"{argument}: expected an int of at least {low}, got {value!r}")
    classes, channels, width, image_size = (int(value) for _, value, _ in numbers)
    # True == 1 and 2.0 == 2
    if not validation.is_integer(stem_stride) or stem_stride not in (1, 2):
        raise ValueError(f"stem_stride: expected 1 or 2, got {stem_stride!r}")
    stem_stride = int(stem_stride)
    if image_size < SMALLEST * stem_stride:
        raise ValueError(
            f"stem_stride: expected 1 for images of less than {SMALLEST * stem_stride} pixels, "
            f"got {stem_stride} for {image_size}"
        )
    if name in RESNETS:
        if image_size >= SMALL and stem_stride != 1:
            raise ValueError(
                f"stem_stride: expected 1 for a ResNet and images of {SMALL} pixels or more, whose "
                f"stem divides the resolution by 4 already, got {stem_stride} for {image_size}"
            )
        stride = stem_stride if image_size < SMALL else None
        network = _resnet(*RESNETS[name], classes, channels, width, stride)
    else:
        network = _vgg(classes, channels, width, image_size, stem_stride)
    for module in network.modules():  # torchvision's own initialisation, of the new layers too
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return network


def resnet18(classes: int, *, width: int = 64, channels: int = 3) -> nn.Module:
    """``build("resnet18", ...)`` for small images.

    Raises:
        ImportError, ValueError: as ``build``.
    """
    return build("resnet18", classes, width=width, channels=channels)


def _resnet(
    block_name: str,
    blocks: tuple[int, ...],
    classes: int,
    channels: int,
    width: int,
    small_stride: int | None,
) -> nn.Module:
    """``small_stride`` is that of the stem for small images; None is torchvision's stem."""
    resnet: Any = import_torchvision().models.resnet
    block = getattr(resnet, block_name)
    with torch.device("meta"):  # every layer with weights is made anew below
        network = resnet.ResNet(block, blocks)
    if small_stride is not None:
        network.conv1 = nn.Conv2d(channels, width, 3, small_stride, padding=1, bias=False)
        network.maxpool = nn.Identity()
    else:
        network.conv1 = nn.Conv2d(channels, width, 7, stride=2, padding=3, bias=False)
    network.bn1 = nn.BatchNorm2d(width)
    network.inplanes = width  # what _make_layer takes as the channels that come in
    for stage, count in enumerate(blocks):
        layer = network._make_layer(
            block, width * 2**stage, blocks=count, stride=1 if stage == 0 else 2
        )
        setattr(network, f"layer{stage + 1}", layer)
    network.fc = nn.Linear(8 * width * block.expansion, classes)
    return network


def _vgg(classes: int, channels: int, width: int, image_size: int, stride: int) -> nn.Module:
    vgg: Any = import_torchvision().models.vgg
    plan: list[int | str] = []
    for stage in VGG16:
        plan += [*(width * factor for factor in stage), "M"]
    with torch.device("meta"):  # its classifier has 120 million weights, and doesn't stay
        network = vgg.VGG(nn.Identity(), init_weights=False)
    network.features = vgg.make_layers(plan, batch_norm=True)
    network.features[0] = nn.Conv2d(channels, width, 3, stride, padding=1)
    pools = [i for i, layer in enumerate(network.features) if isinstance(layer, nn.MaxPool2d)]
    pixels = math.ceil(image_size / stride)
    for i in pools:
        least = 1 if i == pools[-1] else 2  # no stage follows the last
        if pixels // 2 >= least:
            pixels //= 2
        else:
            # The other layers keep their names, so that weights fit either size.
            network.features[i] = nn.Identity()
    network.avgpool = nn.AdaptiveAvgPool2d(1)
    network.classifier = nn.Linear(8 * width, classes)
    nn.init.normal_(network.classifier.weight, std=0.01)
    nn.init.zeros_(network.classifier.bias)
    return network


def import_torchvision() -> ModuleType:
    """torchvision, also where its compiled operators don't match the torch installed.

    A torchvision from the package index beside a CPU-only torch fails to import because
    it describes operators that weren't loaded. What is used of it here needs none of them.
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
            "the networks, and the reading of most data sets, come with torchvision, which isn't "
            "installed: install the version that belongs to your torch, for example "
            "pip install torchvision==0.28.0 beside torch 2.13.0"
        ) from error
    return torchvision
