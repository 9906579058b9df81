"""What is measured on a GPU: operations, forward and backward, on the shapes of real networks."""

from __future__ import annotations

import torch

from ..rows import Row, consistency
from ..shapes import R18_FEATURES, resnet18_weights

FUSED = ("triton", "cuda")
COMPETITORS = (*FUSED, "torch", "torch.compile", "reference")
CONSISTENCIES = ((5, 128, 10), (5, 128, 1000), (5, 1024, 1000), (5, 256, 50257))
DTYPES = (torch.bfloat16, torch.float32)


def rows() -> list[Row]:
    """The most telling ones first, for there may not be time for all."""
    found = []
    for dtype in DTYPES:
        found.append(Row("kernel", "R18", resnet18_weights(), dtype))
        found += _representations(dtype, center=False)
        found += [consistency(*sizes, dtype=dtype) for sizes in CONSISTENCIES]
    for dtype in DTYPES:
        found += _representations(dtype, center=True)
    return found


def _representations(dtype: torch.dtype, center: bool) -> list[Row]:
    return [
        Row("representation", "R18", R18_FEATURES, dtype, channels_last=layout, center=center)
        for layout in (True, False)
    ]
