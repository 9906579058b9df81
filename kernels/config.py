"""Pinned launch configurations, chosen by rule from shape, dtype and device."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from .plan import EVERY, TILE, Plan, operands_in_shared_memory

_MOST_WARPS = 8  # of a program: more would leave a thread fewer than 255 registers
_THREADS_REGISTERS = 2048  # of a processor: as many for a warp's every thread, if it is alone
TARGETS, PARTIALS = 1024, 128  # that the consistency counts at a time, and adds of each sum
LARGE_GRADIENT = 2**24  # elements, which PyTorch should multiply in 20 us on an H100
_CHUNK_WARPS = 4  # where a program takes the classes in chunks: of 8 fewer fit on a processor


class PassConfig(NamedTuple):
    """Columns (forward) or rows (backward) that a product sums at a time, stages of loads, warps, a
    thread's registers, whether products are settled before the next load (numerics.settled)."""

    depth: int
    stages: int
    num_warps: int
    registers: int
    settle: bool = False


class PairwiseConfig(NamedTuple):
    forward: PassConfig
    backward: PassConfig


class ConsistencyConfig(NamedTuple):
    """Samples and classes a program takes at a time, programs, warps, a thread's registers."""

    samples: int
    block: int
    programs: int
    num_warps: int
    registers: int


def pairwise_config(
    dtype: torch.dtype, tensor_cores: bool, center: bool, of: Plan, device: torch.device
) -> PairwiseConfig:
    """What spills no register, but for what test_offline_compile.py and test_compiled_code.py
    list, and of that what bench/gpu/model.py, which knows Hopper only, says is quickest.

    There products on tensor cores have four warps: of more, one group of four overwrites what
    another's products still read (triton-lang/triton#11047, in every release up to 3.7). Elsewhere
    a program has all the registers that there are, as its operands take them too. Products of
    float32 without tensor cores take theirs in thinner slices.
    """
    half, bfloat16 = dtype.itemsize == 2, dtype == torch.bfloat16
    if not operands_in_shared_memory(device):
        depth = 64 if half else 32 if tensor_cores else 16
        return PairwiseConfig(
            PassConfig(depth, 2 if depth == 16 else 3, 8, 255), PassConfig(depth, 3, 8, 255)
        )
    lean = of.paths == EVERY and not center
    if half and center:
        return PairwiseConfig(
            PassConfig(32, 3, 4, 255), PassConfig(64, 3, 4, 168 if bfloat16 else 255)
        )
    if half and lean:
        return PairwiseConfig(
            PassConfig(64, 3, 4, 168, True), PassConfig(64, 3, 4, 128 if bfloat16 else 168)
        )
    if half:
        return PairwiseConfig(
            PassConfig(64, 3, 4, 255, True), PassConfig(64, 3, 4, 168 if bfloat16 else 255)
        )
    if tensor_cores:
        return PairwiseConfig(PassConfig(32, 3, 4, 255), PassConfig(32, 3, 4, 255))
    heavy = of.rows_unit or of.paths != EVERY
    return PairwiseConfig(PassConfig(16, 2, 8, 128), PassConfig(16, 3, 8, 255 if heavy else 128))


class DependenceConfig(NamedTuple):
    """Columns a program takes at a time and stages of loads, of a Gram and of a product, and rows
    that a product sums at a time; columns where they are gathered, each element with a pointer of
    its own; programs that run at a time, tiles that one adds up at a time, warps, of a Gram and of
    a product, a thread's registers."""

    gram_block: int
    gram_stages: int
    product_block: int
    product_depth: int
    product_stages: int
    gathered: int
    programs: int
    fan: int
    gram_warps: int
    product_warps: int
    registers: int


@functools.lru_cache(maxsize=256)
def dependence_config(
    dtype: torch.dtype, samples: int, device: torch.device
) -> DependenceConfig:
    """What needs no register spilled in test_offline_compile.py: two blocks of four warps on a
    processor, of up to 255 registers, or one of eight where float32 has several tiles."""
    if device.type == "cpu":  # interpreted: as few steps as show every loop turning
        return DependenceConfig(64, 1, 64, 32, 1, 64, 6, 2, 1, 1, 255)
    programs, fan = 2 * processors_of(device), 8
    if dtype.itemsize == 2:
        return DependenceConfig(32, 4, 64, 32, 3, 16, programs, fan, 4, 4, 255)
    gram_warps = 4 if samples <= TILE else 8
    return DependenceConfig(16, 2, 32, 16, 3, 16, programs, fan, gram_warps, 4, 255)


@functools.lru_cache(maxsize=256)
def consistency_config(
    heads: int, heavy: bool, rich: bool, batch: int, classes: int, device: torch.device
) -> ConsistencyConfig:
    """All classes of a sample, of the heads of the largest group, or else chunks of them.

    What a thread holds of each head follows from its registers, and is half as much where
    the gradient is ``heavy``: a teacher is not detached, or is a sum over pairs. ``rich``
    labels, a tile of numbers or weights, and samples on several axes leave less of them. Samples
    are taken several at a time only where every processor has two programs to run anyhow.
    """
    processors = processors_of(device)
    block = power_of_2(classes)
    # What fits without spilling in test_offline_compile.py. Scalars of each head need registers
    # too.
    room = 43 if heavy else 100 if rich else 120
    each = min(16, _power_of_2_below(room / heads - (3 if heavy else 5)))
    if block <= 32 * _MOST_WARPS * each:
        if block < 256:
            each = min(each, _power_of_2_below((12 if heavy else 24) / heads), 4)
        samples = max(32 // block, _power_of_2_below(batch / (2 * processors)))
        samples = max(1, min(samples, 64 * each // block))
        warps = max(1, samples * block // (32 * max(each, 1)))
    else:
        each = max(1, _power_of_2_below((14 if heavy else 36) / heads))
        samples, warps, block = 1, _CHUNK_WARPS, 32 * _CHUNK_WARPS * each
    of_thread = samples * block // (32 * warps)
    at_once = _warps_at_once(heads, heavy or rich, of_thread, block < classes)
    programs = processors * max(1, at_once // warps)
    if device.type == "cpu":  # interpreted: as few steps as show every loop turning
        samples = min(power_of_2((batch + 2) // 3), max(2**16 // block, 1))
        programs = 2
    programs = min(programs, (batch + samples - 1) // samples)
    registers = min(255, _THREADS_REGISTERS // at_once // 8 * 8)
    return ConsistencyConfig(samples, block, programs, warps, registers)


def _warps_at_once(heads: int, many: bool, each: int, alone: bool) -> int:
    """Warps on a processor: as many as leave a thread so many registers that none is spilled in
    the same test, or of more than 5 heads in chunks only those that it lists. It has
    ``each`` elements of every head, ``alone`` their sums too."""
    if many or (heads > 5 and not alone):
        return 8
    return 12 if heads * each <= 40 else 10


def consistency_candidates(pinned: ConsistencyConfig, batch: int) -> list[ConsistencyConfig]:
    """What autotuning tries: the pinned configuration, half and twice its warps, twice its
    programs. Always in this order, which is what the cache remembers."""
    steps = (batch + pinned.samples - 1) // pinned.samples
    return [
        pinned,
        pinned._replace(num_warps=max(1, pinned.num_warps // 2)),
        pinned._replace(num_warps=min(2 * _MOST_WARPS, 2 * pinned.num_warps)),
        pinned._replace(programs=min(steps, 2 * pinned.programs)),
    ]


@functools.cache
def processors_of(device: torch.device) -> int:
    """Streaming multiprocessors, compute units or Xe cores; 2 of the interpreter."""
    if device.type == "cpu":
        return 2
    properties = torch.get_device_module(device).get_device_properties(device)
    if device.type == "xpu":
        return properties.gpu_subslice_count
    return properties.multi_processor_count


def power_of_2(n: int) -> int:
    """The least power of 2 that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def _power_of_2_below(x: float) -> int:
    """The largest power of 2 that is at most x, or 0."""
    return 1 << (int(x).bit_length() - 1) if x >= 1 else 0
