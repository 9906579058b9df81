"""Break the code one line at a time and run the tests that should see it: ``python -m
bench.mutants``.

The lists in bench/mutants/lists say which lines. Each mutant is tried out in a copy of the tree;
what comes out goes into bench/mutants/results.json and the table of docs/mutants.md, of those
that --only leaves out what came out the last time.

The exit code is 1 if a mutant survives and the list doesn't say why no test can see it, if one
that the list calls equivalent is killed, or if one doesn't even run.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

from imcl_fast import operators

from .mutant import LISTS, ROOT, Mutant, MutantError, Tests, load
from .results import RESULTS, Results, explained, in_words
from .tree import BROKEN, SURVIVED, Outcome, Tree

DOCUMENT = ROOT / "docs/mutants.md"
PATIENCE = 5  # tests that take as many times as long as without a mutant, and a minute, never end


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    try:
        mutants = load(args.lists)
        chosen = [m for m in mutants if any(map(partial(_is_called, m), args.only))]
        if not chosen:
            raise MutantError(f"--only: no mutant of {args.lists} is called {args.only}")
        for mutant in chosen:
            mutant.applied_to((args.root / mutant.file).read_text(encoding="utf-8"))
        if args.list:
            print("\n".join(mutant.name for mutant in chosen))
            return 0
        results = Results(RESULTS, mutants) if (args.root, args.lists) == (ROOT, LISTS) else None
        found = run(args.root, chosen, args.jobs, results)
    except MutantError as error:
        print(f"bench.mutants: {error}", file=sys.stderr)
        return 2
    if results is not None:
        results.publish(DOCUMENT)
    wrong = [mutant for mutant in found if not explained(mutant, found[mutant].verdict)]
    for mutant in wrong:
        print(f"not as it should be: {mutant.name}: {found[mutant].verdict}")
        if found[mutant].verdict == BROKEN:
            print(found[mutant].by)
    print(f"{len(found)} mutants, {len(found) - len(wrong)} as they should be")
    return 1 if wrong else 0


def run(
    root: Path, mutants: Sequence[Mutant], jobs: int, results: Results | None
) -> dict[Mutant, Outcome]:
    """Try out all mutants in ``jobs`` copies of ``root`` at a time, printing and keeping what
    comes out.

    Raises:
        MutantError: tests are red without a mutant.
    """
    level = "" if operators.build_info is None else operators.build_info.isa_chosen()
    compiled = any(mutant.compiled for mutant in mutants)
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        trees = [Tree(root, Path(folder, str(job)), level) for job in range(jobs)]
        of_thread = threading.local()
        free = iter(trees)

        def unmutated(tests: Tests) -> float:
            outcome = of_thread.tree.test(tests, None, compiled)
            print(f"{outcome.seconds:6.0f} s  {tests.name}, unmutated", flush=True)
            if outcome.verdict != SURVIVED:
                raise MutantError(f"the tests {tests.name} fail without a mutant: {outcome.by}")
            return 60 + PATIENCE * outcome.seconds

        def tried_out(limits: dict[Tests, float], mutant: Mutant) -> Outcome:
            outcome = of_thread.tree.try_out(mutant, limits)
            words = in_words(mutant, outcome.verdict, outcome.by.split("\n")[-1])
            print(f"{outcome.seconds:6.0f} s  {mutant.name}: {words}", flush=True)
            if results is not None:
                results.add(mutant, outcome)
            return outcome

        def begin() -> None:
            of_thread.tree = next(free)

        with ThreadPoolExecutor(jobs, initializer=begin) as pool:
            try:
                tests = list(dict.fromkeys(t for mutant in mutants for t in mutant.tests))
                limits = dict(zip(tests, pool.map(unmutated, tests), strict=True))
                outcomes = pool.map(partial(tried_out, limits), mutants)
                return dict(zip(mutants, outcomes, strict=True))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for tree in trees:
                    tree.stop()
                raise


def _is_called(mutant: Mutant, glob: str) -> bool:
    return fnmatch(mutant.name, glob) or fnmatch(mutant.file, glob)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.mutants", description=__doc__)
    parser.add_argument("--only", nargs="+", default=["*"], metavar="GLOB",
                        help="of names or of files")
    parser.add_argument("--list", action="store_true", help="the names, and run nothing")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time (default 2)")
    parser.add_argument("--lists", type=Path, default=LISTS, help="another folder of lists")
    parser.add_argument("--root", type=Path, default=ROOT,
                        help="another tree; its results, or another list's, are printed only")
    return parser


if __name__ == "__main__":
    sys.exit(main())
