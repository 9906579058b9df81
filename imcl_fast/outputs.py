"""How a network is called, and where the logits are in what it returns."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import FunctionType, MethodType
from typing import Any, Final, NamedTuple

from torch import Tensor, nn

MISSING: Final = object()  # of an argument that may be anything, None among them
# The names that transformers has for the target and for which tokens are none of padding.
LABELS = "labels"
ATTENTION_MASK = "attention_mask"
SEEING = ("vision", "visual", "image")  # how its names of what sees begin
DECODER = "decoder_"  # how its names of what the second half of an encoder-decoder takes begin
# How its names of losses, and of classes, end: the last where there is no encoder of text, as of
# models that see images and write.
CAUSAL = ("ForCausalLM", "LMHeadModel")
GENERATING = "ForConditionalGeneration"


def arguments(x: Any, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """What a network is called with: ``x`` is a tuple of arguments, a mapping of keyword
    arguments (a batch of transformers), or else the one argument."""
    if isinstance(x, Tensor):
        return (x,), kwargs
    if x is MISSING:
        return (), kwargs
    if isinstance(x, tuple):
        return x, kwargs
    if isinstance(x, Mapping):
        return (), {**x, **kwargs}
    return (x,), kwargs


class Padding(NamedTuple):
    """A network's own arguments that say which tokens are none of padding.

    Attributes:
        mask: ``attention_mask``, of an encoder-decoder's source.
        decoder_mask: ``decoder_attention_mask``, of its target.
        decodes: whether there is a target.
    """

    mask: Any = None
    decoder_mask: Any = None
    decodes: bool = False

    @staticmethod
    def of(arguments: Mapping[str, Any]) -> Padding:
        """That which a network's keyword arguments say."""
        decodes = any(
            name.startswith(DECODER) and value is not None for name, value in arguments.items()
        )
        decoder_mask = arguments.get(DECODER + ATTENTION_MASK)
        return Padding(arguments.get(ATTENTION_MASK), decoder_mask, decodes)

    @property
    def of_logits(self) -> Any:
        return self.decoder_mask if self.decodes else self.mask

    def of_layer(self, path: str) -> tuple[Any, str]:
        """That of a layer, and its name; none of what sees images beside the text."""
        if any(part.startswith(SEEING) for part in path.split(".")):
            return None, ATTENTION_MASK
        if self.decodes and half(path) == "decoder":
            return self.decoder_mask, DECODER + ATTENTION_MASK
        return self.mask, ATTENTION_MASK


def half(path: str) -> str:
    """Which half of an encoder-decoder a module lies in, also as ``text_decoder``; "" where its
    path doesn't tell."""
    parts = (part.rpartition("_")[2] for part in path.split("."))
    return next((part for part in parts if part in ("encoder", "decoder")), "")


def check_labels(model: nn.Module, arguments: Mapping[str, Any], dense: bool) -> None:
    """Refuse ``labels`` that the network itself would shift before it compares.

    Args:
        arguments: of the network, by name.
        dense: whether its logits are of tokens.

    Raises:
        ValueError: the model is a causal language model of transformers, or an encoder-decoder
            that would have made its decoder's input of them.
    """
    kind = getattr(model, "loss_type", None)
    name = kind if isinstance(kind, str) and kind else type(model).__name__
    encoded = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if encoded and dense and not Padding.of(arguments).decodes:
        raise ValueError(
            "labels: an encoder-decoder makes the decoder's input of them, which IMCL keeps from "
            "it; pass decoder_input_ids=model.prepare_decoder_input_ids_from_labels(labels) too, "
            "in example_input as well"
        )
    if name.endswith(CAUSAL) or (name.endswith(GENERATING) and not encoded):
        raise ValueError(
            "labels: a causal language model predicts the next token and shifts labels by one, "
            "which IMCL doesn't; pass target=torch.nn.functional.pad(labels[:, 1:], (0, 1), "
            "value=-100)"
        )


def first_tensor(output: object) -> Tensor | None:
    """A Tensor, or that in the first place of a tuple, as many blocks return; else None."""
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    return output if isinstance(output, Tensor) else None


def logits(output: Any, how: Callable[[Any], Tensor] | None = None) -> Tensor:
    """The logits in what a network returns: see ``IMCL``.

    Raises:
        TypeError: there are none where they are looked for.
    """
    if how is not None:
        chosen = how(output)
        if isinstance(chosen, Tensor):
            return chosen
        raise TypeError(
            f"logits: expected the callable to return a Tensor, got {type(chosen).__name__}"
        )
    if isinstance(output, Tensor):
        return output
    found: object = output.get("logits") if isinstance(output, Mapping) else None
    if found is None:
        found = getattr(output, "logits", None)
    if found is None and isinstance(output, (tuple, list)) and output:
        found = output[0]
    if isinstance(found, Tensor):
        return found
    keys = f" of {', '.join(map(repr, output))}" if isinstance(output, Mapping) else ""
    raise TypeError(
        "logits: expected the network to return a Tensor, an object with .logits or ['logits'], or "
        f"a tuple that begins with them, got {type(output).__name__}{keys}; say where they are "
        "with logits=lambda output: ..."
    )


def show_parameters_of(model: nn.Module, wrapper: nn.Module) -> None:
    """Give ``wrapper.forward`` a signature with what ``model`` takes in place of **kwargs.

    transformers' Trainer drops from a batch all that the signature of a module doesn't name.
    """
    forward = type(wrapper).forward
    own = inspect.signature(forward)
    *named, rest = own.parameters.values()
    shown = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for parameter in inspect.signature(model.forward).parameters.values()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and parameter.name not in own.parameters
    ]
    # A function of its own, for a signature is the function's, not the method's.
    twin = FunctionType(
        forward.__code__, forward.__globals__, forward.__name__, closure=forward.__closure__
    )
    twin.__defaults__, twin.__kwdefaults__ = forward.__defaults__, forward.__kwdefaults__
    twin.__doc__ = forward.__doc__
    twin.__signature__ = own.replace(parameters=[*named, *shown, rest])  # type: ignore[attr-defined]
    wrapper.forward = MethodType(twin, wrapper)


def shows_parameters(wrapper: nn.Module) -> bool:
    """Whether its ``forward`` is what ``show_parameters_of`` has put there."""
    forward = getattr(wrapper.__dict__.get("forward"), "__func__", None)
    own = type(wrapper).forward
    return isinstance(forward, FunctionType) and forward is not own and (
        forward.__code__ is own.__code__
    )
