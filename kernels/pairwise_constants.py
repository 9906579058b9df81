"""What the kernels of the pairwise penalty are compiled for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from .constants import Constants


@dataclass(frozen=True, eq=False)
class PairwiseConstants(Constants):
    """
    Attributes:
        layers, padded: how many a launch has, and that padded to a power of 2.
        forms, paths: which layers there are: none, some or all of them over whole rows, none, some
            or all of them in the layout ``fast``. Code for others would cost registers.
        narrow: whether all layers over rows have no more columns than a tile.
        penalty: as algebra.pairwise numbers it.
        center: whether rows are centred.
        keep: whether the state is asked for.
        fast: layout of the fast layers, see plan.py.
        vector: elements of 16 bytes.
        depth: columns (forward) or rows (backward) that a product sums at a time.
        product, form_product: how the products of the primal form and of the dual one are made,
            see numerics.py.
        settle: whether a product is waited for before the next load, see numerics.settled.
        acc, loss: dtypes of the sums and of the loss.
    """

    PRODUCTS: ClassVar[tuple[str, ...]] = ("product", "form_product")

    layers: Any
    padded: Any
    forms: Any
    paths: Any
    narrow: Any
    penalty: Any
    center: Any
    keep: Any
    fast: Any
    vector: Any
    depth: Any
    product: Any
    form_product: Any
    settle: Any
    acc: Any
    loss: Any
