"""Batches of a split. All randomness is a function of the seed, the epoch and the step, so
that a run which was resumed, or shared out to several processes, sees the same ones."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .augmentation import Augmentation, OwnTransforms, ResizedCrop
from .dataset import DataError, DataSet, Split
from .mixing import Mixing
from .quality import Quality

# Sets up to this size lie on the device; a larger one stays in host memory.
RESIDENT_BYTES = 2**30


# Images and labels, or the places of these images; of a sample its place and what was drawn.
Batches = Iterator[tuple[Tensor, Tensor]]
Sample = tuple[int, Tensor | None, Tensor | None]


class Order(NamedTuple):
    """One process's part of a batch, still to be made.

    Attributes:
        places: (b,) int64, of the samples in the split.
        draw: (b, k) int64, what the augmentation drew for them; None for none.
        seeds: (b, V) int64, of what is random in each of V qualities; None for none.
    """

    places: Tensor
    draw: Tensor | None
    seeds: Tensor | None


class TrainLoader:
    """Batches for training: every epoch in another random order, augmented.

    Args:
        split: what to train on, of ``data_set``.
        data_set: whose normalisation and augmentation is used.
        batch_size: of all processes together; a multiple of ``world``.
        augment: whether to augment.
        mixing: what mixes the images of a process's part of a batch, and their labels, at last.
        qualities: to see each augmented image at; without any there is no dimension of views.
        seed: of the order, the augmentation, the mixing and the qualities.
        device: where batches, and sets of up to 1 GiB as a whole, are put.
        rank, world: this process, and how many there are.
        workers: processes that decode image files; 0 decodes in this one. Sets in memory
            need none.

    The last batch of an epoch is left out if it would be smaller, unless it is the only
    one; that one leaves out what can't be shared out evenly.

    Raises:
        ValueError: the processes can't share a batch out evenly, or there is less than one image
            for each.
    """

    def __init__(
        self,
        split: Split,
        data_set: DataSet,
        *,
        batch_size: int,
        augment: bool,
        mixing: Mixing | None = None,
        qualities: Sequence[Quality] = (),
        seed: int,
        device: torch.device | str,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
    ) -> None:
        if batch_size % world:
            raise ValueError(
                f"batch_size: expected a multiple of the {world} processes (world) that share it, "
                f"got {batch_size}"
            )
        size = min(batch_size, len(split))
        self._batch = size - size % world
        if self._batch == 0:
            raise ValueError(
                f"split: expected at least one image for each of {world} processes, "
                f"got {len(split)}"
            )
        self._split = split
        self._seed = seed
        self._augmentation = data_set.augmentation if augment else None
        self._mixing = mixing
        self._qualities = tuple(qualities)
        share = self._batch // world
        self._mine = slice(rank * share, (rank + 1) * share)
        self._source = _Source(split, data_set, device, workers)

    def __len__(self) -> int:
        """Steps per epoch."""
        return len(self._split) // self._batch

    def epoch(self, epoch: int, first_step: int = 0) -> Batches:
        """The batches of an epoch, from ``first_step`` (counted from 0) on.

        Returns:
            Iterator over images (batch_size / world, C, H, W), or with V qualities
            (V, batch_size / world, C, H, W), float32 and normalised, and labels
            (batch_size / world,) int64, or mixed (batch_size / world, K) float32.

        Raises:
            DataError: an image file can't be read.
        """
        orders = self._orders(epoch, first_step)
        batches = self._source.batches(orders, self._augmentation, self._qualities)
        return batches if self._mixing is None else self._mixed(batches, epoch, first_step)

    def _mixed(self, batches: Batches, epoch: int, first_step: int) -> Batches:
        assert self._mixing is not None
        for step, (images, labels) in enumerate(batches, first_step):
            seed = stream(self._seed, epoch, step, "mixing").initial_seed()
            yield self._mixing(images, labels, seed)

    def _orders(self, epoch: int, first_step: int) -> Iterator[Order]:
        permutation = torch.randperm(len(self._split), generator=stream(self._seed, epoch))
        for step in range(first_step, len(self)):
            places = permutation[step * self._batch : (step + 1) * self._batch][self._mine]
            draw = None
            if self._augmentation is not None:
                # Drawn for all processes: who does which sample must not matter.
                generator = stream(self._seed, epoch, step)
                draw = self._augmentation.draw(self._batch, generator)[self._mine]
            seeds = None
            if self._qualities:
                generator = stream(self._seed, epoch, step, "qualities")
                shape = (self._batch, len(self._qualities))
                seeds = torch.randint(0, 2**63 - 1, shape, generator=generator)[self._mine]
            yield Order(places, draw, seeds)


class TestLoader:
    """Batches for evaluation: each image once, in order, as it is.

    Every process gets a part of the split of its own; together they have all of it. The
    parts differ by one image at most, and so may the last batches.

    Args:
        split, data_set, device, rank, world, workers: as for ``TrainLoader``.
        batch_size: of one process.
        quality: to see the images at; what is random in it is always the same.
    """

    __test__ = False  # no test class, whatever pytest makes of the name

    def __init__(
        self,
        split: Split,
        data_set: DataSet,
        *,
        batch_size: int,
        quality: Quality | None = None,
        device: torch.device | str,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
    ) -> None:
        self._quality = quality
        self._mine = range(len(split) * rank // world, len(split) * (rank + 1) // world)
        self._batch = batch_size
        self._source = _Source(split, data_set, device, workers)

    def __len__(self) -> int:
        """Number of batches."""
        return -(-len(self._mine) // self._batch)

    def __iter__(self) -> Batches:
        """Images (b, C, H, W), float32 and normalised, and labels (b,) int64."""
        starts = range(0, len(self._mine), self._batch)
        parts = (self._mine[start : start + self._batch] for start in starts)
        places = (torch.tensor(part) for part in parts)
        qualities = [] if self._quality is None else [self._quality]
        orders = (Order(part, None, part[:, None] if qualities else None) for part in places)
        for images, labels in self._source.batches(orders, None, qualities):
            yield images[0] if qualities else images, labels


def stream(*parts: int | str) -> torch.Generator:
    """A generator on the CPU whose numbers depend on ``parts``, and on nothing else."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


class _Source:
    """A split, in memory or read by worker processes, as normalised batches on the device."""

    def __init__(
        self, split: Split, data_set: DataSet, device: torch.device | str, workers: int
    ) -> None:
        self._images, self._labels = split.images, split.labels
        self._device, self._workers = torch.device(device), workers
        if isinstance(self._images, Tensor):
            if self._images.numel() <= RESIDENT_BYTES:
                self._images = self._images.to(self._device)
            self._labels = self._labels.to(self._images.device)
        own = data_set.augmentation
        self._central = own if isinstance(own, OwnTransforms) else ResizedCrop(data_set.shape[-1])
        mean, std = (torch.tensor(x, dtype=torch.float64) for x in (data_set.mean, data_set.std))
        self._scale, self._shift = (
            x.float().to(self._device).view(-1, 1, 1) for x in (1 / (255 * std), -mean / std)
        )

    def batches(
        self, orders: Iterator[Order], augment: Augmentation | None, qualities: Sequence[Quality]
    ) -> Batches:
        read = self._in_memory if isinstance(self._images, Tensor) else self._decoded
        for images, places in read(orders, augment, qualities):
            images = _send(images, self._device).float().mul_(self._scale).add_(self._shift)
            yield images, _send(self._labels[places], self._device)

    def _in_memory(
        self, orders: Iterator[Order], augment: Augmentation | None, qualities: Sequence[Quality]
    ) -> Batches:
        """Images and their places, augmented where they lie."""
        assert isinstance(self._images, Tensor)
        home = self._images.device
        for places, draw, seeds in orders:
            places = _send(places, home)
            images = self._images[places]
            if augment is not None and draw is not None:
                images = augment(images, _send(draw, home))
            if seeds is not None:
                images = _seen(images, qualities, seeds)
            yield images, places

    def _decoded(
        self, orders: Iterator[Order], augment: Augmentation | None, qualities: Sequence[Quality]
    ) -> Batches:
        """Images and their places, decoded and augmented by worker processes."""
        assert not isinstance(self._images, Tensor)
        loader: DataLoader = DataLoader(
            _Samples(self._images, augment or self._central, qualities),
            batch_sampler=_samplewise(orders),
            num_workers=self._workers,
            collate_fn=_collate,
            pin_memory=self._device.type == "cuda",
            generator=torch.Generator(),  # or it would draw from torch's global one
            worker_init_fn=_leave_group,
        )
        for batch in loader:
            if isinstance(batch, DataError):
                raise batch
            images, places = batch
            yield images.transpose(0, 1) if qualities else images, places


def _leave_group(worker: int) -> None:
    """A signal to the whole group, as a batch system sends it, is the run's own to answer: a worker
    that dies of it would end the run in the middle of a step."""
    with contextlib.suppress(OSError):
        os.setpgid(0, 0)


def _samplewise(orders: Iterator[Order]) -> Iterator[list[Sample]]:
    """Orders as a DataLoader takes them: a list of (place, draw, seeds) for each batch."""
    for places, *drawn in orders:
        each = ([None] * len(places) if rows is None else list(rows) for rows in drawn)
        yield list(zip(places.tolist(), *each, strict=True))


class _Samples(Dataset):
    """Decodes and augments one image, and makes its qualities. An error is returned: raised in a
    worker, it would reach the user wrapped in that worker's traceback."""

    def __init__(self, images: Dataset, augmentation: Any, qualities: Sequence[Quality]) -> None:
        self._images = images
        self._augmentation = augmentation
        self._qualities = qualities

    def __getitem__(self, sample: Sample) -> tuple[Tensor, int] | DataError:
        place, draw, seeds = sample
        augment = self._augmentation
        try:
            image = self._images[place]
            image = augment.central(image) if draw is None else augment(image, draw)
            if seeds is not None:
                image = _seen(image[None], self._qualities, seeds[None])[:, 0]
        except DataError as error:
            return error
        return image, place


def _seen(images: Tensor, qualities: Sequence[Quality], seeds: Tensor) -> Tensor:
    """(B, C, H, W) at several qualities, (V, B, C, H, W)."""
    return torch.stack([
        quality(images, own) for quality, own in zip(qualities, seeds.unbind(1), strict=True)
    ])


def _collate(samples: list[tuple[Tensor, int] | DataError]) -> Any:
    for sample in samples:
        if isinstance(sample, DataError):
            return sample
    images, places = zip(*samples, strict=True)
    return torch.stack(images), torch.tensor(places)


def _send(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on ``device``, without waiting for what the device is doing."""
    if tensor.device == device or device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
