"""``python -m bench``: measure everything, write bench/results/<machine>.json and the plot, and
fill the tables of README.md and docs/performance.md.

A full run takes a quarter to half an hour of two cores. ``--again`` measures some rows of the last
one anew, where something else had slowed the machine meanwhile. ``--quick`` takes a few minutes,
prints its tables and writes to build/bench only: too few rounds to be quoted.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import torch

from imcl_fast.runs.files import write_json

from . import (
    allocator,
    contention,
    facts,
    host,
    instructions,
    operations,
    render,
    roofline,
    rows,
    scaling,
    step,
)

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = (ROOT / "README.md", ROOT / "docs/performance.md")
PLOT = ROOT / "docs/scaling.svg"
RESULTS = ROOT / "bench/results"
QUICK = ROOT / "build/bench"

# Seconds to spend on a row, a training step, those on the host, steps beside a busy process and a
# point of the scaling, warm-up not included.
FULL_SECONDS = {"row": 2.0, "step": 15.0, "host": 20.0, "contention": 20.0, "point": 0.4,
                "allocator": 10.0}  # fmt: skip
QUICK_SECONDS = {"row": 1.5, "step": 10.0, "host": 5.0, "contention": 1.0, "point": 0.1}

# Facts that say whether two runs are of one machine.
SAME_MACHINE = ("cpu", "gpu", "threads", "ISA", "torch")


def run(device: torch.device, quick: bool) -> dict:
    """All measurements, as written to the results file."""
    seconds = QUICK_SECONDS if quick else FULL_SECONDS
    start = time.monotonic()

    def say(what: str) -> None:
        print(f"{time.monotonic() - start:6.0f} s  {what}", flush=True)

    found: dict = {"facts": facts.facts(device), "quick": quick, "operations": {}, "steps": {}}
    if device.type == "cpu":
        say("freed memory")
        if not quick:
            found["allocator"] = allocator.measure(device, seconds["allocator"])
        if allocator.keep_freed_memory():
            found["facts"]["freed memory"] = "kept"
    say("copy and multiply rates")
    found["rates"] = rates = roofline.measure_rates(device)
    for row in rows.rows(quick):
        say(row.name)
        found["operations"][row.name] = _measured(row, rates, device, seconds["row"])
    for one in step.steps(quick):
        say(one.name)
        found["steps"][one.name] = step.measure(one, device, seconds["step"])
    say(f"host: {host.name()}")
    found["host"] = host.measure(device, seconds["host"])
    if device.type == "cpu":
        say("beside a busy process")
        found["contention"] = contention.measure(device, seconds["contention"])
    say("scaling")
    found["scaling"] = scaling.cost(device, quick, seconds["point"])
    say("memory")
    found["memory"] = scaling.memory(device, quick)
    say("instructions")
    found["instructions"] = counted()
    say("done")
    return found


def again(results: dict, names: list[str], device: torch.device) -> None:
    """Measures rows, or training steps, of stored results anew, and notes in them when and at which
    commit.

    Raises:
        ValueError: there is no such row, or the results are of another machine.
    """
    before, now = results["facts"], facts.facts(device)
    for key in SAME_MACHINE:
        if now.get(key) != before.get(key):
            raise ValueError(
                f"the stored results are of another machine: {key} was {before.get(key)}, and is "
                f"{now.get(key)}; run `make bench`"
            )
    known = {row.name: row for row in rows.rows(quick=False)}
    steps = {one.name: one for one in step.steps(quick=False)}
    for name in names:
        if name not in {**known, **steps}:
            raise ValueError(
                f"--again {name!r}: no such row; there are {', '.join([*known, *steps])}"
            )
    if device.type == "cpu":
        allocator.keep_freed_memory()
    for name in names:
        if name in known:
            kind = "operations"
            found = _measured(known[name], results["rates"], device, FULL_SECONDS["row"])
        else:
            kind, found = "steps", step.measure(steps[name], device, FULL_SECONDS["step"])
        noted = {key: now[key] for key in ("commit", "date")}
        results[kind][name] = {**found, "again": noted}


def _measured(row: rows.Row, rates: dict, device: torch.device, seconds: float) -> dict:
    """A row as it is stored: its floors at the machine's rates, and its competitors."""
    return {
        **roofline.entry(row, rates),
        **operations.measure(row, device, seconds).as_json(),
    }


def counted() -> dict:
    """Instruction counts, or the reason why there are none."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            return instructions.count(Path(folder))
    except instructions.CantCount as reason:
        return {"reason": str(reason)}


def publish(results: dict) -> None:
    """The plot and the tables of the documents, from results; those of bfloat16 from the newest
    stored ones that have it, which may be another machine's, and the targets of all."""
    scaling.plot(results["scaling"], PLOT)
    stored = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    for document in DOCUMENTS:
        names = render.fill(document, results) + render.fill_bfloat16(document, stored)
        names += render.fill_machines(document, stored)
        print(f"{document.relative_to(ROOT)}: {', '.join(names) or 'has no place for a table'}")


def check(update: bool) -> int:
    """Compare instruction counts with the baseline, or make them the baseline; the exit status."""
    found = counted()
    if "reason" in found:
        print(f"bench: {found['reason']}")
        return 1
    if update:
        write_json(instructions.BASELINE, found)
        print(f"wrote {instructions.BASELINE.relative_to(ROOT)}")
        return 0
    lines, good = instructions.compare(found, instructions.read_baseline())
    print("\n".join(lines))
    return 0 if good else 1


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.split("\n\n")[0])
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--quick", action="store_true", help="a few rows, nothing published")
    what.add_argument("--render", type=Path, metavar="RESULTS",
                      help="measure nothing, fill the documents from these results")  # fmt: skip
    what.add_argument("--again", nargs="+", metavar="ROW",
                      help="measure these rows, or steps, of the stored results anew")  # fmt: skip
    what.add_argument("--check", action="store_true",
                      help="compare instruction counts with bench/baseline.json")  # fmt: skip
    what.add_argument("--update-baseline", action="store_true",
                      help="make the present instruction counts the baseline")  # fmt: skip
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.check or args.update_baseline:
        return check(args.update_baseline)
    if args.render:
        publish(json.loads(args.render.read_text()))
        return 0
    device = torch.device(args.device)
    folder = QUICK if args.quick else RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{facts.machine(device)}.json"
    if args.again:
        if not path.exists():
            parser.error(f"--again: there is no {path.relative_to(ROOT)}; run `make bench` first")
        results = json.loads(path.read_text())
        try:
            again(results, args.again, device)
        except ValueError as error:
            parser.error(str(error))
    else:
        results = run(device, args.quick)
    write_json(path, results)
    print(f"wrote {path.relative_to(ROOT)}")
    if args.quick:
        print(render.text(results))
    else:
        publish(results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
