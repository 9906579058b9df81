"""Handwritten digits that come with scikit-learn: real data that needs no download."""

from __future__ import annotations

from pathlib import Path

import torch

from .augmentation import PaddedCrop
from .dataset import DataSet, Split, in_memory

TEST_SIZE = 497  # of 1,797, which leaves 1,300 to train on
SPLIT_SEED = 0
LEVELS = 16  # grey values go from 0 to this
IMAGE_SIZE = 16  # scaled from 8, so that a network can halve it several times


def load(root: Path | None, *, download: bool, image_size: int | None) -> DataSet:
    """scikit-learn's 1,797 digits (from UCI's optdigits): 1,300 and 497, 10 classes.

    The split is always the same, and stratified. ``root`` and ``download`` don't matter.

    Raises:
        ImportError: scikit-learn isn't installed.
    """
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
        test_size=TEST_SIZE,
        stratify=digits.target,
        random_state=SPLIT_SEED,
    )
    pixels = torch.from_numpy(digits.images).unsqueeze(1) * (255 / LEVELS)  # [1797, 1, 8, 8]
    images = pixels.round().to(torch.uint8)
    labels = torch.from_numpy(digits.target).long()
    return in_memory(
        "digits",
        Split(images[train], labels[train]),
        Split(images[test], labels[test]),
        [str(digit) for digit in range(10)],
        PaddedCrop(1, fill="edge"),
        image_size=image_size or IMAGE_SIZE,
    )
