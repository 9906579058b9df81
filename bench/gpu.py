"""Everything a machine with a GPU is for, in one command: tests, then measurements.

    python bench/gpu.py --out FOLDER [--minutes 8] [--no-tests] [--rounds 20]

Writes ``gpu.json`` and ``gpu.txt`` to FOLDER: what the tests said, and forward plus backward
of each operation under every implementation, timed on the device (as a CUDA graph) and as
called from Python, beside the machine's own copy bandwidth and matmul rate. An
implementation whose gradients are off is not timed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
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
from imcl_fast.implementations import why_not

ROOT = Path(__file__).resolve().parent.parent
ROTATED = 6  # input sets a row alternates between, more than the cache holds
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2}
FUSED = ("triton", "cuda")
COMPETITORS = (*FUSED, "torch", "torch.compile", "reference")

Step = Callable[[Sequence[Tensor]], object]


def median_ms(run: Callable[[], object], rounds: int) -> float:
    """Median time on the device of one run, by events."""
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def rates(rounds: int) -> dict[str, float]:
    """Copy bandwidth (bytes read and written) and the rates of square products."""
    source = torch.empty(2**28, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    copy = median_ms(lambda: target.copy_(source), rounds)
    found = {"copy_GB_per_s": 2 * source.numel() * 4 / copy / 1e6}
    for name, dtype, precision in (
        ("bf16", torch.bfloat16, "highest"),
        ("tf32", torch.float32, "high"),
        ("fp32", torch.float32, "highest"),
    ):
        torch.set_float32_matmul_precision(precision)
        a = torch.randn(8192, 8192, dtype=dtype, device="cuda")
        found[f"{name}_TFLOP_per_s"] = 2 * 8192**3 / median_ms(lambda a=a: a @ a, rounds) / 1e9
    torch.set_float32_matmul_precision("highest")
    return found


def operations() -> list[tuple[str, torch.dtype, Callable, Callable, int]]:
    """Name, dtype, maker of inputs, loss, and the least bytes forward and backward move."""
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        size = dtype.itemsize
        for layout in (torch.contiguous_format, torch.channels_last):

            def features(dtype=dtype, layout=layout) -> list[Tensor]:
                return [
                    torch.randn(s, device="cuda", dtype=dtype).contiguous(memory_format=layout)
                    for s in R18_FEATURES
                ]

            elements = sum(torch.Size(s).numel() for s in R18_FEATURES)
            lies = "NHWC" if layout == torch.channels_last else "NCHW"
            for center in (False, True):
                rows.append((
                    f"representation R18 {lies}{' centred' if center else ''}",
                    dtype,
                    features,
                    lambda xs, impl, c=center: F.representation_similarity(
                        xs, center=c, impl=impl
                    ),
                    3 * elements * size,  # read, read again, gradient written
                ))  # fmt: skip

        def kernels(dtype=dtype) -> list[Tensor]:
            return [torch.randn(s, device="cuda", dtype=dtype) for s in resnet18_weights()]

        elements = sum(torch.Size(s).numel() for s in resnet18_weights())
        rows.append((
            "kernel R18", dtype, kernels,
            lambda xs, impl: F.kernel_similarity(xs, impl=impl), 3 * elements * size,
        ))  # fmt: skip
        for heads, batch, classes in ((5, 128, 10), (5, 128, 1000), (5, 1024, 1000),
                                      (5, 256, 50257)):  # fmt: skip

            def logits(heads=heads, batch=batch, classes=classes, dtype=dtype) -> list[Tensor]:
                return [
                    torch.randn(batch, classes, device="cuda", dtype=dtype) for _ in range(heads)
                ]

            target = torch.randint(0, classes, (batch,), device="cuda")
            rows.append((
                f"consistency {heads} x {batch} x {classes}", dtype, logits,
                lambda zs, impl, y=target: F.collaborative_consistency(zs, y, impl=impl),
                # read; the gradient in float32 written and read; the gradient written
                heads * batch * classes * (2 * size + 8),
            ))  # fmt: skip
    return rows


def measure(row, rounds: int) -> dict[str, dict[str, float]]:
    """Per competitor: milliseconds on the device and from Python, and peak bytes."""
    _, dtype, make, loss_of, _ = row
    grad = torch.ones((), device="cuda")
    sets = [[x.requires_grad_() for x in make()] for _ in range(ROTATED)]
    truth = torch.autograd.grad(loss_of([x.float() for x in sets[0]], "reference"), sets[0])
    steps: dict[str, Step] = {}
    for name in COMPETITORS:
        if name in FUSED and why_not(name, "cuda", [dtype]) is not None:
            continue
        function = lambda xs, n=name: loss_of(xs, n)  # noqa: E731
        if name == "torch.compile":
            torch._dynamo.reset()
            function = torch.compile(lambda xs: loss_of(xs, "torch"))

        def step(xs, function=function):
            return torch.autograd.grad(function(xs), xs, grad)

        got = step(sets[0])
        error = max(
            float((g.float() - t.float()).abs().max() / t.float().abs().max())
            for g, t in zip(got, truth, strict=True)
        )
        if not error <= TOLERANCE[dtype]:
            print(f"{row[0]}: {name}: gradients are off by {error:.1e}; not timed", flush=True)
            continue
        steps[name] = step
    times: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(-3, rounds):
        for name, step in steps.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            step(sets[index % ROTATED])
            end.record()
            end.synchronize()
            if index >= 0:
                times[name].append(start.elapsed_time(end))
    found = {}
    for name, step in steps.items():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(sets[0])
        torch.cuda.synchronize()
        found[name] = {
            "called_ms": statistics.median(times[name]),
            "peak_bytes": torch.cuda.max_memory_allocated() - before,
        }
        if name in (*FUSED, "torch"):
            found[name]["device_ms"] = graph_ms(step, sets, rounds)
    return found


def graph_ms(step: Step, sets: list[list[Tensor]], rounds: int) -> float:
    """Median time of one step within a CUDA graph of one step on each input set."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for xs in sets:
            step(xs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [step(xs) for xs in sets]
    graph.replay()
    spent = median_ms(graph.replay, rounds) / len(sets)
    del kept
    return spent


def training_step(rounds: int) -> dict[str, dict[str, float]]:
    """A ResNet-18 step, bfloat16 autocast, channels_last, 32x32, batch 128."""
    from imcl_fast.models import resnet18

    x = torch.randn(ROTATED, 128, 3, 32, 32, device="cuda")
    y = torch.randint(0, 10, (ROTATED, 128), device="cuda")

    def runner(network: torch.nn.Module, loss_of) -> Callable[[int], None]:
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)

        def run(index: int) -> None:
            batch = x[index].contiguous(memory_format=torch.channels_last)
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = loss_of(batch, y[index])
            loss.backward()
            optimizer.step()

        return run

    def network() -> torch.nn.Module:
        torch.manual_seed(0)
        model = resnet18(width=64, classes=10).cuda()
        return model.to(memory_format=torch.channels_last)

    plain = network()
    runs = {
        "plain": runner(
            plain, lambda a, b: torch.nn.functional.cross_entropy(plain(a).float(), b)
        )
    }
    for impl in (*(n for n in FUSED if why_not(n, "cuda") is None), "torch", "reference"):
        imcl = imcl_fast.IMCL(network(), x[0, :2], impl=impl)
        runs[impl] = runner(imcl, lambda a, b, imcl=imcl: imcl(a, b).loss)
    times: dict[str, list[float]] = {name: [] for name in runs}
    peaks = {}
    for index in range(-5, rounds):
        for name, run in runs.items():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            start = time.perf_counter()
            run(index % ROTATED)
            torch.cuda.synchronize()
            if index >= 0:
                times[name].append(1e3 * (time.perf_counter() - start))
                peaks[name] = torch.cuda.max_memory_allocated() - before
    return {
        name: {"ms": statistics.median(times[name]), "peak_bytes": peaks[name]} for name in runs
    }


def tests(out: Path, seconds: float) -> dict[str, object]:
    """The suite on the device, and the CUDA kernels under compute-sanitizer if it is there."""
    found: dict[str, object] = {}
    selection = [sys.executable, "-m", "pytest", "-q", "-k", "triton or cuda or gpu", "tests"]
    commands = {"pytest": selection}
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer and why_not("cuda", "cuda") is None:
        few = [sys.executable, "-m", "pytest", "-q", "-x", "tests/test_gpu.py",
               "-k", "repeat and cuda"]  # fmt: skip
        for kind in ("memcheck", "racecheck"):
            commands[kind] = [sanitizer, "--tool", kind, "--error-exitcode", "9", *few]
    else:
        found["compute-sanitizer"] = "left out: not installed, or no CUDA kernels built"
    deadline = time.monotonic() + seconds
    for name, command in commands.items():
        left = max(deadline - time.monotonic(), 20)
        try:
            done = subprocess.run(
                command, cwd=ROOT, timeout=left, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
            said, code = done.stdout, done.returncode
        except subprocess.TimeoutExpired as late:
            said = late.stdout.decode() if isinstance(late.stdout, bytes) else late.stdout or ""
            code = f"stopped after {left:.0f} s"
        (out / f"{name}.log").write_text(said)
        last = said.strip().splitlines()[-1:] or [""]
        found[name] = {"exit": code, "last_line": last[0]}
        print(f"{name}: {code}: {last[0]}", flush=True)
    return found


def facts() -> dict[str, object]:
    import triton

    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    driver = ""
    if shutil.which("nvidia-smi"):
        driver = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True, text=True,
        ).stdout.strip()  # fmt: skip
    return {
        "device": torch.cuda.get_device_name(),
        "driver": driver,
        "cuda": torch.version.cuda or torch.version.hip,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "imcl_fast": imcl_fast.__version__,
        "commit": commit or os.environ.get("IMCL_FAST_COMMIT", "unknown"),
    }


def report(results: dict) -> str:
    lines = [", ".join(f"{k} {v}" for k, v in results["facts"].items())]
    lines.append(", ".join(f"{k} {v:.0f}" for k, v in results["rates"].items()))
    bandwidth = results["rates"]["copy_GB_per_s"]
    for name, row in results["operations"].items():
        floor = row["bytes"] / bandwidth / 1e6
        lines.append(f"\n{name}: forward and backward, floor {floor:.3f} ms ({row['bytes']} bytes)")
        lines.append(f"{'':16s}{'device ms':>12s}{'of copy':>9s}{'called ms':>12s}{'peak MB':>10s}")
        for impl, one in row["impls"].items():
            device = one.get("device_ms")
            share = f"{floor / device:.0%}" if device else ""
            lines.append(
                f"{impl:16s}{f'{device:.3f}' if device else '':>12s}{share:>9s}"
                f"{one['called_ms']:>12.3f}{one['peak_bytes'] / 1e6:>10.1f}"
            )
    plain = results["step"]["plain"]
    lines.append("\nResNet-18 step, bf16 autocast, channels_last, batch 128")
    for name, one in results["step"].items():
        slower, larger = (one[k] / plain[k] - 1 for k in ("ms", "peak_bytes"))
        lines.append(
            f"{name:16s}{one['ms']:>10.2f} ms {slower:>+8.1%}"
            f"{one['peak_bytes'] / 1e6:>10.0f} MB {larger:>+7.1%}"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "build/gpu")),
                        help="folder for the results (default: $OUT, or build/gpu)")  # fmt: skip
    parser.add_argument("--minutes", type=float, default=8, help="time to finish in")
    parser.add_argument("--rounds", type=int, default=20, help="times each row is measured")
    parser.add_argument("--no-tests", action="store_true", help="measure only")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench/gpu.py: torch sees no GPU here; `make test` is what can run without one")
    args.out.mkdir(parents=True, exist_ok=True)
    results: dict = {"facts": facts()}

    def save() -> None:
        (args.out / "gpu.json").write_text(json.dumps(results, indent=1))

    # Measured first: a test that hangs must not take the figures with it.
    results["rates"] = rates(args.rounds)
    results["operations"] = {}
    for row in operations():
        name, dtype, _, _, least = row
        impls = measure(row, args.rounds)
        key = f"{name}, {str(dtype).removeprefix('torch.')}"
        results["operations"][key] = {"bytes": least, "impls": impls}
        save()
    results["step"] = training_step(args.rounds)
    (args.out / "gpu.txt").write_text(report(results))
    print(report(results), flush=True)
    if not args.no_tests:
        results["tests"] = tests(args.out, 60 * args.minutes / 2)
    save()
    failed = [n for n, one in results.get("tests", {}).items()
              if isinstance(one, dict) and one["exit"] != 0]  # fmt: skip
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
