"""What to compare with: rates measured in the same run, work counted per row, and the floor.

A floor is the larger of two times: the bytes that must move, at copy speed, and the multiply-adds
that must be done, at the rate of a large matrix product. Neither rate is a bound: what lies in a
cache moves faster than a copy through memory, and a product may be faster than torch's of the size
measured. So a row can be below its floor. Bytes: inputs read once by each pass that needs them and
gradients written once, whatever is kept in between. Flops: those of the best form known
(csrc/cpu/pairwise_kernels.cpp), a symmetric product by half. Exponentials aren't counted: on a CPU
the consistency can't come as near to its floor as a product can.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from .rows import Row
from .timing import elapsed

REPEATS = 7


class Work(NamedTuple):
    """Bytes to move and floating point operations to do."""

    forward_bytes: int
    backward_bytes: int
    forward_flops: int
    backward_flops: int

    def __add__(self, other: Work) -> Work:  # type: ignore[override]
        return Work(*(a + b for a, b in zip(self, other, strict=True)))


def work(row: Row) -> Work:
    """Of one forward and one backward of a row."""
    total = Work(0, 0, 0, 0)
    for shape in row.shapes:
        size = torch.Size(shape).numel() * row.dtype.itemsize
        if row.operation == "consistency":
            # The gradient is made while the logits are at hand: there is nothing left to read.
            total += Work(size, size, 0, 0)
            continue
        if row.operation == "representation":
            matrices, rows = shape[:2]
        else:
            matrices, rows = 1, shape[0]
        columns = torch.Size(shape).numel() // (matrices * rows)
        small, large = rows, columns  # of the symmetric matrix, and what is summed over
        if row.operation != "dependence" and row.penalty == "square" and 2 * columns <= rows:
            small, large = columns, rows
        gram = matrices * small * (small + 1) * large
        product = 2 * matrices * small * small * large
        if row.penalty == "signed":
            gram, product = 4 * matrices * rows * columns, 6 * matrices * rows * columns
        total += Work(size, 2 * size, gram, product)
    return total


def floors(row: Row, rates: Mapping[str, float]) -> dict[str, float]:
    """Seconds that a row's work takes at the measured rates, by pass."""
    needed = work(row)
    gemm = rates["float32_flops_per_s"]
    if row.dtype != torch.float32 or row.precision == "medium":
        # Without instructions for bfloat16 a product of it may be the slower one.
        gemm = max(gemm, rates["bfloat16_flops_per_s"])
    copy = rates["copy_bytes_per_s"]

    def floor(moved: int, flops: int) -> float:
        return max(moved / copy, flops / gemm)

    return {
        "forward": floor(needed.forward_bytes, needed.forward_flops),
        "backward": floor(needed.backward_bytes, needed.backward_flops),
        "both": floor(
            needed.forward_bytes + needed.backward_bytes,
            needed.forward_flops + needed.backward_flops,
        ),
    }


def entry(row: Row, rates: Mapping[str, float] | None) -> dict:
    """What the results say of a row before it is measured; no floors without rates."""
    return {
        "operation": row.operation,
        "work": work(row)._asdict(),
        "floors": floors(row, rates) if rates else {},
    }


def measure_rates(device: torch.device) -> dict[str, float]:
    """Copy bandwidth (bytes read and written) and the rates of square products."""
    on_gpu = device.type == "cuda"
    rates = {"copy_bytes_per_s": _copy_rate(2**30 if on_gpu else 2**28, device)}
    size = 8192 if on_gpu else 1024
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(size, size, device=device).to(dtype)
        name = str(dtype).removeprefix("torch.")
        spent = _seconds(lambda a=a: a @ a, device)
        rates[f"{name}_flops_per_s"] = 2 * size**3 / spent
    return rates


def _copy_rate(size: int, device: torch.device) -> float:
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _seconds(lambda: target.copy_(source), device)


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    return statistics.median([elapsed(device, run)[0] for _ in range(REPEATS + 1)][1:])
