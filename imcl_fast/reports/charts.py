"""Charts as SVG and heat maps as PNG, made to stand in a page of either colour scheme."""

from __future__ import annotations

import base64
import html
import io
import math
import re
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .paired import deviation

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


READ_CKA = (
    "How to read it: near 1 two layers find the same images alike, whatever the rotation and scale "
    "of their features, so that a bright block is a row of layers that hardly change what they are "
    "given; near 0 they find different images alike."
)


class MissingMatplotlib(ImportError):
    """matplotlib isn't installed; the message is one line."""


def check_matplotlib() -> None:
    """Raises MissingMatplotlib where there are no charts to be had."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingMatplotlib(
            "charts need matplotlib, which isn't installed: pip install matplotlib"
        ) from error


def curves(
    panels: Sequence[tuple[str, Mapping[str, Sequence[float | None]]]],
    epochs: Sequence[float | None],
) -> str:
    """A chart for each title and its series over ``epochs``, as SVGs that stand side by side where
    there is room for it, and the legend of all above them where they have the same four or more.
    """
    from matplotlib.ticker import MaxNLocator

    # In a chart they would cover the curves.
    first = list(panels[0][1])
    shared = first if len(first) >= 4 else []
    drawn = []
    for title, series in panels:
        with _style():
            figure, (axis,) = _figure(3.3, 2.4)
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
            if len(series) > 1 and not shared:
                figure.legend(loc="outside lower center", ncols=len(series), columnspacing=1)
            drawn.append(_svg(figure, f"curves {title}"))
    return f'{legend(shared)}<div class="charts">{"".join(drawn)}</div>'


def legend(names: Sequence[str]) -> str:
    """What the colours of several charts stand for, as HTML; nothing for no names."""
    items = "".join(
        f'<span><em style="background: {COLOURS[i % len(COLOURS)]}"></em>{html.escape(name)}</span>'
        for i, name in enumerate(names)
    )
    return f'<p class="legend">{items}</p>' if names else ""


def layers(
    panels: Sequence[tuple[str, Sequence[str], Mapping[str, Sequence[float | None]]]],
) -> str:
    """Dots per layer: a chart for each title, the layers' names and the series, as SVGs."""
    drawn = []
    for title, names, series in panels:
        with _style():
            figure, (axis,) = _figure(_beside(names), 0.9 + 0.19 * len(names))
            for i, (label, values) in enumerate(series.items()):
                axis.plot(
                    _numbers(values), range(len(names)), color=COLOURS[i], marker=MARKERS[i],
                    markersize=5, linestyle="none", label=label,
                    markerfacecolor="none" if i == 0 else None,
                )  # fmt: skip
            axis.set_yticks(range(len(names)), names)
            axis.invert_yaxis()
            axis.margins(y=0.6 / max(len(names), 1))
            axis.set_xlim(left=0)
            axis.set_title(title)
            figure.legend(loc="outside lower center", ncols=len(series))
            drawn.append(_svg(figure, f"layers {title}"))
    return f'<div class="charts">{"".join(drawn)}</div>'


def shares(parts: Mapping[str, float]) -> str:
    """One bar that is the sum of ``parts``, as HTML."""
    whole = sum(parts.values())
    widths = [f"{100 * value / whole:.2f}%" for value in parts.values()]
    bar = "".join(
        f'<em style="background: {COLOURS[i % len(COLOURS)]}; width: {width}"></em>'
        for i, width in enumerate(widths)
    )
    return f'<div class="shares" role="img">{bar}</div>{legend(list(parts))}'


def means(names: Sequence[str], points: Sequence[Sequence[float]], label: str) -> str:
    """A line per name: its points, and their mean with the standard deviation, as SVG."""
    with _style():
        figure, (axis,) = _figure(3.8, 0.8 + 0.32 * len(names))
        for i, values in enumerate(points):
            if not values:
                continue
            axis.errorbar(
                statistics.fmean(values), i, xerr=deviation(values) or 0, fmt="o",
                color=COLOURS[0], capsize=4, markersize=6,
            )  # fmt: skip
            axis.plot(values, [i + 0.22] * len(values), "|", color=COLOURS[1], markersize=7)
        # In lines that leave a narrow chart room.
        axis.set_yticks(range(len(names)), ["\n".join(textwrap.wrap(n, 26)) or n for n in names])
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
        size = (3.4 + 0.26 * len(columns), 2.4 + 0.26 * len(rows))
        figure, (axis,) = _figure(*size)
        image = axis.imshow(cells, vmin=0, vmax=1, cmap="viridis")
        axis.set_xticks(range(len(columns)), columns, rotation=90)
        axis.set_yticks(range(len(rows)), rows)
        axis.set_ylabel(titles[0])
        axis.set_xlabel(titles[1])
        axis.grid(False)
        figure.colorbar(image, ax=axis, label="CKA", shrink=0.8)
        width = max(30, int(11 * size[0]))
        figure.supxlabel(textwrap.fill(caption, width), fontsize=9, x=0.02, ha="left")
        return _file(figure, kind)


def alignments(panels: Sequence[tuple[str, Sequence[str], Sequence[Sequence[float]]]]) -> str:
    """For each title a heat map of numbers in [0, 1] between layers of the same names, as SVGs that
    stand side by side where there is room for it."""
    drawn = []
    for title, names, cells in panels:
        with _style():
            figure, (axis,) = _figure(_beside(names), 0.6 + 0.15 * len(names))
            axis.imshow(cells, vmin=0, vmax=1, cmap="viridis", aspect="auto")
            axis.set_yticks(range(len(names)), names)
            axis.set_xticks([])  # in the same order
            axis.set_title(title)
            axis.grid(False)
            drawn.append(_svg(figure, f"alignment {title}"))
    return f'<div class="charts">{"".join(drawn)}</div>'


def colours() -> str:
    """The colours of all numbers from 0 to 1, as the data URI of a PNG."""
    return heat_map([[(i / 191) ** 2 for i in range(192)]])


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
        figure, axes = _figure(10, 0.8 + 0.2 * len(names), len(series))
        for i, (axis, (label, values)) in enumerate(zip(axes, series.items(), strict=True)):
            axis.barh(range(len(names)), _numbers(values), color=COLOURS[i])
            axis.set_yticks(range(len(names)), names if i == 0 else [])
            axis.set_ylim(len(names) - 0.4, -0.6)
            axis.set_title(label)
        return _file(figure, kind)


def _numbers(values: Sequence[float | None]) -> list[float]:
    """What matplotlib leaves out where there is none."""
    return [math.nan if value is None else value for value in values]


def _style(ink: str = INK) -> Any:
    check_matplotlib()
    import matplotlib

    style: dict[Any, Any] = {**STYLE, **dict.fromkeys(INKED, ink)}
    return matplotlib.rc_context(style)


def _figure(width: float, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    # Not pyplot's, which would keep it and might want a display.
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False).flat)


def _beside(names: Sequence[str]) -> float:
    """The width of a chart beside such names: on a phone all of it is as small as it is wide."""
    return min(4.6, 2.5 + 0.055 * max(map(len, names), default=0))


def _file(figure: Figure, kind: str) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format=kind, dpi=150)
    return content.getvalue()


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
    # As wide as there is room for, but no more than its text can be read at: the viewBox keeps the
    # proportions.
    svg = re.sub(
        r'width="([\d.]+)pt" height="[\d.]+pt"',
        lambda m: f'class="chart" role="img" style="max-width: {1.7 * float(m[1]):.0f}px"',
        svg, count=1,
    )  # fmt: skip
    # Each chart's groups are named figure_1, axes_1 ...; only what is referred to needs a name.
    svg = re.sub(r'<g id="[^"]*"(/?)>', r"<g\1>", svg)
    return svg.replace(INK, "currentColor")
