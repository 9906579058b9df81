"""From a configuration to what is trained: the data with its wrong labels, and the network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from .. import data, implementations, objectives, outputs
from ..data import DataSet, Split
from ..data.loader import TestLoader, TrainLoader
from ..data.mixing import Mixing
from ..data.noise import label_noise
from ..data.own import from_torch
from ..data.quality import Quality
from ..data.split import subset, validation_split
from ..modes import evaluating
from ..runs.config import TrainConfig
from ..runs.errors import UsageError, as_usage_error, one_line
from .distributed import Processes

# Enough to tell a percent of memorised labels, few enough to cost little per epoch.
TRAIN_MEASURED = 4096


@dataclass(frozen=True, eq=False)
class Material:
    """What a run trains and measures on.

    Attributes:
        data_set: names, normalisation and augmentation.
        train: the training images with the labels to train on.
        true_labels: (N,) int64, theirs before label noise.
        test: what is measured on: the test split, or the held-out images.
        measured: (n,) int64, places in ``train`` of the images that show how much of the
            training labels has been learnt; n is at most ``TRAIN_MEASURED``.
    """

    data_set: DataSet
    train: Split
    true_labels: Tensor
    test: Split
    measured: Tensor

    @property
    def noisy(self) -> bool:
        """Whether any training label is wrong on purpose."""
        return not torch.equal(self.train.labels, self.true_labels)

    def train_loader(self, config: TrainConfig, processes: Processes) -> TrainLoader:
        """Batches to train on, this process's share of them.

        Raises:
            UsageError: the processes can't share a batch out evenly.
        """
        with as_usage_error(ValueError, ImportError):
            mixing = None
            if config.mixup is not None or config.cutmix is not None:
                mixing = Mixing(config.mixup, config.cutmix, len(self.data_set.classes))
            return TrainLoader(
                self.train,
                self.data_set,
                batch_size=config.batch_size,
                augment=config.augment,
                mixing=mixing,
                qualities=config.trained_on,
                seed=config.seed,
                device=processes.device,
                rank=processes.rank,
                world=processes.world,
                workers=config.workers,
            )

    def test_loader(
        self,
        split: Split,
        config: TrainConfig,
        processes: Processes,
        quality: Quality | None = None,
    ) -> TestLoader:
        """Batches of ``split`` as they are or at a quality, this process's share of them."""
        return TestLoader(
            split,
            self.data_set,
            batch_size=max(config.batch_size // processes.world, 1),
            quality=quality,
            device=processes.device,
            rank=processes.rank,
            world=processes.world,
            workers=config.workers,
        )


def prepare_data(
    config: TrainConfig, data_set: DataSet | tuple[Dataset, Dataset] | None = None
) -> Material:
    """Load, set aside, cut down, and make labels wrong: in this order.

    Raises:
        UsageError: the data isn't there, is damaged, or has too few images.
    """
    with as_usage_error(OSError, ValueError, ImportError):
        if data_set is None:
            data_set = data.load(
                config.dataset,
                config.data_root,
                download=config.download,
                image_size=config.image_size,
            )
        elif not isinstance(data_set, DataSet):
            data_set = _of_torch(data_set, config)
        train, test = data_set.train, data_set.test
        if config.validation_images:
            train, test = validation_split(
                train, config.validation_images, config.split_seed, "validation_images"
            )
        if config.train_images is not None:
            train = subset(train, config.train_images, config.split_seed, "train_images")
        labels = label_noise(
            train.labels,
            len(data_set.classes),
            config.label_noise,
            config.noise_type,
            config.seed,
            data_set.noise_pairs,
        )
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(config.split_seed))
    return Material(
        data_set=data_set,
        train=Split(train.images, labels),
        true_labels=train.labels,
        test=test,
        measured=order[:TRAIN_MEASURED].sort().values,
    )


def _of_torch(pair: Any, config: TrainConfig) -> DataSet:
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise TypeError(
            "data_set: expected a DataSet, or two torch Datasets (train, test), got "
            f"{type(pair).__name__}"
        )
    if config.image_size is not None:
        raise ValueError(
            "image_size: expected None with Datasets of your own, got "
            f"{config.image_size}; resize images by their transform"
        )
    return from_torch(*pair)


def check_implementation(config: TrainConfig, device: torch.device) -> None:
    """See that the fused losses can run as the configuration wants them.

    Raises:
        UsageError: they can't, and why.
    """
    if config.impl != "auto":
        with as_usage_error(RuntimeError):
            implementations.choose(config.impl, "pairwise", device, [torch.float32])


def build_objective(
    config: TrainConfig, network: nn.Module, material: Material, processes: Processes
) -> nn.Module:
    """``network``, on its device, in what it is trained with.

    Raises:
        UsageError: the network doesn't fit the data or the objective, or an option the
            method.
    """
    shape = material.data_set.shape
    example = torch.zeros(2, *shape, device=processes.device)
    if config.channels_last:
        example = example.contiguous(memory_format=torch.channels_last)
    options = config.objective_options
    try:
        _check_classes(network, example, len(material.data_set.classes))
        return objectives.build(
            config.method,
            network,
            example,
            ways=config.ways,
            weights=config.weights,
            label_smoothing=config.label_smoothing,
            shard_kernels=processes.world > 1,
            impl=config.impl,
            **options,
        ).to(processes.device)
    except (TypeError, ValueError, RuntimeError) as error:
        message = str(error).split("\n")[0]
        for option in options:
            if f"unexpected keyword argument '{option}'" in message:
                message = f"{option}: method {config.method} has no such setting"
        raise UsageError(message) from error


def _check_classes(network: nn.Module, example: Tensor, classes: int) -> None:
    try:
        with evaluating(network), torch.no_grad():
            output = network(example)
    except Exception as error:  # whatever the network's own code raises
        raise ValueError(
            f"model: can't run on images {tuple(example.shape[1:])}; try another image_size "
            f"({type(error).__name__}: {one_line(error)})"
        ) from error
    shape = tuple(outputs.logits(output).shape)
    if shape != (len(example), classes):
        raise ValueError(
            f"model: expected logits of the data's {classes} classes, its output for "
            f"{len(example)} images has shape {shape}"
        )
