"""pytest plugin: the tests that a GPU is for, in as many parts as there are processes.

    python -m pytest -p bench.gpu.selection tests

runs those that take an implementation with a kernel for GPUs, and those of test_gpu.py and
test_triton.py; with ``IMCL_FAST_PART=2/12`` the third of twelve parts. Tests of compilers and
sanitizers are for the machines that have them. Where hypothesis isn't installed, its tests are
skipped.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from imcl_fast.implementations import why_not

from . import FUSED

GPU_ONLY = ("test_gpu.py", "test_triton.py")


def refused(name: str, dtype: torch.dtype) -> str | None:
    """Why an implementation takes no tensors of a dtype on a GPU, or None."""
    return why_not(name, "cuda", [dtype])


def wanted(item: pytest.Item) -> bool:
    """Whether a GPU is what a test is for, and takes its dtype."""
    if item.path.name in GPU_ONLY:
        return True
    parameters = getattr(item, "callspec", None)
    values = list(parameters.params.values()) if parameters else []
    names = {getattr(value, "name", value) for value in values if _is_name(value)}
    dtypes = [value for value in values if isinstance(value, torch.dtype)]
    fused = names.intersection(FUSED)
    return bool(fused) and all(refused(n, t) is None for n in fused for t in dtypes)


def _is_name(value: object) -> bool:
    return isinstance(getattr(value, "name", value), str)


def pytest_sessionstart() -> None:
    """Before the tests are collected: no dtype that is refused, and few kernels to compile.

    Each case that a test goes through costs seconds of compiling, and the next test in turn
    takes another of them: one of each, as where the kernels are interpreted.
    """
    conftest: Any = sys.modules["conftest"]
    conftest.DTYPES = tuple(
        dtype for dtype in conftest.DTYPES
        if all(refused(n, dtype) is None for n in conftest.TESTED if n in FUSED)
    )  # fmt: skip
    conftest.cases = _one_in_turn
    settings = sys.modules["hypothesis"].settings
    settings.register_profile("few", settings.default, max_examples=4)
    settings.load_profile("few")


def _one_in_turn(impl: object, among: Iterable, turn: int) -> list:
    among = list(among)
    return [among[turn % len(among)]]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Finite differences need float64, which nothing but the test itself knows."""
    try:
        return (yield)
    except RuntimeError as error:
        for name in FUSED:
            reason = refused(name, torch.float64)
            if reason is not None and f'impl="{name}" can\'t run: {reason}' in str(error):
                pytest.skip(f"{name}: {reason}")
        raise


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_Failures(config))


class _Failures:
    """Tells of them at once: the summary is never written where the time is over before."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.config.get_terminal_writer().line(f"\n{report.longreprtext}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    part, parts = map(int, os.environ.get("IMCL_FAST_PART", "0/1").split("/"))
    chosen = [item for item in items if wanted(item)]
    mine = chosen[part::parts]
    config.hook.pytest_deselected(items=[item for item in items if item not in mine])
    items[:] = mine


def _skipped(*_: Any, **drawn: Any) -> Callable:
    """In place of hypothesis.given: the test, without what would be drawn."""

    def decorate(test: Callable) -> Callable:
        def without_hypothesis(**_: Any) -> None:
            pytest.skip("hypothesis is not installed")

        signature = inspect.signature(test)
        left = [p for name, p in signature.parameters.items() if name not in drawn]
        without_hypothesis.__dict__.update(test.__dict__)
        without_hypothesis.__name__ = test.__name__
        without_hypothesis.__signature__ = signature.replace(parameters=left)  # type: ignore
        return without_hypothesis

    return decorate


if importlib.util.find_spec("hypothesis") is None:
    hypothesis = MagicMock(given=_skipped)  # whatever is made of its strategies is one
    hypothesis.settings.return_value = lambda test: test
    hypothesis.settings.default.max_examples = 1
    sys.modules.update({"hypothesis": hypothesis, "hypothesis.strategies": hypothesis.strategies})
