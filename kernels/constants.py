"""What a kernel is compiled for, in one argument in place of twenty."""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields
from typing import Any, Self

import triton.language as tl


@dataclass(frozen=True, eq=False)
class Constants:
    """Base of what one kernel is compiled for. Every value is a ``tl.constexpr``, as the kernel
    reads it. Launches hash and compare it: make one object for the same values."""

    @classmethod
    def of(cls, **values: Any) -> Self:
        return cls(**{name: tl.constexpr(value) for name, value in values.items()})

    @functools.cached_property
    def _values(self) -> tuple:
        return tuple(getattr(self, field.name).value for field in fields(self))

    @functools.cached_property
    def _hash(self) -> int:
        return hash(self._values)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self._values == other._values  # type: ignore[attr-defined]
