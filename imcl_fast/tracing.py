"""What is said to ``torch.compile`` without importing it, which takes a second."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

F = TypeVar("F", bound=Callable)


def constant(function: F) -> F:
    """``torch.compiler.assume_constant_result``: traced, the function is called, not followed.

    That decorator imports the compiler; the mark it leaves is all the compiler looks for.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
