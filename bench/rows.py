"""The rows of the tables: one operation on the shapes of one network, in one dtype and layout."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from imcl_fast import functional as F

from . import shapes
from .shapes import Shapes
from .timing import Loss

OPERATIONS = ("representation", "kernel", "consistency", "dependence")
VIEWS = 3  # of a dependence, side by side in its shapes
TEMPERATURE = 2.0
GPU_CONSISTENCIES = ((5, 128, 10), (5, 128, 1000), (5, 1024, 1000), (5, 256, 50257))
GPU_DTYPES = (torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Row:
    """An operation and what it is measured on.

    Attributes:
        operation: one of ``OPERATIONS``.
        work: whose shapes these are, as the tables call it.
        shapes: of the inputs: features (B, C, H, W), weights, one (B, K) per head, or each layer's
            features once for every view.
        channels_last: whether 4-D inputs lie so in memory.
        center: of the representation similarity.
        penalty: of the similarities.
        divergence: of the consistency.
        precision: for ``torch.set_float32_matmul_precision``.
        compiled: whether torch.compile competes; a compilation takes up to a minute.
    """

    operation: str
    work: str
    shapes: Shapes
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    center: bool = False
    penalty: str = "square"
    divergence: str = "kl"
    precision: str = "highest"
    compiled: bool = False

    @property
    def name(self) -> str:
        words = [self.operation, self.work, str(self.dtype).removeprefix("torch.")]
        words += ["channels_last"] if self.channels_last else []
        words += ["centred"] if self.center else []
        words += [self.penalty] if self.penalty != "square" else []
        words += [self.divergence] if self.divergence != "kl" else []
        words += [self.precision] if self.precision != "highest" else []
        return " ".join(words)

    @property
    def implemented_by(self) -> str:
        """The operation that others must have to be compared."""
        return self.operation if self.divergence == "kl" else "divergences"

    @property
    def bytes(self) -> int:
        """Of the inputs together."""
        return sum(torch.Size(shape).numel() for shape in self.shapes) * self.dtype.itemsize

    def inputs(self, seed: int, device: torch.device) -> list[Tensor]:
        """Fresh random leaves; features are as after a ReLU."""
        generator = torch.Generator(device).manual_seed(seed)
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        leaves = []
        for index, shape in enumerate(self.shapes):
            x = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
            if self.operation == "dependence" and index % VIEWS:
                x += leaves[index - index % VIEWS].detach()  # otherwise they depend on nothing
            if self.operation in ("representation", "dependence"):
                x.relu_()
            x = x.to(self.dtype)
            leaves.append(x.contiguous(memory_format=layout) if x.dim() == 4 else x)
        return [x.requires_grad_() for x in leaves]

    def target(self, device: torch.device) -> Tensor:
        batch, classes = self.shapes[0]
        generator = torch.Generator(device).manual_seed(0)
        return torch.randint(classes, (batch,), generator=generator, device=device)

    def loss(self, impl: str, device: torch.device) -> Loss:
        """The operation under one implementation, as a function of the inputs."""
        if self.operation == "representation":
            return lambda xs: F.representation_similarity(
                xs, penalty=self.penalty, center=self.center, impl=impl
            )
        if self.operation == "kernel":
            return lambda xs: F.kernel_similarity(xs, penalty=self.penalty, impl=impl)
        if self.operation == "dependence":
            return lambda xs: F.view_dependence([xs[v::VIEWS] for v in range(VIEWS)], impl=impl)
        y = self.target(device)
        return lambda xs: F.collaborative_consistency(
            xs, y, temperature=TEMPERATURE, divergence=self.divergence, impl=impl
        )

    @contextlib.contextmanager
    def settings(self) -> Iterator[None]:
        """The matmul precision of this row."""
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(self.precision)
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


def consistency(heads: int, batch: int, classes: int, **options) -> Row:
    return Row(
        "consistency", f"{heads} x {batch} x {classes}", heads * ((batch, classes),), **options
    )


def dependence(work: str, layers: Shapes, batch: int, **options) -> Row:
    shapes_ = tuple((batch, *shape[1:]) for shape in layers for _ in range(VIEWS))
    return Row("dependence", f"{VIEWS} x {work}, batch {batch}", shapes_, **options)


def rows(quick: bool) -> list[Row]:
    """All rows, or the few of a quick run."""
    half = {"dtype": torch.bfloat16}
    r18 = shapes.R18_FEATURES
    chosen = [
        Row("representation", "R18", r18, compiled=not quick),
        Row("representation", "R18", r18, center=True),
        Row("kernel", "R18", shapes.resnet18_weights(), compiled=not quick),
        consistency(5, 128, 1000, compiled=not quick),
    ]
    chosen.append(dependence("R18", r18, 64, compiled=not quick))
    if quick:
        return chosen
    features = {
        "VGG-16": shapes.VGG16_FEATURES,
        "R50": shapes.R50_FEATURES,
        "ConvNeXt-T": shapes.CONVNEXT_FEATURES,
    }
    weights = {
        "VGG-16": shapes.weights("vgg16"),
        "R50": shapes.weights("resnet50"),
        "ConvNeXt-T": shapes.weights("convnext_tiny"),
    }
    chosen += [
        Row("representation", "R18", r18, channels_last=True),
        Row("representation", "R18", r18, **half),
        Row("representation", "R18", r18, channels_last=True, **half),
        *(Row("representation", f"{b} x 256 x 8²", ((b, 256, 8, 8),)) for b in (1, 1024)),
        *(Row("representation", work, given) for work, given in features.items()),
        Row("representation", "R50", features["R50"], channels_last=True, **half),
        Row("kernel", "R18", shapes.resnet18_weights(), precision="medium"),
        Row("kernel", "R18", shapes.resnet18_weights(), channels_last=True),
        Row("kernel", "R18", shapes.resnet18_weights(), **half),
        *(Row("kernel", work, given) for work, given in weights.items()),
        Row("kernel", "R50", weights["R50"], **half),
        *(consistency(5, 128, classes) for classes in (10, 100)),
        consistency(5, 1, 1000),
        consistency(5, 1024, 1000),
        consistency(5, 128, 1000, **half),
        consistency(5, 128, 1000, divergence="jsd"),
        consistency(5, 64, 21841),
        consistency(5, 16, 128256),
        consistency(5, 16, 128256, **half),
        dependence("R18", r18, 64, **half),
        dependence("R18", r18, 64, channels_last=True),
        dependence("R18", r18, 256),
    ]
    return sorted(chosen, key=lambda row: OPERATIONS.index(row.operation))


def gpu_rows() -> list[Row]:
    """Those of ``make gpu``, the most telling ones first, for there may not be time for all."""
    found = []
    for dtype in GPU_DTYPES:
        found.append(Row("kernel", "R18", shapes.resnet18_weights(), dtype, compiled=True))
        found += _gpu_representations(dtype, center=False)
        found += [consistency(*sizes, dtype=dtype, compiled=True) for sizes in GPU_CONSISTENCIES]
        found.append(dependence("R18", shapes.R18_FEATURES, 64, dtype=dtype, compiled=True))
    for dtype in GPU_DTYPES:
        found += _gpu_representations(dtype, center=True)
    return found


def _gpu_representations(dtype: torch.dtype, center: bool) -> list[Row]:
    return [
        Row("representation", "R18", shapes.R18_FEATURES, dtype, layout, center, compiled=True)
        for layout in (True, False)
    ]
