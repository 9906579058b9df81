"""``write_report``: a run folder becomes one HTML file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..objectives import WAYS
from ..runs import files
from ..runs.config import PROVENANCE, SETTINGS, argument_of
from ..runs.folder import LABELS, Run, read_run
from . import charts
from .page import page
from .table import number

NAME = "report.html"
KINDS = {"representation": "Representations", "kernel": "Kernels"}
# What the table of all numbers has of each profile: key, title, format, scale.
COLUMNS = (
    ("mean_abs_cos", "|cos|", ".3f", 1.0),
    ("mean_square_cos", "cos²", ".4f", 1.0),
    ("dead_share", "dead %", ".1f", 100.0),
    ("effective_rank", "eff. rank", ".1f", 1.0),
)


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
    parts = run.setting("dataset"), run.setting("model"), run.label
    content = page(
        "run.html",
        title=" · ".join(str(part) for part in parts if part is not None),
        status=_status(run),
        results=_results(run),
        curves=_curves(run),
        terms=_terms(run),
        step_time=_step_time(run),
        ways=_ways(run),
        cka=_cka(run),
        read_cka=charts.READ_CKA,
        scale=charts.colours(),
        configuration=_configuration(run),
        **_redundancy(run),
    )
    path = run.folder / NAME
    files.write(path, content.encode("utf-8", "replace"))
    return path


def _status(run: Run) -> str:
    epochs = run.setting("epochs")
    done = f"{run.epochs} of {epochs} epochs" if epochs is not None else f"{run.epochs} epochs"
    state = "finished" if run.finished else "not finished: going on or interrupted"
    return f"Run {run.folder.resolve().name}, seed {run.setting('seed', '-')}; {done}, {state}."


def _results(run: Run) -> list[tuple[str, str]]:
    where, best = run.held_out, run.best_accuracy
    pairs = [(f"{where} accuracy, last epoch", number(run.accuracy, ".2f", 100) + " %")]
    if best is not None:
        at = run.metrics["test_accuracy"].index(best)
        epoch = number(run.metrics["epoch"][at], ".0f") if "epoch" in run.metrics else "-"
        pairs.append((f"{where} accuracy, best epoch", f"{100 * best:.2f} % (epoch {epoch})"))
    last, summary = run.last, run.summary.get
    for value, label, form, scale, unit in (
        (last("train_accuracy"), "training accuracy", ".2f", 100, " %"),
        (last("fit_noisy"), "wrong labels fitted", ".2f", 100, " %"),
        (last("train_loss"), "training loss", ".4f", 1, ""),
        (last("test_loss"), f"{where} loss", ".4f", 1, ""),
        (summary("steps"), "optimizer steps", ",.0f", 1, ""),
        (summary("seconds"), "time", ",.1f", 1, " s"),
        (summary("seconds_per_step"), "time per step", ",.2f", 1e3, " ms"),
        (summary("images_per_second"), "images per second", ",.0f", 1, ""),
        (summary("peak_memory_bytes"), "peak memory", ",.0f", 2**-20, " MiB"),
    ):
        if value is not None:
            pairs.append((label, number(value, form, scale) + unit))
    return pairs


def _curves(run: Run) -> str | None:
    """Of accuracy, loss and learning rate; None before the end of the first epoch."""
    metrics, where = run.metrics, run.held_out
    if not run.epochs:
        return None
    panels = []
    for title, scale, series in (
        ("accuracy, %", 100, {"test_accuracy": where, "train_accuracy": "training",
                              "fit_noisy": LABELS["fit_noisy"]}),
        ("accuracy by quality, %", 100, run.qualities),
        ("loss", 1, {"test_loss": where, "train_loss": "training"}),
        ("learning rate", 1, {"lr": "learning rate"}),
    ):  # fmt: skip
        measured = {
            name: [None if value is None else scale * value for value in metrics[column]]
            for column, name in series.items()
            if any(value is not None for value in metrics.get(column, ()))
        }
        if measured:
            panels.append((title, measured))
    return charts.curves(panels, metrics["epoch"])


def _terms(run: Run) -> str | None:
    if not run.epochs or not run.terms:
        return None
    panels = [(LABELS.get(name, name), {name: run.metrics[name]}) for name in run.terms]
    return charts.curves(panels, run.metrics["epoch"])


def _step_time(run: Run) -> dict[str, Any] | None:
    """What each way takes of a step, where that was measured."""
    ways, step = run.summary.get("way_seconds"), run.summary.get("seconds_per_step")
    if not isinstance(ways, Mapping) or not ways or not isinstance(step, float):
        return None
    measured = {LABELS.get(str(way), str(way)): float(seconds) for way, seconds in ways.items()}
    parts = {"network and cross entropy": step - sum(measured.values()), **measured}
    shown = {name: seconds for name, seconds in parts.items() if seconds > 0}
    return {
        "chart": charts.shares(shown),
        "lines": [
            [name, number(seconds, ".2f", 1e3), number(seconds / step, ".1f", 100)]
            for name, seconds in {**parts, "all": step}.items()
        ],
    }


def _ways(run: Run) -> list[list[str]]:
    """Number and name, weight and layers of each way that was on; none if the run didn't say."""
    paths, weights = run.used.get("paths", {}), run.used.get("weights", {})
    return [
        [f"{WAYS.index(way) + 1} {LABELS[way]}", number(weights.get(way), "g"),
         ", ".join(paths[way])]
        for way in WAYS if way in paths
    ]  # fmt: skip


def _marks(run: Run, layer: Mapping[str, Any]) -> list[str]:
    """The numbers of the ways that act on a layer of a profile."""
    of_kind = {"kernel": ("output", "kernel"), "representation": ("multilayer", "representation")}
    paths = run.used.get("paths", {})
    name = layer["name"].partition(" (call")[0]
    return [
        str(WAYS.index(way) + 1)
        for way in of_kind[layer["kind"]]
        if any(path == name or path == f"{name}.weight" for path in paths.get(way, ()))
    ]


def _cka(run: Run) -> str | None:
    """How alike the layers are to one another, before and after training."""
    found = {"before training": run.cka_before, "after training": run.cka_after}
    panels = [(title, one["rows"], one["cka"]) for title, one in found.items() if one]
    return charts.alignments(panels) if panels else None


def _redundancy(run: Run) -> dict[str, Any]:
    """Pictures and numbers of every layer of the first profile there is, in all of them."""
    series = {"before training": run.before, "after training": run.after}
    series = {label: layers for label, layers in series.items() if layers}
    if not series:
        return {"kinds": {}}
    found = {
        (label, layer["kind"], layer["name"]): layer
        for label, layers in series.items()
        for layer in layers
    }
    first, *_ = series.values()
    kinds: dict[str, list[dict]] = {}
    panels, lines = [], []
    for kind, title in KINDS.items():
        layers = [layer for layer in first if layer["kind"] == kind]
        if not layers:
            continue
        names = [layer["name"] for layer in layers]
        profiles = [{label: found.get((label, kind, name), {}) for label in series}
                    for name in names]  # fmt: skip
        means = {label: [each[label].get("mean_abs_cos") for each in profiles] for label in series}
        panels.append((f"{title.lower()}: mean |cos|", names, means))
        for layer, each in zip(layers, profiles, strict=True):
            marks = _marks(run, layer)
            kinds.setdefault(title, []).append(_card(layer, each, marks))
            lines.append([
                layer["name"], kind, " ".join(marks) or "-", layer["rows"], layer["columns"],
                number(layer.get("welch_bound"), ".4f"),
                *(number(each[label].get(key), form, scale)
                  for key, _, form, scale in COLUMNS for label in series),
            ])  # fmt: skip
    head = ["layer", "kind", "ways", "N", "D", "Welch bound of cos²"]
    head += [f"{title} {label.split()[0]}" for _, title, _, _ in COLUMNS for label in series]
    return {
        "kinds": kinds,
        "cosines": charts.layers(panels),
        "legend": list(zip(series, charts.COLOURS, strict=False)),
        "numbers": {"head": head, "lines": lines},
    }


def _card(
    layer: Mapping[str, Any], profiles: Mapping[str, Mapping[str, Any]], marks: Sequence[str]
) -> dict[str, Any]:
    """Heat maps and histograms of one layer."""
    pictures = [
        (label.split()[0], number(one.get("mean_abs_cos"), ".3f"), charts.heat_map(one["heatmap"]))
        for label, one in profiles.items()
        if one.get("heatmap")
    ]
    known = [one["histogram"] for one in profiles.values() if one.get("histogram")]
    return {**layer, "pictures": pictures, "histogram": charts.histogram(known), "marks": marks}


def _configuration(run: Run) -> dict[str, list[tuple[str, str]]]:
    """Names and values by the heading they stand under."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for name, value in {**run.config, **run.own}.items():
        if name not in PROVENANCE:
            group = SETTINGS[name].group if name in SETTINGS else "other"
            shown = name.replace("_", " "), _setting(run, name, value)
            groups.setdefault(group, []).append(shown)
    for name in PROVENANCE:
        if value := run.config.get(name):
            entries = value if isinstance(value, Mapping) else {name: value}
            groups[name] = [(str(key), _text(entry)) for key, entry in entries.items()]
    return groups


def _setting(run: Run, name: str, value: Any) -> str:
    """A setting as it turned out, where the configuration leaves that open."""
    used = run.used.get("settings", {})
    if name == "weights" and "weights" in run.used:
        return _text(run.used["weights"])
    if value is None or value == "auto":
        value = used.get(name, value)
    if value is None and not run.used and name in SETTINGS and argument_of(name):
        return "the method's own"  # the run is of a version that didn't write down which
    return _text(value)


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(entry)}" for key, entry in value.items()) or "-"
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value)) or "none"
    return str(value)
