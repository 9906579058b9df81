"""Work in a process group of gloo's that ends whatever the work leaves behind."""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from torch import distributed

from imcl_fast.training.distributed import THREADS_END

T = TypeVar("T")


def in_group(folder: Path | str, work: Callable[[], T], rank: int = 0, world: int = 1) -> T:
    """What ``work`` returns, which process ``rank`` of ``world`` calls.

    A DistributedDataParallel must be gone before its group is, as `Processes.release` of
    imcl_fast/training/distributed.py says: one that a function still has when it destroys the
    group hung within thirty runs. Hence the work is a function, whose variables end before.
    """
    store = f"file://{folder}/store{world}"
    distributed.init_process_group("gloo", store, rank=rank, world_size=world)
    try:
        return work()
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)
        raise
    finally:
        gc.collect()
        time.sleep(THREADS_END)
        distributed.destroy_process_group()
