"""Where a training run stopped being numbers, in a sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..taps import observed


def describe(objective: nn.Module, images: Tensor, values: Mapping[str, float]) -> str:
    """Which terms of the loss are not finite, and the first layer that makes such features.

    Args:
        images: the batch at which it was noticed; the network is run on it once.
        values: the loss and its terms.
    """
    bad = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
    weights = spoilt(objective)
    layer = _first_bad_layer(objective.model, images)  # type: ignore[arg-type]
    where = []
    if weights is not None:
        where.append(f"weights that are not finite: {weights}")
    if layer is not None:
        where.append(f"first layer with features that are not: {layer}")
    return "; ".join([", ".join(bad), *where])


def spoilt(module: nn.Module) -> str | None:
    """Name of the first parameter or buffer with an element that is not finite."""
    for name, value in module.state_dict().items():
        if value.is_floating_point() and not value.isfinite().all():
            return name
    return None


def _first_bad_layer(network: nn.Module, images: Tensor) -> str | None:
    found: list[str] = []

    def look(call: tuple[str, int], module: nn.Module, inputs: tuple, output: object) -> None:
        alone = next(module.children(), None) is None
        if alone and isinstance(output, Tensor) and not output.isfinite().all():
            found.append(call[0])

    with torch.no_grad(), observed(network, look):
        network(images)
    return found[0] if found else None
