"""How much of a network is redundant: how alike its kernels and its channels are.

The matrices are those of ``imcl_fast.functional``: one of a layer's kernels, and for
every image one of a layer's channels over its pixels. Pairs of rows are looked at in
blocks, so that a layer of 32,000 rows needs no matrix of 32,000 x 32,000.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from .autograd import without_autocast
from .layers import PASSIVE, spatial_ranks
from .modes import evaluating
from .reference import CENTRED_DEAD_RATIO
from .taps import observed
from .tracing import eager, uncompiled

BINS = 40
HEAT_MAP_SIZE = 64
BLOCK = 1 << 22  # numbers held at once, beside the matrix itself
FACTORISED = 4096  # rows or columns, whichever are fewer; beyond, a spectrum takes minutes
EPS = 1e-12
# Modules that finish what the layer before them began.
FINISHING = (
    "torch.nn.modules.activation",
    "torch.nn.modules.batchnorm",
    "torch.nn.modules.dropout",
    "torch.nn.modules.instancenorm",
    "torch.nn.modules.normalization",
)


def profile(
    model: nn.Module, images: Tensor, *, center: bool = True, batch_size: int = 32
) -> list[dict[str, Any]]:
    r"""The redundancy of every layer of any network, in the order in which it is run.

    Kernels are the weights of all convolution and linear layers with two rows or more.
    Representations are the outputs (B, C, \*spatial), C >= 2, of more than one pixel, of
    layers and blocks, after the normalisation and the activation that follow at once;
    poolings are left out, for they only shrink what there is. The network runs in eval
    mode and without gradients, and is left as it was.

    Args:
        model: any network; what it returns doesn't matter.
        images: (B, ...), as ``model`` takes them. A few dozen tell as much as many.
        center: subtract each channel's mean over its pixels from representations first,
            as ``IMCL`` does unless told otherwise; kernels never are centred.
        batch_size: images that the network is run on at once.

    Returns:
        One dict per layer, all of it ready for JSON:

        * ``name``: path of the module; `` (call 2)`` follows where it runs again;
        * ``kind``: ``"representation"`` or ``"kernel"``;
        * ``rows`` N and ``columns`` D of a matrix;
        * ``mean_abs_cos``, ``mean_square_cos``: means over the N(N-1) ordered pairs of rows
          and over the images of \|cos\| and of cos^2. Dead rows count as 0;
        * ``dead_share``: of rows whose norm is at most 1e-12 (centred: or 1e-5 of what it
          was);
        * ``effective_rank``: exp of the entropy of the singular values divided by their
          sum (Roy & Vetterli, EUSIPCO 2007), mean over the images. Of a matrix of zeros it
          is 0; it is None where both N and D exceed 4096;
        * ``welch_bound``: what ``mean_square_cos`` of N live rows can't be below,
          max(0, (N-D)/(D(N-1))) (Welch 1974), with D-1 instead of D if centred;
        * ``histogram``: how many unordered pairs have \|cos\| in each of 40 equal parts of
          [0, 1], over all images;
        * ``heatmap``: \|cos\| of every pair, mean over the images, the diagonal 0; of more
          than 64 rows each of 64 x 64 cells is the mean over a block of pairs.

        Where a matrix is not finite, what would be computed from it is None.

    Raises:
        TypeError, ValueError: ``images`` is no batch of at least one image, or
            ``batch_size`` is less than 1.
    """
    if not isinstance(images, Tensor):
        raise TypeError(f"images: expected a Tensor, got {type(images).__name__}")
    if images.dim() < 2 or len(images) < 1:
        raise ValueError(
            "images: expected a batch of at least 1 image, as the network takes it, got shape "
            f"{tuple(images.shape)}"
        )
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    model = uncompiled(model)
    with undisturbed(model, images.device):
        order, chosen = find_representations(model, images[:1])
        found: dict[tuple[str, int], _Layer] = {}
        for batch in images.split(batch_size):
            _run(model, batch, chosen, center, found)
        layers = list(found.items())
        for name, weight in _kernels(model):
            kernels = _Layer(name, "kernel", centred=False)
            kernels.update(weight.unsqueeze(0))
            layers.append(((name, 0), kernels))
    # A layer's kernels come before what it makes of the image; what never ran comes last.
    last = len(order)
    layers.sort(key=lambda item: (order.get(item[0], last), item[1].kind))
    return [layer.summary() for _, layer in layers]


class _Layer:
    """The pairs of rows of one layer, summed up matrix by matrix."""

    def __init__(self, name: str, kind: str, centred: bool) -> None:
        self.name, self.kind, self.centred = name, kind, centred
        self.rows = self.columns = self.matrices = self.dead = 0
        self.finite = True
        self.square = self.rank = 0.0
        self.counts = torch.zeros(BINS, dtype=torch.int64)
        self.cells = torch.zeros(0, 0, dtype=torch.float64)  # sums of |cos|

    def update(self, matrices: Tensor) -> None:
        """Add a batch of matrices (B, N, D)."""
        x = matrices.detach()
        if x.device.type == "mps":  # which has no float64
            x = x.cpu()
        if x.dtype not in (torch.float32, torch.float64):
            x = x.float()
        count, self.rows, self.columns = x.shape
        self.matrices += count
        self.finite = self.finite and bool(x.isfinite().all())
        if not self.finite:
            return
        if len(self.cells) == 0:
            size = min(self.rows, HEAT_MAP_SIZE)
            self.cells = torch.zeros(size, size, dtype=torch.float64)
        step = max(1, BLOCK // max(self.rows**2, self.rows * self.columns))
        for part in x.split(step):
            self._update(part)

    def _update(self, x: Tensor) -> None:
        before = x.norm(dim=2)
        if self.centred:
            x = x - x.mean(dim=2, keepdim=True)
        norms = x.norm(dim=2)
        if not norms.isfinite().all():  # overflow
            self.finite = False
            return
        live = norms > EPS
        if self.centred:
            live &= norms > CENTRED_DEAD_RATIO * before
        self.dead += int((~live).sum())
        unit = torch.where(live.unsqueeze(2), x / norms.unsqueeze(2), 0)
        cells = _membership(self.rows, len(self.cells)).to(unit)
        for start in range(0, self.rows, max(1, BLOCK // (len(x) * self.rows))):
            some = unit[:, start : start + max(1, BLOCK // (len(x) * self.rows))]
            similarity = (some @ unit.mT).abs_().clamp_(max=1)  # [b, n, N]
            similarity.diagonal(start, 1, 2).zero_()
            self.square += float(similarity.square().sum(dtype=torch.float64))
            bins = (similarity.flatten() * BINS).to(torch.int64).clamp_(max=BINS - 1)
            self.counts += bins.bincount(minlength=BINS).cpu()
            own = cells[start : start + some.shape[1]]
            self.cells += (own.mT @ similarity.sum(0) @ cells).cpu().double()
        if min(self.rows, self.columns) <= FACTORISED:
            self.rank += float(_effective_rank(torch.where(live.unsqueeze(2), x, 0)).sum())

    def summary(self) -> dict[str, Any]:
        n, total = self.rows, self.rows * self.matrices
        pairs = n * (n - 1) * self.matrices
        dimensions = self.columns - self.centred
        histogram = self.counts.clone()
        histogram[0] -= total  # the diagonal
        group = _membership(n, len(self.cells)).sum(0)
        inside = torch.outer(group, group) - torch.diag(group)
        cells = self.cells / (inside * self.matrices).clamp(min=1)
        factorised = min(self.rows, self.columns) <= FACTORISED
        finite = self.finite
        return {
            "name": self.name,
            "kind": self.kind,
            "rows": n,
            "columns": self.columns,
            "mean_abs_cos": float(self.cells.sum()) / pairs if finite else None,
            "mean_square_cos": self.square / pairs if finite else None,
            "dead_share": self.dead / total if finite else None,
            "effective_rank": self.rank / self.matrices if finite and factorised else None,
            "welch_bound": max(0.0, (n - dimensions) / (dimensions * (n - 1))),
            "histogram": (histogram // 2).tolist() if finite else None,
            "heatmap": cells.tolist() if finite else None,
        }


def _membership(rows: int, cells: int) -> Tensor:
    """(rows, cells): 1 where a row belongs to a cell of the heat map; even, consecutive parts."""
    index = torch.arange(rows) * cells // rows
    return (index.unsqueeze(1) == torch.arange(cells)).double()


def _effective_rank(x: Tensor) -> Tensor:
    """(B, N, D) -> (B,), by the eigenvalues of the smaller Gram matrix, in float64."""
    x = x.mT if x.shape[1] > x.shape[2] else x
    gram = torch.zeros(len(x), x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
    for part in x.split(max(1, BLOCK // x[:, :, 0].numel()), dim=2):
        gram.baddbmm_(part.double(), part.mT.double())
    eigenvalues = torch.linalg.eigvalsh(gram)
    # Where there is nothing, rounding leaves 1e-16 of the largest, whose root is no longer small.
    noise = max(x.shape[1:]) * torch.finfo(torch.float64).eps * eigenvalues[:, -1:]
    values = torch.where(eigenvalues > noise, eigenvalues, 0).sqrt()
    total = values.sum(1)
    entropy = torch.special.entr(values / total.unsqueeze(1)).sum(1)
    return torch.where(total > 0, entropy.exp(), 0)


def _kernels(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Path and weight (N, D) of every convolution and linear layer of two rows or more."""
    for name, module in model.named_modules():
        if not isinstance(module, _ConvNd | nn.Linear):
            continue
        weight = module.weight
        if isinstance(module, _ConvTransposeNd):  # (Cin, Cout/groups, *k)
            weight = weight.unflatten(0, (module.groups, -1)).transpose(1, 2).flatten(0, 1)
        if not isinstance(weight, nn.UninitializedParameter) and len(weight) > 1:
            yield name, weight.flatten(1)


def find_representations(
    model: nn.Module, image: Tensor
) -> tuple[dict[tuple[str, int], int], set[tuple[str, int]]]:
    """The order in which the modules finished, and which outputs are representations.

    A call is a module's path and how often it had run before.
    """
    ranks = spatial_ranks(model)
    order: dict[tuple[str, int], int] = {}
    # By the identity of the output: a block returns what its last layer does, and a layer that
    # works in place what the one before it did; the one that is done last names it.
    outputs: dict[int, tuple[str, int]] = {}
    left_out: set[int] = set()
    kept: list[object] = []  # or an identity could come again

    def record(call: tuple[str, int], module: nn.Module, inputs: tuple, output: object) -> None:
        order[call] = len(order)
        kept.append((inputs, output))
        where = type(module).__module__
        if isinstance(module, nn.Identity):
            return
        if where in PASSIVE:
            left_out.add(id(output))
        elif where in FINISHING and inputs and inputs[0] is not output:
            left_out.add(id(inputs[0]))
        if isinstance(output, Tensor) and output.dim() - 2 in ranks:
            channels, pixels = output.shape[1], output.shape[2:].numel()
            if channels > 1 and pixels > 1 and output.is_floating_point():
                outputs[id(output)] = call

    with observed(model, record):
        model(image)
    return order, {call for key, call in outputs.items() if key not in left_out}


def _run(
    model: nn.Module,
    images: Tensor,
    chosen: set[tuple[str, int]],
    center: bool,
    found: dict[tuple[str, int], _Layer],
) -> None:
    """Add the chosen outputs on ``images`` to ``found``."""

    def record(call: tuple[str, int], module: nn.Module, inputs: tuple, output: object) -> None:
        if call in chosen and isinstance(output, Tensor):
            if call not in found:
                found[call] = _Layer(call_name(call), "representation", center)
            found[call].update(output.flatten(2))

    with observed(model, record):
        model(images)


def call_name(call: tuple[str, int]) -> str:
    """What tables call the output of a call."""
    path, before = call
    return f"{path} (call {before + 1})" if before else path


@contextlib.contextmanager
def undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Eval mode, no gradients, full precision; then everything as it was."""
    precision = torch.get_float32_matmul_precision()
    generators = [device] if device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices=generators),
        torch.no_grad(),
        without_autocast(device),
        evaluating(model),
        eager(),
    ):
        try:
            torch.set_float32_matmul_precision("highest")
            yield
        finally:
            torch.set_float32_matmul_precision(precision)
