"""ImageNet at 32x32 (arXiv 1707.08819), from its authors' pickled batches."""

from __future__ import annotations

from pathlib import Path

from .augmentation import PaddedCrop
from .batches import read_batches
from .dataset import DataSet, in_memory
from .files import find

NAME = "imagenet32"
CLASSES = 1000
TRAIN = [f"train_data_batch_{i}" for i in range(1, 11)]
TEST = ["val_data"]
SOURCE = (
    "get Imagenet32_train and Imagenet32_val, after registration, from "
    "https://image-net.org/download-images.php and unpack them there"
)


def load(root: Path | None, *, download: bool, image_size: int | None) -> DataSet:
    """1,281,167 and 50,000 colour images of 32x32 in 1,000 classes, 4 GB in memory.

    The batches may lie in ``root``, or in a folder of it that is called imagenet32 or as
    the archives are. They can't be downloaded without registration, whatever ``download``.
    Classes are named by their numbers, from 1, since the batches have no names.
    """
    places = [] if root is None else [root, root / NAME]
    train = find(NAME, _with_archive(places, "Imagenet32_train"), TRAIN, SOURCE)
    test = find(NAME, _with_archive(places, "Imagenet32_val"), TEST, SOURCE)
    return in_memory(
        NAME,
        read_batches([train / file for file in TRAIN], "labels", first_label=1),
        read_batches([test / file for file in TEST], "labels", first_label=1),
        [str(number) for number in range(1, CLASSES + 1)],
        PaddedCrop(4, flip=True),
        image_size=image_size,
    )


def _with_archive(places: list[Path], archive: str) -> list[Path]:
    return [folder for place in places for folder in (place, place / archive)]
