"""What tells data and networks apart that are called the same."""

from __future__ import annotations

import hashlib
from collections.abc import Collection

from torch import Tensor, nn

from ..data import folder
from .preparation import Material


def fingerprints(material: Material, network: nn.Module, own: Collection[str]) -> dict[str, str]:
    """Of the ``data`` and the ``network``, where the configuration's names don't say which.

    Data are their labels, in order, and the classes' names, not the images: a user's transforms may
    make these anew each time. A network is the names, shapes and dtypes of what it holds.

    Args:
        own: which of ``dataset`` and ``model`` the user gave in place of the configuration's.
    """
    found = {}
    data = material.data_set
    if "dataset" in own or data.name == folder.NAME:
        labels = b"".join(side.labels.numpy().tobytes() for side in (data.train, data.test))
        found["data"] = _hash(repr((data.classes, data.shape)).encode() + labels)
    if "model" in own:
        held = [
            (name, tuple(value.shape), str(value.dtype))
            for name, value in network.state_dict().items()
            if isinstance(value, Tensor)
        ]
        found["network"] = _hash(repr(held).encode())
    return found


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:8]
