"""Wrong labels, made on purpose."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

KINDS = ("symmetric", "asymmetric")


def label_noise(
    labels: Tensor,
    classes: int,
    probability: float,
    kind: str = "symmetric",
    seed: int = 0,
    pairs: Mapping[int, int] | None = None,
) -> Tensor:
    """Replace every label, with a probability, by a wrong one.

    Args:
        labels: (N,) int64 in [0, classes); not written to.
        classes: at least 2.
        probability: in [0, 1], for each label on its own.
        kind: ``"symmetric"`` for a uniformly random other class; ``"asymmetric"`` for the
            class that ``pairs`` gives (arXiv 1609.03683).
        seed: of a generator of its own; the same seed gives the same labels, and the same
            labels are wrong with either kind where ``pairs`` has every class.
        pairs: class to wrong class; labels of other classes stay. None pairs each class
            with the next, and the last with the first.

    Returns:
        (N,) int64, on the device of ``labels``.

    Raises:
        ValueError: there is but one class.
    """
    if classes < 2:
        raise ValueError(f"classes: expected at least 2, got {classes}")
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.rand(len(labels), generator=generator) < probability
    if kind == "symmetric":
        shift = torch.randint(1, classes, (len(labels),), generator=generator)
        other = (labels + shift.to(labels.device)) % classes
    else:
        other = _targets(classes, pairs).to(labels.device)[labels]
    return torch.where(wrong.to(labels.device), other, labels)


def _targets(classes: int, pairs: Mapping[int, int] | None) -> Tensor:
    """(classes,) int64: what asymmetric noise makes of each class."""
    if pairs is None:
        return (torch.arange(classes) + 1) % classes
    targets = torch.arange(classes)
    for true, wrong in pairs.items():
        targets[true] = wrong
    return targets
