"""What the kernels of the dependence are compiled for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from .constants import Constants


@dataclass(frozen=True, eq=False)
class DependenceConstants(Constants):
    """
    Attributes:
        layers, padded: how many representations a launch has, and that padded to a power of 2.
        paths: none, some or all of them are in the layout ``fast``, see plan.py.
        fast: layout of the fast ones.
        vector: elements of 16 bytes.
        single: whether all samples are in one tile.
        block, gathered, depth: columns a program takes at a time, or where they are gathered, and
            rows that a product sums at a time.
        aligned: whether the rows of S begin at multiples of 16 bytes.
        fan: tiles that one program adds up at a time.
        product: how products are made, see numerics.py.
        acc: dtype of the sums.
    """

    PRODUCTS: ClassVar[tuple[str, ...]] = ("product",)

    layers: Any
    padded: Any
    paths: Any
    fast: Any
    vector: Any
    single: Any
    block: Any
    gathered: Any
    depth: Any
    aligned: Any
    fan: Any
    product: Any
    acc: Any
