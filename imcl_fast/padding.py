"""Features whose padded positions count for nothing, by values that change nothing.

The penalty of a channel is one over its positions. Without centring a 0 adds nothing to any
product or norm. With centring nothing is added by a position that has the mean of the others: it
leaves the mean as it is, and is 0 when that is subtracted. So the kernels need not know of masks;
what is spent is one pass that writes such features. Their gradient is 0 where they were filled
in, whatever the mean does: with A symmetric it is A X_c, and X_c is 0 there.
"""

from __future__ import annotations

import torch
from torch import Tensor


def broadcast(mask: Tensor, features: Tensor) -> Tensor:
    """(B, *spatial), True (or not 0) where a position counts -> (B, 1, *spatial), bool."""
    return (mask if mask.dtype == torch.bool else mask != 0).reshape(
        len(features), 1, *features.shape[2:]
    )


def zeroed(features: Tensor, mask: Tensor) -> Tensor:
    """(B, C, *spatial), 0 where ``mask`` (B, 1, *spatial) is False, whatever was there."""
    return torch.where(mask, features, features.new_zeros(()))


def mean(zeroed: Tensor, mask: Tensor) -> Tensor:
    """(B, C): that over the positions that count, 0 where there are none."""
    return _wide_mean(zeroed, mask).to(zeroed.dtype)


def _wide_mean(zeroed: Tensor, mask: Tensor) -> Tensor:
    """The same in float32, of float64 in that."""
    positions = tuple(range(2, zeroed.dim()))
    dtype = zeroed.dtype if zeroed.dtype == torch.float64 else torch.float32
    count = mask.sum(positions, dtype=dtype).clamp(min=1)
    return zeroed.sum(positions, dtype=dtype) / count


def neutral(features: Tensor, mask: Tensor, center: bool) -> Tensor:
    """``features`` with values at padded positions that count for nothing; where centred in float32
    or more: a mean that is rounded to less isn't that of the others any more."""
    filled = zeroed(features, mask)
    if not center:
        return filled
    with torch.no_grad():
        means = _wide_mean(filled, mask)
    return torch.where(mask, features, means.reshape(*means.shape, *[1] * (features.dim() - 2)))
