"""pytest plugin: runs the tests of impl="triton" as a GPU of 132 processors would see them.

Writes what was launched to the file that IMCL_FAST_LAUNCHES names: of each kernel that a GPU
would have compiled, how often it ran.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import gpu_stubs
import pytest

# That a kernel of its own has made, and none runs here.
LOOK_AT_NUMBERS = (
    "test_a_large_gradient_is_scaled_in_one_launch", "test_parts_of_a_number_add_up_to_it",
)  # fmt: skip

gpu_stubs.record_launches()  # before conftest.py asks what can run


def pytest_sessionstart() -> None:
    import conftest

    conftest.Impl.interpreted = property(lambda self: False)  # as many cases as on a GPU


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left = [item for item in items if getattr(item, "originalname", item.name) in LOOK_AT_NUMBERS]
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if item not in left]


def pytest_sessionfinish() -> None:
    Path(os.environ["IMCL_FAST_LAUNCHES"]).write_text(json.dumps(gpu_stubs.KEYS))
