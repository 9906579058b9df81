"""What each way of an ``IMCL`` acts on, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from . import kernel_weights
from .imcl_state import IMCLState
from .modes import evaluating


def share(model: nn.Module, kernels: Sequence[str]) -> float:
    """Of the network's weights, how many take part in kernel similarity."""
    sizes = [_weight(model, path).numel() for path in kernels]
    return sum(sizes) / max(sum(p.numel() for p in model.parameters()), 1)


def acted_on(imcl: IMCLState) -> dict[str, list[str]]:
    """The paths of what each way that is on acts on, by the way's name."""
    of_ways: dict[str, list[str]] = {
        "output": [imcl.classifier] if imcl.classifier else [],
        "multilayer": imcl.layers[:-1],
        "representation": imcl.layers,
        "kernel": imcl.kernels,
    }
    return {
        way: list(paths) for way, paths in of_ways.items() if getattr(imcl, f"{way}_weight")
    }


def text(imcl: IMCLState, nothing: Mapping[str, str]) -> str:
    """A line or more for each way.

    Args:
        nothing: why ways were switched off, by the names of their weights.
    """
    heads = sum(p.numel() for p in imcl.heads.parameters())
    of_kernels = [
        f"{path} {tuple(_weight(imcl.model, path).shape)}"
        + (f", {roles} roles" if (roles := imcl._kernel_share.roles.get(path)) else "")
        for path in imcl.kernels
    ]
    ways: dict[str, tuple[str, str, list[str]]] = {
        "output_weight": (
            "1 output consistency",
            f"{imcl.views} dropout views through {imcl.classifier}",
            [],
        ),
        "multilayer_weight": (
            "2 multi-layer consistency",
            f"{len(imcl.heads)} heads of {heads:,} parameters, and the network's own, on",
            [imcl.layers[index] for index in imcl._head_of],
        ),
        "representation_weight": ("3 representation similarity", "the channels of", imcl.layers),
        "kernel_weight": (
            "4 kernel similarity",
            f"{len(imcl.kernels)} layers with {share(imcl.model, imcl.kernels):.1%} of the "
            "network's weights",
            of_kernels,
        ),
    }
    lines = []
    for name, (title, what, paths) in ways.items():
        weight: Any = getattr(imcl, name)
        if weight:
            lines.append(f"{title}, weight {weight:g}: {what}")
            lines += [f"    {path}" for path in paths]
        else:
            lines.append(f"{title}: off ({nothing.get(name, 'its weight is 0')})")
    return "\n".join(lines)


def _weight(model: nn.Module, path: str) -> Tensor:
    module, name = kernel_weights.locate(model, path)
    made_of = [name, f"{name}_orig", f"{name}_v"]  # of pruned and of normalised layers
    for candidate in made_of:
        if candidate in module._parameters:
            return cast(Tensor, module._parameters[candidate])
    with evaluating(module), torch.no_grad():  # training, to read spectral_norm's changes it
        return cast(Tensor, getattr(module, name))
