"""What a study is: methods x conditions x networks x seeds, each an imcl-train run."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from imcl_fast import models
from imcl_fast.ilr import MultiHead
from imcl_fast.imcl import IMCL
from imcl_fast.kernel_choice import find_kernels
from imcl_fast.objectives import OF_QUALITIES, WAYS, WITH_WAYS
from imcl_fast.quality_agnostic import QualityAgnostic
from imcl_fast.runs.config import TrainConfig

# Values at which an argument of an objective changes nothing, so that one that is new, and has such
# a default, makes no old row stale. A default that isn't neutral belongs to the fingerprint.
NEUTRAL: Mapping[str, Any] = {
    "representation_interval": 1, "kernel_interval": 1, "criterion": None, "logits": None,
    "class_dim": None, "ignore_index": -100, "activation": "softmax",
}  # fmt: skip
DEFAULT = TrainConfig()


@dataclass(frozen=True)
class Part:
    """A condition or a network: a name, what it is called in text, its settings."""

    name: str
    title: str
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Method(Part):
    """A method, and in which runs it takes part.

    Attributes:
        seeds: how many, from the study's first on.
        conditions, networks: names.
        versus: the method that this one is a variant of; by default the baseline.
        form: of way 4, that of another definition (``kernel_forms``); "" for that of ``IMCL``.
        found: its kernels are those that were found when it ran, where nobody had named them.
    """

    seeds: int
    conditions: tuple[str, ...]
    networks: tuple[str, ...]
    versus: str
    form: str = ""
    found: bool = False


def run_name(condition: str, network: str, method: str, seed: int) -> str:
    """What a run is called, in a study and in its results."""
    return f"{condition}-{network}-{method}-s{seed}"


@dataclass(frozen=True)
class PlannedRun:
    """A run of a study. Its seed decides weights, order, augmentation and wrong labels, so that
    runs of the same condition, network and seed differ by their method alone."""

    condition: str
    network: str
    method: str
    config: TrainConfig
    form: str = ""  # of way 4
    found: bool = False  # the kernels are named, and told as if they weren't

    @property
    def seed(self) -> int:
        return self.config.seed

    @property
    def name(self) -> str:
        return run_name(self.condition, self.network, self.method, self.seed)

    @property
    def told(self) -> dict[str, Any]:
        """What results depend on: the settings that aren't at their defaults, for one that is new
        to ``TrainConfig`` doesn't make old results stale; the weight of each way that is on,
        whoever chose it; the objective's own defaults, which stand for the settings that are left
        to it; and the kernels that it finds, if that is left to it too. An argument of ``NEUTRAL``
        is told once, and where it is at that value, whoever chose it, not at all.

        A change here, or of what is found, makes rows stale. They are run again, or moved by a
        migration that is committed with a test (bench/accuracy/migrations)."""
        settings = self.config.as_json()
        told = {
            name: settings[name] for name in DEFAULT.differences(self.config)
            if not _neutral(name, settings[name])
        }  # fmt: skip
        told["objective"] = left = _objective_defaults(self.config)
        if self.config.method in WITH_WAYS:
            defaults = {way: left.pop(f"{way}_weight", None) for way in WAYS}
            told["weights"] = {way: self.config.weights.get(way, defaults[way])
                               for way in self.config.ways}  # fmt: skip
            if self.found:
                told["kernels"] = [list(self.config.kernels or ())] * 2
            elif told["weights"].get("kernel") and self.config.kernels is None:
                told["kernels"] = _found_kernels(self.config)
        if self.form:
            told["form"] = self.form
        return told

    @property
    def fingerprint(self) -> str:
        """A short hash of ``told``."""
        return hashed(self.told)


@dataclass(frozen=True)
class Study:
    """All that a study file says.

    Attributes:
        name: of the file, without its ending.
        title, description: in text.
        baseline: the method that all are compared with.
        compare: further pairs of methods to compare, the second is subtracted.
        jobs: runs at a time, None to decide by the machine.
        threads: CPU threads of each run, None to share the cores out.
        train: settings of all runs, unless a condition, a network or a method has others.
        ways: settings of all runs that have some of the four ways, unless a method has others.
        conditions, networks, methods: by name, in the order of the file.
        runs: seed by seed, so that a study that isn't finished is balanced.
    """

    name: str
    title: str
    description: str
    baseline: str
    compare: tuple[tuple[str, str], ...]
    jobs: int | None
    threads: int | None
    train: Mapping[str, Any]
    ways: Mapping[str, Any]
    conditions: Mapping[str, Part]
    networks: Mapping[str, Part]
    methods: Mapping[str, Method]
    runs: tuple[PlannedRun, ...]

    @property
    def held_out(self) -> int:
        """Training images set aside and measured on in place of the test images; 0 for none."""
        return self.runs[0].config.validation_images


def hashed(told: Mapping[str, Any]) -> str:
    """Ten hex digits for what a run is told."""
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:10]


def _objective_defaults(config: TrainConfig) -> dict[str, Any]:
    objectives: list[Any] = [IMCL] if config.has_ways else []
    if config.method.startswith("song-chai"):
        objectives = [MultiHead]
    elif config.method in OF_QUALITIES:
        objectives.append(QualityAgnostic)
    return {
        p.name: p.default for o in objectives for p in inspect.signature(o).parameters.values()
        if p.default is not p.empty and not _neutral(p.name, p.default)
        and not (p.name in NEUTRAL and getattr(config, p.name, None) is not None)
    }  # fmt: skip


def _neutral(name: str, value: Any) -> bool:
    return name in NEUTRAL and NEUTRAL[name] == value


def _found_kernels(config: TrainConfig) -> list[list[str]]:
    """On grey and on coloured images: the data set's are not known before it is loaded."""
    return [
        _found_in(config.model, channels, config.width, config.stem_stride) for channels in (1, 3)
    ]


@cache
def _found_in(model: str, channels: int, width: int, stem_stride: int) -> list[str]:
    with torch.device("meta"):
        return find_kernels(
            models.build(model, 10, channels=channels, width=width, stem_stride=stem_stride)
        )
