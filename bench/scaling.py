"""How the cost grows with batch, channels, pixels, classes, heads and layers, and the memory with
the number of kernels."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from .memory import available_bytes, peak_bytes
from .operations import measure, step
from .rows import Row, consistency

IMPLS = ("cpp", "triton", "cuda", "torch", "reference")
ROUNDS = 15


class Axis(NamedTuple):
    """A quantity that is doubled and doubled, and the row at each of its values."""

    quantity: str
    values: tuple[int, ...]
    row: Callable[[int], Row]


def _features(batch: int, channels: int, side: int) -> Row:
    return Row(
        "representation", f"{batch} x {channels} x {side}²", ((batch, channels, side, side),)
    )


AXES = (
    Axis("batch", (8, 16, 32, 64, 128), lambda b: _features(b, 64, 16)),
    Axis("channels", (16, 32, 64, 128, 256), lambda c: _features(16, c, 16)),
    Axis("pixels", (256, 1024, 4096, 16384), lambda p: _features(16, 64, math.isqrt(p))),
    Axis("classes", (100, 1000, 10000, 100000), lambda k: consistency(5, 16, k)),
    Axis("heads", (2, 4, 8, 16), lambda h: consistency(h, 128, 1000)),
    Axis(
        "layers",
        (1, 2, 4, 8, 16),
        lambda n: Row("kernel", f"{n} x (128, 64, 3, 3)", n * ((128, 64, 3, 3),)),
    ),
)

# Rows of a weight of this many columns, under a penalty that has no form without the N x N.
MEMORY_ROWS = (1024, 2048, 4096, 8192, 16384, 32768)
MEMORY_COLUMNS = 64
# About what each peaks at, in N x N float32 (the fused CPU kernels keep none); it isn't run where
# that is more than most of the memory there is.
COPIES = {"auto": 3.2, "torch": 7, "reference": 5}
MOST_OF_MEMORY = 0.75


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Least squares slope of log(y) over log(x): the exponent of a power law."""
    xs, ys = ([math.log(value) for value in column] for column in zip(*points, strict=True))
    return statistics.linear_regression(xs, ys).slope


def cost(device: torch.device, quick: bool, seconds: float) -> dict[str, dict]:
    """Per axis and implementation: [value, seconds] pairs, and the fitted slopes."""
    found = {}
    for axis in AXES:
        points: dict[str, list[tuple[int, float]]] = {}
        for value in axis.values[::2] if quick else axis.values:
            row = axis.row(value)
            summary = measure(row, device, seconds, only=IMPLS, fewest=3, most=ROUNDS).as_json()
            for name, times in summary["competitors"].items():
                points.setdefault(name, []).append((value, times["both"]["median"]))
        found[axis.quantity] = {
            name: {"points": several, "slope": slope(several)}
            for name, several in points.items()
            if len(several) > 1
        }
    return found


def memory(device: torch.device, quick: bool) -> dict[str, list[tuple[int, int | None]]]:
    """Peak bytes of kernel similarity over the number of kernels, forward and backward."""
    found: dict[str, list[tuple[int, int | None]]] = {}
    for n in MEMORY_ROWS[:3] if quick else MEMORY_ROWS:
        row = Row("kernel", f"{n} x {MEMORY_COLUMNS}", ((n, MEMORY_COLUMNS),), penalty="abs")
        xs = row.inputs(0, device)
        for impl, copies in COPIES.items():
            if copies * 4 * n * n > MOST_OF_MEMORY * available_bytes(device):
                continue
            loss = row.loss(impl, device)
            if n == MEMORY_ROWS[0]:
                step(loss, xs)  # what is kept from call to call is made now
            peak = peak_bytes(lambda loss=loss, xs=xs: step(loss, xs), device)
            found.setdefault(impl, []).append((n, peak))
    return found


def plot(results: dict[str, dict], path: Path) -> None:
    """The cost against every quantity, on log axes, as an SVG that is the same for the same
    results."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullLocator

    with plt.rc_context({"svg.hashsalt": "imcl_fast", "font.size": 9}):
        figure, axes = plt.subplots(2, 3, figsize=(10, 6), layout="constrained")
        for ax, (quantity, impls) in zip(axes.flat, results.items(), strict=True):
            for name, line in impls.items():
                values, seconds = zip(*line["points"], strict=True)
                label = f"{name}, slope {line['slope']:.2f}"
                ax.loglog(values, [1e3 * s for s in seconds], "o-", label=label)
            # The values measured: matplotlib's own ticks overlap on a short logarithmic axis.
            ax.set_xticks(values, [f"{value:,d}" for value in values])
            ax.xaxis.set_minor_locator(NullLocator())
            ax.set_xlabel(quantity)
            ax.set_ylabel("ms, forward and backward")
            ax.legend(fontsize=7)
            ax.grid(True, alpha=0.3)
        figure.savefig(path, format="svg", metadata={"Date": None})
        plt.close(figure)
