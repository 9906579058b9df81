"""Data sets of a user's own: two map-style torch Datasets of (image, label)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Subset

from .. import validation
from .augmentation import OwnTransforms, transforms
from .dataset import DataError, DataSet, Split, statistics

NAME = "own"
LABELS = ("targets", "labels")  # what torchvision's data sets call them
MEASURED = 256  # images that mean and deviation are taken of
COMPARED = 32  # items whose labels are compared with the list


def from_torch(train: Any, test: Any) -> DataSet:
    """Two map-style Datasets, to train and to measure on, as a data set.

    Args:
        train, test: items are (image, label), or more; images are PIL's or Tensors (C, H, W),
            all of one size; uint8 ones are normalised, floating ones are taken as they are. Labels
            are ints from 0; where a Dataset has them as ``targets`` or ``labels``, without a
            ``target_transform``, and some dozens of items agree, they are not read from its items.

    Returns:
        Images are read when they are needed, through the transforms of the Dataset; what these
        draw is seeded by the run, as all its randomness is.

    Raises:
        TypeError, DataError: they are no such Datasets.
    """
    for name, side in (("train", train), ("test", test)):
        if isinstance(side, IterableDataset) or not (
            hasattr(side, "__getitem__") and hasattr(side, "__len__")
        ):
            raise TypeError(
                f"data_set: expected a map-style Dataset as {name}, with len() and indices, got "
                f"{type(side).__name__}"
            )
        if len(side) == 0:
            raise DataError(f"data_set: expected images in {name}, it has none")
    of_train = Split(_Images(train), _labels("train", train))
    of_test = Split(_Images(test), _labels("test", test))
    labels = torch.cat([of_train.labels, of_test.labels])
    count = 1 + int(labels.max())
    classes = getattr(train, "classes", None)
    if not isinstance(classes, Sequence) or len(classes) < count:
        classes = [str(label) for label in range(count)]
    if (lowest := int(labels.min())) < 0 or len(classes) < 2:
        raise DataError(
            "data_set: expected labels of 2 classes or more, from 0 on, got labels from "
            f"{lowest} to {count - 1}"
        )
    mean, std, shape = _measured(train)
    _check_same(train, test)
    names = tuple(map(str, classes))
    return DataSet(NAME, of_train, of_test, names, mean, std, shape, OwnTransforms())


class _Images(Dataset):
    """Images still to be read: an item is a function that reads it."""

    def __init__(self, items: Any) -> None:
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Callable[[], Tensor]:
        return partial(_image, self._items, index)


def _image(items: Any, index: int) -> Tensor:
    image = items[index][0]
    if not isinstance(image, Tensor):
        image = transforms().functional.pil_to_tensor(image)
    return image


def _labels(name: str, side: Any) -> Tensor:
    some = {index: _label(name, side, index) for index in _some(side, COMPARED)}
    listed = None if _transforms_labels(side) else _listed(side)
    if listed is None or any(listed[index] != label for index, label in some.items()):
        listed = [_label(name, side, index) for index in range(len(side))]
    return torch.as_tensor(listed)


def _label(name: str, side: Any, index: int) -> int:
    """That of an item."""
    try:
        label = side[index][1]
    except (KeyError, IndexError, TypeError) as error:
        raise DataError(
            f"data_set: expected items (image, label) in {name}, got {type(side[index]).__name__}"
        ) from error
    number = _as_int(label)
    if number is None:
        kind = label.dtype if isinstance(label, Tensor) else type(label).__name__
        raise DataError(
            f"data_set: expected int labels in {name}, got {kind} at {index}; make them one by a "
            "target_transform"
        )
    return number


def _as_int(label: Any) -> int | None:
    """An int, NumPy's too, or a Tensor that has one, or a bool; else None."""
    if isinstance(label, Tensor) and label.numel() == 1 and not label.is_floating_point():
        return int(label)
    return int(label) if validation.is_integer(label) else None


def _some(side: Any, count: int) -> range:
    """Places of ``count`` items or more, less than twice as many, all over them."""
    return range(0, len(side), max(len(side) // count, 1))


def _transforms_labels(side: Any) -> bool:
    """Whether a Dataset says that its items' labels are not those it has as a list."""
    if isinstance(side, Subset):
        return _transforms_labels(side.dataset)
    return getattr(side, "target_transform", None) is not None


def _listed(side: Any) -> list[int] | None:
    """The labels that a Dataset has as a list of ints; None if it has none."""
    if isinstance(side, Subset):
        whole = _listed(side.dataset)
        return None if whole is None else [whole[index] for index in side.indices]
    for name in LABELS:
        found: Any = getattr(side, name, None)  # whatever it is: a method, a number, names
        if hasattr(found, "tolist"):  # a Tensor, an array, a column of a table
            found = found.tolist()
        if isinstance(found, Sequence) and len(found) == len(side):
            labels = [_as_int(label) for label in found]
            if None not in labels:
                return cast(list[int], labels)
    return None


def _check_same(train: Any, test: Any) -> None:
    """Refuse images to measure on that those to train on don't tell the scale, or size, of."""
    read = OwnTransforms()
    first = [read.central(partial(_image, side, 0)) for side in (train, test)]
    kinds = [(tuple(x.shape), "floating" if x.is_floating_point() else str(x.dtype)) for x in first]
    if kinds[0] != kinds[1]:
        raise DataError(
            "data_set: expected images of one size and kind in train and test, got "
            + " and ".join(f"{shape} {kind}" for shape, kind in kinds)
        )


def _measured(train: Any) -> tuple[tuple[float, ...], tuple[float, ...], tuple[int, int, int]]:
    """Mean, deviation and shape of training images; 0 and 1 of those that are floating."""
    read = OwnTransforms()
    images = [read.central(partial(_image, train, index)) for index in _some(train, MEASURED)]
    shapes = {tuple(image.shape) for image in images}
    if len(shapes) > 1 or images[0].dim() != 3:
        raise DataError(
            "data_set: expected images (C, H, W) of one size, got "
            f"{', '.join(map(str, sorted(shapes)))}; resize or crop them by a transform"
        )
    channels, height, width = images[0].shape
    if images[0].dtype == torch.uint8:
        mean, std = statistics(torch.stack(images))
    elif images[0].is_floating_point():
        # What a batch goes through is (image / 255 - mean) / std.
        mean, std = (0.0,) * channels, (1 / 255,) * channels
    else:
        raise DataError(
            f"data_set: expected images of uint8 or a floating dtype, got {images[0].dtype}"
        )
    return mean, std, (channels, height, width)
