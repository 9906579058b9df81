"""Fashion-MNIST (arXiv 1708.07747), from its gzipped IDX files."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

from ..models import import_torchvision
from .augmentation import PaddedCrop
from .dataset import DataError, DataSet, MissingData, Split, in_memory
from .files import fetch, find

NAME = "fashion-mnist"
FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}
CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag",
    "Ankle boot",
)  # fmt: skip
UBYTE = 8  # IDX's code for unsigned bytes
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
TORCHVISION = Path("FashionMNIST", "raw")
SOURCE = (
    "get it with download=True (--download), as Debian's package dataset-fashion-mnist, or from "
    "https://github.com/zalandoresearch/fashion-mnist"
)


def load(root: Path | None, *, download: bool, image_size: int | None) -> DataSet:
    """60,000 and 10,000 grey images of 28x28 in 10 classes.

    The files may lie in ``root``, where torchvision puts them below it, or where Debian's
    package dataset-fashion-mnist does; then ``root`` isn't needed.
    """
    folders = [] if root is None else [root, root / TORCHVISION]
    files = [file for pair in FILES.values() for file in pair]
    try:
        folder = find(NAME, [*folders, DEBIAN], files, SOURCE)
    except MissingData:
        if not download or root is None:
            raise
        folder = root / TORCHVISION
        theirs = import_torchvision().datasets.FashionMNIST
        for file, md5 in theirs.resources:
            fetch(NAME, theirs.mirrors[0] + file, folder, md5)
    splits = {side: _read(folder, *pair) for side, pair in FILES.items()}
    return in_memory(
        NAME, splits["train"], splits["test"], CLASSES, PaddedCrop(2, flip=True),
        image_size=image_size,
    )  # fmt: skip


def _read(folder: Path, images_file: str, labels_file: str) -> Split:
    images = read_idx(folder / images_file, dimensions=3)
    labels = read_idx(folder / labels_file, dimensions=1)
    if len(images) != len(labels):
        raise DataError(
            f"{folder / labels_file}: expected {len(images)} labels, as {images_file} has images, "
            f"got {len(labels)}"
        )
    return Split(images.unsqueeze(1), labels.long())


def read_idx(path: Path, *, dimensions: int) -> Tensor:
    """A gzipped IDX file of unsigned bytes, the format of MNIST, as a uint8 Tensor.

    Raises:
        DataError: it is damaged, or holds something else.
    """
    try:
        with gzip.open(path) as file:
            content = bytearray(file.read())
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{path}: can't be unpacked ({error}); delete it and get it again"
        ) from error
    start = 4 + 4 * dimensions
    if content[:4] != bytes([0, 0, UBYTE, dimensions]) or len(content) < start:
        raise DataError(f"{path}: expected an IDX file of {dimensions}-dimensional bytes")
    shape = struct.unpack(f">{dimensions}I", content[4:start])
    if len(content) - start != math.prod(shape):
        raise DataError(
            f"{path}: expected {math.prod(shape)} bytes of data for shape {shape}, "
            f"got {len(content) - start}; delete it and get it again"
        )
    if math.prod(shape) == 0:
        return torch.empty(shape, dtype=torch.uint8)
    return torch.frombuffer(content, dtype=torch.uint8, offset=start).view(shape)
