"""Dense and token outputs of a network: where they have their classes, and what makes them."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}  # interpolation, by spatial dimensions


class Resize(NamedTuple):
    """How a network makes maps of logits as large as its output."""

    mode: str = "linear"
    align_corners: bool | None = False

    def __call__(self, maps: Tensor, size: torch.Size) -> Tensor:
        """(N, K, *positions), or tokens (N, K, T) that lie over the size, -> (N, K, *size).

        Raises:
            ValueError: they don't.
        """
        if maps.shape[2:] == size:
            return maps
        if maps.dim() != len(size) + 2:
            cells = grid(maps.shape[2], size)
            if cells is None:
                raise ValueError(
                    f"layers: expected tokens that lie row by row over logits of {tuple(size)}, "
                    f"as on example_input, got {maps.shape[2]} of them"
                )
            maps = maps.unflatten(2, cells)
            if cells == tuple(size):
                return maps
        mode = LINEAR[len(size)] if self.mode == "linear" else self.mode
        return F.interpolate(maps, size, mode=mode, align_corners=self.align_corners)


RESIZES = (Resize(), Resize(align_corners=True), Resize("nearest", None))


def class_dim(
    logits: Tensor,
    last: Sequence[tuple[Tensor | None, bool]],
    example: Sequence[Tensor],
    labels: Any,
    ranks: set[int],
) -> int:
    """1 for logits (B, K, *spatial), -1 for (B, *tokens, K): see ``IMCL``.

    Args:
        last: outputs of the modules, in order, and whether their channels are last.
        example: what the network was run on.
        labels: the target in the example, if there is one.
        ranks: number of spatial dimensions of the network's convolutions.
    """
    shape = logits.shape
    samples = {1: shape[:1] + shape[2:], -1: shape[:-1]}
    if isinstance(labels, Tensor):
        fits = [dim for dim, size in samples.items() if size == labels.shape]
        if len(fits) == 1:
            return fits[0]
    for output, channels_last in reversed(last):
        if output is not None and is_same(output, logits):
            return -1 if channels_last else 1
    for x in example:
        sizes = {x.shape[1:], x.shape[2:], x.shape[1:-1]}  # of ids, of images, of tokens
        fits = [dim for dim, size in samples.items() if size[1:] in sizes]
        if len(fits) == 1:
            return fits[0]
    return 1 if len(shape) - 2 in ranks else -1


def no_logits(found: Tensor, class_dim: int | None) -> str:
    """Why an output is none of logits, or nothing."""
    if found.is_floating_point() and found.dim() > 1 and found.shape[class_dim or 1] > 1:
        return ""
    return (
        "model: expected its output to be logits of at least 2 classes, (B, K), (B, K, *spatial) "
        f"or (B, *tokens, K), got {tuple(found.shape)}, {found.dtype}"
    )


def doubt(found: Tensor, example: Sequence[Tensor], labels: Any, criterion: bool) -> str:
    """Why an output of several dimensions is likelier an image or features than logits, or
    nothing."""
    indices = isinstance(labels, Tensor) and not labels.is_floating_point()
    image = any(x.shape == found.shape for x in example) and not indices
    if found.dim() < 3 or not (image or criterion):
        return ""
    return (
        f"model: its output {tuple(found.shape)} is taken for no logits, for "
        + ("it has the shape of an input" if image else "there is a criterion")
        + "; if it is, say where the classes are with class_dim=1 or class_dim=-1"
    )


def makers(
    logits: Tensor, outputs: Mapping[str, Tensor | None], class_dim: int | None
) -> dict[str, Resize]:
    """By path, the modules whose output is the logits, or is, of dense ones, when it is resized;
    and how."""
    found = {}
    for name, output in outputs.items():
        if output is None:
            continue
        if is_same(output, logits) or (class_dim is not None and _is_copy(output, logits)):
            found[name] = Resize()
        elif class_dim == 1 and _could_be(output, logits):
            size = logits.shape[2:]
            for resize in RESIZES if len(size) in LINEAR else ():
                if torch.allclose(resize(output, size), logits):
                    found[name] = resize
                    break
    return found


def rivals(
    logits: Tensor,
    outputs: Mapping[str, Tensor | None],
    linear: Collection[str],
    taken: Sequence[Tensor],
    class_dim: int,
) -> frozenset[str]:
    """Paths of the modules that give other outputs of as many classes, as auxiliary classifiers
    do: those of a convolution or linear layer that no module goes on with.

    Args:
        linear: paths of the convolutions and linear layers.
        taken: what the modules got.
    """
    ends = [
        output
        for name in linear
        if (output := outputs[name]) is not None
        and output.dim() == logits.dim()
        and output.shape[class_dim] == logits.shape[class_dim]
        and not any(is_same(output, x) for x in taken)
    ]
    return frozenset(
        name
        for name, output in outputs.items()
        if output is not None and any(is_same(output, end) for end in ends)
    )


def fits(positions: Sequence[int], size: Sequence[int]) -> bool:
    """Whether a head on features of some positions can give logits of a size."""
    if len(positions) == len(size):
        return True
    return len(positions) == 1 and grid(positions[0], size) is not None


def grid(count: int, size: Sequence[int]) -> tuple[int, ...] | None:
    """How so many tokens, row by row, lie over maps of a size: each a square of its pixels; None
    if they don't."""
    if not count:
        return None
    side = round((math.prod(size) / count) ** (1 / len(size)))
    if not side or any(n % side for n in size):
        return None
    cells = tuple(n // side for n in size)
    return cells if math.prod(cells) == count else None


def is_same(output: Tensor, other: Tensor) -> bool:
    """Whether two Tensors are the same numbers in the same order, not by chance."""
    return (
        output.shape == other.shape
        and output.data_ptr() == other.data_ptr()
        and output.stride() == other.stride()
    )


def _is_copy(output: Tensor, logits: Tensor) -> bool:
    """Whether logits are an output in another dtype, or resized to the size that it has."""
    return output.shape == logits.shape and torch.equal(output.to(logits.dtype), logits)


def _could_be(output: Tensor, logits: Tensor) -> bool:
    """Whether an output has the classes and the dimensions of the logits, at another size."""
    return (
        output.dim() == logits.dim()
        and output.shape[:2] == logits.shape[:2]
        and output.shape != logits.shape
        and output.dtype == logits.dtype
    )
