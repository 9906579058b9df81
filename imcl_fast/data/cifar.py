"""CIFAR-10 and CIFAR-100, from the batches that their authors pickled for Python.

torchvision's classes aren't used to read them: they unpickle, and know no other files than
the original ones. Their addresses and checksums are.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import NamedTuple

from ..models import import_torchvision
from .augmentation import PaddedCrop
from .batches import read_batches
from .dataset import DataError, DataSet, MissingData, in_memory
from .files import fetch, find
from .pickles import read_pickle


class Edition(NamedTuple):
    """What differs between the two."""

    name: str
    theirs: str  # torchvision's class
    folder: str
    train: tuple[str, ...]
    test: str
    meta: str
    names_key: str
    labels_key: str
    classes: int


CIFAR10 = Edition(
    "cifar10", "CIFAR10", "cifar-10-batches-py", tuple(f"data_batch_{i}" for i in range(1, 6)),
    "test_batch", "batches.meta", "label_names", "labels", 10,
)  # fmt: skip
CIFAR100 = Edition(
    "cifar100", "CIFAR100", "cifar-100-python", ("train",),
    "test", "meta", "fine_label_names", "fine_labels", 100,
)  # fmt: skip

# The asymmetric noise of arXiv 1609.03683: what is mistaken for what, in CIFAR-10; in
# CIFAR-100 each class is for the next, by index, of its superclass.
CIFAR10_PAIRS = {
    "truck": "automobile", "bird": "airplane", "deer": "horse", "cat": "dog", "dog": "cat",
}  # fmt: skip
CIFAR100_SUPERCLASSES = (
    "beaver dolphin otter seal whale",
    "aquarium_fish flatfish ray shark trout",
    "orchid poppy rose sunflower tulip",
    "bottle bowl can cup plate",
    "apple mushroom orange pear sweet_pepper",
    "clock keyboard lamp telephone television",
    "bed chair couch table wardrobe",
    "bee beetle butterfly caterpillar cockroach",
    "bear leopard lion tiger wolf",
    "bridge castle house road skyscraper",
    "cloud forest mountain plain sea",
    "camel cattle chimpanzee elephant kangaroo",
    "fox porcupine possum raccoon skunk",
    "crab lobster snail spider worm",
    "baby boy girl man woman",
    "crocodile dinosaur lizard snake turtle",
    "hamster mouse rabbit shrew squirrel",
    "maple_tree oak_tree palm_tree pine_tree willow_tree",
    "bicycle bus motorcycle pickup_truck train",
    "lawn_mower rocket streetcar tank tractor",
)


def load(
    edition: Edition, root: Path | None, *, download: bool, image_size: int | None
) -> DataSet:
    """50,000 and 10,000 colour images of 32x32 in 10 or 100 classes.

    The batches may lie in ``root`` or, as torchvision and the authors' archive have them,
    in a folder of it.
    """
    folders = [] if root is None else [root / edition.folder, root]
    files = [*edition.train, edition.test, edition.meta]
    source = (
        "get it with download=True (--download), or from "
        "https://www.cs.toronto.edu/~kriz/cifar.html (the version for Python)"
    )
    try:
        folder = find(edition.name, folders, files, source)
    except MissingData:
        if not download or root is None:
            raise
        theirs = getattr(import_torchvision().datasets, edition.theirs)
        fetch(edition.name, theirs.url, root, theirs.tgz_md5)
        folder = find(edition.name, folders, files, source)
    classes = _class_names(folder / edition.meta, edition)
    return in_memory(
        edition.name,
        read_batches([folder / file for file in edition.train], edition.labels_key),
        read_batches([folder / edition.test], edition.labels_key),
        classes,
        PaddedCrop(4, flip=True),
        image_size=image_size,
        noise_pairs=noise_pairs(classes),
    )


load_cifar10 = partial(load, CIFAR10)
load_cifar100 = partial(load, CIFAR100)


def noise_pairs(classes: list[str]) -> dict[int, int]:
    """The published asymmetric noise, as indices into ``classes``."""
    if len(classes) == CIFAR10.classes:
        pairs = CIFAR10_PAIRS
    else:
        pairs = {}
        for names in CIFAR100_SUPERCLASSES:
            members = sorted(names.split(), key=classes.index)
            pairs |= zip(members, members[1:] + members[:1], strict=True)
    return {classes.index(true): classes.index(wrong) for true, wrong in pairs.items()}


def _class_names(path: Path, edition: Edition) -> list[str]:
    names = read_pickle(path).get(edition.names_key)
    if edition is CIFAR10:
        known = {"airplane", "frog", "ship", *CIFAR10_PAIRS, *CIFAR10_PAIRS.values()}
    else:
        known = {name for names in CIFAR100_SUPERCLASSES for name in names.split()}
    if not isinstance(names, list) or len(names) != len(known) or set(map(str, names)) != known:
        got = f"{len(names)}" if isinstance(names, list) else repr(names)[:40]
        raise DataError(
            f"{path}: expected '{edition.names_key}' to be the {edition.classes} names of "
            f"{edition.name}'s classes, got {got}"
        )
    return names
