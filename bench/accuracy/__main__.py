"""Run a study, or what is left of it, and fill docs/accuracy.md: ``python -m bench.accuracy``.

A run that the study's CSV file has a row for isn't run again, and one that was interrupted goes on.
With --results a study of your own is kept apart, and the documents stay as they are.
"""

from __future__ import annotations

import argparse
import sys
from fnmatch import fnmatch
from pathlib import Path

from imcl_fast.reports.charts import MissingMatplotlib
from imcl_fast.runs.config import POSITIVE
from imcl_fast.runs.errors import DiskFullError
from imcl_fast.runs.flags import Parser, in_range

from ..render import MarkerError, fill_places
from . import migrations, penalties, results, runs, study_file, tables
from .analysis import Analysis
from .plot import plot
from .progress import Progress

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = (ROOT / "README.md", ROOT / "docs/accuracy.md")
RUNS = ROOT / "build/accuracy"


def main(arguments: list[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    try:
        if args.render:
            publish(args.results)
            return 0
        return _run(args)
    except (study_file.StudyError, results.BrokenResults, runs.Busy, DiskFullError, MarkerError,
            MissingMatplotlib) as error:  # fmt: skip
        print(f"bench.accuracy: {error}", file=sys.stderr)
        return 1 if isinstance(error, DiskFullError) else 2


def _run(args: argparse.Namespace) -> int:
    planned = study_file.load(args.study)
    store = results.Store(args.results / f"{planned.name}.csv", planned)
    folder = args.runs / planned.name
    selected = [run for run in planned.runs if fnmatch(run.name, args.only)]
    if not selected:
        raise study_file.StudyError(f"--only: no run of {planned.name} is called {args.only}")
    pending = [run for run in selected if run.name not in store.results]
    if args.list:
        for run in selected:
            done = run.name in store.results
            print(f"{'done' if done else runs.state(runs.run_folder(folder, run)):8s} {run.name}")
        return 0
    if store.stale:
        print(
            f"{len(store.stale)} rows of {planned.name}.csv are of other settings, or of runs that "
            "the study has no longer: they don't count, and go once a run is done"
        )
    jobs, threads = runs.shares(planned, args.jobs, args.threads)
    print(f"{planned.title}. {planned.description}")
    print(f"{planned.name}: {len(pending)} of {len(selected)} runs to do, {jobs} at a time with "
          f"{threads} {'thread' if threads == 1 else 'threads'} each")  # fmt: skip
    options = runs.Options(folder, args.data_root, args.download, jobs, threads, args.minutes)
    progress = Progress(len(selected), len(selected) - len(pending))
    try:
        status = runs.execute(planned, pending, store, options, progress)
    finally:
        progress.close()
    if args.results.resolve() == results.FOLDER:
        publish(args.results)
    else:
        found = Analysis(planned, store.results.values())
        print(f"\n{tables.facts(found)}\n{tables.tables(found)}" if store.results else "no results")
    return status


def publish(folder: Path) -> None:
    """The plots and the tables of the documents, from the results in ``folder``.

    Raises:
        StudyError, BrokenResults, MarkerError: a file isn't as it should be.
        MissingMatplotlib: there can be no plots.
    """
    analyses = {}
    for name in study_file.names():
        planned = study_file.load(name)
        store = results.Store(folder / f"{name}.csv", planned)
        analyses[name] = Analysis(planned, store.results.values())
    counts = {name: len(found.results) for name, found in analyses.items()}
    places = {
        **tables.places(analyses), **penalties.places(folder), **migrations.places(counts),
    }  # fmt: skip
    shown: set[str] = set()
    for document in DOCUMENTS:
        filled = fill_places(document, "accuracy", places)
        print(f"{document.relative_to(ROOT)}: {', '.join(filled) or 'has no place for a table'}")
        shown.update(filled)
    for name, found in analyses.items():
        if found.results and f"{name}:plot" in shown:
            plot(found, ROOT / "docs" / tables.plot_name(name))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m bench.accuracy", description=__doc__)
    add = parser.add_argument
    add("--study", default="cpu", metavar="NAME",
        help=f"{', '.join(study_file.names())}, or the path of a .toml file (default: cpu)")
    add("--data-root", type=Path, metavar="DIR",
        help="folder the data set lies in; Debian's Fashion-MNIST is found without")
    add("--download", action="store_true", help="fetch the data set into the data root")
    add("--jobs", type=in_range(int, POSITIVE), metavar="N",
        help="runs at a time (default: the study's, else as many as the cores allow, or one on a "
        "GPU)")
    add("--threads", type=in_range(int, POSITIVE), metavar="N",
        help="CPU threads of each run (default: the study's, else the cores shared out)")
    add("--minutes", type=float, metavar="N", help="start no more runs after so many")
    add("--only", default="*", metavar="GLOB",
        help="only runs whose name CONDITION-NETWORK-METHOD-sSEED matches")
    add("--results", type=Path, default=results.FOLDER, metavar="DIR",
        help="folder of the CSV files (default: bench/accuracy/results)")
    add("--runs", type=Path, default=RUNS, metavar="DIR",
        help="for the run folders (default: build/accuracy)")
    add("--list", action="store_true", help="say which runs there are, and run none")
    add("--render", action="store_true",
        help="run nothing, make the plots and fill the documents from the CSV files")
    return parser  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
