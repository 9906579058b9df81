"""Everything a machine with a GPU is for, in one command: measurements, then tests.

    python -m bench.gpu --out FOLDER [--minutes 8] [--no-tests] [--rounds 20]

Writes ``gpu.json`` and ``gpu.txt`` to FOLDER as results come: forward plus backward of each
operation under every implementation, timed on the device (as a CUDA graph) and as called from
Python, beside the machine's own copy bandwidth and matmul rate; then what the tests said.
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

from .. import roofline
from ..facts import commit
from . import rows, suite
from .report import report
from .workers import COMMAND, Workers

ONE_ANSWER = 60.0  # seconds: an implementation of a row that takes longer hangs
STEPS = ("plain", *rows.FUSED, "torch", "reference")


class Results:
    """Kept in the folder, whatever comes next."""

    def __init__(self, out: Path) -> None:
        self.out, self.found = out, {}

    def put(self, value: Any, *path: str) -> None:
        place: dict[str, Any] = self.found
        for name in path[:-1]:
            place = place.setdefault(name, {})
        place[path[-1]] = value
        for name, text in (("gpu.json", json.dumps(self.found, indent=1)),
                           ("gpu.txt", report(self.found))):  # fmt: skip
            (self.out / name).write_text(text)


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

        def ask(*path: str, **what: Any) -> dict[str, Any]:
            left = deadline - time.monotonic()
            if left <= 0:
                said: dict[str, Any] = {"left_out": "the time for measuring was over"}
            else:
                said = worker.ask(min(ONE_ANSWER, left), rounds=rounds, **what)
            if "failed" in said:
                failed.append(" ".join(path))
            results.put(said, *path)
            print(f"{', '.join(path)}: {said}", flush=True)
            return said

        try:
            said = ask("facts", kind="facts")
            if "not_timed" in said:
                sys.exit(f"bench.gpu: {said['not_timed']}")
            ask("rates", kind="rates")
            prepare(log, command, min(seconds / 3, deadline - time.monotonic()))
            for impl in STEPS:
                ask("step", impl, kind="step", impl=impl)
            for row in rows.rows():
                least = sum(roofline.work(row)[:2])  # of the forward and the backward
                results.put({"bytes": least, "impls": {}}, "operations", row.name)
            for impls in (rows.FUSED, [n for n in rows.COMPETITORS if n not in rows.FUSED]):
                for row in rows.rows():
                    for impl in impls:
                        ask("operations", row.name, "impls", impl,
                            kind="operation", row=row.name, impl=impl)  # fmt: skip
        finally:
            worker.close()
    return failed


def prepare(log: Any, command: Sequence[str], seconds: float) -> None:
    """Every kernel compiled into the caches on disk, by many workers at a time."""
    deadline = time.monotonic() + seconds
    if seconds <= 0:
        return
    wanted = [(row.name, impl) for impl in ("triton", "torch.compile") for row in rows.rows()]
    parts = suite.processes()

    def share(part: int) -> None:
        worker = Workers(log, command)
        for row, impl in wanted[part::parts]:
            left = deadline - time.monotonic()
            if left > 0:
                worker.ask(left, kind="prepare", row=row, impl=impl, rounds=1)
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
    results.put(commit(), "commit")
    seconds = 60 * args.minutes
    failed: list[str] = []
    if not args.no_measurements:
        half = seconds if args.no_tests else seconds / 2
        failed += measure(results, half, args.rounds, command)
        print(report(results.found), flush=True)
    if not args.no_tests:
        left = start + seconds - time.monotonic()
        found = suite.run(args.out, left, lambda found: results.put(found, "tests"), **tests)
        failed += suite.failures(found)
    if failed:
        print(f"failed: {', '.join(failed)}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
