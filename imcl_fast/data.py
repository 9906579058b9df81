"""Real data that needs no download, and wrong labels for it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from . import validation

DIGITS_TEST_SIZE = 497  # of 1,797, which leaves 1,300 to train on
DIGITS_SPLIT_SEED = 0


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled images in memory, split for training and testing.

    Attributes:
        train_images, test_images: (N, C, H, W) float32, normalised.
        train_labels, test_labels: (N,) int64.
        classes: number of classes.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: int

    def with_label_noise(self, probability: float, seed: int) -> Dataset:
        """This data set with ``symmetric_label_noise`` on its training labels only."""
        noisy = symmetric_label_noise(self.train_labels, self.classes, probability, seed)
        return replace(self, train_labels=noisy)


def load_digits(size: int = 16) -> Dataset:
    """scikit-learn's 1,797 handwritten digits (from UCI's optdigits), in 10 classes.

    The split into 1,300 training and 497 test images is always the same, and stratified.
    Images are one channel, 8x8 scaled bilinearly to ``size`` so that a network can halve
    them several times, and normalised by the training images' mean and deviation.

    Args:
        size: height and width in pixels, at least 8.

    Raises:
        ImportError: scikit-learn isn't installed.
        ValueError: ``size`` is less than the images have.
    """
    if isinstance(size, bool) or not isinstance(size, int) or size < 8:
        raise ValueError(f"size: expected an int of at least 8 pixels, got {size!r}")
    try:
        from sklearn import datasets
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ImportError(
            "the digits data set comes with scikit-learn, which isn't installed: "
            "pip install scikit-learn"
        ) from error
    digits = datasets.load_digits()
    train, test = train_test_split(
        range(len(digits.target)),
        test_size=DIGITS_TEST_SIZE,
        stratify=digits.target,
        random_state=DIGITS_SPLIT_SEED,
    )
    images = torch.from_numpy(digits.images).float().unsqueeze(1)  # [1797, 1, 8, 8]
    labels = torch.from_numpy(digits.target).long()
    images = F.interpolate(images, (size, size), mode="bilinear", align_corners=False)
    images = (images - images[train].mean()) / images[train].std()
    return Dataset(images[train], labels[train], images[test], labels[test], classes=10)


def symmetric_label_noise(
    labels: Tensor, classes: int, probability: float, seed: int
) -> Tensor:
    """Replace every label, with a probability, by a uniformly random other class.

    Args:
        labels: (N,) int64 in [0, classes); not written to.
        classes: at least 2.
        probability: in [0, 1].
        seed: of a generator of its own; the same seed gives the same labels.

    Returns:
        (N,) int64, on the device of ``labels``.

    Raises:
        TypeError, ValueError: ``classes`` or ``probability`` is outside its range.
    """
    if classes < 2:
        raise ValueError(f"classes: expected at least 2, got {classes}")
    if probability != 1:
        probability = validation.number("probability", probability, low=0, high=1)
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.rand(len(labels), generator=generator) < probability
    shift = torch.randint(1, classes, (len(labels),), generator=generator)
    shift = torch.where(wrong, shift, 0).to(labels.device)
    return (labels + shift) % classes


def random_shift(images: Tensor, pixels: int, generator: torch.Generator) -> Tensor:
    """Shift every image (N, C, H, W) by up to ``pixels`` each way, filling up with its edge."""
    count, _, height, width = images.shape
    padded = F.pad(images, [pixels] * 4, mode="replicate")
    offsets = torch.randint(0, 2 * pixels + 1, (2, count, 1), generator=generator)
    rows, columns = (offset.to(images.device) for offset in offsets)
    rows = (rows + torch.arange(height, device=images.device)).view(count, height, 1)
    columns = (columns + torch.arange(width, device=images.device)).view(count, 1, width)
    sample = torch.arange(count, device=images.device).view(count, 1, 1)
    return padded[sample, :, rows, columns].permute(0, 3, 1, 2).contiguous()
