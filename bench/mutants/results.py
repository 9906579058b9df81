"""What became of each mutant when it was last run: results.json, and the table made of it."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from pathlib import Path

from imcl_fast.training.files import write_json

from ..facts import commit, cpu
from ..render import fill_places, table
from .mutant import Mutant
from .tree import KILLED, SURVIVED, TIMEOUT, Outcome

RESULTS = Path(__file__).resolve().parent / "results.json"
NOT_RUN = "not run"


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
        self._path, self._mutants = path, mutants
        stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        self._rows: dict[str, dict[str, str]] = {}
        for mutant in mutants:
            row = stored.get(mutant.name)
            if row is not None and (row["old"], row["new"]) == (mutant.old, mutant.new):
                self._rows[mutant.name] = row

    def add(self, found: dict[Mutant, Outcome]) -> None:
        """Keep what was found out, and where."""
        where = {"cpu": cpu(), "commit": commit(), "date": datetime.date.today().isoformat()}
        for mutant, outcome in found.items():
            self._rows[mutant.name] = {
                "old": mutant.old, "new": mutant.new, "verdict": outcome.verdict,
                "by": outcome.by, **where,
            }  # fmt: skip
        names = [mutant.name for mutant in self._mutants if mutant.name in self._rows]
        write_json(self._path, {name: self._rows[name] for name in names})

    def publish(self, document: Path) -> None:
        """Fill the table of a document, and what it says above it."""
        fill_places(document, "mutants", {"summary": self._summary, "table": self._table})

    def _summary(self) -> str:
        verdicts = [self._verdict(mutant) for mutant in self._mutants]
        killed = sum(verdict in (KILLED, TIMEOUT) for verdict in verdicts)
        alike = sum(
            verdict == SURVIVED and bool(mutant.equivalent)
            for mutant, verdict in zip(self._mutants, verdicts, strict=True)
        )
        places = {(row["cpu"], row["commit"], row["date"]) for row in self._rows.values()}
        run = "; ".join(f"{cpu}, commit {commit}, {date}" for cpu, commit, date in sorted(places))
        return (
            f"Of {len(verdicts)} mutants {killed} are killed, {alike} can't be seen by any test, "
            f"{len(verdicts) - killed - alike} are left. Run on {run}."
        )

    def _table(self) -> str:
        return table(
            ("file", "what is wrong then", "what the tests say"),
            [
                (f"`{mutant.file}`", mutant.breaks,
                 in_words(mutant, self._verdict(mutant), self._row(mutant).get("by", "")))
                for mutant in self._mutants
            ],
        ).replace("---:", "---")  # fmt: skip

    def _verdict(self, mutant: Mutant) -> str:
        return self._row(mutant).get("verdict", NOT_RUN)

    def _row(self, mutant: Mutant) -> dict[str, str]:
        return self._rows.get(mutant.name, {})
