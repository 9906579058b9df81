"""Where a training run stopped being numbers, in a sentence."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from ..layers import has_children
from ..taps import observed


def describe(
    objective: nn.Module,
    images: Tensor,
    values: Mapping[str, float],
    meant: Collection[str] = (),
) -> str:
    """Which terms of the loss are not finite, and the first layer that makes such features.

    Args:
        images: the batch at which it was noticed; the network is run on it once.
        values: the loss and its terms.
        meant: see ``spoilt``.
    """
    bad = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
    weights = spoilt(objective, meant)
    layer = _first_bad_layer(objective.model, images)  # type: ignore[arg-type]
    where = []
    if weights is not None:
        where.append(f"weights that are not finite: {weights}")
    if layer is not None:
        where.append(f"first layer with features that are not: {layer}")
    return "; ".join([", ".join(bad), *where])


def not_finite(module: nn.Module) -> list[str]:
    """Names of the parameters and buffers with an element that is not finite."""
    return [
        name
        for name, value in module.state_dict().items()
        if isinstance(value, Tensor)  # or what a module keeps as its extra state
        and value.is_floating_point()
        and not value.isfinite().all()
    ]


def spoilt(module: nn.Module, meant: Collection[str] = ()) -> str | None:
    """Name of the first of them that isn't among ``meant``, those that were so from the beginning:
    a mask of -inf, an observer's least and largest."""
    return next((name for name in not_finite(module) if name not in meant), None)


def _first_bad_layer(network: nn.Module, images: Tensor) -> str | None:
    found: list[str] = []

    def look(call: tuple[str, int], module: nn.Module, inputs: tuple, output: object) -> None:
        alone = not has_children(module)
        if alone and isinstance(output, Tensor) and not output.isfinite().all():
            found.append(call[0])

    with torch.no_grad(), observed(network, look):
        network(images)
    return found[0] if found else None
