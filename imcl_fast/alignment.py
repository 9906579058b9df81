"""How alike the layers of networks are in what they make of the same images: linear CKA."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from . import outputs
from .algebra import dependence as algebra
from .layers import trace
from .redundancy import call_name, find_representations, undisturbed
from .taps import observed
from .tracing import uncompiled

LEAST = 4  # images of a batch, below which HSIC has no unbiased estimate
OUTPUT = "output"  # of the network as a whole


class Alignment(NamedTuple):
    """Attributes:
    rows: names of the layers of a network, in the order in which it runs them.
    columns: those of the other, or of the same.
    cka: by row and column; 0 where a layer's features are constant.
    """

    rows: list[str]
    columns: list[str]
    cka: list[list[float]]


def alignment(
    model: nn.Module, batches: Iterable[Tensor], other: nn.Module | None = None
) -> Alignment:
    r"""Linear CKA of each layer with each (Kornblith et al., arXiv 1905.00414).

    It is 1 where the features of one layer are those of the other turned and scaled, and about 0
    where which images are alike in one says nothing of which are in the other. Estimated over
    minibatches: the ratio of sums over batches of the unbiased HSIC (arXiv 2010.15327), which
    doesn't depend on how large they are. It can be a little below 0 or above 1, as any estimate.

    Layers are the outputs of convolutions and blocks that ``redundancy.profile`` looks at, those of
    residual blocks, and the network's output. Networks run in eval mode, without gradients, and
    are left as they were.

    Args:
        model: any network.
        batches: of images (B, \*), as it takes them; those of fewer than 4 are left out.
        other: to compare it with, on the same images; None compares it with itself.

    Raises:
        ValueError: there is no batch of 4 images or more.
    """
    networks = [model] if other is None else [model, other]
    sides: list[_Layers] = []
    total: Tensor | None = None
    least: Tensor | None = None
    for images in batches:
        if len(images) < LEAST:
            continue
        if not sides:
            sides = [_Layers(network, images) for network in networks]
        layers = [layer for side in sides for layer in side.kernels(images)]
        kernels = algebra.Kernels(*map(torch.stack, zip(*layers, strict=True)))
        found = algebra.hsic(kernels.values, algebra.UNBIASED)
        spread = algebra.spread(kernels.values, algebra.UNBIASED)
        nothing = algebra.least_hsic(kernels, algebra.UNBIASED, spread)
        total = found if total is None else total + found
        least = nothing if least is None else least + nothing
    if total is None or least is None:
        raise ValueError(f"batches: expected one of at least {LEAST} images, got none")
    names = [side.names for side in sides]
    start = len(names[0]) if other is not None else 0
    cells = algebra.cka(total, least)[: len(names[0]), start:]
    return Alignment(names[0], names[-1], cells.tolist())


class _Layers:
    """Which outputs of a network are compared."""

    def __init__(self, network: nn.Module, images: Tensor) -> None:
        network = self.network = uncompiled(network)
        found = trace(network, images)
        blocks = {(name, 0): id(found.calls[name][0].output) for name in found.residual}
        # A stage returns what its last block does, and names it.
        last = {id(calls[0].output): (name, 0) for name, calls in found.calls.items()}
        with undisturbed(network, images.device):
            order, chosen = find_representations(network, images[:1])
        chosen |= {call for call, output in blocks.items() if last[output] == call}
        self.chosen = sorted(chosen, key=order.__getitem__)
        self.names = [*map(call_name, self.chosen), OUTPUT]

    def kernels(self, images: Tensor) -> list[algebra.Kernels]:
        """Of each layer, the features dropped as soon as they are seen."""
        found: dict[tuple[str, int], algebra.Kernels] = {}

        def record(call: tuple[str, int], module: nn.Module, inputs: tuple, output: Any) -> None:
            if call in wanted:
                found[call] = _kernel(output)

        wanted = set(self.chosen)
        with undisturbed(self.network, images.device), observed(self.network, record):
            last = self.network(images)
        return [*(found[call] for call in self.chosen), _kernel(outputs.logits(last))]


def _kernel(output: Any) -> algebra.Kernels:
    """(B, B) float64."""
    first = cast(Tensor, outputs.first_tensor(output)).detach()
    grams, _ = algebra.gram_forward([first], [1.0])
    return algebra.kernels(
        grams[0].double(), algebra.LINEAR, False, algebra.rounding([first], products=True)
    )
