"""The results of a study: a CSV file with a row for each run."""

from __future__ import annotations

import csv
import dataclasses
import datetime
import io
import os
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imcl_fast.machine import processor
from imcl_fast.runs import files
from imcl_fast.runs.folder import Run

from .study import PlannedRun, Study, run_name

FOLDER = Path(__file__).parent / "results"
COMMIT_DIGITS = 12
OPTIONAL = "at_qualities"


class BrokenResults(ValueError):
    """A CSV file doesn't hold results; the message names the line."""


@dataclass(frozen=True)
class Result:
    """What a run gave. Accuracies and what of wrong labels was fitted are shares.

    Attributes:
        fingerprint: of the settings, as ``PlannedRun.fingerprint``.
        held_out: ``test`` or ``validation``, the images that were measured on.
        accuracy: after the last epoch, which is what counts.
        best_accuracy, best_epoch: chosen by the very images measured on.
        train_accuracy, fit_noisy: after the last epoch; the latter is None where no label
            is wrong.
        seconds_per_step: median over epochs.
        peak_memory_bytes: of the whole process, on a GPU of its tensors.
        seconds: from the start of the process to its end, measuring included.
        at_qualities: the accuracy at each quality, ``raw=0.9 jpeg20=0.8``, where there are some;
            ``accuracy`` is then their mean. Files without have no such column.
        threads, jobs: CPU threads of the run, and how many runs went on at a time.
    """

    study: str
    condition: str
    network: str
    method: str
    seed: int
    fingerprint: str
    held_out: str
    accuracy: float
    best_accuracy: float
    best_epoch: int
    train_accuracy: float
    fit_noisy: float | None
    epochs: int
    seconds_per_step: float
    peak_memory_bytes: int
    seconds: float
    threads: int
    jobs: int
    machine: str
    torch: str
    commit: str
    date: str
    at_qualities: str = ""

    @property
    def name(self) -> str:
        """That of the run."""
        return run_name(self.condition, self.network, self.method, self.seed)

    @property
    def qualities(self) -> dict[str, float]:
        """The accuracy at each quality, none where there are none."""
        pairs = (part.split("=") for part in self.at_qualities.split())
        return {name: float(share) for name, share in pairs}


def of_run(
    study: str, planned: PlannedRun, run: Run, *, seconds: float, threads: int, jobs: int
) -> Result:
    """The row for a finished run."""
    summary, versions, machine = run.summary, run.config["versions"], run.config["machine"]
    on_cpu = planned.config.device == "cpu" or machine["accelerator"] is None
    commit = versions["commit"] or os.environ.get("IMCL_FAST_COMMIT", "unknown")
    return Result(
        study=study,
        condition=planned.condition,
        network=planned.network,
        method=planned.method,
        seed=planned.seed,
        fingerprint=planned.fingerprint,
        held_out=run.held_out,
        accuracy=summary["last_test_accuracy"],
        best_accuracy=summary["best_test_accuracy"],
        best_epoch=summary["best_epoch"],
        train_accuracy=summary["train_accuracy"],
        fit_noisy=summary.get("fit_noisy"),
        epochs=summary["epochs"],
        seconds_per_step=summary["seconds_per_step"],
        peak_memory_bytes=summary["peak_memory_bytes"],
        seconds=round(seconds, 1),
        threads=threads,
        jobs=jobs,
        machine=processor() if on_cpu else machine["accelerator"],
        torch=versions["torch"],
        commit=commit[:COMMIT_DIGITS],
        date=datetime.date.today().isoformat(),
        at_qualities=" ".join(
            f"{name}={share}" for name, share in summary.get("last_test_accuracy_at", {}).items()
        ),
    )


class Store:
    """The rows of a study that its file has now, kept in ``path``.

    Rows of runs that the study no longer has, or has with other settings, are left out, and
    gone once a row is added.

    Attributes:
        results: by the name of the run, in the order of the study.
        stale: names of the rows left out.

    Raises:
        BrokenResults: ``path`` holds something else.
    """

    def __init__(self, path: Path, study: Study) -> None:
        self._path = path
        fingerprints = {run.name: run.fingerprint for run in study.runs}
        self._order = list(fingerprints)
        self.results: dict[str, Result] = {}
        self.stale: list[str] = []
        for result in read(path):
            if fingerprints.get(result.name) == result.fingerprint:
                self.results[result.name] = result
            else:
                self.stale.append(result.name)
        self._sort()

    def add(self, result: Result) -> None:
        """Take up the row of a run, and write all."""
        self.results[result.name] = result
        self._sort()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        files.write(self._path, to_csv(self.results.values()).encode())

    def _sort(self) -> None:
        self.results = {n: self.results[n] for n in self._order if n in self.results}


def read(path: Path) -> list[Result]:
    """The rows of a file; none if there is no such file.

    Raises:
        BrokenResults: it isn't a file of results.
    """
    if not path.exists():
        return []
    kinds = typing.get_type_hints(Result)
    results = []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if OPTIONAL not in (reader.fieldnames or ()):
            del kinds[OPTIONAL]
        if reader.fieldnames is None or list(reader.fieldnames) != list(kinds):
            raise BrokenResults(
                f"{path}: expected the columns {','.join(kinds)}, got "
                f"{','.join(reader.fieldnames or [])}"
            )
        for row in reader:
            try:
                if None in row or None in row.values():
                    raise ValueError(f"expected {len(kinds)} columns")
                results.append(Result(**{n: _value(row[n], kind) for n, kind in kinds.items()}))
            except (TypeError, ValueError) as error:
                raise BrokenResults(f"{path}, line {reader.line_num}: {error}") from error
    return results


def to_csv(results: Iterable[Result]) -> str:
    """A header, and a line for each result."""
    results = list(results)
    columns = [field.name for field in dataclasses.fields(Result)]
    if not any(result.at_qualities for result in results):
        columns.remove(OPTIONAL)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for result in results:
        values = [getattr(result, column) for column in columns]
        writer.writerow(["" if x is None else x for x in values])
    return text.getvalue()


def _value(text: str, kind: Any) -> Any:
    if kind == float | None:
        return float(text) if text else None
    return kind(text)
