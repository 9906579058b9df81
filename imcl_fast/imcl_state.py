"""What an ``IMCL`` is set to and what it found in its network, for those who compute its ways.

They lie below it, and may not know it: this declares what they read, and ``IMCL`` sets it.
"""

from __future__ import annotations

from torch import nn

from .dense_outputs import Resize
from .sharding import KernelShare


class IMCLState(nn.Module):
    """The attributes are explained where ``IMCL`` takes them as arguments; all but those below may
    be changed between steps.

    Attributes:
        model: the network.
        heads: the auxiliary classifiers.
        layers, kernels, classifier: the paths that were chosen or found.
    """

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
