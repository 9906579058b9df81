"""``python -m imcl_fast.demo``: what the four ways do for a network whose labels are wrong.

Trains a narrow ResNet-18 on scikit-learn's handwritten digits, with plain cross entropy
and with the four ways, from the same weights and on the same batches, seed by seed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence

import torch
from torch import nn
from tqdm import tqdm

from .data import Dataset, load_digits
from .imcl import IMCL
from .implementations import IMPLEMENTATIONS
from .models import resnet18
from .trainer import FitResult, Progress, fit

METHODS = ("cross entropy", "four ways")
TERMS = {
    "cross_entropy": "CE",
    "output_consistency": "output",
    "multilayer_consistency": "multi-layer",
    "representation_similarity": "represent.",
    "kernel_similarity": "kernel",
}
IMAGE_SIZE = 16  # the four stages then work on 16, 8, 4 and 2 pixels
BATCH_SIZE = 128


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit code (130 if interrupted)."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    digits = load_digits(IMAGE_SIZE)
    train, test = len(digits.train_labels), len(digits.test_labels)
    print(
        f"ResNet-18 shape, {options.width} to {8 * options.width} channels, on "
        f"scikit-learn's digits:\n{train} training images, a random {options.label_noise:.0%} "
        f"of them with a wrong label; {test} test images with their true labels.\n"
        "Wrong labels are what the consistency between parts of a network is meant to help "
        "with.\nBoth methods start from the same weights and see the same batches; "
        f"seeds: {options.seeds}, epochs: {options.epochs}, threads: {options.threads}.\n"
    )
    results: dict[str, list[FitResult]] = {method: [] for method in METHODS}
    interrupted = False
    steps = -(-train // BATCH_SIZE) * options.epochs * options.seeds * len(METHODS)
    with tqdm(total=steps, unit="step", dynamic_ncols=True) as bar:
        try:
            for seed in range(options.seeds):
                dataset = digits.with_label_noise(options.label_noise, seed)
                for method in METHODS:
                    results[method].append(_train(method, dataset, seed, options, bar))
        except KeyboardInterrupt:
            interrupted = True
    if interrupted:
        print("\nInterrupted; what follows is of the finished runs only.")
    if results[METHODS[0]]:
        print(f"\n{table(results)}\n\n{differences(results)}")
    return 130 if interrupted else 0


def table(results: dict[str, list[FitResult]]) -> str:
    """One line per method: means over its runs, accuracy with its standard deviation."""
    head = ["method", "test accuracy", "s/step", *TERMS.values(), "implementation"]
    lines = [head]
    for method, runs in results.items():
        if not runs:
            continue
        accuracies = [100 * run.test_accuracy for run in runs]
        terms = [[run.terms[key] for run in runs if key in run.terms] for key in TERMS]
        lines.append(
            [
                method,
                f"{_mean_and_deviation(accuracies)} %",
                f"{statistics.mean(run.seconds_per_step for run in runs):.4f}",
                *(f"{statistics.mean(values):.4f}" if values else "-" for values in terms),
                runs[0].implementation or "plain torch",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(
            # Names to the left, numbers to the right.
            cell.ljust(width) if i in (0, len(head) - 1) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return "\n".join([text[0], "-" * max(map(len, text)), *text[1:]])


def differences(results: dict[str, list[FitResult]]) -> str:
    """The difference in accuracy between the methods, seed by seed."""
    plain, ways = (results[method] for method in METHODS)
    points = [
        100 * (b.test_accuracy - a.test_accuracy) for a, b in zip(plain, ways, strict=False)
    ]
    if not points:
        return "No seed was finished with both methods."
    listed = ", ".join(f"{value:+.1f}" for value in points)
    return (
        f"{METHODS[1]} minus {METHODS[0]}, seed by seed: {listed} points of test accuracy "
        f"(mean {statistics.mean(points):+.1f}).\nThe terms are unweighted, and means over the "
        "last epoch. A test set this small and so few seeds make an example, not a study."
    )


def _train(
    method: str, dataset: Dataset, seed: int, options: argparse.Namespace, bar: tqdm
) -> FitResult:
    torch.manual_seed(seed)
    network: nn.Module = resnet18(dataset.classes, width=options.width, channels=1)
    if method == METHODS[1]:
        network = IMCL(network, dataset.train_images, impl=options.impl)

    def show(progress: Progress) -> None:
        bar.update()
        if progress.step % 10 == 1:
            bar.set_description(
                f"{method}, seed {seed}, epoch {progress.epoch}/{options.epochs}, "
                f"loss {progress.loss.item():.3f}"
            )

    return fit(
        network,
        dataset,
        epochs=options.epochs,
        batch_size=BATCH_SIZE,
        lr=0.1,
        shift=IMAGE_SIZE // 8,  # one pixel of the original
        seed=seed,
        progress=show,
    )


def _mean_and_deviation(values: Sequence[float]) -> str:
    mean = f"{statistics.mean(values):.2f}"
    return f"{mean} +- {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m imcl_fast.demo",
        description="Plain cross entropy against the four ways of intra-model collaborative "
        "learning, on handwritten digits with wrong labels.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--seeds", type=_at_least(1), default=3, help="runs of each method")
    parser.add_argument("--epochs", type=_at_least(1), default=40, help="epochs of each run")
    parser.add_argument(
        "--label-noise", type=_share, default=0.5, help="share of wrong training labels"
    )
    parser.add_argument(
        "--width", type=_at_least(2), default=8, help="channels of the network's first stage"
    )
    # So small a network gains little from more, and stalls where other programs use them.
    parser.add_argument("--threads", type=_at_least(1), default=1, help="CPU threads")
    parser.add_argument(
        "--impl", choices=IMPLEMENTATIONS, default="auto", help="implementation of the losses"
    )
    return parser


def _at_least(low: int):
    def integer(text: str) -> int:
        value = int(text)
        if value < low:
            raise argparse.ArgumentTypeError(f"expected at least {low}, got {value}")
        return value

    return integer


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"expected a share in [0, 1), got {text}")
    return value


if __name__ == "__main__":
    sys.exit(main())
