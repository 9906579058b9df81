"""Shapes of the feature maps and weights of the networks measured."""

from __future__ import annotations

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
    """The 20 convolutions of a ResNet-18 with the CIFAR stem."""
    shapes: list[tuple[int, ...]] = [(64, 3, 3, 3)]
    channels = 64
    for width in (64, 128, 256, 512):
        for block in range(2):
            shapes += [(width, channels, 3, 3), (width, width, 3, 3)]
            if block == 0 and width != channels:
                shapes.append((width, channels, 1, 1))
            channels = width
    return tuple(shapes)


def vgg16_weights() -> Shapes:
    """The 13 convolutions of a VGG-16."""
    widths = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
    return tuple(
        (width, channels, 3, 3) for channels, width in zip((3, *widths), widths, strict=False)
    )


def resnet50_weights() -> Shapes:
    """The 53 convolutions of a ResNet-50."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7)]
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += [(width, channels, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            if block == 0:
                shapes.append((4 * width, channels, 1, 1))
            channels = 4 * width
    return tuple(shapes)


def convnext_weights() -> Shapes:
    """The 22 convolutions of a ConvNeXt-T: patches, depthwise 7x7, reductions."""
    shapes: list[tuple[int, ...]] = [(96, 3, 4, 4)]
    channels = 96
    for width, blocks in ((96, 3), (192, 3), (384, 9), (768, 3)):
        if width != channels:
            shapes.append((width, channels, 2, 2))
        shapes += blocks * [(width, 1, 7, 7)]
        channels = width
    return tuple(shapes)
