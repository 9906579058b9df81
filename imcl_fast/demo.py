"""``python -m imcl_fast.demo``: what the four ways do for a network whose labels are wrong.

Trains a narrow ResNet-18 on scikit-learn's handwritten digits, with plain cross entropy
and with the four ways, from the same weights and on the same batches, seed by seed.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import data, implementations
from .objectives import WAYS
from .reports.paired import in_percent
from .runs import flags
from .runs.config import POSITIVE, SHARE, Range, TrainConfig
from .runs.errors import Interrupted, TrainingError
from .runs.extra import needed_by

with needed_by("python -m imcl_fast.demo"):
    from tqdm import tqdm

    from .reports.table import text_table
    from .training.progress import Observer
    from .training.trainer import Trainer

METHODS: dict[str, tuple[str, ...]] = {"cross entropy": (), "four ways": WAYS}
TERMS = {
    "cross_entropy": "CE",
    "output_consistency": "output",
    "multilayer_consistency": "multi-layer",
    "representation_similarity": "represent.",
    "kernel_similarity": "kernel",
}


@dataclass(frozen=True)
class Result:
    """What a run of a method gave.

    Attributes:
        summary: that of ``Trainer.fit``.
        row: the last of metrics.csv.
    """

    summary: Mapping[str, Any]
    row: Mapping[str, float]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit code (130 if interrupted)."""
    options = _parser().parse_args(arguments)
    try:
        digits = data.load("digits")
    except ImportError as error:
        print(f"python -m imcl_fast.demo: {error}", file=sys.stderr)
        return 2
    print(
        f"ResNet-18 shape, {options.width} to {8 * options.width} channels, on "
        f"scikit-learn's digits:\n{len(digits.train)} training images, a random "
        f"{options.label_noise:.0%} of them with a wrong label; {len(digits.test)} test images "
        "with their true labels.\n"
        "Wrong labels are what the consistency between parts of a network is meant to help "
        "with.\nBoth methods start from the same weights and see the same batches; "
        f"seeds: {options.seeds}, epochs: {options.epochs}, threads: {options.threads}.\n"
    )
    results: dict[str, list[Result]] = {method: [] for method in METHODS}
    interrupted = False
    with tqdm(unit="step", dynamic_ncols=True, disable=not sys.stderr.isatty()) as bar:
        try:
            for seed in range(options.seeds):
                for method, ways in METHODS.items():
                    config = TrainConfig(
                        ways=ways,
                        width=options.width,
                        label_noise=options.label_noise,
                        epochs=options.epochs,
                        schedule="onecycle",
                        seed=seed,
                        device="cpu",
                        threads=options.threads,
                        impl=options.impl,
                    )
                    shown = _OneBar(bar, f"{method}, seed {seed}", options.seeds * len(METHODS))
                    trainer = Trainer(config, data_set=digits, observer=shown)
                    results[method].append(Result(trainer.fit(), trainer.rows[-1]))
        except Interrupted:
            interrupted = True
        except TrainingError as error:
            bar.close()
            print(f"python -m imcl_fast.demo: {error}", file=sys.stderr)
            return error.exit_code
    if interrupted:
        print("\nInterrupted; what follows is of the finished runs only.")
    if results["cross entropy"]:
        used = implementations.choose(options.impl, "pairwise", torch.device("cpu"))
        print(f"\n{table(results, used)}\n\n{differences(results)}")
    return 130 if interrupted else 0


def table(results: Mapping[str, Sequence[Result]], implementation: str) -> str:
    """One line per method: means over its runs, accuracy with its standard deviation."""
    lines = []
    for method, runs in results.items():
        if not runs:
            continue
        accuracies = [run.summary["last_test_accuracy"] for run in runs]
        fitted = [100 * run.row["fit_noisy"] for run in runs if "fit_noisy" in run.row]
        terms = [[run.row[key] for run in runs if key in run.row] for key in TERMS]
        seconds = statistics.mean(run.summary["seconds_per_step"] for run in runs)
        lines.append(
            [
                method,
                implementation if METHODS[method] else "plain torch",
                f"{in_percent(accuracies)} %",
                f"{statistics.mean(fitted):.1f} %" if fitted else "-",
                f"{seconds:.4f}",
                *(f"{statistics.mean(values):.4f}" if values else "-" for values in terms),
            ]
        )
    head = ["method", "implementation", "test accuracy", "wrong fitted", "s/step", *TERMS.values()]
    return text_table(head, lines, left=2)


def differences(results: Mapping[str, Sequence[Result]]) -> str:
    """The difference in accuracy between the methods, seed by seed."""
    plain, ways = (
        [100 * run.summary["last_test_accuracy"] for run in results[method]] for method in METHODS
    )
    points = [b - a for a, b in zip(plain, ways, strict=False)]
    if not points:
        return "No seed was finished with both methods."
    listed = ", ".join(f"{value:+.1f}" for value in points)
    return (
        f"four ways minus cross entropy, seed by seed: {listed} points of test accuracy "
        f"(mean {statistics.mean(points):+.1f}).\nWrong fitted: the share of wrong training "
        "labels that the network has learnt. The terms are unweighted, and means\nover the last "
        "epoch. A test set this small and so few seeds make an example, not a study."
    )


class _OneBar(Observer):
    """Shows a run as a part of one bar over all runs; without a terminal as a line per run."""

    def __init__(self, bar: tqdm, name: str, runs: int) -> None:
        self._bar, self._name, self._runs = bar, name, runs

    def started(self, step: int, steps: int) -> None:
        if self._bar.disable:
            print(f"{self._name}: {steps} steps", file=sys.stderr, flush=True)
            return
        if self._bar.total is None:
            self._bar.total = steps * self._runs
        self._bar.set_description(self._name)

    def stepped(self, values: Mapping[str, float] | None) -> None:
        if self._bar.disable:
            return
        if values is not None:
            self._bar.set_postfix_str(f"loss {values['loss']:.3f}", refresh=False)
        self._bar.update()


def _parser() -> flags.Parser:
    parser = flags.Parser(
        prog="python -m imcl_fast.demo",
        description="Plain cross entropy against the four ways of intra-model collaborative "
        "learning, on handwritten digits with wrong labels.",
    )
    count, share = flags.in_range(int, POSITIVE), flags.in_range(float, SHARE)
    for flag, kind, default, help in (
        ("--seeds", count, 3, "runs of each method"),
        ("--epochs", count, 30, "epochs of each run"),
        ("--label-noise", share, 0.5, "share of wrong training labels"),
        ("--width", flags.in_range(int, Range(2)), 8, "channels of the network's first stage"),
        # So small a network gains little from more, and stalls where other programs use them.
        ("--threads", count, 1, "CPU threads"),
    ):
        metavar = "X" if kind is share else "N"
        parser.add_argument(
            flag, type=kind, default=default, metavar=metavar, help=f"{help} (default: {default})"
        )
    parser.add_argument(
        "--impl",
        choices=implementations.IMPLEMENTATIONS,
        default="auto",
        help="implementation of the losses (default: auto)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
