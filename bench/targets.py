"""The speed targets in one run: every competitor of a row is timed in turn, round by round,
on inputs that are rotated, so that drifts of the machine fall on all of them alike.

    python bench/targets.py [--rounds 15] [--no-step] [--no-compile]

Prints a table per operation with medians in milliseconds, the spread (the quartiles) and how
many times faster ``cpp`` is. An implementation whose loss or gradients are off is not timed.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from shapes import R18_FEATURES, resnet18_weights
from torch import Tensor

import imcl_fast
from imcl_fast import functional as F
from imcl_fast.implementations import choose

ROTATED = 3  # input sets a row alternates between

Run = Callable[[], tuple[Tensor, Sequence[Tensor]]]


def interleaved(runs: dict[str, Callable[[int], object]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every run in every round; two rounds to warm up aren't counted."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(-2, rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run(index % ROTATED)
            if index >= 0:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def table(title: str, times: dict[str, list[float]], subject: str) -> None:
    print(f"\n{title}\n{'':28s}{'median ms':>11s}{'quartiles':>20s}{f'{subject} is faster':>22s}")
    best = statistics.median(times[subject])
    for name, values in times.items():
        low, middle, high = statistics.quantiles(values, n=4)
        factor = "" if name == subject else f"{middle / best:.2f}x"
        print(f"{name:28s}{middle:11.2f}{f'{low:.2f} - {high:.2f}':>20s}{factor:>22s}", flush=True)


def compare(
    title: str,
    loss_of: Callable[[Sequence[Tensor], str], Tensor],
    inputs: Callable[[], list[Tensor]],
    impls: Sequence[str],
    rounds: int,
    tolerance: float,
    compiled: bool,
) -> None:
    """One table: forward and backward of a loss under several implementations."""
    sets = [[x.requires_grad_() for x in inputs()] for _ in range(ROTATED)]
    functions = {impl: (lambda xs, impl=impl: loss_of(xs, impl)) for impl in impls}
    if compiled:
        torch._dynamo.reset()
        functions["torch.compile(reference)"] = torch.compile(functions["reference"])
    truth = torch.autograd.grad(loss_of(sets[0], "reference"), sets[0])
    runs = {}
    for name, function in functions.items():
        gradients = torch.autograd.grad(function(sets[0]), sets[0])
        error = max(
            float((g - t).abs().max() / t.abs().max())
            for g, t in zip(gradients, truth, strict=True)
        )
        if error > tolerance:
            print(f"{name}: gradients are off by {error:.1e}; not timed")
            continue

        def run(index: int, function: Callable = function) -> object:
            return torch.autograd.grad(function(sets[index]), sets[index])

        runs[name] = run
    table(title, interleaved(runs, rounds), "cpp")


def training_step(rounds: int) -> None:
    """A ResNet-18 step (32x32, batch 128), plain and with the four ways."""
    from imcl_fast.models import resnet18

    torch.manual_seed(0)
    x = torch.randn(ROTATED, 128, 3, 32, 32)
    y = torch.randint(0, 10, (ROTATED, 128))

    def step(loss_of: Callable[[Tensor, Tensor], Tensor], model: torch.nn.Module) -> Callable:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

        def run(index: int) -> None:
            optimizer.zero_grad(set_to_none=True)
            loss_of(x[index], y[index]).backward()
            optimizer.step()

        return run

    plain = resnet18(width=64, classes=10)
    runs = {
        "plain cross entropy": step(
            lambda x, y: torch.nn.functional.cross_entropy(plain(x), y), plain
        )
    }
    for name, impl in (("four ways, cpp", "cpp"), ("four ways, torch", "torch")):
        imcl = imcl_fast.IMCL(resnet18(width=64, classes=10), x[0], impl=impl)
        runs[name] = step(lambda x, y, imcl=imcl: imcl(x, y).loss, imcl)
    times = interleaved(runs, rounds)
    print("\nResNet-18 training step, 32x32, batch 128")
    print(f"{'':28s}{'median ms':>11s}{'overhead':>12s}")
    base = times["plain cross entropy"]
    for name, values in times.items():
        # Round by round: the machine's drift is larger than what is being measured.
        ratio = statistics.median(v / b for v, b in zip(values, base, strict=True))
        print(f"{name:28s}{statistics.median(values):11.0f}{100 * (ratio - 1):+11.1f} %")


def peak_memory() -> None:
    """Peak resident memory of three steps: medians of processes of their own, in turn."""
    print(f"\nPeak memory of that step\n{'':28s}{'MiB':>11s}{'extra':>12s}")
    peaks: dict[str, list[float]] = {"plain": [], "cpp": [], "torch": []}
    for _ in range(5):  # the allocator's luck is worth some per cent
        for name, values in peaks.items():
            command = [sys.executable, __file__, "--memory-of", name]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            values.append(float(done.stdout))
    base = statistics.median(peaks["plain"])
    for name, values in peaks.items():
        peak = statistics.median(values)
        print(f"{name:28s}{peak:11.0f}{100 * (peak / base - 1):+11.1f} %")


def memory_of(name: str) -> None:
    from imcl_fast.models import resnet18

    torch.manual_seed(0)
    x, y = torch.randn(128, 3, 32, 32), torch.randint(0, 10, (128,))
    model: torch.nn.Module = resnet18(width=64, classes=10)
    if name != "plain":
        model = imcl_fast.IMCL(model, x, impl=name)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad(set_to_none=True)
        out = model(x) if name == "plain" else model(x, y)
        loss = torch.nn.functional.cross_entropy(out, y) if name == "plain" else out.loss
        loss.backward()
        optimizer.step()
    # Not ru_maxrss: a child's begins with what its parent had when it forked.
    status = Path("/proc/self/status").read_text()
    print(int(status.partition("VmHWM:")[2].split()[0]) / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-step", action="store_true", help="leave out the training step")
    parser.add_argument("--only-step", action="store_true", help="leave out all the rest")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument("--memory-of", choices=("plain", "cpp", "torch"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        memory_of(args.memory_of)
        return

    torch.manual_seed(0)
    if choose("auto", "pairwise", torch.device("cpu")) != "cpp":
        sys.exit("The compiled extension isn't there; see python -m imcl_fast.env")
    from imcl_fast.env import report

    print(report().partition("\n\n")[0])
    print(f"{'machine':20s}{platform.machine()}, {platform.system()}")
    if not args.only_step:
        operations(args.rounds, not args.no_compile)
    if not args.no_step:
        training_step(max(5, args.rounds // 2))
        peak_memory()


def operations(rounds: int, compiled: bool) -> None:
    """Forward and backward of each operation under every implementation."""
    impls = ("cpp", "torch", "reference")

    def features() -> list[Tensor]:
        return [torch.randn(shape).relu_() for shape in R18_FEATURES]

    def weights() -> list[Tensor]:
        return [torch.randn(shape) for shape in resnet18_weights()]

    y = torch.randint(0, 1000, (128,))
    compare(
        "Representation similarity, R18, forward + backward",
        lambda xs, impl: F.representation_similarity(xs, impl=impl),
        features, impls, rounds, 1e-4, compiled,
    )  # fmt: skip
    compare(
        "The same, centred",
        lambda xs, impl: F.representation_similarity(xs, center=True, impl=impl),
        features, impls, rounds, 1e-4, False,
    )  # fmt: skip
    compare(
        "The same, channels_last",
        lambda xs, impl: F.representation_similarity(xs, impl=impl),
        lambda: [x.to(memory_format=torch.channels_last) for x in features()],
        impls, rounds, 1e-4, False,
    )  # fmt: skip
    compare(
        "Kernel similarity, R18, float32, forward + backward",
        lambda xs, impl: F.kernel_similarity(xs, impl=impl),
        weights, impls, rounds, 1e-4, compiled,
    )  # fmt: skip
    torch.set_float32_matmul_precision("medium")
    compare(
        'Kernel similarity, R18, set_float32_matmul_precision("medium")',
        lambda xs, impl: F.kernel_similarity(xs, impl=impl),
        weights, impls, rounds, 5e-2, False,
    )  # fmt: skip
    torch.set_float32_matmul_precision("highest")
    compare(
        "Consistency, 5 heads x 128 x 1000, T = 2, forward + backward",
        lambda xs, impl: F.collaborative_consistency(xs, y, impl=impl),
        lambda: [torch.randn(128, 1000) for _ in range(5)],
        impls, 10 * rounds, 1e-4, compiled,
    )  # fmt: skip


if __name__ == "__main__":
    main()
