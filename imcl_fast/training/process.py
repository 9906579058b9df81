"""Settings of the whole Python process, for as long as a run lasts."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import sys
from collections.abc import Iterator

import torch

try:
    import numpy
except ImportError:  # torch does without
    numpy = None  # type: ignore[assignment]

from .. import operators
from ..runs.config import TrainConfig
from ..runs.errors import as_usage_error


def check_environment() -> None:
    """See that the compiled extension takes its environment variables.

    Raises:
        UsageError: it doesn't; a training step would be the first to say so.
    """
    if operators.build_info is not None:
        with as_usage_error(RuntimeError):
            operators.build_info.isa_chosen()


@contextlib.contextmanager
def settings(config: TrainConfig, device: torch.device) -> Iterator[None]:
    """Threads and determinism as the run needs them; then these, and the generators of random
    numbers, as before."""
    cudnn, devices = torch.backends.cudnn, [device] if device.type == "cuda" else []
    deterministic = torch.are_deterministic_algorithms_enabled()
    only_warns = torch.is_deterministic_algorithms_warn_only_enabled()
    with torch.random.fork_rng(devices=devices), contextlib.ExitStack() as before:
        before.callback(random.setstate, random.getstate())
        if numpy is not None:
            before.callback(numpy.random.set_state, numpy.random.get_state())
        before.callback(torch.set_num_threads, torch.get_num_threads())
        before.callback(setattr, cudnn, "benchmark", cudnn.benchmark)
        before.callback(torch.use_deterministic_algorithms, deterministic, warn_only=only_warns)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        cudnn.benchmark = not config.deterministic
        if config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        yield


def seed(number: int, device: torch.device) -> None:
    """Set the generators that are the whole process's, Python's and NumPy's too, which a network or
    a transform of the user's may draw from."""
    # Not by torch.manual_seed, which would set those of other devices, of other runs perhaps.
    torch.default_generator.manual_seed(number)
    if device.type != "cpu":
        of_device = torch.get_device_module(device)
        with of_device.device(device) if hasattr(of_device, "device") else contextlib.nullcontext():
            of_device.manual_seed(number)  # that of the device which is current
    random.seed(number)
    if numpy is not None:
        numpy.random.seed(number % 2**32)  # it takes no more


def peak_memory(device: torch.device) -> tuple[int, str]:
    """The most memory so far in bytes, and of what that is.

    Of a GPU it is that of this run, otherwise that of all the process has done.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), "tensors on the GPU"
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "the whole process"
