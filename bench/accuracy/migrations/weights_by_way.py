"""Until commit 8c91e0302bcf a run was told the weights that it was given, and the objective's
defaults, multi-layer weight 1 among them. Since then it is told the weight of each way that is on,
and studies give the multi-layer weight 1 where that is meant."""

from __future__ import annotations

from ..study import PlannedRun, hashed
from . import found_kernels

DEFAULTS = {"output": 1.0, "multilayer": 1.0, "representation": 10.0, "kernel": 100.0}


def before(run: PlannedRun) -> set[str]:
    """The fingerprint that a run's rows had; none where that of before ``found_kernels`` isn't
    known to be of the same kernels, and none of methods other than ``imcl``."""
    told = run.told
    if "weights" not in told:
        return set()
    weights = told.pop("weights")
    if weights.get("kernel") and (run.found or run.config.kernels is None):
        kernels = found_kernels.kernels_of(run.config, told.pop("kernels"))
        if kernels != found_kernels.found_before(run.config):
            return set()
    given = {way: weight for way, weight in weights.items() if weight != DEFAULTS[way]}
    if given:
        told["weights"] = given
    if told["objective"]:
        told["objective"] |= {f"{way}_weight": weight for way, weight in DEFAULTS.items()}
    return {hashed(told)}
