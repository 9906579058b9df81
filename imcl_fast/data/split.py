"""Fewer labels, and images set aside: parts of a split that keep its classes' shares."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import Subset

from .dataset import Split


def take(split: Split, index: Tensor) -> Split:
    """The samples of ``split`` at ``index`` (n,) int64, in that order."""
    if isinstance(split.images, Tensor):
        return Split(split.images[index], split.labels[index])
    return Split(Subset(split.images, index.tolist()), split.labels[index])


def subset(split: Split, n: int, seed: int, name: str = "n") -> Split:
    """``n`` random samples, for studies with few labels.

    Every class keeps its share, as nearly as whole numbers allow. The same seed gives the
    same samples, in the order of ``split``. ``name`` is what an error calls ``n``.

    Raises:
        ValueError: ``n`` is less than the number of classes, or more than
            ``split`` has.
    """
    return take(split, _stratified(split.labels, n, seed, name)[0])


def validation_split(split: Split, n: int, seed: int, name: str = "n") -> tuple[Split, Split]:
    """What remains for training, and ``n`` samples set aside, drawn as by ``subset``.

    Raises:
        ValueError: as ``subset``; and there must be samples left to train on.
    """
    aside, rest = _stratified(split.labels, n, seed, name)
    if len(rest) == 0:
        raise ValueError(f"{name}: expected fewer than all {len(split)} images, got {n}")
    return take(split, rest), take(split, aside)


def _stratified(labels: Tensor, n: int, seed: int, name: str) -> tuple[Tensor, Tensor]:
    """Sorted indices of ``n`` samples, and of the others."""
    counts = labels.bincount()
    present = int((counts > 0).sum())
    if not present <= n <= len(labels):
        raise ValueError(
            f"{name}: expected at least one image per class ({present}) and at most all "
            f"{len(labels)}, got {n}"
        )
    # The largest remainders, of exact fractions, get what rounding down has left over.
    quotas = n * counts // len(labels)
    remainders = n * counts % len(labels)
    extra = remainders.argsort(descending=True, stable=True)[: n - int(quotas.sum())]
    quotas[extra] += 1
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label, quota in enumerate(quotas.tolist()):
        members = (labels == label).nonzero().flatten()
        chosen[members[torch.randperm(len(members), generator=generator)[:quota]]] = True
    return chosen.nonzero().flatten(), (~chosen).nonzero().flatten()
