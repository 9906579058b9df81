"""Images at other qualities than their own: compressed, downsampled, blurred, noisy."""

from __future__ import annotations

import io
import math
import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .dataset import DataError

RAW = "raw"
# By kind: what its number is, the lowest and the highest that there are.
KINDS = {
    "jpeg": ("JPEG's quality, a whole number", 1, 100),
    "down": ("how many times smaller, a whole number", 2, 64),
    "blur": ("the deviation of a Gaussian in pixels", 0.1, 64),
    "noise": ("the deviation of Gaussian noise, white being 1", 0.001, 1),
}


@dataclass(frozen=True)
class Quality:
    """What becomes of an image: ``Quality.named("jpeg20")``.

    ``raw`` leaves it as it is; ``jpeg20`` compresses it with that quality, ``down2`` makes it half
    as large and as large as it was again, ``blur1.5`` and ``noise0.1`` do what they say.
    """

    name: str
    kind: str = RAW
    amount: float = 0.0

    @classmethod
    def named(cls, name: str) -> Quality:
        """Raises ValueError where there is none of this name."""
        if name == RAW:
            return cls(RAW)
        match = re.fullmatch(r"([a-z]+)(\d+(?:\.\d+)?)", name)
        if match is None or match[1] not in KINDS:
            known = ", ".join([RAW, *(f"{kind}N" for kind in KINDS)])
            raise ValueError(f"qualities: expected some of {known} with a number N, got {name!r}")
        kind, amount = match[1], float(match[2])
        what, low, high = KINDS[kind]
        whole = "whole" not in what or amount.is_integer()
        if not (low <= amount <= high and whole):
            raise ValueError(
                f"qualities: expected for {kind} {what}, from {low} to {high}, got {name!r}"
            )
        return cls(name, kind, amount)

    def __call__(self, images: Tensor, seeds: Tensor) -> Tensor:
        """Images (B, C, H, W) uint8 at this quality; what is random in it by ``seeds`` (B,).

        Raises:
            DataError: they aren't uint8, or JPEG doesn't know as many channels.
        """
        if self.kind == RAW:
            return images
        if images.dtype != torch.uint8:
            raise DataError(
                f"qualities: expected images of uint8, which {self.name} is made of, got "
                f"{images.dtype}; leave floating images and normalising to the trainer"
            )
        if self.kind == "jpeg":
            return _jpeg(images, int(self.amount))
        if self.kind == "noise":
            return _rounded(images + 255 * self.amount * _normal(images, seeds))
        if self.kind == "blur":
            return _rounded(_blurred(images.float(), self.amount))
        size = [max(1, round(length / self.amount)) for length in images.shape[-2:]]
        small = F.interpolate(images.float(), size, mode="area")
        return _rounded(F.interpolate(small, images.shape[-2:], mode="bilinear"))


def _rounded(images: Tensor) -> Tensor:
    return images.round().clamp(0, 255).to(torch.uint8)


def _normal(images: Tensor, seeds: Tensor) -> Tensor:
    """Noise for each image by its own seed, wherever and in whatever batch it is."""
    noise = torch.empty(images.shape, dtype=torch.float32)
    generator = torch.Generator()
    for each, seed in zip(noise, seeds.tolist(), strict=True):
        each.normal_(generator=generator.manual_seed(seed))
    return noise.to(images.device)


def _blurred(images: Tensor, deviation: float) -> Tensor:
    """By one axis after the other; what lies outside is the edge's."""
    radius = math.ceil(3 * deviation)
    places = torch.arange(-radius, radius + 1, dtype=torch.float64)
    weights = torch.exp(-places.square() / (2 * deviation**2))
    channels = images.shape[1]
    kernel = (weights / weights.sum()).to(images).expand(channels, 1, 1, -1)
    images = F.pad(images, [radius] * 4, mode="replicate")
    images = F.conv2d(images, kernel, groups=channels)
    return F.conv2d(images, kernel.transpose(-1, -2), groups=channels)


def _jpeg(images: Tensor, quality: int) -> Tensor:
    import numpy
    from PIL import Image

    channels = images.shape[1]
    if channels not in (1, 3):
        raise DataError(f"qualities: expected images of 1 or 3 channels for JPEG, got {channels}")
    back = []
    for image in images.cpu().movedim(1, -1).numpy():
        file = io.BytesIO()
        pixels = Image.fromarray(image[..., 0] if channels == 1 else image)
        pixels.save(file, "JPEG", quality=quality)
        array = numpy.array(Image.open(file)).reshape(image.shape)
        back.append(torch.from_numpy(array).movedim(-1, 0))
    return torch.stack(back).to(images.device)
