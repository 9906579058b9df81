"""Finds what computes a network's logits: the classifier of way 1, and those that are like it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from .dense_outputs import share_memory
from .layers import Trace, has_children, is_passive, only_call

MAPS = (nn.Linear, _ConvNd)  # transposed convolutions too


def find_classifier(trace: Trace) -> str:
    """The linear layer, or convolution, whose output is the network's output.

    Raises:
        ValueError: there is none.
    """
    for name in trace.makers:
        if isinstance(trace.model.get_submodule(name), MAPS):
            return check_classifier(trace, name)
    if trace.class_dim is None:
        raise ValueError(
            "classifier: the network's output is not the output of an nn.Linear; name the linear "
            "layer that computes the logits, or pass output_weight=0"
        )
    raise ValueError(
        "classifier: the network's output is not that of an nn.Linear or a convolution, or this "
        "interpolated; pass output_weight=0"
    )


def predictors(trace: Trace) -> set[str]:
    """The convolutions and linear layers whose output is the network's, if need be resized; or,
    of linear layers and 1x1 convolutions, has its shape: there can be several classifiers."""

    def predicts(name: str) -> bool:
        module = trace.model.get_submodule(name)
        if not isinstance(module, MAPS):
            return False
        if trace.predicts(name):
            return True
        # Of larger kernels that says nothing where all maps are of one size.
        small = isinstance(module, nn.Linear) or math.prod(module.kernel_size) == 1
        return small and _has_shape(trace.calls[name][-1].output, trace.shape)

    return set(filter(predicts, trace.calls)) | _before_pooling(trace)


def _before_pooling(trace: Trace) -> set[str]:
    """Linear layers and 1x1 convolutions with a row for each class of logits (B, K) that nothing
    goes on with, but pooling and the like: of every token or pixel, or of a part of the network
    that has not run."""
    if trace.class_dim is not None or trace.logits is None:
        return set()
    classes = trace.logits.shape[1]
    taken = [
        call.input
        for path, calls in trace.calls.items()
        for call in calls
        if call.input is not None and not _passes_on(trace.model.get_submodule(path))
    ]
    found = set()
    for name, module in trace.model.named_modules():
        weight = getattr(module, "weight", None) if isinstance(module, MAPS) else None
        if weight is None or len(weight) != classes or math.prod(weight.shape[2:]) > 1:
            continue
        calls = trace.calls.get(name, [])
        outputs = [call.output for call in calls if call.output is not None]
        if not any(share_memory(output, x) for output in outputs for x in taken):
            found.add(name)
    return found


def _passes_on(module: nn.Module) -> bool:
    """Whether what goes through a module stays what it is: flattened, pooled, or in a container."""
    flattens = isinstance(module, (nn.Flatten, nn.Identity))
    return flattens or has_children(module) or is_passive(module)


def check_classifier(trace: Trace, name: str) -> str:
    """``name``, if it is the path of an nn.Linear that maps features (B, F) to logits (B, K); for
    dense logits of one, or of a convolution, that makes them, be it at another resolution.

    Raises:
        TypeError, ValueError: it is not.
    """
    call = only_call(trace, "classifier", name)
    module = trace.model.get_submodule(name)
    shapes = [None if x is None else tuple(x.shape) for x in (call.input, call.output)]
    logits = None if trace.logits is None else tuple(trace.logits.shape)
    if trace.class_dim is not None:
        if not isinstance(module, MAPS) or name not in trace.makers:
            raise ValueError(
                "classifier: expected an nn.Linear or a convolution whose output is, or "
                f"interpolated is, the network's logits {logits}; {name!r} is "
                f"{type(module).__name__} and leads from {shapes[0]} to {shapes[1]}"
            )
        return name
    if not isinstance(module, nn.Linear):
        raise ValueError(f"classifier: expected an nn.Linear, {name!r} is {type(module).__name__}")
    if shapes[0] is None or len(shapes[0]) != 2 or shapes[1] != logits:
        raise ValueError(
            f"classifier: expected a layer from features (B, F) to the network's logits "
            f"{logits}; {name!r} leads from {shapes[0]} to {shapes[1]}"
        )
    return name


def _has_shape(output: Tensor | None, shape: torch.Size | None) -> bool:
    return output is not None and output.shape == shape
