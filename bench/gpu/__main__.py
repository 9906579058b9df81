"""Everything a machine with a GPU is for, in one command: measurements, then tests.

    python -m bench.gpu --out FOLDER [--minutes 8] [--no-tests] [--rounds 20]

Writes ``gpu.json`` and ``gpu.txt`` to FOLDER as results come, in the form of ``python -m bench``:
each operation under every implementation, timed as called from Python and as a CUDA graph, and
training steps, beside the machine's own copy bandwidth and matmul rate; then what the tests said.
Half of the time is for each, and what measuring leaves is for the tests.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .. import render, roofline, rows, step
from ..facts import commit
from . import FUSED, suite
from .worker import STEP
from .workers import COMMAND, Workers

ONE_ANSWER = 60.0  # seconds: an implementation of a row that takes longer hangs
COMPETITORS = (*FUSED, "torch", "torch.compile(torch)", "reference")
STEPS = (*(f"four ways, {name}" for name in (*FUSED, "torch", "naive")), step.SCHEDULED)
TABLES = (
    "machine", "representation", "kernel", "consistency", "dependence", "step", "losing",
    "left-out",
)  # fmt: skip


class Results:
    """Kept in the folder, whatever comes next."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.found: dict[str, Any] = {"operations": {}, "steps": {}}

    def put(self, **found: Any) -> None:
        self.found |= found
        self.keep()

    def keep(self) -> None:
        (self.out / "gpu.json").write_text(json.dumps(self.found, indent=1))
        if self.found.get("facts"):
            (self.out / "gpu.txt").write_text(render.text(self.found, TABLES))


def measure(
    results: Results, seconds: float, rounds: int, command: Sequence[str] = COMMAND
) -> list[str]:
    """All there is time for; a worker that is lost takes one implementation of one row along.

    Returns:
        What failed, by name.
    """
    deadline = time.monotonic() + seconds
    failed: list[str] = []
    with (results.out / "gpu.log").open("a") as log:
        worker = Workers(log, command)

        def ask(what_for: str, **what: Any) -> dict[str, Any]:
            left = deadline - time.monotonic()
            if left <= 0:
                said: dict[str, Any] = {"failed": "the time for measuring was over"}
            else:
                said = worker.ask(min(ONE_ANSWER, left), rounds=rounds, **what)
                if "failed" in said:
                    failed.append(what_for)
            print(f"{what_for}: {said}", flush=True)
            return said

        def add(entry: dict[str, Any], who: str, said: dict[str, Any]) -> None:
            """An answer about one of those who compete for an entry of the results."""
            for key, value in said.get("found", {"left_out": {who: said.get("failed")}}).items():
                entry[key] = entry[key] | value if isinstance(value, dict) else value
            results.keep()

        try:
            facts = ask("facts", kind="facts").get("found", {})
            if "no_gpu" in facts:
                sys.exit(f"bench.gpu: {facts['no_gpu']}")
            rates = ask("rates", kind="rates").get("found")
            results.put(facts=facts, rates=rates)
            prepare(log, command, min(seconds / 3, deadline - time.monotonic()))
            entry: dict[str, Any] = {"base": step.PLAIN, "methods": {}, "left_out": {}}
            results.put(steps={STEP.name: entry})
            for name in STEPS:
                add(entry, name, ask(f"step {name}", kind="step", name=name))
            entries = {
                row.name: {**roofline.entry(row, rates), "competitors": {}, "left_out": {}}
                for row in rows.gpu_rows()
            }
            results.put(operations=entries)
            for names in (FUSED, [name for name in COMPETITORS if name not in FUSED]):
                for row, entry in entries.items():
                    for name in names:
                        said = ask(f"{row} {name}", kind="operation", row=row, name=name)
                        add(entry, name, said)
        finally:
            worker.close()
    return failed


def prepare(log: Any, command: Sequence[str], seconds: float) -> None:
    """Every kernel compiled into the caches on disk, by many workers at a time."""
    deadline = time.monotonic() + seconds
    if seconds <= 0:
        return
    wanted = [(row.name, name) for name in ("triton", "torch.compile(torch)")
              for row in rows.gpu_rows()]  # fmt: skip
    parts = suite.processes()

    def share(part: int) -> None:
        worker = Workers(log, command)
        for row, name in wanted[part::parts]:
            left = deadline - time.monotonic()
            if left > 0:
                worker.ask(left, kind="compile", row=row, name=name, rounds=1)
        worker.close()

    with ThreadPoolExecutor(parts) as pool:
        list(pool.map(share, range(parts)))


def main(
    arguments: Sequence[str] | None = None, command: Sequence[str] = COMMAND, **tests: Any
) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "build/gpu")),
                        help="folder for the results (default: $OUT, or build/gpu)")  # fmt: skip
    parser.add_argument("--minutes", type=float, default=8, help="time to finish in")
    parser.add_argument("--rounds", type=int, default=20, help="times each row is measured")
    parser.add_argument("--no-tests", action="store_true", help="measure only")
    parser.add_argument("--no-measurements", action="store_true", help="test only")
    args = parser.parse_args(arguments)
    start = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    results = Results(args.out)
    results.put(commit=commit())
    seconds = 60 * args.minutes
    failed: list[str] = []
    if not args.no_measurements:
        half = seconds if args.no_tests else seconds / 2
        failed += measure(results, half, args.rounds, command)
        print(render.text(results.found, TABLES), flush=True)
    if not args.no_tests:
        left = start + seconds - time.monotonic()
        found = suite.run(args.out, left, lambda found: results.put(tests=found), **tests)
        failed += suite.failures(found)
    if failed:
        print(f"failed: {', '.join(failed)}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
