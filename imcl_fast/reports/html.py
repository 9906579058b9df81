"""``write_report``: a run folder becomes one HTML file."""

from __future__ import annotations

import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..runs import files
from ..runs.config import PROVENANCE, SETTINGS
from ..runs.folder import LABELS, Run, read_run
from . import charts
from .page import facts, heading, page, paragraph, table
from .table import number

NAME = "report.html"
KINDS = {"representation": "Representations", "kernel": "Kernels"}


def write_report(run_folder: str | Path) -> Path:
    """Write ``report.html`` into a run folder, also while the run is going on.

    The file is whole in itself: style, charts and pictures are part of it, and it runs no
    scripts. It takes the place of an older one only when it is complete.

    Returns:
        The path of the file.

    Raises:
        UnreadableRun: the folder is no run folder, or one of its files is broken.
        MissingMatplotlib: matplotlib, which draws the charts, isn't installed.
        OSError: the file can't be written.
    """
    charts.check_matplotlib()
    run = read_run(run_folder)
    title = " · ".join(
        str(part)
        for part in (run.setting("dataset"), run.setting("model"), run.label)
        if part is not None
    )
    body = [heading(title, 1), paragraph(_status(run), faint=True)]
    body += [heading("Result"), facts(_results(run))]
    body += _curves(run) + _step_time(run) + _redundancy(run) + _configuration(run)
    path = run.folder / NAME
    files.write(path, page(title, body).encode())
    return path


def _status(run: Run) -> str:
    epochs = run.setting("epochs")
    done = f"{run.epochs} of {epochs} epochs" if epochs is not None else f"{run.epochs} epochs"
    state = "finished" if run.finished else "not finished: going on or interrupted"
    return f"Run {run.folder.resolve().name}, seed {run.setting('seed', '-')}; {done}, {state}."


def _results(run: Run) -> list[tuple[str, str]]:
    summary, where = run.summary, run.held_out
    best = run.best_accuracy
    pairs = [(f"{where} accuracy, last epoch", number(run.accuracy, ".2f", 100) + " %")]
    if best is not None:
        at = run.metrics["test_accuracy"].index(best)
        epoch = number(run.metrics["epoch"][at], ".0f") if "epoch" in run.metrics else "-"
        pairs.append((f"{where} accuracy, best epoch", f"{100 * best:.2f} % (epoch {epoch})"))
    for column, label, form, scale, unit in (
        ("train_accuracy", "training accuracy", ".2f", 100.0, " %"),
        ("fit_noisy", "wrong labels fitted", ".2f", 100.0, " %"),
        ("train_loss", "training loss", ".4f", 1.0, ""),
        ("test_loss", f"{where} loss", ".4f", 1.0, ""),
    ):
        if (value := run.last(column)) is not None:
            pairs.append((label, number(value, form, scale) + unit))
    for key, label, form, scale, unit in (
        ("steps", "optimizer steps", ",.0f", 1, ""),
        ("seconds", "time", ",.1f", 1, " s"),
        ("seconds_per_step", "time per step", ",.2f", 1e3, " ms"),
        ("images_per_second", "images per second", ",.0f", 1, ""),
        ("peak_memory_bytes", "peak memory", ",.0f", 2**-20, " MiB"),
    ):
        if summary.get(key) is not None:
            pairs.append((label, number(summary[key], form, scale) + unit))
    return pairs


def _curves(run: Run) -> list[str]:
    metrics = run.metrics
    if not run.epochs:
        return [heading("Curves"), paragraph("No epoch has been finished yet.")]
    named = {
        "test_accuracy": run.held_out,
        "test_loss": run.held_out,
        "train_accuracy": "training",
        "train_loss": "training",
        "fit_noisy": LABELS["fit_noisy"],
    }

    def panel(title: str, *columns: str, scale: float = 1) -> tuple[str, dict[str, Any]]:
        return title, {
            named[name]: [None if value is None else scale * value for value in metrics[name]]
            for name in columns
            if any(value is not None for value in metrics.get(name, ()))
        }

    panels = [
        panel("accuracy, %", "test_accuracy", "train_accuracy", "fit_noisy", scale=100),
        panel("loss", "test_loss", "train_loss"),
    ]
    if any(value is not None for value in metrics.get("lr", ())):
        panels.append(("learning rate", {"learning rate": metrics["lr"]}))
    body = [
        heading("Curves"),
        charts.curves([p for p in panels if p[1]], metrics["epoch"]),
    ]
    if run.terms:
        body += [
            heading("Terms of the loss", 3),
            paragraph("Unweighted means over each epoch.", faint=True),
            charts.curves(
                [(LABELS.get(name, name), {name: metrics[name]}) for name in run.terms],
                metrics["epoch"],
            ),
        ]
    return body


def _step_time(run: Run) -> list[str]:
    ways, step = run.summary.get("way_seconds"), run.summary.get("seconds_per_step")
    if not isinstance(ways, Mapping) or not ways or not isinstance(step, float):
        return []
    measured = {LABELS.get(str(way), str(way)): float(seconds) for way, seconds in ways.items()}
    parts = {"network and cross entropy": step - sum(measured.values()), **measured}
    lines = [
        [name, number(seconds, ".2f", 1e3), number(seconds / step, ".1f", 100)]
        for name, seconds in {**parts, "all": step}.items()
    ]
    return [
        heading("Time of a step"),
        paragraph(
            "A way's time is what a step gained when the way was left out, measured on the last "
            "batches after training; less than zero is noise.",
            faint=True,
        ),
        charts.shares(
            {name: 1e3 * seconds for name, seconds in parts.items() if seconds > 0}, "ms per step"
        ),
        table(["", "ms", "%"], lines),
    ]


def _redundancy(run: Run) -> list[str]:
    series = {"before training": run.before, "after training": run.after}
    series = {name: layers for name, layers in series.items() if layers}
    if not series:
        return []
    scale = charts.heat_map([[(i / 191) ** 2 for i in range(192)]])
    body = [
        heading("Redundancy"),
        paragraph(
            "How alike the kernels of a layer are, and the channels of what it makes of an "
            "image: |cos| between each two, of channels after their mean over the pixels was "
            "subtracted, averaged over images; 0 is unrelated, 1 the same but for its scale."
        ),
        charts.layers(
            [
                (
                    f"{title.lower()}: mean |cos|",
                    [layer["name"] for layer in _of_kind(next(iter(series.values())), kind)],
                    {label: _column(series, label, kind, "mean_abs_cos") for label in series},
                )
                for kind, title in KINDS.items()
                if _of_kind(next(iter(series.values())), kind)
            ]
        ),
        f'<p class="faint">Heat maps: 0 <img class="scale" src="{scale}" alt=""> 1, of pairs of '
        "rows in order, the diagonal left out; beyond 64 rows a pixel is the mean over a block. "
        "Histograms: pairs by |cos|, counts on a logarithmic scale; "
        + ", ".join(
            f'<span style="color: {colour}">■</span> {name}'
            for name, colour in zip(series, charts.COLOURS, strict=False)
        )
        + ".</p>",
    ]
    for kind, title in KINDS.items():
        names = [layer["name"] for layer in _of_kind(next(iter(series.values())), kind)]
        if names:
            cards = [_card(name, kind, series) for name in names]
            body += [heading(title, 3), f'<div class="cards">{"".join(cards)}</div>']
    return [*body, heading("All numbers", 3), _numbers(series)]


def _of_kind(layers: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [layer for layer in layers if layer["kind"] == kind]


def _column(
    series: Mapping[str, list[dict[str, Any]]], label: str, kind: str, key: str
) -> list[float | None]:
    """A number of each of the first profile's layers, out of the profile ``label``."""
    found = {layer["name"]: layer.get(key) for layer in _of_kind(series[label], kind)}
    return [found.get(layer["name"]) for layer in _of_kind(next(iter(series.values())), kind)]


def _card(name: str, kind: str, series: Mapping[str, list[dict[str, Any]]]) -> str:
    """Heat maps and histograms of one layer."""
    pictures, histograms = [], []
    size = ""
    for label, layers in series.items():
        for layer in _of_kind(layers, kind):
            if layer["name"] != name:
                continue
            size = f"{layer['rows']} x {layer['columns']}"
            if layer.get("heatmap"):
                word = label.split()[0]
                pictures.append(
                    f'<div><img src="{charts.heat_map(layer["heatmap"])}" '
                    f'alt="heat map {html.escape(word)}">{word} '
                    f"{number(layer.get('mean_abs_cos'), '.3f')}</div>"
                )
            if layer.get("histogram"):
                histograms.append(layer["histogram"])
    pictures.append(f"<div>{charts.histogram(histograms)}</div>")
    return (
        f'<figure class="card"><span class="name">{html.escape(name)}</span> '
        f'<span class="faint">{html.escape(size)}</span>'
        f'<div class="pictures">{"".join(pictures)}</div></figure>'
    )


def _numbers(series: Mapping[str, list[dict[str, Any]]]) -> str:
    columns = (
        ("mean_abs_cos", "|cos|", ".3f", 1.0),
        ("mean_square_cos", "cos²", ".4f", 1.0),
        ("dead_share", "dead %", ".1f", 100.0),
        ("effective_rank", "eff. rank", ".1f", 1.0),
    )
    short = [label.split()[0] for label in series]
    head = ["layer", "kind", "N", "D", "Welch bound of cos²"]
    head += [f"{label} {word}" for _, label, _, _ in columns for word in short]
    lines = []
    for kind in KINDS:
        layers = _of_kind(next(iter(series.values())), kind)
        cells = [
            [number(value, form, scale) for value in _column(series, label, kind, key)]
            for key, _, form, scale in columns
            for label in series
        ]
        for i, layer in enumerate(layers):
            line = [str(layer["name"]), kind, str(layer["rows"]), str(layer["columns"])]
            line.append(number(layer.get("welch_bound"), ".4f"))
            lines.append(line + [column[i] for column in cells])
    return table(head, lines, left=2)


def _configuration(run: Run) -> list[str]:
    groups: dict[str, list[tuple[str, str]]] = {}
    for name, value in run.config.items():
        if name not in PROVENANCE:
            group = SETTINGS[name].group if name in SETTINGS else "other"
            groups.setdefault(group, []).append((name.replace("_", " "), _text(value)))
    body = [heading("Configuration")]
    for group, pairs in groups.items():
        body += [heading(group.capitalize(), 3), facts(pairs)]
    for name in PROVENANCE:
        value = run.config.get(name)
        if value:
            entries = value if isinstance(value, Mapping) else {name: value}
            body += [
                heading(name.capitalize(), 3),
                facts([(str(key), _text(entry, "-")) for key, entry in entries.items()]),
            ]
    return body


def _text(value: Any, none: str = "default") -> str:
    if value is None:
        return none
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(entry)}" for key, entry in value.items()) or "default"
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value)) or "none"
    return str(value)
