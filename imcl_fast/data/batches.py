"""The layout that CIFAR's and ImageNet32's pickled batches share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .dataset import DataError, Split
from .pickles import read_pickle

SIZE = 32
PIXELS = 3 * SIZE * SIZE


def read_batches(paths: Sequence[Path], labels_key: str, *, first_label: int = 0) -> Split:
    """The images and labels of batches, one after the other.

    Each is a dict of ``data``, (N, 3072) uint8, a row holding the red, the green and then
    the blue pixels, row by row, and of N labels.

    Args:
        labels_key: what the labels are called.
        first_label: what the first class is counted as.

    Returns:
        Images (N, 3, 32, 32) uint8 and labels (N,) from 0.

    Raises:
        DataError: a file is damaged or holds something else.
    """
    parts, labels = [], []
    for path in paths:
        batch = read_pickle(path)
        parts.append(_data(path, batch))
        labels.append(_labels(path, batch, labels_key, len(parts[-1])) - first_label)
    images = torch.empty(sum(map(len, parts)), PIXELS, dtype=torch.uint8)
    start = 0
    while parts:
        part = parts.pop(0)  # and freed: two copies of ImageNet32 would take 8 GB
        images[start : start + len(part)] = part
        start += len(part)
    return Split(images.view(-1, 3, SIZE, SIZE), torch.cat(labels))


def _data(path: Path, batch: dict[str, Any]) -> Tensor:
    data = batch.get("data")
    if not isinstance(data, Tensor) or data.dtype != torch.uint8 or data.shape[1:] != (PIXELS,):
        got = f"{tuple(data.shape)} {data.dtype}" if isinstance(data, Tensor) else repr(data)[:40]
        raise DataError(f"{path}: expected 'data' to be (N, {PIXELS}) torch.uint8, got {got}")
    return data


def _labels(path: Path, batch: dict[str, Any], key: str, count: int) -> Tensor:
    try:
        labels = torch.as_tensor(batch[key])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{path}: expected '{key}' to be a list of classes") from error
    if labels.shape != (count,) or (count and labels.is_floating_point()):
        raise DataError(
            f"{path}: expected '{key}' to be {count} ints, one per image, "
            f"got {tuple(labels.shape)} {labels.dtype}"
        )
    return labels.long()
