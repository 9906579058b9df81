"""Modules whose settings may be changed while they are used, and are checked each time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

from torch import nn

from . import validation

Check = Callable[[str, Any], Any]  # of a name and a value; returns what is kept, or raises


class Checked(nn.Module):
    """Attributes:
    CHECKS: of each setting by its name.
    """

    CHECKS: ClassVar[Mapping[str, Check]] = {}

    def __setattr__(self, name: str, value: Any) -> None:
        check = self.CHECKS.get(name)
        super().__setattr__(name, value if check is None else check(name, value))


def one_of(allowed: Sequence[str]) -> Check:
    def check(name: str, value: Any) -> Any:
        validation.choice(name, value, allowed)
        return value

    return check


WEIGHT: Check = partial(validation.number, low=0, high=math.inf)
POSITIVE: Check = partial(validation.number, low=0, high=math.inf, open_low=True)
SHARE: Check = partial(validation.number, low=0, high=1)
