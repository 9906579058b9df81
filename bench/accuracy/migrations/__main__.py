"""Move the rows of all studies: ``python -m bench.accuracy.migrations NAME``, a module here.

Keeps the rows as they were in NAME.csv beside it, to be committed with it.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from imcl_fast.runs import files

from .. import results, study_file
from . import FOLDER, Before, migrate


def apply(before: Before, folder: Path) -> list[results.Result]:
    """Move the rows of the files in ``folder``; those that were moved, as they were."""
    moved = []
    for name in study_file.names():
        path = folder / f"{name}.csv"
        rows = results.read(path)
        now = migrate(study_file.load(name), rows, before)
        different = [row for row, other in zip(rows, now, strict=True) if row != other]
        if different:
            files.write(path, results.to_csv(now).encode())
            moved += different
    return moved


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m bench.accuracy.migrations", description=__doc__)
    parser.add_argument("name", choices=sorted(
        path.stem for path in FOLDER.glob("*.py") if not path.stem.startswith("_")
    ))  # fmt: skip
    name = parser.parse_args(arguments).name
    before = importlib.import_module(f"{__package__}.{name}").before
    moved = apply(before, results.FOLDER)
    if moved:
        files.write(FOLDER / f"{name}.csv", results.to_csv(moved).encode())
    print(f"{name}: moved {len(moved)} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
