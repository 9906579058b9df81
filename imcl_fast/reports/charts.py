"""Charts as SVG and heat maps as PNG, made to stand in a page of either colour scheme."""

from __future__ import annotations

import base64
import io
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Told apart by people with any colour vision, and dark or light enough on either background.
COLOURS = ("#2f7ed8", "#e0701a", "#2a9d6f", "#c2479d", "#8a8a00", "#7a6ff0")
MARKERS = "os^Dvp"
# Stands for the page's text colour in what matplotlib draws.
INK = "#010203"
INKED = (
    "text.color",
    "axes.labelcolor",
    "axes.edgecolor",
    "grid.color",
    "xtick.color",
    "ytick.color",
)
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text, in the page's font
    "font.family": "sans-serif",
    "font.size": 9,
    "text.parse_math": False,  # a $ in a name is a $
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "grid.alpha": 0.15,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
}


class MissingMatplotlib(ImportError):
    """matplotlib isn't installed; the message is one line."""


def check_matplotlib() -> None:
    """Raises MissingMatplotlib where there are no charts to be had."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingMatplotlib(
            "charts need matplotlib, which isn't installed: pip install 'imcl_fast[train]'"
        ) from error


def curves(
    panels: Sequence[tuple[str, Mapping[str, Sequence[float | None]]]],
    epochs: Sequence[float | None],
    *,
    columns: int = 3,
) -> str:
    """A panel for each title and its series over ``epochs``, as SVG.

    Where there are four series or more, all panels have the same.
    """
    with _style():
        from matplotlib.ticker import MaxNLocator

        rows = -(-len(panels) // columns)
        figure, axes = _figure(9.9, (1.4 + 2.7 / columns) * rows, rows, columns)
        for axis, (title, series) in zip(axes, panels, strict=False):
            for i, (name, values) in enumerate(series.items()):
                # Not every epoch is measured, and a line would break there.
                points = zip(epochs, values, strict=True)
                known = [(x, y) for x, y in points if x is not None and y is not None]
                # A line through one point can't be seen.
                marker = MARKERS[i % len(MARKERS)] if len(known) < 15 else None
                axis.plot(
                    [x for x, _ in known], [y for _, y in known],
                    color=COLOURS[i % len(COLOURS)], marker=marker, markersize=4, label=name,
                    linestyle=("-", "--", ":")[i % 3],
                )  # fmt: skip
            axis.set_title(title)
            axis.set_xlabel("epoch")
            axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
            if 1 < len(series) < 4:
                axis.legend()
        if len(panels[0][1]) >= 4:  # they would cover the curves, and are the same in all panels
            figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
        for axis in axes[len(panels) :]:
            axis.remove()
        return _svg(figure, "curves " + " ".join(title for title, _ in panels))


def layers(
    panels: Sequence[tuple[str, Sequence[str], Mapping[str, Sequence[float | None]]]],
) -> str:
    """Dots per layer: for each panel a title, the layers' names and the series, as SVG."""
    with _style():
        heights = [0.6 + 0.19 * len(names) for _, names, _ in panels]
        figure, axes = _figure(9.9, sum(heights) + 0.3, len(panels), 1, heights)
        for axis, (title, names, series) in zip(axes, panels, strict=True):
            for i, (label, values) in enumerate(series.items()):
                x = [math.nan if value is None else value for value in values]
                axis.plot(
                    x, range(len(names)), color=COLOURS[i], marker=MARKERS[i], markersize=5,
                    linestyle="none", label=label, markerfacecolor="none" if i == 0 else None,
                )  # fmt: skip
            axis.set_yticks(range(len(names)), names)
            axis.invert_yaxis()
            axis.margins(y=0.6 / max(len(names), 1))
            axis.set_xlim(left=0)
            axis.set_title(title)
            axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
        return _svg(figure, "layers")


def shares(parts: Mapping[str, float], unit: str) -> str:
    """One bar that is the sum of ``parts``, as SVG."""
    with _style():
        figure, (axis,) = _figure(9.9, 1.3, 1, 1)
        start = 0.0
        for i, (name, value) in enumerate(parts.items()):
            axis.barh(0, value, left=start, color=COLOURS[i % len(COLOURS)], label=name, height=0.5)
            start += value
        axis.set_yticks([])
        axis.grid(False)
        axis.spines["left"].set_visible(False)
        axis.set_xlabel(unit)
        axis.legend(ncols=len(parts), loc="lower center", bbox_to_anchor=(0.5, 1))
        return _svg(figure, "shares")


def means(names: Sequence[str], points: Sequence[Sequence[float]], label: str) -> str:
    """A line per name: its points, and their mean with the standard deviation, as SVG."""
    with _style():
        figure, (axis,) = _figure(9.9, 0.8 + 0.32 * len(names), 1, 1)
        for i, values in enumerate(points):
            if not values:
                continue
            mean = sum(values) / len(values)
            squares = sum((value - mean) ** 2 for value in values)
            deviation = math.sqrt(squares / (len(values) - 1)) if len(values) > 1 else 0
            axis.errorbar(
                mean, i, xerr=deviation, fmt="o", color=COLOURS[0], capsize=4, markersize=6
            )
            axis.plot(values, [i + 0.22] * len(values), "|", color=COLOURS[1], markersize=7)
        axis.set_yticks(range(len(names)), names)
        axis.set_ylim(len(names) - 0.4, -0.6)
        axis.set_xlabel(label)
        return _svg(figure, "means")


def heat_map(cells: Sequence[Sequence[float]]) -> str:
    """Numbers in [0, 1] as the data URI of a PNG of a pixel each, colours by their square root."""
    import matplotlib
    import numpy
    from PIL import Image

    values = numpy.sqrt(numpy.clip(numpy.asarray(cells, dtype=float), 0, 1))
    pixels = matplotlib.colormaps["viridis"](values, bytes=True)[..., :3]
    png = io.BytesIO()
    Image.fromarray(numpy.ascontiguousarray(pixels)).save(png, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()


def alignment(
    rows: Sequence[str], columns: Sequence[str], cells: Sequence[Sequence[float]],
    titles: tuple[str, str], caption: str, kind: str,
) -> bytes:
    """A heat map of numbers in [0, 1] with the names of its rows and columns, as a file of its own:
    ``titles`` are those of the two, ``kind`` is ``svg`` or ``png``."""
    with _style(ink="black"):
        cell = 0.26
        size = (3.4 + cell * len(columns), 2.4 + cell * len(rows))
        figure, (axis,) = _figure(*size, 1, 1)
        image = axis.imshow(cells, vmin=0, vmax=1, cmap="viridis")
        axis.set_xticks(range(len(columns)), columns, rotation=90)
        axis.set_yticks(range(len(rows)), rows)
        axis.set_ylabel(titles[0])
        axis.set_xlabel(titles[1])
        axis.grid(False)
        figure.colorbar(image, ax=axis, label="CKA", shrink=0.8)
        width = max(30, int(11 * size[0]))
        figure.supxlabel(textwrap.fill(caption, width), fontsize=9, x=0.02, ha="left")
        content = io.BytesIO()
        figure.savefig(content, format=kind, dpi=150)
        return content.getvalue()


def histogram(series: Sequence[Sequence[int]]) -> str:
    """Outlines of histograms over [0, 1], counts on a logarithmic scale, as SVG."""
    width, height = 100, 82
    highest = max((math.log1p(max(counts)) for counts in series), default=0) or 1
    outlines = []
    for i, counts in enumerate(series):
        path = [f"M0 {height}"]
        for j, count in enumerate(counts):
            y = height - (height - 4) * math.log1p(count) / highest
            path.append(f"V{y:.1f}H{(j + 1) * width / len(counts):.1f}")
        path.append(f"V{height}")
        colour = COLOURS[i % len(COLOURS)]
        outlines.append(
            f'<path d="{"".join(path)}" fill="{colour}" fill-opacity="0.15" stroke="{colour}"/>'
        )
    return (
        f'<svg class="histogram" viewBox="0 0 {width} {height + 12}" role="img">'
        f'{"".join(outlines)}<path d="M0 {height}H{width}" stroke="currentColor"/>'
        f'<text x="0" y="{height + 10}">0</text>'
        f'<text x="{width}" y="{height + 10}" text-anchor="end">1</text></svg>'
    )


def save(names: Sequence[str], series: Mapping[str, Sequence[float | None]], kind: str) -> bytes:
    """Bars per layer as a file of its own, black on white: ``kind`` is ``svg`` or ``png``."""
    with _style(ink="black"):
        figure, axes = _figure(10, 0.8 + 0.2 * len(names), 1, len(series))
        for i, (axis, (label, values)) in enumerate(zip(axes, series.items(), strict=True)):
            x = [math.nan if value is None else value for value in values]
            axis.barh(range(len(names)), x, color=COLOURS[i])
            axis.set_yticks(range(len(names)), names if i == 0 else [])
            axis.set_ylim(len(names) - 0.4, -0.6)
            axis.set_title(label)
        content = io.BytesIO()
        figure.savefig(content, format=kind, dpi=150)
        return content.getvalue()


def _style(ink: str = INK) -> Any:
    check_matplotlib()
    import matplotlib

    style: dict[Any, Any] = {**STYLE, **dict.fromkeys(INKED, ink)}
    return matplotlib.rc_context(style)


def _figure(
    width: float, height: float, rows: int, columns: int, heights: Sequence[float] | None = None
) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    # Not pyplot's, which would keep it and might want a display.
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, height_ratios=heights)
    return figure, list(axes.flat)


def _svg(figure: Figure, salt: str) -> str:
    """The figure as an element of a page: no prologue, text in the page's colour."""
    import matplotlib

    # Identifiers must differ from those of the page's other charts, yet not from run to run.
    matplotlib.rcParams["svg.hashsalt"] = salt
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # As wide as the page has room for: the viewBox keeps the proportions.
    svg = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', 'class="chart" role="img"', svg, count=1)
    # Each chart's groups are named figure_1, axes_1 ...; only what is referred to needs a name.
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)
    return svg.replace(INK, "currentColor")
