"""Finds what computes a network's logits: the classifier of way 1, and those that are like it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from .layers import Trace, only_call


def find_classifier(trace: Trace) -> str:
    """The linear layer, or 1x1 convolution, whose output is the network's output.

    Raises:
        ValueError: there is none.
    """
    for name in trace.makers:
        if _classifies(trace.model.get_submodule(name)):
            return check_classifier(trace, name)
    if trace.class_dim is None:
        raise ValueError(
            "classifier: the network's output is not the output of an nn.Linear; name the linear "
            "layer that computes the logits, or pass output_weight=0"
        )
    raise ValueError(
        "classifier: the network's output is not that of an nn.Linear or a 1x1 convolution, or "
        "this interpolated; pass output_weight=0"
    )


def _classifies(module: nn.Module) -> bool:
    """Whether what a module does is the same linear map everywhere."""
    if isinstance(module, nn.Linear):
        return True
    if not isinstance(module, _ConvNd) or isinstance(module, _ConvTransposeNd):
        return False
    unpadded = isinstance(module.padding, str) or not any(module.padding)
    return set(module.kernel_size) == set(module.stride) == {1} and unpadded


def predictors(trace: Trace) -> set[str]:
    """The convolutions and linear layers whose output is the network's, if need be resized, or
    has its shape: there can be several classifiers."""
    return {
        name
        for name, calls in trace.calls.items()
        if isinstance(trace.model.get_submodule(name), (_ConvNd, nn.Linear))
        and (trace.predicts(name) or _has_shape(calls[-1].output, trace.shape))
    }


def check_classifier(trace: Trace, name: str) -> str:
    """``name``, if it is the path of an nn.Linear that maps features (B, F) to logits (B, K); for
    dense logits of one, or of a 1x1 convolution, that makes them, be it at another resolution.

    Raises:
        TypeError, ValueError: it is not.
    """
    call = only_call(trace, "classifier", name)
    module = trace.model.get_submodule(name)
    shapes = [None if x is None else tuple(x.shape) for x in (call.input, call.output)]
    logits = None if trace.logits is None else tuple(trace.logits.shape)
    if trace.class_dim is not None:
        if not _classifies(module) or name not in trace.makers:
            raise ValueError(
                "classifier: expected an nn.Linear or a 1x1 convolution whose output is, or "
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
