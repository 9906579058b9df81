"""What a person sees of a run: a live bar, a line per epoch, a table at the end."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from tabulate import tabulate
from tqdm import tqdm

from ..runs import files
from ..runs.errors import printable

# As few letters as a bar needs.
SHORT = {
    "cross_entropy": "CE",
    "output_consistency": "out",
    "multilayer_consistency": "multi",
    "representation_similarity": "repr",
    "kernel_similarity": "kern",
}


class Observer:
    """Told what a run does, by the first process only; does nothing about it.

    Derive from it to show a run in another way.
    """

    def logs_to(self, path: Path) -> None:
        """The run has a folder, in which ``path`` is the place for a log."""

    def said(self, line: str) -> None:
        """A line for the log: what the run is about, a warning, a checkpoint refused."""

    def started(self, step: int, steps: int) -> None:
        """Training goes on after ``step`` optimizer steps of ``steps``."""

    def stepped(self, values: Mapping[str, float] | None) -> None:
        """An optimizer step is done. ``values`` are the step's loss and terms, and images per
        second and share of time spent waiting for data in this epoch, where they are known:
        reading them makes a GPU wait, so it is done every ``log_every`` steps."""

    def epoch_finished(self, row: Mapping[str, float], epochs: int) -> None:
        """A row of metrics.csv is complete; it has no accuracies if none were due."""

    def finished(self) -> None:
        """Training has ended, in whatever way."""


class Console(Observer):
    """Prints lines on ``out`` (standard output), with a bar beneath if that is a terminal.

    The log gets every line too, after the time.
    """

    def __init__(self, out: TextIO | None = None) -> None:
        self._out = sys.stdout if out is None else out
        self._log: Path | None = None
        self._bar: tqdm | None = None

    def logs_to(self, path: Path) -> None:
        self._log = path

    def said(self, line: str) -> None:
        line = printable(line)
        if self._bar is None:
            print(line, file=self._out, flush=True)
        else:
            tqdm.write(line, file=self._out)
        if self._log is not None:
            with files.disk_full_named(self._log), open(self._log, "a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")

    def started(self, step: int, steps: int) -> None:
        if self._out.isatty():
            self._bar = tqdm(
                total=steps, initial=step, unit="step", dynamic_ncols=True, file=self._out
            )

    def stepped(self, values: Mapping[str, float] | None) -> None:
        if self._bar is None:
            return
        if values is not None:
            self._bar.set_postfix_str(step_text(values), refresh=False)
        self._bar.update()

    def epoch_finished(self, row: Mapping[str, float], epochs: int) -> None:
        self.said(epoch_text(row, epochs))

    def finished(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def step_text(values: Mapping[str, float]) -> str:
    """What stands behind the bar."""
    terms = ", ".join(f"{SHORT.get(name, name)} {values[name]:.3g}" for name in values
                      if name not in ("loss", "images_per_second", "data_share"))  # fmt: skip
    return (
        f"loss {values['loss']:.3f} ({terms}), {values['images_per_second']:.0f} img/s, "
        f"data {values['data_share']:.0%}"
    )


def epoch_text(row: Mapping[str, float], epochs: int) -> str:
    """One line about an epoch."""
    measured = ""
    if "test_accuracy" in row:
        measured = (
            f", test loss {row['test_loss']:.4f}, test accuracy {row['test_accuracy']:.2%}, "
            f"train accuracy {row['train_accuracy']:.2%}"
        )
    if "fit_noisy" in row:
        measured += f", wrong labels fitted {row['fit_noisy']:.1%}"
    return (
        f"epoch {row['epoch']:.0f}/{epochs}: loss {row['train_loss']:.4f}{measured}; "
        f"{row['seconds']:.1f} s, {row['images_per_second']:.0f} images/s"
    )


def summary_table(summary: Mapping[str, Any]) -> str:
    """The result of a run, a line for each thing worth knowing."""
    where = summary["measured_on"]
    lines = [
        ("data set", summary["dataset"]),
        ("method", summary["method"] + (f" ({', '.join(summary['ways'])})" if summary["ways"]
                                        else "")),
        (f"last {where} accuracy", f"{summary['last_test_accuracy']:.2%}"),
        (f"best {where} accuracy",
         f"{summary['best_test_accuracy']:.2%} in epoch {summary['best_epoch']}"),
    ]  # fmt: skip
    if "fit_noisy" in summary:
        lines.append(("wrong labels fitted", f"{summary['fit_noisy']:.1%}"))
    lines += [
        ("steps", f"{summary['steps']} in {summary['epochs']} epochs"),
        ("training time", f"{summary['seconds']:.1f} s"),
        ("seconds per step", f"{summary['seconds_per_step']:.4f}"),
        ("images per second", f"{summary['images_per_second']:.0f}"),
        ("peak memory", f"{summary['peak_memory_bytes'] / 2**20:.0f} MiB "
                        f"({summary['peak_memory_of']})"),
    ]  # fmt: skip
    for way, seconds in summary.get("way_seconds", {}).items():
        lines.append((f"cost of {way}", f"{seconds:+.4f} s per step"))
    return tabulate(lines, tablefmt="plain", disable_numparse=True)
