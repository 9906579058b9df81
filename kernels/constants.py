"""What a kernel is compiled for, in one argument in place of twenty."""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

import triton.language as tl

from .numerics import INTERPRETED


def plain(value: Any) -> Any:
    """A value, be it a ``tl.constexpr`` or not."""
    return value.value if isinstance(value, tl.constexpr) else value


@dataclass(frozen=True, eq=False)
class Constants:
    """Base of what one kernel is compiled for. Every value is a ``tl.constexpr``, as the kernel
    reads it, but plain under the interpreter, which is quicker. Launches hash and compare it: make
    one object for the same values."""

    PRODUCTS: ClassVar[tuple[str, ...]] = ()  # which of them say how products are made

    @classmethod
    def of(cls, **values: Any) -> Self:
        known = {name: plain(value) for name, value in values.items()}
        if INTERPRETED:
            return cls(**known)
        return cls(**{name: tl.constexpr(value) for name, value in known.items()})

    @functools.cached_property
    def _values(self) -> tuple:
        return tuple(plain(getattr(self, field.name)) for field in fields(self))

    @functools.cached_property
    def _hash(self) -> int:
        return hash(self._values)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self._values == other._values  # type: ignore[attr-defined]
