"""STL-10 (Coates, Lee and Ng 2011), from its binary files; the labelled images only."""

from __future__ import annotations

from pathlib import Path

import torch

from ..models import import_torchvision
from .augmentation import PaddedCrop
from .dataset import DataError, DataSet, Split, in_memory
from .files import find_or_fetch

NAME = "stl10"
CLASS_NAMES = "class_names.txt"
CLASSES = 10
SIZE = 96
SOURCE = (
    "get it with download=True (--download), or from https://cs.stanford.edu/~acoates/stl10/ "
    "(the binary files)"
)


def load(root: Path | None, *, download: bool, image_size: int | None) -> DataSet:
    """5,000 and 8,000 colour images of 96x96 in 10 classes."""
    files = [f"{side}_{kind}.bin" for side in ("train", "test") for kind in "Xy"] + [CLASS_NAMES]
    theirs = import_torchvision().datasets.STL10
    folder = find_or_fetch(NAME, root, theirs.base_folder, files, SOURCE, theirs, download)
    classes = (folder / CLASS_NAMES).read_text(encoding="utf-8", errors="replace").split()
    if len(classes) != CLASSES:
        raise DataError(
            f"{folder / CLASS_NAMES}: expected {CLASSES} names of classes, got {len(classes)}"
        )
    return in_memory(
        NAME, _read(folder, "train"), _read(folder, "test"), classes, PaddedCrop(12, flip=True),
        image_size=image_size,
    )  # fmt: skip


def _read(folder: Path, side: str) -> Split:
    path = folder / f"{side}_X.bin"
    content = bytearray(path.read_bytes())
    if not content or len(content) % (3 * SIZE * SIZE):
        raise DataError(
            f"{path}: expected a multiple of {3 * SIZE * SIZE} bytes, an image each, "
            f"got {len(content)}; delete it and get it again"
        )
    # Stored column by column.
    pixels = torch.frombuffer(content, dtype=torch.uint8).view(-1, 3, SIZE, SIZE)
    images = pixels.transpose(2, 3).contiguous()
    path = folder / f"{side}_y.bin"
    labels = torch.tensor(list(path.read_bytes()), dtype=torch.int64) - 1  # counted from 1
    if len(labels) != len(images):
        raise DataError(
            f"{path}: expected {len(images)} labels, as {side}_X.bin has images, got {len(labels)}"
        )
    return Split(images, labels)
