"""``Trainer``: one run from its configuration to its results."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..alignment import LEAST, alignment
from ..data import DataError, DataSet
from ..data.quality import Quality
from ..data.split import take
from ..ilr import MultiHead
from ..imcl import IMCL
from ..objectives import WITH_WAYS, CrossEntropy
from ..plan import acted_on
from ..redundancy import profile
from ..runs.config import SETTINGS, TrainConfig, argument_of
from ..runs.errors import as_usage_error, one_line
from ..runs.folder import (
    AFTER,
    AT_QUALITY,
    BEFORE,
    CKA_AFTER,
    CKA_BEFORE,
    LOG,
    SUMMARY,
    WEIGHTS,
)
from ..runs.network import build_network
from .distributed import Processes, joined
from .fingerprints import fingerprints
from .interruption import Interruption
from .loop import Loop
from .preparation import Material, build_objective, check_implementation, prepare_data
from .process import check_environment, peak_memory, seed, settings
from .progress import Console, Observer
from .records import Records
from .way_costs import way_seconds

PROFILED_IMAGES = 32
ALIGNED_IMAGES, ALIGNED_AT_ONCE = 256, 64
# What measuring the ways after training may take: a share of the training time, and seconds.
WAYS_SHARE, WAYS_SECONDS = 0.05, 2.0


class Trainer:
    """A training run, also one process of several if torchrun started it.

    Args:
        config: every setting of the run. Without ``run_dir`` nothing is written. The report is
            ``reports.html.write_report``'s to write, when the run is over.
        data_set: to train on instead of the one that ``config`` names; also two map-style torch
            Datasets of (image, label), to train and to measure on, whose own transforms take the
            place of augmentation: see ``data.own.from_torch``.
        network: to train instead of the one that ``config`` names: any classifier of the
            data's images. It is trained in place and moved to the run's device. Given in
            train mode, its parts in eval mode are frozen: batch normalisation keeps its
            statistics, dropout drops nothing. Given in eval mode, as after loading, all of it
            is put in train mode.
        observer: told what happens; by default a ``Console``.

    Attributes:
        network: after ``fit`` the plain network to deploy, in eval mode; the averaged one if
            there is a moving average.
        rows: after ``fit`` those of metrics.csv.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        data_set: DataSet | tuple[Dataset, Dataset] | None = None,
        network: nn.Module | None = None,
        observer: Observer | None = None,
    ) -> None:
        self.config = config
        self.network = self._given = network
        self.rows: list[dict[str, float]] = []
        self._data_set = data_set
        self._observer = observer

    def fit(self) -> dict[str, Any]:
        """Train from the beginning, or from where the run folder's checkpoints allow.

        Generators of random numbers, threads and determinism are afterwards as they were.

        Returns:
            The results, as summary.json holds them.

        Raises:
            TypeError, ValueError: ``data_set`` or ``network`` is none; the message names it.
            UsageError: the settings, the environment, the data or the run folder don't allow the
                run; another process may be training in that folder.
            CheckpointError: there are checkpoints to resume from, and none can be read.
            NonFiniteError: the loss or the weights are no longer numbers.
            DiskFullError, OSError: a file of the run folder can't be written, for there is no room,
                or for another reason.
            Interrupted: SIGINT or SIGTERM came; the state was saved if there is a run folder.
        """
        config, folder = self.config, self.config.run_dir
        check_environment()
        with (
            joined(config.device) as processes,
            settings(config, processes.device),
            contextlib.ExitStack() as claim,
        ):
            observer = Observer()
            if processes.first:
                observer = self._observer or Console()
            check_implementation(config, processes.device)
            material = prepare_data(config, self._data_set)
            seed(config.seed, processes.device)
            network = self._given
            if network is None:
                network = build_network(config, material.data_set)
            records = None
            if folder is not None:
                processes.on_first(lambda: claim.enter_context(Records.claim(folder, config)))
                records = Records(folder) if processes.first else None
                observer.logs_to(folder / LOG)
            loop = Loop(config, processes, material, network, records, observer)
            own = self._own(material)
            # From here on, what is random in a step: each process drops out other features.
            seed(config.seed + 7919 * processes.rank, processes.device)
            try:
                with as_usage_error(DataError):  # an image file can't be read
                    with Interruption() as interruption:
                        _begin(loop, own)
                        loop.train(interruption)
                    observer.finished()
                    summary = _finish(loop, own)
            finally:
                observer.finished()
                if records is not None:
                    records.close()
            self.network, self.rows = loop.measured.eval(), loop.state.rows
        return summary

    def _own(self, material: Material) -> dict[str, str]:
        """What was given in place of what the configuration names, as it is called."""
        own = {}
        if material.data_set.name != self.config.dataset:
            own["dataset"] = material.data_set.name
        if self._given is not None:
            own["model"] = type(self._given).__name__
        return own


def _begin(loop: Loop, own: Mapping[str, str]) -> None:
    """Take up what there is of the run, or write down what it starts from."""
    config, material, records = loop.config, loop.material, loop.records
    resumed = loop.resume()
    if records is not None:
        if resumed:
            records.extend(config)
            damage = records.go_on(loop.state.step, loop.state.rows)
            if damage is not None:
                loop.observer.said(damage)
        else:
            noise = None
            if material.noisy:
                noise = {"original": material.true_labels, "noisy": material.train.labels}
            used = _used(loop)
            if own:
                used["own"] = dict(own)
            if prints := fingerprints(material, loop.plain, own):
                used["fingerprints"] = prints
            records.begin(config, used, noise)
            if config.report:
                _look(loop, records, BEFORE, CKA_BEFORE)
        if config.tensorboard and not records.open_board(loop.state.step):
            loop.observer.said("TensorBoard isn't installed: its files are left out")
    if not resumed:
        loop.observer.said(_description(config, material, loop))


def _used(loop: Loop) -> dict[str, Any]:
    """The settings as they turned out, and what each way acts on; see ``Run.used``."""
    material, objective = loop.material, loop.state.objective
    settings: dict[str, Any] = {
        "image_size": material.data_set.shape[-1],
        "train_images": len(material.train),
        "threads": torch.get_num_threads(),
        "device": str(loop.processes.device),
    }
    arguments = {name: argument_of(name) for name in SETTINGS}
    if isinstance(objective, MultiHead):
        arguments["multilayer_temperature"] = "temperature"
    settings |= {
        name: getattr(objective, argument)
        for name, argument in arguments.items()
        if argument is not None and hasattr(objective, argument)
    }
    if not isinstance(objective, IMCL):
        return {"settings": settings}
    paths = acted_on(objective)
    weights = {way: getattr(objective, f"{way}_weight") for way in paths}
    return {"settings": settings, "weights": weights, "paths": paths}


def _description(config: TrainConfig, material: Material, loop: Loop) -> str:
    wrong = int((material.train.labels != material.true_labels).sum())
    where = "test images"
    if config.validation_images:
        where = "held-out training images, NOT test images"
    processes = loop.processes
    plain = isinstance(loop.state.objective, CrossEntropy)
    alphas = {"mixup": config.mixup, "cutmix": config.cutmix}
    mixed = [f"{name} {alpha:g}" for name, alpha in alphas.items() if alpha is not None]
    return (
        f"{'plain cross entropy' if plain else config.label} on {material.data_set.name}: "
        f"{len(material.train)} training images"
        + (f" ({wrong} with a wrong label)" if wrong else "")
        + (f", mixed by {' or '.join(mixed)}" if mixed else "")
        + (f", trained on as {_names(config.trained_on)}" if config.trained_on else "")
        + f", measured on {len(material.test)} {where}"
        + (f" as {_names(config.measured_on)}, and their mean" if config.measured_on else "")
        + f"; train accuracy is that of {len(material.measured)} training images without "
        f"augmentation; {loop.steps_per_epoch} steps per epoch on {processes.device}"
        + (f", {processes.world} processes" if processes.world > 1 else "")
    )


def _names(qualities: Sequence[Quality]) -> str:
    return ", ".join(quality.name for quality in qualities)


def _finish(loop: Loop, own: Mapping[str, str]) -> dict[str, Any]:
    """The results, written down with all that is made of them."""
    summary = {**_summary(loop), **own}
    config, records = loop.config, loop.records
    if records is None:
        return summary
    records.tensors(WEIGHTS, loop.measured.state_dict())
    if loop.last_batch is None:  # nothing was left to train: what it took is known from before
        summary |= records.measured_before()
    costs = _way_seconds(loop, summary["seconds"])
    if costs is not None:
        summary["way_seconds"] = costs
    if config.report:
        _look(loop, records, AFTER, CKA_AFTER)
    records.json(SUMMARY, summary)  # which is what tells that it has ended
    return summary


def _summary(loop: Loop) -> dict[str, Any]:
    config, rows, material = loop.config, loop.state.rows, loop.material
    measured = [row for row in rows if "test_accuracy" in row]
    best = max(measured, key=lambda row: row["test_accuracy"])
    peak, of = peak_memory(loop.processes.device)
    per_step = [row["seconds"] / loop.steps_per_epoch for row in rows]
    summary = {
        "method": config.method,
        "ways": list(config.ways) if config.method in WITH_WAYS else [],
        "dataset": material.data_set.name,
        "model": config.model,
        "seed": config.seed,
        "label_noise": config.label_noise,
        "noise_type": config.noise_type,
        "measured_on": "validation" if config.validation_images else "test",
        "last_test_accuracy": rows[-1]["test_accuracy"],
        "best_test_accuracy": best["test_accuracy"],
        "best_epoch": best["epoch"],
        "train_accuracy": rows[-1]["train_accuracy"],
        "train_images": len(material.train),
        "train_images_measured": len(material.measured),
        "epochs": len(rows),
        "steps": loop.state.step,
        "processes": loop.processes.world,
        "seconds": sum(row["seconds"] for row in rows),
        "images_per_second": statistics.median(row["images_per_second"] for row in rows),
        "seconds_per_step": statistics.median(per_step),
        "peak_memory_bytes": peak,
        "peak_memory_of": of,
    }
    if "fit_noisy" in rows[-1]:
        summary["fit_noisy"] = rows[-1]["fit_noisy"]
    if config.measured_on:
        summary["last_test_accuracy_at"] = {
            quality.name: rows[-1][f"{AT_QUALITY}{quality.name}"] for quality in config.measured_on
        }
    return summary


def _look(loop: Loop, records: Records, redundancy: str, cka: str) -> None:
    """What the report shows of the network as it is, into two files."""
    images = _images(loop, ALIGNED_IMAGES)
    records.json(redundancy, profile(loop.measured, images[:PROFILED_IMAGES]))
    if len(images) >= LEAST:
        records.json(cka, alignment(loop.measured, images.split(ALIGNED_AT_ONCE))._asdict())


def _images(loop: Loop, count: int) -> Tensor:
    """The first ones that are measured on."""
    some = take(loop.material.test, torch.arange(min(count, len(loop.material.test))))
    alone = Processes(0, 1, loop.processes.device)
    batches = loop.material.test_loader(some, loop.config, alone)
    return torch.cat([images for images, _ in batches])


def _way_seconds(loop: Loop, trained: float) -> dict[str, float] | None:
    """What each way costs per step on average; None if there was too little time to tell, or
    nothing to measure."""
    config, objective = loop.config, loop.state.objective
    wanted = config.measure_ways and config.method == "imcl" and bool(config.ways)
    if not wanted or loop.processes.world > 1 or loop.last_batch is None:
        return None

    def build(network: nn.Module, without: str | None) -> nn.Module:
        return build_objective(_less(config, without), network, loop.material, loop.processes)

    allowed = max(WAYS_SECONDS, WAYS_SHARE * trained)
    why = f"to measure it would take more than {allowed:.1f} s"
    try:
        costs = way_seconds(
            loop.plain, build, config.ways, loop.forward_backward, *loop.last_batch, allowed=allowed
        )
    except Exception as error:  # of a copy of the user's network; the run has come to its end
        costs, why = None, f"{type(error).__name__}: {one_line(error)}"
    if costs is None:
        loop.observer.said(f"What each way costs is left out: {why}")
    return costs and {
        way: cost / getattr(objective, f"{way}_interval", 1) for way, cost in costs.items()
    }


def _less(config: TrainConfig, without: str | None) -> TrainConfig:
    """``config`` without one way (or None), and the others in every step: what a way costs is seen
    where it is computed, and spread over its interval."""
    weights = config.weights if without is None else {**config.weights, without: 0.0}
    options: dict[str, Any] = {"representation_interval": 1, "kernel_interval": 1}
    if all(weights.get(way) == 0 for way in config.ways):  # cross entropy has none
        options = dict.fromkeys(name for name in SETTINGS if argument_of(name))
    return replace(config, weights=weights, **options)
