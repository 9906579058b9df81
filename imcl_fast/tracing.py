"""What is said to ``torch.compile`` without importing it, which takes a second."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable)


def constant(function: F) -> F:
    """``torch.compiler.assume_constant_result``: traced, the function is called, not followed.

    That decorator imports the compiler; the mark it leaves is all the compiler looks for.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def uncompiled(model: Any) -> Any:
    """The network in torch.compile's wrapper; any other as it is."""
    return getattr(model, "_orig_mod", model)


def eager() -> AbstractContextManager[Any]:
    """A context in which what has been compiled runs as written."""
    if "torch._dynamo" not in sys.modules:  # nothing has
        return nullcontext()
    import torch

    return torch.compiler.set_stance("force_eager")
