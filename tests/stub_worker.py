"""bench/gpu/worker.py on a GPU that isn't there, small shapes; see test_gpu_bench.py."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import gpu_stubs
import torch

from bench import operations, roofline, rows, shapes, step, timing
from bench.gpu import worker

SMALL = tuple((4, 8 * 2**i, 16 >> i, 16 >> i) for i in range(4))

WEIGHTS = ((8, 3, 3, 3), (16, 8, 3, 3), (16, 8, 1, 1))


def faulting(row: rows.Row, impl: str, device: torch.device) -> rows.Loss:
    def loss(xs: Sequence[torch.Tensor]) -> torch.Tensor:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    return loss if (row.name, impl) == (FAULTY, "triton") else loss_of(row, impl, device)


torch.set_num_threads(1)
launches, FAULTY = Path(sys.argv.pop(1)), sys.argv.pop(1)
gpu_stubs.record_launches()
gpu_stubs.pretend_cuda()
shapes.R18_FEATURES, shapes.resnet18_weights = SMALL, lambda: WEIGHTS
rows.GPU_CONSISTENCIES, rows.gpu_rows = ((5, 4, 10),), gpu_stubs.few_rows
loss_of, rows.Row.loss = rows.Row.loss, faulting
worker.STEP, worker.DEVICE = step.Step("resnet18", 4, width=4, bfloat16=True), torch.device("cpu")
step.why_no_bfloat16 = operations.why_no_bfloat16 = lambda device: None
elapsed = timing.elapsed
timing.elapsed = lambda _, *parts: elapsed(gpu_stubs.Device, *parts)
operations.GRAPHS, timing.MOST_SETS, roofline.REPEATS = ("cpu",), 2, 1
worker.main()
with launches.open("a") as file:  # there are several workers
    file.write(json.dumps(gpu_stubs.KEYS) + "\n")
