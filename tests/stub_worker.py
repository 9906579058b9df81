"""bench/gpu/worker.py on a GPU that isn't there, small shapes; see test_gpu_bench.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gpu_stubs
import torch

from bench import roofline
from bench.gpu import measure, rows, worker
from bench.step import Step

SMALL = tuple((4, 8 * 2**i, 16 >> i, 16 >> i) for i in range(4))

WEIGHTS = ((8, 3, 3, 3), (16, 8, 3, 3), (16, 8, 1, 1))


def answer(asked: dict[str, Any]) -> Any:
    if asked.get("row") == FAULTY and asked["impl"] == "triton" and asked["kind"] == "operation":
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    return worker.answer(asked)


torch.set_num_threads(1)
launches, FAULTY = Path(sys.argv[1]), sys.argv[2]
gpu_stubs.record_launches()
gpu_stubs.pretend_cuda()
rows.R18_FEATURES, rows.resnet18_weights = SMALL, lambda: WEIGHTS
rows.CONSISTENCIES, rows.rows = ((5, 4, 10),), gpu_stubs.few_rows
measure.TRAINED = Step("resnet18", 4, width=4, bfloat16=True)
measure.DEVICE, measure.WARM_UP, measure.ROTATED = torch.device("cpu"), 1, 2
roofline.REPEATS = 1
worker.main(answer)
with launches.open("a") as file:  # there are several workers
    file.write(json.dumps(gpu_stubs.KEYS) + "\n")
