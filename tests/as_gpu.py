"""pytest plugin: runs the tests of impl="triton" as a GPU of 132 processors would see them.

Writes what was launched to the file that IMCL_FAST_LAUNCHES names: of each kernel that a GPU
would have compiled, how often it ran.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import gpu_stubs

gpu_stubs.record_launches()  # before conftest.py asks what can run


def pytest_sessionstart() -> None:
    import conftest

    conftest.Impl.interpreted = property(lambda self: False)  # as many cases as on a GPU


def pytest_sessionfinish() -> None:
    Path(os.environ["IMCL_FAST_LAUNCHES"]).write_text(json.dumps(gpu_stubs.KEYS))
