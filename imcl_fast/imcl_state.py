"""What an ``IMCL`` is set to and what it found in its network, for those who compute its ways.

They lie below it, and may not know it: this declares what they read, and ``IMCL`` sets it.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from . import calls, validation
from .checked import POSITIVE, SHARE, WEIGHT, Checked, one_of
from .dense_outputs import Resize
from .implementations import IMPLEMENTATIONS
from .sharding import KernelShare

WEIGHTS = ("output_weight", "multilayer_weight", "representation_weight", "kernel_weight")


def _views(name: str, value: Any) -> int:
    if not validation.is_integer(value) or value < 2:
        raise ValueError(f"{name}: expected an int of at least 2, got {value!r}")
    return int(value)


class IMCLState(Checked):
    """The attributes are explained where ``IMCL`` takes them as arguments; all but those below may
    be changed between steps.

    Attributes:
        model: the network.
        heads: the auxiliary classifiers.
        layers, kernels, classifier: the paths that were chosen or found.
    """

    CHECKS = {
        **dict.fromkeys(WEIGHTS, WEIGHT),
        "views": _views,
        "dropout": SHARE,
        "output_temperature": POSITIVE,
        "multilayer_temperature": POSITIVE,
        "multilayer_teacher": one_of(calls.TEACHERS),
        "representation_penalty": one_of(calls.PENALTIES),
        "center": validation.boolean,
        "kernel_penalty": one_of(calls.PENALTIES),
        "label_smoothing": SHARE,
        "ignore_index": validation.integer,
        "activation": one_of(calls.ACTIVATIONS),
        "criterion": validation.function,
        "impl": one_of(IMPLEMENTATIONS),
    }

    model: nn.Module
    heads: nn.ModuleList
    layers: list[str]
    kernels: list[str]
    classifier: str | None

    output_weight: float
    multilayer_weight: float
    representation_weight: float
    kernel_weight: float
    views: int
    dropout: float
    output_temperature: float
    multilayer_temperature: float
    multilayer_teacher: str
    representation_penalty: str
    center: bool
    kernel_penalty: str
    label_smoothing: float
    class_dim: int | None
    ignore_index: int
    activation: str
    impl: str

    _head_of: dict[int, int]  # index of a layer -> of its head
    _resize: Resize  # of dense logits
    _kernel_share: KernelShare
    _told_of_mask: bool
    _no_logits: str  # why the output on the example is taken for none; "" if it isn't
