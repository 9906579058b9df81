"""Timed choice between launch configurations, only where ``IMCL_FAST_AUTOTUNE=1`` asks for it.

The winner is kept in memory and in ``imcl_fast/autotune.json`` in the user's cache folder.
Without the variable and under Triton's interpreter the pinned configuration is taken, whatever
the file says: so runs are the same by default. While a CUDA graph is captured nothing is timed:
it is the winner that is known, or else the pinned one.
"""

from __future__ import annotations

import functools
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch

Config = TypeVar("Config", bound=tuple)

_ASKED_FOR = os.environ.get("IMCL_FAST_AUTOTUNE") == "1"  # to look takes as long as a launch

_winners: dict[str, int] | None = None  # indices of candidates; None until the file is read


def wanted(device: torch.device) -> bool:
    return _ASKED_FOR and device.type != "cpu"


def best(
    operation: str,
    bucket: Sequence[object],
    dtype: torch.dtype,
    device: torch.device,
    candidates: Sequence[Config],
    run: Callable[[Config], None],
) -> Config:
    """The fastest of the candidates, the first of which is the pinned one.

    They are timed once for each operation, device name, dtype and ``bucket`` of sizes, and
    the place of the winner is kept. ``run`` launches with a configuration, many times.
    """
    name = torch.get_device_module(device).get_device_name(device)
    key = "|".join(map(str, (operation, name, dtype, *bucket)))
    winners = _read()
    winner = winners.get(key)
    if isinstance(winner, int) and 0 <= winner < len(candidates):
        return candidates[winner]
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return candidates[0]
    times = [_time(functools.partial(run, config)) for config in candidates]
    winner = times.index(min(times))
    winners[key] = winner
    _write(winners)
    return candidates[winner]


def cache_file() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "imcl_fast" / "autotune.json"


def _time(launch: Callable[[], None]) -> float:
    """Milliseconds, or infinity where a candidate doesn't fit this device."""
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    try:
        return do_bench(launch, warmup=5, rep=20, return_mode="median")
    except OutOfResources:
        return float("inf")


def _read() -> dict[str, int]:
    global _winners
    if _winners is None:
        try:
            _winners = dict(json.loads(cache_file().read_text()))
        except (OSError, ValueError, TypeError):
            _winners = {}  # none yet, or not ours: it will be written anew
    return _winners


def _write(winners: dict[str, int]) -> None:
    """Replace the file at once: other processes read all of it, old or new."""
    file = cache_file()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as temporary:
            json.dump(winners, temporary, indent=1, sort_keys=True)
        os.replace(temporary.name, file)
    except OSError:
        pass  # a cache that can't be written costs the timing in the next process
