"""The weights of kernel similarity: those that the network computes with in this very step.

Most are parameters, and there at any time. Others are made anew from parameters: in a hook
before each run of their module (``torch.nn.utils.prune``, the older ``weight_norm`` and
``spectral_norm``), or by a parametrization whenever they are read, at a cost, and perhaps
with a change of state (spectral norm) or another random part. Those are taken as the run
made them. All is looked up in every step: a network may be pruned while it trains.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from .taps import Tape

# By path: a module, and the name of its weight.
Weights = Mapping[str, tuple[nn.Module, str]]


def locate(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module and the name of its weight, of the path of either: ``model.get_submodule`` in a
    tenth of its time, of a path that is there."""
    module = model
    for name in path.split("."):
        if name in module._parameters or parametrize.is_parametrized(module, name):
            return module, name
        child: Any = module._modules.get(name)
        if child is None:
            child = getattr(module, name)  # of a compiled module, or a weight made of parameters
            if not isinstance(child, nn.Module):
                return module, name
        module = child
    return module, "weight"


def are_parameters(weights: Weights) -> bool:
    """Whether the weights can be had before the network runs."""
    return all(
        name in module._parameters and not module._forward_pre_hooks
        for module, name in weights.values()
    )


def parameters(weights: Weights) -> list[Tensor]:
    """The weights, all of which are parameters."""
    return [cast(Tensor, module._parameters[name]) for module, name in weights.values()]


def tap(weights: Weights, tape: Tape) -> list[RemovableHandle]:
    """Hook onto the parametrizations of the weights that have none of ``tape``'s taps yet."""
    handles = []
    for path, (module, name) in weights.items():
        if parametrize.is_parametrized(module, name):
            parametrization = cast(nn.ModuleDict, module.parametrizations)[name]
            hooks = parametrization._forward_hooks.values()
            if not any(isinstance(hook, _Tap) and hook.tape is tape for hook in hooks):
                handles.append(parametrization.register_forward_hook(_Tap(tape, path)))
    return handles


def used(weights: Weights, made: Mapping[str, Tensor]) -> list[Tensor]:
    """The weights that the run computed with, which is over.

    Args:
        made: what taps have seen in it, by path.

    Raises:
        RuntimeError: a weight has lost its gradient.
    """
    found = []
    for path, (module, name) in weights.items():
        weight = made.get(path)
        if weight is None or _lost_gradient(module, name, weight):
            # Of a parametrization: made again.
            weight = cast(Tensor, getattr(module, name))
        if _lost_gradient(module, name, weight):
            raise RuntimeError(
                f"kernels: the weight of {path!r} is computed from others under torch.no_grad, "
                "so nothing can be learnt from it; for gradient checkpointing pass "
                "use_reentrant=False to torch.utils.checkpoint, or name other modules"
            )
        found.append(weight)
    return found


def is_unit(module: nn.Module) -> bool:
    """Whether FSDP2's ``fully_shard`` was called on a module."""
    return hasattr(type(module), "reshard")


def reshard(root: nn.Module, weights: Weights) -> None:
    """Where FSDP2 keeps other shards between the passes than the optimizer has, those of
    ``reshard_after_forward=N``, bring back the optimizer's: a gradient of the others is lost.

    Args:
        root: a module around the network, which FSDP2 may have too.
    """
    owners = {
        module for module, name in weights.values() if is_shard(module._parameters.get(name))
    }
    if not owners:
        return
    for unit in reversed([*filter(is_unit, root.modules())]):  # each before those around it
        inside = owners.intersection(unit.modules())
        if inside:
            cast(Any, unit).reshard()
            owners -= inside


def is_shard(weight: Tensor | None) -> bool:
    """Whether FSDP2 (or tensor parallelism) has the rest of a weight in other processes."""
    return hasattr(weight, "full_tensor")


def whole(weights: list[Tensor]) -> list[Tensor]:
    """The weights, those that FSDP2 has in shards gathered from all processes: the similarity of
    rows needs all rows. Of the gradient each process keeps its shard, the same in each."""
    return [
        cast(Any, weight).full_tensor() if is_shard(weight) else weight
        for weight in weights
    ]


def by_role(weights: list[Tensor], roles: Mapping[str, int], paths: Weights) -> list[Tensor]:
    """The weights, those whose rows have several roles in as many parts."""
    if not roles:
        return weights
    parts: list[Tensor] = []
    for path, weight in zip(paths, weights, strict=True):
        parts.extend(weight.chunk(roles.get(path, 1)))
    return parts


class _Tap:
    """A forward hook that hands the weight a parametrization makes to the step under way."""

    def __init__(self, tape: Tape, path: str) -> None:
        self.tape = tape
        self.path = path

    def __call__(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        if self.tape.step is not None:
            self.tape.step.weights[self.path] = output


def _lost_gradient(module: nn.Module, attribute: str, weight: Tensor) -> bool:
    if weight.requires_grad or not torch.is_grad_enabled() or attribute in module._parameters:
        return False
    return any(
        parameter.requires_grad
        for name, parameter in module.named_parameters()
        if name.startswith((attribute, f"parametrizations.{attribute}"))
    )
