"""The consistency's part of the model: bench/gpu/model.py."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from imcl_fast.kernels.config import LARGE_GRADIENT, PARTIALS, TARGETS

from ..rows import Row, consistency, gpu_rows
from . import machine
from .machine import Launch

# What a language model's heads take: too much for the others that `make gpu` compares with.
BEYOND = consistency(8, 4096, 128256, dtype=torch.bfloat16)


class Case(NamedTuple):
    row: Row

    @property
    def name(self) -> str:
        return self.row.name

    @property
    def code(self) -> str:
        return f"{self.row.name}, consistency_kernel"

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Heads, batch and classes."""
        return len(self.row.shapes), *self.row.shapes[0]

    def forward(self, kernel: dict[str, Any]) -> Launch:
        programs = list(self.programs(kernel))
        logits = self.row.bytes
        _, batch, classes = self.sizes
        moved = 2 * logits  # the gradient is written as well
        if classes > kernel["block"]:
            # Read a second time: from the cache, if it holds the samples that are under way.
            under_way = min(len(programs), machine.PROCESSORS * kernel["blocks"])
            if logits / batch * under_way > machine.CACHE:
                moved += logits
        return machine.launch(programs, moved, kernel)

    @property
    def backward(self) -> Launch:
        """The gradient is multiplied where it lies; a large one isn't by 1, which is what comes in
        where the loss itself is differentiated, as `make gpu` does."""
        large = math.prod(self.sizes) >= LARGE_GRADIENT
        return machine.copied(0 if large else 2 * self.row.bytes)

    @property
    def floor(self) -> float:
        """Seconds for a read of the logits and a write of the gradient."""
        return 2 * self.row.bytes / machine.BANDWIDTH

    def programs(self, kernel: dict[str, Any]) -> list[int]:
        """Instructions of every program, in their order; the last one ends the launch."""
        _, batch, classes = self.sizes
        weights, samples, *chunks, finish = loops_of(kernel["loops"])
        turns_of_chunks = math.ceil(classes / kernel["block"]) if chunks else 0
        each = samples["instructions"] + turns_of_chunks * sum(c["instructions"] for c in chunks)
        count, at_once = kernel["programs"], kernel["samples"]
        start = samples["outside"] + math.ceil(batch / TARGETS) * weights["instructions"]
        found = [start + each * math.ceil((batch - p * at_once) / (count * at_once))
                 for p in range(count)]  # fmt: skip
        found[-1] += math.ceil(count / PARTIALS) * finish["instructions"]
        return found


def loops_of(loops: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The loop over the labels, that over samples, those over chunks of classes in it, and that
    over what the programs leave; others would be an error."""
    found = [(loop["form"], loop["depth"]) for loop in loops]
    known = [[("weights", 0), ("samples", 0), *chunks * [("samples", 1)], ("finish", 0)]
             for chunks in (0, 2)]  # fmt: skip
    if found not in known:
        raise ValueError(f"the consistency has other loops than bench/gpu/consistency_model.py "
                         f"knows of: {found}")
    return loops


def cases() -> list[Case]:
    """Those of `make gpu`, in its order, and one beyond."""
    return [Case(row) for row in (*gpu_rows(), BEYOND) if row.operation == "consistency"]
