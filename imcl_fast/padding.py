"""Features whose padded positions count for nothing, by values that change nothing.

The penalty of a channel is one over its positions, and a 0 adds nothing to any product or norm.
With centring the mean of the others is subtracted here, so that 0 is the mean of what the kernels
get, and they subtract nothing more. Which channels are dead is decided here as well, for of such
rows the kernels no longer see how large they were: these are 0. The mean is a constant to
autograd. With A symmetric the gradient is A X_c, whose rows sum to 0 as those of X_c do: nothing
would come back through the mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dtypes import accumulation
from .reference import CENTRED_DEAD_RATIO


def broadcast(mask: Tensor, features: Tensor) -> Tensor:
    """(B, *spatial), True (or not 0) where a position counts -> (B, 1, *spatial), bool.

    Contiguous, or the gradient of what it selects from would lie as the mask does.
    """
    counts = mask if mask.dtype == torch.bool else mask != 0
    return counts.reshape(len(features), 1, *features.shape[2:]).contiguous()


def zeroed(features: Tensor, mask: Tensor) -> Tensor:
    """(B, C, *spatial), 0 where ``mask`` (B, 1, *spatial) is False, whatever was there."""
    return torch.where(mask, features, features.new_zeros(()))


def mean(zeroed: Tensor, mask: Tensor) -> Tensor:
    """(B, C): that over the positions that count, 0 where there are none."""
    return _wide_mean(zeroed, mask).to(zeroed.dtype)


def _wide_mean(zeroed: Tensor, mask: Tensor) -> Tensor:
    """The same in the accumulation dtype."""
    positions = tuple(range(2, zeroed.dim()))
    dtype = accumulation(zeroed.dtype)
    count = mask.sum(positions, dtype=dtype).clamp(min=1)
    return zeroed.sum(positions, dtype=dtype) / count


def neutral(features: Tensor, mask: Tensor, center: bool) -> Tensor:
    """``features`` with 0 at padded positions; if they are to be centred less their means, in
    float32 or more: a mean that is rounded to less isn't that of the others any more."""
    filled = zeroed(features, mask)
    if not center:
        return filled
    positions = tuple(range(2, features.dim()))
    with torch.no_grad():
        means = _wide_mean(filled, mask).reshape(*features.shape[:2], *[1] * len(positions))
        raw, norm = (
            torch.linalg.vector_norm(x, dim=positions, keepdim=True)
            for x in (filled.to(means.dtype), torch.where(mask, filled - means, 0))
        )
        dead = (norm <= CENTRED_DEAD_RATIO * raw) & raw.isfinite()
    # Not where(mask & ~dead), which lies as a mask of all channels does, and the gradient with it.
    return torch.where(mask, (features - means) * ~dead, 0)
