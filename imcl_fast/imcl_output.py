"""What a training step of ``IMCL`` returns."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree


@dataclass(eq=False)
class IMCLOutput:
    """What a training step of ``IMCL`` returns; also as the tuple ``(loss, logits)``.

    Attributes:
        loss: the whole objective, a scalar to call ``backward()`` on.
        logits: (B, K) or dense, the network's own; None where it has none.
        terms: detached, unweighted scalars ``cross_entropy`` (or ``criterion``, where one was
            given), ``output_consistency``, ``multilayer_consistency``,
            ``representation_similarity`` and ``kernel_similarity``, those of the ways that
            are on and were computed in this call; ``loss`` is the first plus the weighted
            others, a way on a schedule times its interval.
        output: what the network returned, whole; part of the tuple it is not.
    """

    loss: Tensor
    logits: Tensor
    _criterion: Tensor | None = field(repr=False, default=None)
    _head_terms: Tensor | None = field(repr=False, default=None)  # (2, H), cross entropies and KL
    _representation: Tensor | None = field(repr=False, default=None)
    _kernel: Tensor | None = field(repr=False, default=None)
    _own: bool = field(repr=False, default=False)  # whether the network's cross entropy counts
    _auxiliary: int = field(repr=False, default=0)
    _multilayer: bool = field(repr=False, default=False)  # whether the auxiliary heads count
    _views: int = field(repr=False, default=0)
    output: Any = field(repr=False, default=None)

    @cached_property
    def terms(self) -> dict[str, Tensor]:
        # Worked out when asked for, so that a step which doesn't log doesn't pay.
        terms = {}
        if self._criterion is not None:
            terms["criterion"] = self._criterion
        if self._head_terms is not None:
            ce, kl = self._head_terms
            n, final = self._auxiliary, self._auxiliary + 1
            if self._own:
                terms["cross_entropy"] = ce[n]
            if self._views:
                terms["output_consistency"] = ce[final:].mean() + kl[final:].mean()
            if n and self._multilayer:
                terms["multilayer_consistency"] = ce[:n].mean() + kl[:final].mean()
        if self._representation is not None:
            terms["representation_similarity"] = self._representation
        if self._kernel is not None:
            terms["kernel_similarity"] = self._kernel
        return terms

    def __getitem__(self, index: int | slice) -> Any:
        """As of ``(loss, logits)``: what transformers' Trainer takes of a model's output."""
        return ((self.loss,) if self.logits is None else (self.loss, self.logits))[index]


class _Whole:
    """What a network returned, in a place where pytree compares and hashes: outputs of one kind are
    alike, whatever is in there."""

    def __init__(self, output: Any) -> None:
        self.output = output

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Whole)

    def __hash__(self) -> int:
        return 0


_TENSORS = ("loss", "logits", "_criterion", "_head_terms", "_representation", "_kernel")


def _flatten_with_keys(output: IMCLOutput) -> tuple[list, tuple]:
    # Each as a list, for None would be a leaf.
    keyed = [
        (pytree.GetAttrKey(name), [x for x in [getattr(output, name)] if x is not None])
        for name in _TENSORS
    ]
    counts = output._own, output._auxiliary, output._multilayer, output._views
    return keyed, (*counts, _Whole(output.output))


def _flatten(output: IMCLOutput) -> tuple[list, tuple]:
    keyed, counts = _flatten_with_keys(output)
    return [part for _, part in keyed], counts


def _unflatten(parts: Iterable[Any], context: tuple) -> IMCLOutput:
    *counts, whole = context
    values: list[Any] = [next(iter(part), None) for part in parts]
    values += [*counts, whole.output]
    return IMCLOutput(*values)


# DistributedDataParallel(static_graph=True) hooks onto the tensors that it finds in what a
# module returns, and where it finds none it averages no gradients.
pytree.register_pytree_node(
    IMCLOutput, _flatten, _unflatten, flatten_with_keys_fn=_flatten_with_keys
)
