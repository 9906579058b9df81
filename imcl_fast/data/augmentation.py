"""What training images go through at random.

Every augmentation is drawn and applied in two steps: ``draw`` takes all randomness from
one generator, a row of numbers per sample, and applying it to a sample needs no more than
its row. So a batch comes out the same wherever, and on however many processes, it is made.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .. import validation
from ..models import import_torchvision

FILLS = ("black", "edge")


@dataclass(frozen=True)
class PaddedCrop:
    """Shifts by up to ``pad`` pixels each way, and mirrors; for batches in memory.

    The same as a crop, at the images' own size, of the images padded on every side.

    Args:
        pad: in pixels, at least 0.
        flip: mirror every other image, left to right.
        fill: of what comes in from outside: ``"black"``, or ``"edge"`` to repeat the edge.

    Raises:
        TypeError, ValueError: an argument is none of these.
    """

    pad: int
    flip: bool = False
    fill: str = "black"

    def __post_init__(self) -> None:
        object.__setattr__(self, "pad", validation.integer("pad", self.pad))
        if self.pad < 0:
            raise ValueError(f"pad: expected at least 0 pixels, got {self.pad}")
        object.__setattr__(self, "flip", validation.boolean("flip", self.flip))
        validation.choice("fill", self.fill, FILLS)

    def scaled(self, factor: float) -> PaddedCrop:
        """The same for images ``factor`` times as large; some shift always remains."""
        return replace(self, pad=max(1, round(self.pad * factor)) if self.pad else 0)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """(count, 3) int64: rows and columns to shift by, and whether to mirror."""
        shifts = torch.randint(-self.pad, self.pad + 1, (count, 2), generator=generator)
        flips = torch.randint(0, 1 + self.flip, (count, 1), generator=generator)
        return torch.cat([shifts, flips], 1)

    def __call__(self, images: Tensor, draw: Tensor) -> Tensor:
        """(B, C, H, W) of any dtype, by a ``draw`` (B, 3) on the same device; a new Tensor."""
        count, channels, height, width = images.shape
        shift_rows, shift_columns, flips = draw.view(count, 3, 1).unbind(1)
        rows = torch.arange(height, device=images.device) + shift_rows  # [B, H]
        columns = torch.arange(width, device=images.device)
        columns = torch.where(flips == 1, width - 1 - columns, columns) + shift_columns  # [B, W]
        inside_rows, inside_columns = rows.clamp(0, height - 1), columns.clamp(0, width - 1)
        pixels = inside_rows.unsqueeze(2) * width + inside_columns.unsqueeze(1)  # [B, H, W]
        pixels = pixels.view(count, 1, height * width).expand(count, channels, height * width)
        result = images.reshape(count, channels, height * width).gather(2, pixels)
        result = result.view(images.shape)
        if self.fill == "black":
            inside = (rows == inside_rows).unsqueeze(2) & (columns == inside_columns).unsqueeze(1)
            result = result.mul_(inside.unsqueeze(1))
        return result


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Have torch's generator on the CPU and Python's start from ``seed``, and be afterwards as
    they were."""
    # torch.manual_seed would set the generators of other devices too, which dropout draws from.
    state = random.getstate()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(state)


@contextlib.contextmanager
def seeded_numpy(seed: int) -> Iterator[None]:
    """The same of NumPy's global generator, but for the second of a pair of normal numbers, which
    NumPy may have kept."""
    import numpy

    # Another bit generator in its place, for to read and write its state takes 90 microseconds.
    of_numpy: Any = numpy.random  # whose types lack two of these
    theirs = of_numpy.get_bit_generator()
    of_numpy.set_bit_generator(_bit_generator())
    of_numpy.seed(seed % 2**32)  # it takes no more
    try:
        yield
    finally:
        of_numpy.set_bit_generator(theirs)


@cache
def _bit_generator() -> Any:
    import numpy

    return numpy.random.MT19937(0)


class _BySeed:
    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """(count, 1) int64: a seed per sample."""
        return torch.randint(0, 2**63 - 1, (count, 1), generator=generator)


@dataclass(frozen=True)
class ResizedCrop(_BySeed):
    """torchvision's RandomResizedCrop (arXiv 1409.4842) and a mirror; for single PIL images.

    Args:
        size: height and width of the result in pixels.
    """

    size: int

    def __call__(self, image: Any, draw: Tensor) -> Tensor:
        """(3, size, size) uint8, by the ``draw`` (1,) of this sample."""
        with seeded(int(draw)):
            return _crops(self.size)[0](image)

    def central(self, image: Any) -> Tensor:
        """The image without augmentation: its central 7/8, as (3, size, size) uint8."""
        return _crops(self.size)[1](image)


class OwnTransforms(_BySeed):
    """The random transforms inside a Dataset of a user's own; for functions that read an image.

    What they take from torch's generator on the CPU, from Python's and from NumPy's global one is
    seeded for each sample; ``numpy.random.Generator``s of their own are theirs to seed.
    """

    def __call__(self, image: Any, draw: Tensor) -> Tensor:
        """What ``image()`` reads, (C, H, W), by the ``draw`` (1,) of this sample."""
        with seeded(int(draw)), seeded_numpy(int(draw)):
            return image()

    def central(self, image: Any) -> Tensor:
        """The image as the Dataset has it; what is random in that, always the same."""
        return self(image, torch.zeros(1, dtype=torch.int64))


Augmentation = PaddedCrop | ResizedCrop | OwnTransforms


# Made where they are used, so that a worker process imports torchvision by import_torchvision.
@cache
def _crops(size: int) -> tuple[Any, Any]:
    """A random crop and a central one."""
    v2 = transforms()
    random_crop = [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), v2.PILToTensor()]
    central_crop = [v2.Resize(size * 8 // 7), v2.CenterCrop(size), v2.PILToTensor()]
    return v2.Compose(random_crop), v2.Compose(central_crop)


def transforms() -> Any:
    """torchvision's transforms, of version 2."""
    import_torchvision()
    from torchvision.transforms import v2

    return v2
