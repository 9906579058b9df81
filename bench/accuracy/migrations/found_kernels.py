"""Until commit 60772ea193e9 a run was not told which kernels way 4 finds, when that is left to it,
and it found all convolutions of more than one pixel. Studies named the kernels of runs that left a
layer out, and now name those of runs that don't."""

from __future__ import annotations

from functools import cache

import torch
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from imcl_fast import models
from imcl_fast.runs.config import TrainConfig

from ..study import PlannedRun, hashed


def before(run: PlannedRun) -> set[str]:
    """The fingerprints that a run's rows had: with its kernels named, and with none told, if these
    are what was found then. None where way 4 is off, or what is found depends on whether images
    are grey."""
    told = run.told
    if not told.get("weights", {}).get("kernel"):
        return set()
    now, kernels = hashed(told), kernels_of(run.config, told.pop("kernels"))
    if kernels is None:
        return set()
    fingerprints = {hashed({**told, "kernels": kernels})}
    if kernels == found_before(run.config):
        fingerprints.add(hashed(told))
    return fingerprints - {now}


def kernels_of(config: TrainConfig, told: list) -> list[str] | None:
    """Those of way 4, named or found, as they are ``told``; None where they depend on whether
    images are grey."""
    if config.kernels is not None:
        return list(config.kernels)
    grey, coloured = told
    return grey if grey == coloured else None


def found_before(config: TrainConfig) -> list[str]:
    """What the rule of then found, on grey and on coloured images."""
    return _found_in(config.model, config.width, config.stem_stride)


@cache
def _found_in(model: str, width: int, stem_stride: int) -> list[str]:
    with torch.device("meta"):
        network = models.build(model, 10, channels=1, width=width, stem_stride=stem_stride)
    return [
        name
        for name, module in network.named_modules()
        if isinstance(module, _ConvNd)
        and not isinstance(module, _ConvTransposeNd)
        and max(module.kernel_size) > 1
        and module.out_channels > 1
    ]
