"""A network's modes, train or eval: each module has its own, and gets it back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode; then every module in its mode again, also those frozen in eval mode."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        model.train(modes[model])  # for networks that do more in it than set the mode
        for module, training in modes.items():
            module.training = training
