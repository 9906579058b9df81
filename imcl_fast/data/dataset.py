"""What a data set is to the rest of the package, and how one in memory is put together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from .augmentation import Augmentation, PaddedCrop

CHUNK = 4096  # images converted at a time, so that ImageNet32 needs no second copy in float


class DataError(ValueError):
    """A data set is there, but its files aren't what they should be."""


class MissingData(FileNotFoundError):
    """A data set isn't there; the message says where it was looked for and where to get it."""


@dataclass(frozen=True, eq=False)
class Split:
    """The images of one side of a data set, and their labels.

    Attributes:
        images: (N, C, H, W) uint8 in memory, or a map-style dataset of N PIL images in RGB, or
            of what reads one (own.py).
        labels: (N,) int64 on the CPU.
    """

    images: Tensor | Dataset
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class DataSet:
    """Labelled images, split for training and testing.

    Attributes:
        name: what ``load`` knows it as.
        train, test: never share an image.
        classes: their names; labels are indices into it.
        mean, std: of the training images, one per channel, where 1 is white. Of a data set
            that isn't in memory, those of ImageNet.
        shape: (C, H, W) of a batch's images.
        augmentation: what the training images go through by default.
        noise_pairs: the published asymmetric label noise, class to class; None where
            there is none.
    """

    name: str
    train: Split
    test: Split
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    shape: tuple[int, int, int]
    augmentation: Augmentation
    noise_pairs: Mapping[int, int] | None = None


def in_memory(
    name: str,
    train: Split,
    test: Split,
    classes: Sequence[str],
    augmentation: PaddedCrop,
    *,
    image_size: int | None,
    noise_pairs: Mapping[int, int] | None = None,
) -> DataSet:
    """A data set of images in memory, scaled to ``image_size`` if there is one.

    Scaling is bilinear, antialiased, and done once; the padding of ``augmentation`` is
    scaled with the images.

    Raises:
        DataError: a split is empty, a label outside the classes, or the splits differ in size.
    """
    for side, split in (("training", train), ("test", test)):
        if len(split) == 0:
            raise DataError(f"{name}: expected {side} images, its files hold none")
        low, high = (int(value) for value in torch.aminmax(split.labels))
        if low < 0 or high >= len(classes):
            raise DataError(
                f"{name}: expected labels of {len(classes)} classes (0 to {len(classes) - 1}), "
                f"the {side} labels go from {low} to {high}"
            )
    assert isinstance(train.images, Tensor) and isinstance(test.images, Tensor)
    if train.images.shape[1:] != test.images.shape[1:]:
        raise DataError(
            f"{name}: expected images of one size, those to train on are "
            f"{tuple(train.images.shape[1:])}, those to test on {tuple(test.images.shape[1:])}"
        )
    native = train.images.shape[-1]
    if image_size is not None and image_size != native:
        augmentation = augmentation.scaled(image_size / native)
        train = Split(resize(train.images, image_size), train.labels)
        test = Split(resize(test.images, image_size), test.labels)
    assert isinstance(train.images, Tensor)
    channels, height, width = train.images.shape[1:]
    mean, std = statistics(train.images)
    return DataSet(
        name, train, test, tuple(classes), mean, std, (channels, height, width), augmentation,
        noise_pairs,
    )  # fmt: skip


def resize(images: Tensor, size: int) -> Tensor:
    """uint8 images (N, C, H, W) scaled bilinearly to (N, C, size, size)."""
    scaled = images.new_empty(*images.shape[:2], size, size)
    for source, result in zip(images.split(CHUNK), scaled.split(CHUNK), strict=True):
        pixels = F.interpolate(
            source.float(), (size, size), mode="bilinear", align_corners=False, antialias=True
        )
        result.copy_(pixels.round_().clamp_(0, 255))
    return scaled


def statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of every channel of uint8 images (N, C, H, W), over 255.

    A deviation below one grey level counts as one: constant images must not become
    infinite when they are divided by it.
    """
    count = images.numel() // images.shape[1]
    total = torch.zeros(images.shape[1], dtype=torch.int64)
    squares = torch.zeros_like(total)
    for chunk in images.split(CHUNK):
        pixels = chunk.to(torch.int32)
        total += pixels.sum((0, 2, 3))  # summed in int64, so exactly
        squares += pixels.square_().sum((0, 2, 3))
    mean = total.double() / count
    std = (squares.double() / count - mean.square()).clamp(min=1).sqrt()
    return tuple((mean / 255).tolist()), tuple((std / 255).tolist())
