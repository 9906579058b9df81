"""What became of each mutant when it was last run: results.json, and the table made of it."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from threading import Lock

from imcl_fast.machine import processor
from imcl_fast.runs.files import write_json

from ..facts import commit
from ..render import fill_places, table
from .mutant import Mutant
from .tree import KILLED, SURVIVED, TIMEOUT, Outcome

RESULTS = Path(__file__).resolve().parent / "results.json"
NOT_RUN = "not run"

Rows = dict[str, dict[str, str]]


def explained(mutant: Mutant, verdict: str) -> bool:
    """Whether a verdict is what the list says: an equivalent mutant that is killed is none."""
    return verdict == SURVIVED if mutant.equivalent else verdict in (KILLED, TIMEOUT)


def in_words(mutant: Mutant, verdict: str, by: str) -> str:
    """A verdict, as the table has it."""
    words = verdict
    if verdict == KILLED:
        words = f"killed by {by}"
    elif verdict == TIMEOUT:
        words = "killed: the tests never end"
    elif verdict == SURVIVED and mutant.equivalent:
        words = f"no test can see it: {mutant.equivalent}"
    return words if explained(mutant, verdict) or verdict == NOT_RUN else f"**{words}**"


class Results:
    """The latest result of each mutant, on disk. That of one which has changed since is left out.

    Args:
        path: of the JSON file, which need not be there.
    """

    def __init__(self, path: Path, mutants: Sequence[Mutant]) -> None:
        self._path, self._mutants, self._lock = path, mutants, Lock()
        # Now: the file itself will make the checkout dirty.
        self._where = {
            "cpu": processor(), "commit": commit(), "date": datetime.date.today().isoformat()
        }  # fmt: skip

    def add(self, mutant: Mutant, outcome: Outcome) -> None:
        """Keep what came out, and where."""
        with self._lock:  # and from what is there now: two runs may each try out some
            rows = self._rows()
            rows[mutant.name] = {
                "old": mutant.old, "new": mutant.new, "verdict": outcome.verdict,
                "by": outcome.by, **self._where,
            }  # fmt: skip
            names = [each.name for each in self._mutants if each.name in rows]
            write_json(self._path, {name: rows[name] for name in names})

    def publish(self, document: Path) -> None:
        """Fill the table of a document, and what it says above it."""
        rows = self._rows()
        tables = {"summary": partial(self._summary, rows), "table": partial(self._table, rows)}
        fill_places(document, "mutants", tables)

    def _rows(self) -> Rows:
        stored = {}
        if self._path.exists():
            stored = json.loads(self._path.read_text(encoding="utf-8"))
        return {
            mutant.name: stored[mutant.name]
            for mutant in self._mutants
            if mutant.name in stored
            and all(stored[mutant.name][key] == getattr(mutant, key) for key in ("old", "new"))
        }

    def _summary(self, rows: Rows) -> str:
        verdicts = [(mutant, _verdict(rows, mutant)) for mutant in self._mutants]
        killed = sum(verdict in (KILLED, TIMEOUT) for _, verdict in verdicts)
        alike = sum(verdict == SURVIVED and bool(mutant.equivalent) for mutant, verdict in verdicts)
        not_run = sum(verdict == NOT_RUN for _, verdict in verdicts)
        left = len(verdicts) - killed - alike - not_run
        run = ""
        if rows:
            cpus = " and ".join(sorted({row["cpu"] for row in rows.values()}))
            dates = sorted({row["date"] for row in rows.values()})
            days = " to ".join(dict.fromkeys((dates[0], dates[-1])))
            commits = len({row["commit"] for row in rows.values()})
            run = (
                f" Run on {cpus}, {days}, at {commits} commit{'s' * (commits > 1)}, which "
                "bench/mutants/results.json names for each."
            )
        return (
            f"Of {len(verdicts)} mutants {killed} are killed, {alike} can't be seen by any test, "
            f"{left} survive or don't run, {not_run} have not been tried out.{run}"
        )

    def _table(self, rows: Rows) -> str:
        lines = [
            (f"`{mutant.file}`", mutant.breaks,
             in_words(mutant, _verdict(rows, mutant), rows.get(mutant.name, {}).get("by", "")))
            for mutant in self._mutants
        ]  # fmt: skip
        text = table(("file", "what is wrong then", "what the tests say"), lines)
        return text.replace("---:", "---")  # words, to the left


def _verdict(rows: Rows, mutant: Mutant) -> str:
    return rows[mutant.name]["verdict"] if mutant.name in rows else NOT_RUN
