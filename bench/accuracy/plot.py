"""The differences of a study as a plot."""

from __future__ import annotations

import statistics
from pathlib import Path

from imcl_fast.reports.charts import COLOURS, check_matplotlib
from imcl_fast.reports.paired import interval

from .analysis import Analysis


def plot(found: Analysis, path: Path) -> None:
    """A panel for each condition and network, as an SVG that is the same for the same results.

    A dot is a method's accuracy minus the baseline's at one seed, after the last epoch; beneath
    are their mean and its 95 % interval, and as a diamond the mean at the best epochs.

    Raises:
        MissingMatplotlib: it isn't installed.
    """
    check_matplotlib()
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    study = found.study
    methods = [method for name, method in study.methods.items() if name != study.baseline]
    cells = found.cells()
    columns = min(len(cells), 2)
    rows = -(-len(cells) // columns)
    with plt.rc_context({"svg.hashsalt": "imcl_fast", "svg.fonttype": "none", "font.size": 9}):
        figure, axes = plt.subplots(
            rows, columns, figsize=(10, rows * (1 + 0.32 * len(methods))), layout="constrained",
            sharey=True, squeeze=False,
        )  # fmt: skip
        for axis, (condition, network) in zip(axes.flat, cells, strict=False):
            for i, method in enumerate(methods):
                pair = (condition, [network], method.name, study.baseline)
                last = [100 * x for x in found.points(*pair)]
                if not last:
                    continue
                axis.plot(last, [i - 0.15] * len(last), ".", color=COLOURS[0], alpha=0.6)
                mean, low, high, _ = interval(last)
                if low is not None and high is not None:
                    axis.plot([low, high], [i + 0.15] * 2, "-", color=COLOURS[1])
                axis.plot(mean, i + 0.15, "o", color=COLOURS[1], markersize=4)
                best = statistics.fmean(found.points(*pair, "best_accuracy"))
                axis.plot(100 * best, i + 0.15, "D", color=COLOURS[2], markersize=4, mfc="none")
            axis.axvline(0, color="gray", linewidth=0.8)
            axis.set_yticks(range(len(methods)), [method.title for method in methods])
            axis.set_ylim(len(methods) - 0.5, -0.5)
            axis.grid(True, axis="x", alpha=0.3)
            axis.set_title(found.title(condition, network), loc="left", fontsize=9)
            axis.set_xlabel(f"points over {study.methods[study.baseline].title}")
        for axis in axes.flat[len(cells) :]:
            axis.set_visible(False)
        figure.savefig(path, format="svg", metadata={"Date": None})
        plt.close(figure)
