"""Image files in folders named after their classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from ..models import import_torchvision
from . import image_file
from .augmentation import ResizedCrop
from .dataset import DataError, DataSet, MissingData, Split

NAME = "folder"
# Of image files, beside those that torchvision takes; Pillow reads them too.
ENDINGS = (
    ".gif", ".avif", ".jfif", ".jpe", ".jp2", ".j2k", ".apng", ".dib", ".pbm", ".pnm", ".tga",
)  # fmt: skip
TEST_FOLDERS = ("test", "val")
IMAGE_SIZE = 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as torchvision has them
LAYOUT = "expected the folders train and test (or val), each with a folder of image files per class"


class ImageFiles(Dataset):
    """Image files, as PIL images in RGB (see ``image_file.read``), decoded when asked for."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths = list(paths)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Any:
        return image_file.read(self._paths[index])


def load(root: Path | None, *, download: bool, image_size: int | None) -> DataSet:
    """Any images: ``root``/train/<class>/<file>, and the same in test or val; files of other
    endings than those of images are left out.

    Nothing is decoded before it is needed. Training images are cropped at random to
    ``image_size`` (224), test images in their centre.

    Raises:
        MissingData, DataError: as ``data.load``; also if there are fewer than two classes,
            or not the same for training and testing.
    """
    if root is None:
        raise MissingData(f"{NAME}: expected root (--data-root), got none; {LAYOUT}")
    size = image_size or IMAGE_SIZE
    test_folder = next((root / name for name in TEST_FOLDERS if (root / name).is_dir()), None)
    if not (root / "train").is_dir() or test_folder is None:
        missing = "train" if not (root / "train").is_dir() else " or ".join(TEST_FOLDERS)
        raise MissingData(f"{NAME}: no folder {missing} in {root}; {LAYOUT}")
    train, classes = _read(root / "train")
    test, test_classes = _read(test_folder)
    if classes != test_classes:
        differing = sorted(set(classes) ^ set(test_classes))
        raise DataError(
            f"{root}: expected the same classes in train and {test_folder.name}, "
            f"only one of them has {', '.join(differing)}"
        )
    return DataSet(NAME, train, test, tuple(classes), MEAN, STD, (3, size, size), ResizedCrop(size))


def _read(folder: Path) -> tuple[Split, list[str]]:
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    if len(classes) < 2:
        raise DataError(f"{folder}: expected folders of at least 2 classes, got {len(classes)}")
    of_folders = import_torchvision().datasets.folder
    endings = (*of_folders.IMG_EXTENSIONS, *ENDINGS)
    try:
        found = of_folders.ImageFolder(
            str(folder), is_valid_file=lambda path: path.lower().endswith(endings)
        )
    except FileNotFoundError as error:  # in one line already, and says which classes and files
        raise DataError(f"{folder}: {error}") from error
    paths, labels = zip(*found.samples, strict=True)
    return Split(ImageFiles(paths), torch.tensor(labels)), found.classes
