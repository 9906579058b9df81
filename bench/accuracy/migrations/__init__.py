"""Rows whose fingerprint is another than it was, although what was run is the same.

A stale row is run again. Where only the way changed in which a run is told (``PlannedRun.told``),
it may be moved instead, by a module here: its ``before`` says which fingerprints the rows of a run
had until then, and none where it can't be proved that the settings are the same. The rows as they
were are committed beside it, and a test moves them and gets those that there are now. A migration
whose rows have all been run again goes, with its rows.

Three times rows were moved before there was this rule, by scripts that nobody kept:

- ``found_kernels`` does the last again, from rows that were committed before and after it.
- ``weights_by_way`` is the first. Its rows, and some of the last, were not committed as they were
  first written. They are in never_committed.csv, with the fingerprint that the code and the study
  of their own commit give to them (for seed 3 of the screening: with one seed more). That a
  migration gives the same is tested; that the row had it can't be.
- In between, the rows of cpu-wide-screening were moved once before they were committed. The last
  moved them back: their fingerprint is that which the code and the study of their commit give.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from ...render import table
from ..results import Result, read
from ..study import PlannedRun, Study

FOLDER = Path(__file__).parent
MOVED = FOLDER / "found_kernels.csv"
NEVER_COMMITTED = FOLDER / "never_committed.csv"

Before = Callable[[PlannedRun], set[str]]


def migrate(study: Study, rows: Iterable[Result], before: Before) -> list[Result]:
    """``rows`` with the method and the fingerprint that their runs have now; rows that ``before``
    gives to no run are as they were."""
    runs = {
        (run.condition, run.network, run.seed, fingerprint): run
        for run in study.runs
        for fingerprint in before(run)
    }
    moved = []
    for row in rows:
        run = runs.get((row.condition, row.network, row.seed, row.fingerprint))
        moved.append(
            row if run is None
            else replace(row, method=run.method, fingerprint=run.fingerprint)
        )  # fmt: skip
    return moved


def never_committed() -> list[dict[str, str]]:
    """The lines of never_committed.csv."""
    with NEVER_COMMITTED.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def places(rows: Mapping[str, int]) -> dict[str, Callable[[], str]]:
    """By the name of its place in docs/accuracy.md, what makes the table of moved rows; ``rows``
    are how many there are, by study."""
    return {"migrations:rows": partial(_table, rows)}


def _table(rows: Mapping[str, int]) -> str:
    kept = set(FOLDER.glob("*.csv")) - {NEVER_COMMITTED}
    moved = [row.study for path in sorted(kept) for row in read(path)]
    unseen = [line["study"] for line in never_committed()]
    lines = [
        [study, str(count), str(moved.count(study)), str(unseen.count(study))]
        for study, count in rows.items() if study in {*moved, *unseen}
    ]  # fmt: skip
    return table(["study", "rows", "moved, checked", "moved before they were committed"], lines)
