"""What functions, and not modules, show while a network runs.

Which modules are residual blocks: what they compute is added to what they get.
What leaves such a block is the network's state at that depth. What runs inside is a branch of
it, seen through windows, with other widths, or before it is added: no place to teach from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

ADDITIONS = frozenset(
    [torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__]
)

DROPOUTS = frozenset(
    [F.dropout, F.alpha_dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.feature_alpha_dropout]
)  # fmt: skip


class Dropouts(TorchFunctionMode):
    """While a network runs in eval mode: what it would overwrite in place in training.

    Args:
        overwrites: is called with each Tensor that a dropout in place would.
    """

    def __init__(self, overwrites: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.overwrites = overwrites

    def __torch_function__(
        self, function: Callable, types: Any, args: Sequence = (), kwargs: dict | None = None
    ) -> Any:
        given = kwargs or {}
        if function in DROPOUTS and given.get("inplace") and given.get("p", 0.5) > 0:
            self.overwrites(args[0])
        return function(*args, **given)


class Additions(TorchFunctionMode):
    """While a network runs: in which module, and after how many calls, features were last added.

    The names of the modules under way are to be kept in ``running``, innermost last.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.running: list[str] = []
        self.finished: list[str] = []
        self.last: dict[str, int] = {}  # calls finished before, by module
        own: list[Tensor] = [*model.parameters(), *model.buffers()]
        self.own = {x.untyped_storage()._cdata for x in own if x.layout is torch.strided}

    def __torch_function__(
        self, function: Callable, types: Any, args: Sequence = (), kwargs: dict | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in ADDITIONS and self.running and self._of_features(args[:2]):
            self.last[self.running[-1]] = len(self.finished)
        return result

    def _of_features(self, terms: Sequence) -> bool:
        """Whether two features of one shape are added, and not a bias or an embedding of positions
        that the network keeps."""
        return (
            len(terms) == 2
            and all(isinstance(x, Tensor) and x.dim() > 2 for x in terms)
            and terms[0].shape == terms[1].shape
            and not any(x.untyped_storage()._cdata in self.own for x in terms)
        )

    def blocks(self, model: nn.Module) -> frozenset[str]:
        """Paths of the modules that add after all their convolutions and linear layers have run."""
        order = {
            name: i
            for i, name in enumerate(self.finished)
            if isinstance(model.get_submodule(name), (_ConvNd, nn.Linear))
        }
        found = []
        for name, count in self.last.items():
            inside = [i for path, i in order.items() if path.startswith(f"{name}.")]
            if inside and max(inside) < count:
                found.append(name)
        return frozenset(found)
