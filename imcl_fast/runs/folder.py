"""The files of a run folder, read as ``imcl-train`` writes them, also while the run goes on."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .config import label_of
from .errors import one_line

CONFIG, METRICS, STEPS, SUMMARY = "config.json", "metrics.csv", "steps.csv", "summary.json"
USED = "used.json"  # settings as they turned out, and what each way acts on
NOISE, WEIGHTS, LOG = "noise.pt", "network.pt", "log.txt"
BEFORE, AFTER = "redundancy_before.json", "redundancy_after.json"
CKA_BEFORE, CKA_AFTER = "cka_before.json", "cka_after.json"
CHECKPOINTS, TENSORBOARD = "checkpoints", "tb"

# The columns of metrics.csv that are no terms of the objective.
MEASURES = (
    "epoch",
    "train_loss",
    "test_loss",
    "test_accuracy",
    "train_accuracy",
    "seconds",
    "images_per_second",
    "data_seconds",
    "lr",
    "fit_noisy",
)
# Before the name of a quality: the accuracy at it; test_accuracy is then their mean.
AT_QUALITY = "test_accuracy_"
# What the columns of a series are called in text.
LABELS = {
    "cross_entropy": "cross entropy",
    "dependence": "dependence between qualities",
    "output_consistency": "output consistency",
    "multilayer_consistency": "multi-layer consistency",
    "representation_similarity": "representation similarity",
    "kernel_similarity": "kernel similarity",
    "fit_noisy": "wrong labels fitted",
    "output": "output consistency",
    "multilayer": "multi-layer consistency",
    "representation": "representation similarity",
    "kernel": "kernel similarity",
}


class UnreadableRun(ValueError):
    """A folder is no run folder, or a file of it is broken; the message is one line."""


@dataclass(frozen=True)
class Run:
    """What a run folder holds.

    Attributes:
        folder: where it lies.
        config: the settings, ``versions`` and ``machine`` among them.
        metrics: columns of metrics.csv, a number per epoch; None where there is none.
        summary: results of the whole run; empty while it is going on.
        before, after: redundancy profiles; empty where there are none.
        cka_before, cka_after: ``rows`` and ``columns``, names of layers, and ``cka`` between them;
            empty where there is none.
        used: ``settings`` by their names, those that the configuration left open among them, the
            ``weights`` and the ``paths`` of the ways that are on, by way; in ``own`` the
            ``dataset`` and the ``model`` that were given in place of those that the configuration
            names; in ``fingerprints`` what tells data and networks apart that have one name. Empty
            for a run of a version that didn't write it.
    """

    folder: Path
    config: dict[str, Any]
    metrics: dict[str, list[float | None]]
    summary: dict[str, Any]
    before: list[dict[str, Any]]
    after: list[dict[str, Any]]
    used: dict[str, Any] = field(default_factory=dict)
    cka_before: dict[str, Any] = field(default_factory=dict)
    cka_after: dict[str, Any] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        return bool(self.summary)

    @property
    def epochs(self) -> int:
        """How many are done."""
        return len(self.metrics.get("epoch", []))

    @property
    def terms(self) -> list[str]:
        """The columns of ``metrics`` that are terms of the objective."""
        return [name for name in self.metrics if name not in MEASURES + tuple(self.qualities)]

    @property
    def qualities(self) -> dict[str, str]:
        """By column of ``metrics``, the quality that it has the accuracy at."""
        return {
            name: name.removeprefix(AT_QUALITY)
            for name in self.metrics
            if name.startswith(AT_QUALITY)
        }

    @property
    def own(self) -> dict[str, str]:
        """What took the place of the configuration's ``dataset`` and ``model``; see ``used``."""
        return self.used.get("own", {})

    @property
    def fingerprints(self) -> dict[str, str]:
        """Of the ``data`` and the ``network``, where no setting says which they are."""
        return self.used.get("fingerprints", {})

    @property
    def measured_at(self) -> str:
        """The qualities that ``test_accuracy`` is the mean over."""
        return ",".join(self.qualities.values()) or "raw"

    def setting(self, name: str, default: Any = None) -> Any:
        """A setting of the configuration as the run had it, or else of the summary."""
        value = self.own.get(name, self.config.get(name))
        return self.summary.get(name, default) if value is None else value

    @property
    def label(self) -> str:
        """What was trained, in a word: ``ce``, ``imcl``, ``output+kernel``, another method."""
        ways = [str(way) for way in self.setting("ways") or ()]
        return label_of(str(self.setting("method", "imcl")), ways)

    @property
    def held_out(self) -> str:
        """What the accuracies were measured on: ``test`` or ``validation`` images."""
        return "validation" if self.setting("validation_images") else "test"

    @property
    def accuracy(self) -> float | None:
        """Test accuracy after the last epoch, a share."""
        return self.last("test_accuracy")

    @property
    def best_accuracy(self) -> float | None:
        """The highest test accuracy of any epoch."""
        known = self.metrics.get("test_accuracy", [])
        return max((x for x in known if x is not None and not math.isnan(x)), default=None)

    def last(self, column: str) -> float | None:
        """What the last epoch measured."""
        values = self.metrics.get(column, [])
        return values[-1] if values else None


def read_run(folder: str | Path) -> Run:
    """Read a run folder.

    A run that is going on has no summary.json yet, and its metrics.csv may be missing or end
    in a line that isn't complete. Of an epoch that was repeated the last line counts.

    Raises:
        UnreadableRun: ``folder`` or its config.json is missing, or a file can't be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UnreadableRun(f"{folder}: expected a run folder, as imcl-train writes it")
    if not (folder / CONFIG).is_file():
        raise UnreadableRun(f"{folder}: expected a run folder, it has no {CONFIG}")
    return Run(
        folder=folder,
        config=_read_json(folder / CONFIG, dict),
        metrics=_read_metrics(folder / METRICS),
        summary=_read_json(folder / SUMMARY, dict),
        before=_read_profile(folder / BEFORE),
        after=_read_profile(folder / AFTER),
        used=_read_json(folder / USED, dict),
        cka_before=_read_cka(folder / CKA_BEFORE),
        cka_after=_read_cka(folder / CKA_AFTER),
    )


def read_own(folder: Path) -> dict[str, str]:
    """``Run.own`` alone.

    Raises:
        UnreadableRun: the file that has it can't be read.
    """
    return _read_json(folder / USED, dict).get("own", {})


def _read_json(path: Path, kind: type) -> Any:
    """The content of a file; that of a missing one is empty."""
    if not path.exists():
        return kind()
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnreadableRun(f"{path}: expected JSON, {one_line(error)}") from error
    if not isinstance(value, kind):
        expected = "an object" if kind is dict else "a list"
        raise UnreadableRun(f"{path}: expected {expected}, got {type(value).__name__}")
    return value


def _read_profile(path: Path) -> list[dict[str, Any]]:
    layers = _read_json(path, list)
    for layer in layers:
        missing = {"name", "kind", "rows", "columns"} - set(
            layer if isinstance(layer, dict) else ()
        )
        if missing:
            raise UnreadableRun(f"{path}: expected layers with {', '.join(sorted(missing))}")
    return layers


def _read_cka(path: Path) -> dict[str, Any]:
    found = _read_json(path, dict)
    if found:
        try:
            sizes = {len(found["columns"]), *map(len, found["cka"])}
            fits = len(sizes) == 1 and len(found["cka"]) == len(found["rows"])
        except (KeyError, TypeError):
            fits = False
        if not fits:
            raise UnreadableRun(f"{path}: expected rows, columns and as many cells of cka")
    return found


def _read_metrics(path: Path) -> dict[str, list[float | None]]:
    if not path.exists():
        return {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            header, *lines = list(csv.reader(file)) or [[]]
    except (OSError, ValueError, csv.Error) as error:
        raise UnreadableRun(f"{path}: expected CSV, {one_line(error)}") from error
    if (header or lines) and header[:1] != ["epoch"]:
        raise UnreadableRun(
            f"{path}: expected CSV whose first column is epoch, got {','.join(header)[:40]!r}"
        )
    if lines and len(lines[-1]) < len(header):  # being written
        lines.pop()
    epochs: dict[str, list[str]] = {}
    for number, line in enumerate(lines, start=2):
        if len(line) != len(header):
            raise UnreadableRun(
                f"{path}, line {number}: expected {len(header)} columns, got {len(line)}"
            )
        epochs[line[0]] = line
    columns: dict[str, list[float | None]] = {}
    for name, cells in zip(header, zip(*epochs.values(), strict=True), strict=False):
        try:
            columns[name] = [float(cell) if cell else None for cell in cells]
        except ValueError as error:
            raise UnreadableRun(f"{path}, column {name}: {one_line(error)}") from error
    return columns
