"""What a trainer trains: a network in the objective of a method, the baselines among them.

An objective is an nn.Module ``o`` with ``o(x)`` the plain network's logits (B, K),
``o(x, target)`` a step's ``.loss``, ``.logits`` and ``.terms`` (detached scalars by name),
and ``o.model`` the plain network to deploy. Of a method in OF_QUALITIES x in ``o(x, target)`` is
(V, B, ...), the same samples at V qualities, and so are the logits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from . import outputs, validation
from .ilr import MultiHead
from .imcl import IMCL
from .quality_agnostic import QualityAgnostic

METHODS = ("imcl", "song-chai-2", "song-chai-4", "mutual-exits", "qad", "qad-imcl")
WITH_WAYS = ("imcl", "qad-imcl")  # to choose
OF_QUALITIES = ("qad", "qad-imcl")  # trained on several views of each image
WAYS = ("output", "multilayer", "representation", "kernel")
QUALITY_OPTIONS = (
    "alpha", "layer_weight", "reduction", "kernel", "bandwidth", "estimator", "normalize",
)  # fmt: skip


class CrossEntropyOutput(NamedTuple):
    """What a training step of ``CrossEntropy`` returns.

    Attributes:
        loss: a scalar to call ``backward()`` on.
        logits: (B, K).
        terms: ``cross_entropy``, the detached loss.
    """

    loss: Tensor
    logits: Tensor
    terms: dict[str, Tensor]


class CrossEntropy(nn.Module):
    """The baseline: a network trained with cross entropy, by torch's own function.

    Args:
        model: maps x to logits (B, K), or to what ``IMCL`` finds them in.
        label_smoothing: in [0, 1).

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
    """

    def __init__(self, model: nn.Module, label_smoothing: float = 0.0) -> None:
        super().__init__()
        validation.module("model", model)
        self.model = model
        self.label_smoothing = validation.number("label_smoothing", label_smoothing, low=0, high=1)

    def forward(self, x: Tensor, target: Tensor | None = None) -> Tensor | CrossEntropyOutput:
        """What the network returns; with ``target``, class indices (B,) or probabilities (B, K), a
        step's output."""
        output = self.model(x)
        if target is None:
            return output
        logits = outputs.logits(output)
        target = validation.own_target(target, logits)
        loss = F.cross_entropy(logits, target, label_smoothing=self.label_smoothing)
        return CrossEntropyOutput(loss, logits, {"cross_entropy": loss.detach()})

    def extra_repr(self) -> str:
        return f"label_smoothing={self.label_smoothing:g}"


def build(
    method: str,
    model: nn.Module,
    example_input: Tensor,
    *,
    ways: Sequence[str] = WAYS,
    weights: Mapping[str, float] | None = None,
    label_smoothing: float = 0.0,
    shard_kernels: bool = False,
    impl: str = "auto",
    **options: Any,
) -> nn.Module:
    """A network in the objective of a method.

    Args:
        method: ``"imcl"``, the chosen ways of ``IMCL``, or ``CrossEntropy`` if there are none;
            ``"song-chai-2"`` and ``"song-chai-4"``, ``MultiHead`` with as many heads;
            ``"mutual-exits"``, auxiliary classifiers and the network's own that all teach
            each other (after arXiv 1906.00675): ``IMCL`` with multi-layer consistency only,
            pairwise teachers and weight 1; ``"qad"``, ``QualityAgnostic``, and ``"qad-imcl"``, the
            same with the chosen ways of ``IMCL``, whose ``o(views, target)`` takes several
            qualities.
        model: maps x to logits (B, K).
        example_input: a batch as ``model`` takes it.
        ways: those of ``"imcl"`` and ``"qad-imcl"`` that are on, of ``WAYS``; other methods have
            none to choose.
        weights: by way; the others keep the defaults of ``IMCL`` and of ``method``. 0 leaves a
            way out.
        label_smoothing: in [0, 1), of every cross entropy.
        shard_kernels: see ``IMCL``; without kernel similarity it does nothing.
        impl: see ``functional``.
        options: other arguments of ``IMCL``, ``MultiHead`` or ``QualityAgnostic``;
            ``multilayer_temperature`` is also the ``temperature`` of ``MultiHead``, and
            ``layers`` are those of both of ``"qad-imcl"``.

    Raises:
        TypeError, ValueError, RuntimeError: an argument is wrong; the message names it.
    """
    validation.choice("method", method, METHODS)
    if method.startswith("song-chai"):
        if weights:
            raise ValueError(
                f"weights: expected None for {method!r}, which has no ways, got {dict(weights)}; "
                "its weight is beta"
            )
        renamed = {}
        if "multilayer_temperature" in options:
            renamed["temperature"] = options.pop("multilayer_temperature")
        return MultiHead(
            model,
            heads=int(method.rpartition("-")[2]),
            label_smoothing=label_smoothing,
            impl=impl,
            **renamed,
            **options,
        )
    if method in OF_QUALITIES:
        own = {name: options.pop(name) for name in QUALITY_OPTIONS if name in options}
        if "layers" in options:
            own["layers"] = options["layers"]
        around = None
        if method == "qad-imcl":
            around = build(
                "imcl", model, example_input, ways=ways, weights=weights,
                label_smoothing=label_smoothing, shard_kernels=shard_kernels, impl=impl, **options,
            )  # fmt: skip
        elif unknown := sorted(options.keys() - {"layers"}):
            raise TypeError(f"{unknown[0]}: method {method} has no such setting")
        return QualityAgnostic(
            model,
            example_input,
            label_smoothing=label_smoothing,
            ways=around if isinstance(around, IMCL) else None,
            impl=impl,
            **own,
        )
    if method == "mutual-exits":
        ways = ("multilayer",)
        weights = {"multilayer": 1.0, **(weights or {})}
        options.setdefault("multilayer_teacher", "pairwise")
    chosen = _weights(ways, weights or {})
    if all(chosen.get(way) == 0 for way in WAYS):
        if options:
            raise TypeError(
                f"{next(iter(options))}: expected no further arguments for cross entropy alone, "
                f"got {sorted(options)}"
            )
        return CrossEntropy(model, label_smoothing)
    options.update({f"{way}_weight": weight for way, weight in chosen.items()})
    return IMCL(
        model,
        example_input,
        label_smoothing=label_smoothing,
        shard_kernels=shard_kernels,
        impl=impl,
        **options,
    )


def _weights(ways: Sequence[str], weights: Mapping[str, float]) -> dict[str, float]:
    """The weights to set by way: 0 for those that are off; the rest keep their defaults."""
    if isinstance(ways, str) or not isinstance(ways, Sequence):
        raise TypeError(
            f"ways: expected a sequence of {', '.join(WAYS)}, got {type(ways).__name__}"
        )
    for way in ways:
        validation.choice("ways", way, WAYS)
    for way in weights:
        validation.choice("weights", way, WAYS)
        if way not in ways:
            raise ValueError(
                f"weights: expected ways that are on ({', '.join(ways) or 'none'}), got {way!r}"
            )
    return {**{way: 0.0 for way in WAYS if way not in ways}, **weights}
