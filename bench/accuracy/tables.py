"""The tables of docs/accuracy.md, by the name of their place there, STUDY:TABLE."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Callable, Mapping
from functools import partial

from imcl_fast.reports.paired import Interval, in_percent, in_points
from imcl_fast.runs import flags
from imcl_fast.runs.config import TrainConfig

from ..render import mebibytes, milliseconds, table
from .analysis import Analysis
from .study import Method, Part

NOT_RUN = "Not run yet.\n"


def facts(found: Analysis) -> str:
    """How much of the study there is, and where, when and by what it was made."""
    study, results = found.study, found.results
    minutes = sum(result.seconds / result.jobs for result in results) / 60
    wall = f"{minutes / 60:.1f} hours" if minutes >= 90 else f"{minutes:.0f} minutes"
    done = f"{len(results)}" if len(results) == len(study.runs) else (
        f"{len(results)} of {len(study.runs)}"
    )  # fmt: skip
    where = _counted([
        f"{r.machine} ({r.jobs} at a time, {r.threads} {'thread' if r.threads == 1 else 'threads'})"
        for r in results
    ])  # fmt: skip
    return (
        f"{done} runs in {wall} on {where}; torch {_counted([r.torch for r in results])}, commit "
        f"{_counted([r.commit for r in results])}, {min(r.date for r in results)}"
        + (f" to {max(r.date for r in results)}" if len({r.date for r in results}) > 1 else "")
        + ".\n"
    )


def settings(found: Analysis) -> str:
    """The command that all runs share, and what each condition, network and method adds."""
    study = found.study
    shared = flags.command(TrainConfig(**study.train))
    lines = ["```sh", shlex.join(["imcl-train", *shared]), "```\n"]
    rows = [
        [kind, part.title, _added({**part.settings, **_form(part)})]
        for kind, parts in (("condition", study.conditions), ("network", study.networks),
                            ("method", study.methods))
        for part in parts.values()
    ]  # fmt: skip
    if study.ways:
        rows.append(["method", "all that have ways, unless it says otherwise", _added(study.ways)])
    # Words, so all columns to the left.
    text = ["| | | settings |", "| --- | --- | --- |", *(f"| {' | '.join(r)} |" for r in rows)]
    return "\n".join([*lines, *text]) + "\n"


def tables(found: Analysis) -> str:
    """A table for each condition and network."""
    study, parts = found.study, []
    what = f"held-out training images ({study.held_out})" if study.held_out else "test images"
    base = study.methods[study.baseline].title
    for condition, network in found.cells():
        noisy = any(result.fit_noisy is not None for result in found.results
                    if result.condition == condition)  # fmt: skip
        head = ["method", "seeds", "last epoch, %", f"minus {base} [95 %]", "best epoch, %",
                "minus the same", *(["wrong labels fitted, %"] * noisy), "ms/step", "x",
                "MiB"]  # fmt: skip
        lines = []
        for method in study.methods.values():
            runs = list(found.runs(condition, network, method.name).values())
            if not runs:
                continue
            compared = partial(found.difference, condition, [network], method.name, study.baseline)
            plain = method.name == study.baseline
            ratio = found.slowdown(condition, network, method.name)
            fitted = [run.fit_noisy for run in runs if run.fit_noisy is not None]
            best = compared("best_accuracy")
            lines.append([
                method.title,
                str(len(runs)),
                in_percent([run.accuracy for run in runs], "±"),
                "" if plain else _interval(compared()),
                f"{100 * statistics.fmean(run.best_accuracy for run in runs):.2f}",
                "" if plain or best is None else f"{100 * best.mean:+.2f}",
                *([f"{100 * statistics.fmean(fitted):.1f}" if fitted else ""] * noisy),
                milliseconds(statistics.median(run.seconds_per_step for run in runs)),
                "" if plain or ratio is None else f"{ratio:.2f}",
                mebibytes(max(run.peak_memory_bytes for run in runs)),
            ])  # fmt: skip
        title = found.title(condition, network)
        parts.append(f"**{title}**, accuracy on {what}\n\n{table(head, lines)}")
    return "\n".join(parts)


def qualities(found: Analysis) -> str:
    """The mean accuracy at each quality: a table for each condition and network."""
    study, parts = found.study, []
    for condition, network in found.cells():
        lines, names = [], list[str]()
        for method in study.methods.values():
            runs = list(found.runs(condition, network, method.name).values())
            if not runs:
                continue
            names = list(runs[0].qualities)
            shares = [[run.qualities[name] for run in runs] for name in names]
            cells = [f"{100 * statistics.fmean(values):.2f}" for values in shares]
            lines.append([method.title, str(len(runs)), *cells])
        shown = table(["accuracy, %", "seeds", *names], lines)
        parts.append(f"**{found.title(condition, network)}**\n\n{shown}")
    return "\n".join(parts)


def summary(found: Analysis) -> str:
    """Every method against the baseline: a column per condition, networks pooled, and the time of
    a step over the baseline's."""
    study = found.study
    base = study.methods[study.baseline]
    lines = []
    for method in study.methods.values():
        if method is base:
            cells = [_level(found, condition) for condition in study.conditions]
            ratio = "1.00" if any(cells) else ""
        else:
            cells = _pooled(found, method.name, base.name)
            ratios = [found.slowdown(c, n, method.name) for c, n in found.cells()]
            known = [ratio for ratio in ratios if ratio is not None]
            ratio = f"{statistics.median(known):.2f}" if known else ""
        if any(cells):
            lines.append([method.title, *cells, ratio])
    titles = [part.title for part in study.conditions.values()]
    return table([f"accuracy, points over {base.title}", *titles, "time, x"], lines)


def compare(found: Analysis) -> str:
    """The pairs of methods that the study names: a column per condition, networks pooled."""
    study, lines = found.study, []
    for first, second in study.compare:
        cells = _pooled(found, first, second)
        if any(cells):
            title = f"{study.methods[first].title} minus {study.methods[second].title}"
            lines.append([title, *cells])
    return table(["points", *(part.title for part in study.conditions.values())], lines)


def tried(found: Analysis) -> str:
    """Variants beside what each is a variant of: won where it did better in every condition. Of
    networks those that any run of it is of."""
    study = found.study
    titles = [part.title for part in study.conditions.values()]
    lines = []
    for method in study.methods.values():
        if method.name == study.baseline:
            continue
        networks = [
            network for network in method.networks
            if any(found.runs(c, network, method.name) for c in study.conditions)
        ]  # fmt: skip
        means = {}
        for condition in study.conditions:
            point = found.difference(condition, networks, method.name, method.versus)
            if point is not None:
                means[condition] = point.mean
        if not means:
            continue
        verdict = ""
        if len(means) == len(study.conditions):  # all have run
            least, most = min(means.values()), max(means.values())
            verdict = "won" if least > 0 else "lost" if most <= 0 else ""
        counts = [len(found.points(c, networks, method.name, method.versus)) for c in means]
        seeds = counts[:1] if len(set(counts)) == 1 else counts
        cells = [f"{100 * means[c]:+.2f}" if c in means else "" for c in study.conditions]
        versus = study.methods[method.versus].title
        lines.append([method.title, versus, *cells, ", ".join(map(str, seeds)), verdict])
    return table(["tried", "over", *titles, "seeds", "in both" if len(titles) == 2 else "in all"],
                 lines)  # fmt: skip


def plot(found: Analysis) -> str:
    """The link to the study's plot."""
    return f"![{found.study.title}: differences by seed]({plot_name(found.study.name)})\n"


def plot_name(study: str) -> str:
    """Of the file in docs."""
    return f"accuracy-{study}.svg"


TABLES: dict[str, Callable[[Analysis], str]] = {
    "facts": facts,
    "settings": settings,
    "tables": tables,
    "qualities": qualities,
    "summary": summary,
    "compare": compare,
    "tried": tried,
    "plot": plot,
}


def places(analyses: Mapping[str, Analysis]) -> dict[str, Callable[[], str]]:
    """Every place that a document may have for a table, and what makes the table."""

    def render(maker: Callable[[Analysis], str], found: Analysis) -> str:
        # Settings are known before anything has run.
        return maker(found) if found.results or maker is settings else NOT_RUN

    return {
        f"{study}:{name}": partial(render, maker, found)
        for study, found in analyses.items()
        for name, maker in TABLES.items()
    }


def _pooled(found: Analysis, method: str, other: str) -> list[str]:
    """For each condition the difference on all networks that both methods are for."""
    methods, conditions = found.study.methods, found.study.conditions
    networks = [name for name in methods[method].networks if name in methods[other].networks]
    return [_interval(found.difference(c, networks, method, other)) for c in conditions]


def _level(found: Analysis, condition: str) -> str:
    """The baseline's accuracy, a mean over all its runs of a condition."""
    accuracies = [r.accuracy for r in found.results
                  if (r.condition, r.method) == (condition, found.study.baseline)]  # fmt: skip
    return f"{100 * statistics.fmean(accuracies):.2f} %" if accuracies else ""


def _interval(value: Interval | None) -> str:
    return "" if value is None else in_points(value)


def _counted(values: list[str]) -> str:
    """Each different value; how often where there are several."""
    counts = {value: values.count(value) for value in dict.fromkeys(values)}
    if len(counts) == 1:
        return values[0]
    return " and ".join(f"{value} ({count} of the runs)" for value, count in counts.items())


def _added(settings: Mapping[str, object]) -> str:
    return ", ".join(f"{name} = {_plain(value)}" for name, value in settings.items()) or "as above"


def _form(part: Part) -> dict[str, str]:
    return {"form": part.form} if isinstance(part, Method) and part.form else {}


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return " ".join(f"{name}={number:g}" for name, number in value.items())
    if isinstance(value, list):
        return "+".join(value) or "none"
    return str(value).lower() if isinstance(value, bool) else str(value)
