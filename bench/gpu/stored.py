"""What runs of ``make gpu`` gave that were kept, a file of each in results/, as docs/gpu.md has the
latest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from .. import render

FOLDER = Path(__file__).parent / "results"
TABLES = ("machine", "representation", "step", "left-out")


def latest() -> Mapping:
    return json.loads(max(FOLDER.glob("*.json")).read_text())  # their names begin with the date


def tables() -> str:
    return "\n".join(render.TABLES[name](latest()) for name in TABLES) + "\n" + tests()


def tests() -> str:
    """How many ended how, and which failed."""
    found = latest()["tests"]
    counts: dict[str, int] = {}
    for one in found.values():
        for outcome, number in one.get("outcomes", {}).items():
            counts[outcome] = counts.get(outcome, 0) + number
    said = ", ".join(f"{number} {outcome}" for outcome, number in sorted(counts.items()))
    late = sum(isinstance(one.get("exit"), str) for one in found.values())
    return (
        f"Tests: {said}; of {len(found)} processes {late} were stopped when their time was over.\n"
    )
