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
    """How the output of a module becomes the logits of a network.

    Attributes:
        class_dim: where the output has its classes, 1 or -1.
        mode, align_corners: of the interpolation of maps; "linear" is bilinear in two dimensions.
    """

    class_dim: int = 1
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


INTERPOLATIONS = (("linear", False), ("linear", True), ("nearest", None))
OF_IMAGES = (("bicubic", False), ("bicubic", True))  # there are these for two dimensions only


class Found(NamedTuple):
    """What is known of a network's output.

    Attributes:
        logits: the output, or None if it isn't taken for logits.
        why: then, why not.
        class_dim: where dense logits have their classes, 1 or -1; None for (B, K).
        makers: by path, the modules whose output is the logits, or becomes them; and how.
    """

    logits: Tensor | None
    why: str
    class_dim: int | None
    makers: dict[str, Resize]


def find(
    output: Tensor,
    outputs: Mapping[str, Tensor | None],
    channels_last: Collection[str],
    linear: Collection[str],
    example: Sequence[Tensor],
    labels: Any,
    ranks: set[int],
    *,
    where: int | None,
    sure: bool,
    named: bool,
    criterion: bool,
    least: int,
) -> Found:
    """Whether an output is logits, and where their classes are: see ``IMCL``.

    Args:
        outputs: of the modules, by path, in order.
        channels_last: paths of those whose channels come last.
        linear: paths of the convolutions and linear layers.
        example: what the network was run on.
        labels: the target in the example, if there is one.
        ranks: number of spatial dimensions of the network's convolutions.
        where: the classes' dimension, if the user has said it.
        sure: whether the user has said that it is logits, or where these are.
        named: whether the output is called logits.
        criterion: whether it may be meant for something else than cross entropy.
        least: number of classes.
    """
    dim = None
    if output.dim() > 2:
        by_modules = [(x, name in channels_last) for name, x in outputs.items()]
        dim = where or class_dim(output, by_modules, example, labels, ranks)
    if not output.is_floating_point() or output.dim() < 2 or output.shape[dim or 1] < least:
        why = (
            f"model: expected its output to be logits of at least {least} "
            f"class{'' if least == 1 else 'es'}, (B, K), (B, K, *spatial) or (B, *tokens, K), got "
            f"{tuple(output.shape)}, {output.dtype}"
        )
        return Found(None, why, None, {})
    made = makers(output, outputs, dim)
    if dim is not None and not sure:
        indices = isinstance(labels, Tensor) and not labels.is_floating_point()
        doubt = _doubt(output, dim, example, bool(made.keys() & set(linear)), criterion,
                       told=named or indices)  # fmt: skip
        if doubt:
            why = (
                f"model: its output {tuple(output.shape)} is taken for no logits, for {doubt}; if "
                "it is, say where the classes are with class_dim=1 or class_dim=-1"
            )
            return Found(None, why, None, {})
    return Found(output, "", dim, made)


def _doubt(
    output: Tensor, dim: int, example: Sequence[Tensor], linear: bool, criterion: bool, told: bool
) -> str:
    """Why a dense output may be an image or features, or nothing."""
    if criterion:
        return "there is a criterion"
    if told:
        return ""
    like = [x for x in example if x.is_floating_point() and x.dim() == output.dim()]
    if any(x.shape[dim] == output.shape[dim] for x in like):
        return "it has as many channels as an input"
    return "" if linear else "no linear layer or convolution computes it"


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


def makers(
    logits: Tensor, outputs: Mapping[str, Tensor | None], class_dim: int | None
) -> dict[str, Resize]:
    """By path, the modules whose output is the logits, or, where these are dense, becomes them;
    and how."""
    if class_dim is None:
        return {
            name: Resize() for name, x in outputs.items() if x is not None and is_same(x, logits)
        }
    if logits.is_meta:
        raise ValueError(
            "example_input: expected a device that computes, for dense logits are told by their "
            "values, got meta; build the IMCL on the CPU, and move it then"
        )
    found = {}
    for name, output in outputs.items():
        if output is not None and output.dim() > 2:
            for dim in (class_dim, -class_dim):
                how = _becomes(output.movedim(dim, 1), logits.movedim(class_dim, 1))
                if how is not None:
                    found[name] = how._replace(class_dim=dim)
                    break
    return found


def _becomes(maps: Tensor, logits: Tensor) -> Resize | None:
    """How (N, K, *positions) become logits (N, K, *size); None if they don't."""
    size = logits.shape[2:]
    if maps.shape[:2] != logits.shape[:2] or not fits(maps.shape[2:], size):
        return None
    maps = maps.to(logits.dtype)
    if math.prod(maps.shape[2:]) == math.prod(size):
        return Resize() if torch.equal(Resize()(maps, size), logits) else None
    ways = INTERPOLATIONS if len(size) in LINEAR else ()
    for mode, align_corners in (*ways, *OF_IMAGES) if len(size) == 2 else ways:
        how = Resize(1, mode, align_corners)
        if torch.allclose(how(maps, size), logits):
            return how
    return None


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
    return output is other or (
        share_memory(output, other)
        and output.shape == other.shape
        and output.stride() == other.stride()
        and output.storage_offset() == other.storage_offset()
    )


def share_memory(x: Tensor, y: Tensor) -> bool:
    """Whether what is written to one Tensor may be seen in the other."""
    if x is y:
        return True
    # Not by data_ptr(), which is 0 of all that are on the meta device.
    strided = x.layout == y.layout == torch.strided
    return strided and x.untyped_storage()._cdata == y.untyped_storage()._cdata
