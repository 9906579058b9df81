"""CIFAR-10 and CIFAR-100, from the batches that their authors pickled for Python.

torchvision's classes aren't used to read them: they unpickle, and know no other files than
the original ones. The names, addresses and checksums of the files are theirs.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from ..models import import_torchvision
from .augmentation import PaddedCrop
from .batches import read_batches
from .dataset import DataError, DataSet, in_memory
from .files import find_or_fetch
from .pickles import read_pickle

SOURCE = (
    "get it with download=True (--download), or from "
    "https://www.cs.toronto.edu/~kriz/cifar.html (the version for Python)"
)
LABELS = {"cifar10": "labels", "cifar100": "fine_labels"}
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


CLASSES = {
    "cifar10": {"airplane", "frog", "ship", *CIFAR10_PAIRS, *CIFAR10_PAIRS.values()},
    "cifar100": {name for names in CIFAR100_SUPERCLASSES for name in names.split()},
}


def load(name: str, root: Path | None, *, download: bool, image_size: int | None) -> DataSet:
    """50,000 and 10,000 colour images of 32x32 in 10 or 100 classes.

    The batches may lie in ``root`` or, as torchvision and the authors' archive have them,
    in a folder of it.
    """
    theirs = getattr(import_torchvision().datasets, name.upper())
    train, test = ([file for file, _ in side] for side in (theirs.train_list, theirs.test_list))
    meta = theirs.meta["filename"]
    files = [*train, *test, meta]
    folder = find_or_fetch(name, root, theirs.base_folder, files, SOURCE, theirs, download)
    classes = _class_names(folder / meta, theirs.meta["key"], CLASSES[name], name)
    return in_memory(
        name,
        read_batches([folder / file for file in train], LABELS[name]),
        read_batches([folder / file for file in test], LABELS[name]),
        classes,
        PaddedCrop(4, flip=True),
        image_size=image_size,
        noise_pairs=noise_pairs(classes),
    )


load_cifar10, load_cifar100 = (partial(load, name) for name in LABELS)


def noise_pairs(classes: list[str]) -> dict[int, int]:
    """The published asymmetric noise, as indices into ``classes``."""
    pairs = CIFAR10_PAIRS
    if len(classes) != len(CLASSES["cifar10"]):
        pairs = {}
        for names in CIFAR100_SUPERCLASSES:
            members = sorted(names.split(), key=classes.index)
            pairs |= zip(members, members[1:] + members[:1], strict=True)
    return {classes.index(true): classes.index(wrong) for true, wrong in pairs.items()}


def _class_names(path: Path, key: str, known: set[str], name: str) -> list[str]:
    names = read_pickle(path).get(key)
    if not isinstance(names, list) or len(names) != len(known) or set(map(str, names)) != known:
        got = f"{len(names)}" if isinstance(names, list) else repr(names)[:40]
        raise DataError(
            f"{path}: expected '{key}' to be the {len(known)} names of {name}'s classes, got {got}"
        )
    return names
