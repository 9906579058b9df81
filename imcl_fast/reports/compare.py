"""``imcl-compare``: several runs side by side, paired by their seeds."""

from __future__ import annotations

import argparse
import csv
import io
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from ..runs import files
from ..runs.errors import DiskFullError, one_line
from ..runs.extra import needed_by
from ..runs.flags import Parser
from ..runs.folder import Run, UnreadableRun, read_run
from . import charts
from .groups import Group, NotComparable, group
from .page import page
from .paired import deviation, in_percent, in_points

with needed_by("imcl-compare"):
    from .table import number, show, text_table

NOTE = (
    "Accuracies are of the last epoch unless it says best: mean +- standard deviation over "
    "seeds, in percent. Differences are in points, paired by seed, in brackets Student's 95 % "
    "interval of their mean, which says nothing of other data or settings. Times and memory "
    "are medians."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code, 2 for runs that can't be compared."""
    options = _parser().parse_args(arguments)
    try:
        return _compare(options)
    except (UnreadableRun, NotComparable, DiskFullError, ImportError, OSError) as error:
        print(f"imcl-compare: {one_line(error)}", file=sys.stderr)
        return 2


def _compare(options: argparse.Namespace) -> int:
    if options.html is not None:
        charts.check_matplotlib()
    runs = []
    for folder in dict.fromkeys(path.resolve() for path in options.runs):
        run = read_run(folder)
        accuracy = run.accuracy
        if not run.finished:
            why = f"not finished, {run.epochs} of {run.setting('epochs', '?')} epochs"
        elif accuracy is None or not math.isfinite(accuracy):
            why = "no accuracy"
        else:
            runs.append(run)
            continue
        print(f"imcl-compare: left out {folder}: {why}", file=sys.stderr)
    if not runs:
        raise NotComparable("expected at least one finished run, got none")
    groups = group(runs, options.baseline)
    head, lines = summary_table(groups)
    show(text_table(head, lines))
    if warning := one_seed(groups):
        show(warning)
    for path, content in (
        (options.csv, lambda: as_csv(groups)),
        (options.html, lambda: as_html(groups)),
    ):
        if path is not None:
            files.deliver(path, content().encode("utf-8", "replace"))
    return 0


def summary_table(groups: Sequence[Group]) -> tuple[list[str], list[list[str]]]:
    """A line per group; columns that no group has a value for are left out."""
    where = "/".join(
        sorted({run.held_out for each in groups for run in each.runs.values()}, reverse=True)
    )
    lines = []
    for each in groups:
        difference, slowdown = each.difference(), each.slowdown()
        spread = "-" if difference is None else in_points(difference)
        lines.append({
            "method": each.name,
            "seeds": str(len(each.runs)),
            f"{where} accuracy": in_percent(each.accuracies()),
            "best epoch": in_percent(each.accuracies(best=True)),
            "difference": "baseline" if each.baseline is each else spread,
            "pairs": "-" if difference is None else str(difference.values),
            "wrong fitted %": number(each.fitted, ".1f", 100),
            "ms/step": number(each.median_of("seconds_per_step"), ".2f", 1e3),
            "time": "-" if slowdown is None else f"x {slowdown:.3f}",
            "MiB": number(each.median_of("peak_memory_bytes"), ".0f", 2**-20),
        })  # fmt: skip
    kept = [name for name in lines[0] if any(line[name] != "-" for line in lines)]
    return kept, [[line[name] for name in kept] for line in lines]


def one_seed(groups: Sequence[Group]) -> str:
    """A sentence on what differences of a single seed are worth; empty if there are none."""
    found = [(each.name, each.difference()) for each in groups]
    names = [name for name, difference in found if difference and difference.values == 1]
    if not names:
        return ""
    return (
        f"One seed proves nothing: the difference of {', '.join(names)} is that of a single pair "
        "of runs, and another seed may turn it round. Train each with several seeds (--seed)."
    )


def as_csv(groups: Sequence[Group]) -> str:
    """The same as numbers, shares and seconds, a line per group."""
    rows = []
    for each in groups:
        last, best = each.accuracies(), each.accuracies(best=True)
        mean, low, high, pairs = each.difference() or (None, None, None, 0)
        rows.append({
            "method": each.name,
            "seeds": len(each.runs),
            "accuracy_mean": statistics.fmean(last),
            "accuracy_sd": deviation(last),
            "best_accuracy_mean": statistics.fmean(best),
            "best_accuracy_sd": deviation(best),
            "baseline": None if each.baseline is None else each.baseline.name,
            "pairs": pairs,
            "difference_mean": mean,
            "difference_low": low,
            "difference_high": high,
            "fit_noisy_mean": each.fitted,
            "seconds_per_step": each.median_of("seconds_per_step"),
            "peak_memory_bytes": each.median_of("peak_memory_bytes"),
        })  # fmt: skip
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_html(groups: Sequence[Group]) -> str:
    """The same as a page with charts."""
    head, lines = summary_table(groups)
    runs = [run for each in groups for run in each.runs.values()]
    epochs = max(run.epochs for run in runs)
    panels = [
        (title, {each.name: _mean_curve(list(each.runs.values()), column, epochs)
                 for each in groups})
        for title, column in (
            ("accuracy by epoch, %", "test_accuracy"),
            ("wrong labels fitted, %", "fit_noisy"),
        )
        if any(run.last(column) is not None for run in runs)
    ]  # fmt: skip
    return page(
        "comparison.html",
        title="Comparison of runs",
        data_sets=sorted({str(run.setting("dataset", "-")) for run in runs}),
        note=NOTE,
        warning=one_seed(groups),
        head=head,
        lines=lines,
        accuracies=charts.means(
            [each.name for each in groups],
            [[100 * value for value in each.accuracies()] for each in groups],
            "%",
        ),
        curves=charts.curves(panels, range(1, epochs + 1)),
        runs=[
            [run.folder, each.name, seed, number(run.accuracy, ".2f", 100),
             number(run.best_accuracy, ".2f", 100),
             number(run.summary.get("seconds_per_step"), ".2f", 1e3)]
            for each in groups
            for seed, run in each.runs.items()
        ],  # fmt: skip
    )


def _mean_curve(runs: Sequence[Run], column: str, epochs: int) -> list[float | None]:
    """The mean over those runs that have the epoch, in percent."""
    curve: list[float | None] = []
    for epoch in range(epochs):
        values = [run.metrics.get(column, [])[epoch : epoch + 1] for run in runs]
        known = [value[0] for value in values if value and value[0] is not None]
        curve.append(100 * statistics.fmean(known) if known else None)
    return curve


def _parser() -> Parser:
    parser = Parser(prog="imcl-compare", description=f"Runs side by side. {NOTE}")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument(
        "--baseline",
        metavar="METHOD|RUN",
        help="what differences are to: a name of the table's first column, or a run of it; "
        "ce, plain cross entropy, by default",
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write a page with charts")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write the numbers")
    return parser


if __name__ == "__main__":
    sys.exit(main())
