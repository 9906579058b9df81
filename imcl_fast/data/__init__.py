"""Data sets, label noise, augmentation and loaders.

``load`` knows the data sets by name; each has a file of its own here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .. import validation
from . import cifar, digits, fashion_mnist, folder, imagenet32, stl10
from .dataset import DataError, DataSet, MissingData, Split

_LOADERS: dict[str, Callable[..., DataSet]] = {
    "digits": digits.load,
    "fashion-mnist": fashion_mnist.load,
    "cifar10": cifar.load_cifar10,
    "cifar100": cifar.load_cifar100,
    "stl10": stl10.load,
    "imagenet32": imagenet32.load,
    "folder": folder.load,
}
NAMES = tuple(_LOADERS)

__all__ = ["NAMES", "DataError", "DataSet", "MissingData", "Split", "load"]


def load(
    name: str,
    root: Path | str | None = None,
    *,
    download: bool = False,
    image_size: int | None = None,
) -> DataSet:
    """A data set by name.

    Args:
        name: one of ``NAMES``.
        root: the folder it lies in; "digits" needs none.
        download: fetch what is missing into ``root``, where it may be fetched freely.
        image_size: height and width in pixels, at least 8. None leaves images as they
            are, but scales digits from 8 to 16 and crops those of a folder to 224.

    Raises:
        MissingData: it isn't there; the message says where to get it.
        DataError: a file of it is damaged.
        ImportError: a library that it comes with or is read by isn't installed.
    """
    validation.choice("name", name, NAMES)
    if image_size is not None:
        image_size = validation.integer("image_size", image_size)
        if image_size < 8:
            raise ValueError(f"image_size: expected at least 8 pixels, got {image_size}")
    path = None if root is None else Path(root)
    return _LOADERS[name](path, download=download, image_size=image_size)
