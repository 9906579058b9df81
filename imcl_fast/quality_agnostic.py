"""``QualityAgnostic``: one network that sees its samples at several qualities, as one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from . import layers as find
from . import outputs, validation
from .checked import SHARE, WEIGHT, Checked, one_of
from .imcl import IMCL
from .imcl_output import IMCLOutput
from .implementations import IMPLEMENTATIONS
from .modules import ViewDependence
from .perturbation import Perturbation
from .taps import Step, Tap, Tape, living, refuse_replica

STAGES = (0.1, 0.25, 0.5)  # weights of the last layers
REDUCTIONS = ("sum", "mean")


@dataclass(eq=False)
class QualityAgnosticOutput:
    """What a training step of ``QualityAgnostic`` returns; also as the tuple ``(loss, logits)``.

    Attributes:
        loss: the whole objective, a scalar to call ``backward()`` on.
        logits: (V, B, K), the network's own of each view.
        terms: detached, unweighted scalars: ``cross_entropy`` and, if ``alpha`` isn't 0,
            ``dependence``, both over the views as ``reduction`` says; and those of the ways.
    """

    loss: Tensor
    logits: Tensor
    _own: dict[str, Tensor] = field(repr=False)
    _ways: IMCLOutput | None = field(repr=False, default=None)

    @property
    def terms(self) -> dict[str, Tensor]:
        return {**self._own, **({} if self._ways is None else self._ways.terms)}

    def __getitem__(self, index: int | slice) -> Any:
        return (self.loss, self.logits)[index]


def _flatten_with_keys(output: QualityAgnosticOutput) -> tuple[list, None]:
    ways = [] if output._ways is None else [output._ways]  # for None would be a leaf
    parts = {"loss": output.loss, "logits": output.logits, "_own": output._own, "_ways": ways}
    return [(pytree.GetAttrKey(name), part) for name, part in parts.items()], None


def _flatten(output: QualityAgnosticOutput) -> tuple[list, None]:
    return [part for _, part in _flatten_with_keys(output)[0]], None


def _unflatten(parts: Iterable[Any], _: None) -> QualityAgnosticOutput:
    *own, ways = parts
    return QualityAgnosticOutput(*own, *ways)


# For DistributedDataParallel, as IMCLOutput.
pytree.register_pytree_node(
    QualityAgnosticOutput, _flatten, _unflatten, flatten_with_keys_fn=_flatten_with_keys
)


class QualityAgnostic(Checked):
    r"""Quality-agnostic training (QAD, arXiv 2309.05911) around an unmodified network.

    The same B samples, at V qualities, go through the network at once, and its representations
    are made dependent on one another:

    .. math:: \sum_q CE(z_q, y) - \alpha \sum_l w_l \sum_{q < r} CKA(f_l(x_q), f_l(x_r)).

    ``qa(x)`` of one batch is exactly ``model(x)``; ``qa(views, target)`` also gives the training
    loss. Nothing is left over afterwards: ``qa.model`` is the plain network, and
    ``remove_hooks`` takes even the idle hooks off it.

    The network runs once, on the views one after another in one batch of V B samples. So batch
    normalisation takes its statistics over all qualities together, as it will find them
    when it is deployed on a mixture of them.

    Args:
        model: maps x to logits (B, K).
        example_input: a batch (B, \*) as ``model`` takes it, whose first sample is run once.
        layers: paths of the modules whose outputs take part. None takes the last three of those
            that ``IMCL`` finds.
        alpha: weight of the dependence; 0 leaves it out: no hook, no call. It may be changed
            between steps, but from 0.
        layer_weight: one number, or one per layer. None: 0.1, 0.25 and 0.5 for three, and of fewer
            the last of these.
        reduction: ``"sum"`` over the qualities and their pairs, as above, or ``"mean"`` over both.
        kernel, bandwidth, estimator, normalize: of the dependence, see ``functional.dependence``.
        label_smoothing: in [0, 1).
        logits: ``(output) -> Tensor``, the logits in what ``model`` returns; see ``IMCL``.
        ways: an ``IMCL`` around the same ``model``: its ways, over the views in one batch, are
            added to the loss, and its state is part of this one's.
        impl: of the dependence, see ``functional``.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.

    A step with ``perturbed`` takes its gradients at adversarially perturbed weights.

    The objective is QAD's, whose dependence is HSIC (``normalize=False``). Public are its three
    weights, and that alpha was 0.002 to 0.004 with a Gaussian kernel of sigma 6; its estimator,
    what its distances are divided by and whether representations are pooled are not. Of whole
    representations of a ResNet-18 at its start, with distances per dimension, HSIC of that sigma
    has a millionth of the cross entropies' gradient even before alpha: it teaches nothing. So the
    default is CKA, which knows no scale, at the median bandwidth; no study chose it, or the
    default of alpha. With 0.3, chosen by a screening, it did not help (docs/accuracy.md, "One
    network for several qualities"), where ``ways`` with alpha 0 did.
    """

    CHECKS = {"alpha": WEIGHT, "reduction": one_of(REDUCTIONS), "label_smoothing": SHARE}

    def __init__(
        self,
        model: nn.Module,
        example_input: Tensor,
        layers: Sequence[str] | None = None,
        alpha: float = 0.1,
        layer_weight: float | Sequence[float] | None = None,
        *,
        reduction: str = "sum",
        kernel: str = "gaussian",
        bandwidth: float | str = "median",
        estimator: str = "unbiased",
        normalize: bool = True,
        label_smoothing: float = 0.0,
        logits: Callable[[Any], Tensor] | None = None,
        ways: IMCL | None = None,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        validation.module("model", model)
        if not isinstance(example_input, Tensor):
            raise TypeError(
                f"example_input: expected a Tensor, got {type(example_input).__name__}; inputs "
                "of several parts have no views here"
            )
        if ways is not None and not isinstance(ways, IMCL):
            raise TypeError(f"ways: expected an IMCL or None, got {type(ways).__name__}")
        if ways is not None and ways.model is not model:
            raise ValueError("ways: expected an IMCL around this very model, got one of another")
        if ways is not None and ways.activation != "softmax":
            raise ValueError(
                "ways: expected an IMCL of softmax logits, as of the cross entropy here, got one "
                f"with activation={ways.activation!r}"
            )
        self.alpha, self.reduction, self.label_smoothing = alpha, reduction, label_smoothing
        validation.choice("impl", impl, IMPLEMENTATIONS)
        self.dependence = ViewDependence(
            kernel=kernel, bandwidth=bandwidth, estimator=estimator, normalize=normalize, impl=impl
        )
        self._find_logits = validation.function("logits", logits)
        self._rank = example_input.dim()

        self.model = model
        self.ways = ways
        self.layers: list[str] = []
        self._tape = Tape()
        self._handles: list[RemovableHandle] = []
        if self.alpha:
            trace = find.trace(model, example_input, logits)
            self.layers = _layers(trace, layers)
            self.dependence.layer_weight = _weights(layer_weight, self.layers)
            for index, name in enumerate(self.layers):
                module = trace.model.get_submodule(name)
                tap = Tap(self._tape, index)
                self._handles.append(module.register_forward_hook(tap, with_kwargs=True))

    def forward(self, views: Tensor | Sequence[Tensor], target: Tensor | None = None) -> Any:
        r"""What the network returns for one batch; with ``target``, a ``QualityAgnosticOutput``.

        Args:
            views: without ``target`` a batch (B, \*); with it the same B samples at V >= 2
                qualities, a sequence of batches, or one Tensor (V, B, \*). One view is enough where
                ``alpha`` is 0, and in eval mode, where the loss is the cross entropy alone and
                a batch (B, \*) will do.
            target: class indices (B,) or probabilities (B, K), of every view.

        Raises:
            TypeError, ValueError: ``views`` are none; for the unbiased estimator fewer than 4
                samples.
            RuntimeError: the network took another course than on ``example_input``.
        """
        if target is None:
            return self.model(views)
        refuse_replica(self, "QualityAgnostic")
        x, count = self._together(views)
        if not self.training:
            return self._objective(self.model(x), target, count)
        # As in IMCL's own call, and not by watch(), which torch.compile can't trace.
        of_ways = None if self.ways is None else self.ways._begin()
        step = _Step()
        self._tape.step = step
        try:
            output = self.model(x)
        finally:
            self._tape.step = None
            if self.ways is not None:
                self.ways._tape.step = None
        step.finish()
        result = self._objective(output, target, count, step)
        if self.ways is not None and of_ways is not None:
            of_ways.outputs.append(output)
            self.ways._end(of_ways)
            repeated = target.repeat(count, *[1] * (target.dim() - 1))
            added = self.ways._objective(of_ways, repeated, task=False)
            result.loss = result.loss + added.loss
            # Kept for its terms, which are worked out when they are asked for.
            added.loss, added.logits, added.output = added.loss.detach(), None, None  # type: ignore[assignment]
            result._ways = added
        return result

    def perturbed(self, gamma: float) -> Perturbation:
        """A ``Perturbation`` of the network: a step's gradients at weights that do worse."""
        return Perturbation(self.model, gamma, self.ways)

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        state["_handles"] = living(self._handles)
        return state

    def remove_hooks(self) -> nn.Module:
        """Take the hooks off the network and return it; ``qa`` can't train it any more."""
        for handle in self._handles:
            handle.remove()
        if self.ways is not None:
            self.ways.remove_hooks()
        return self.model

    def extra_repr(self) -> str:
        return (
            f"alpha={self.alpha:g}, layers={self.layers}, "
            f"layer_weight={self.dependence.layer_weight}, reduction={self.reduction!r}"
        )

    def _together(self, views: Tensor | Sequence[Tensor]) -> tuple[Tensor, int]:
        """The views in one batch, and how many there are."""
        if isinstance(views, Tensor) and views.dim() == self._rank and not self.training:
            views = [views]
        if not isinstance(views, (Tensor, list, tuple)):
            raise TypeError(
                f"views: expected a sequence of Tensors or one Tensor, got {type(views).__name__}"
            )
        shapes = [x.shape if isinstance(x, Tensor) else type(x).__name__ for x in views]
        if len(set(shapes)) != 1 or any(not isinstance(x, Tensor) for x in views):
            raise ValueError(
                "views: expected the same samples at several qualities, Tensors of one shape "
                f"(B, *), got {[s if isinstance(s, str) else tuple(s) for s in shapes]}"
            )
        if views[0].dim() != self._rank:
            raise ValueError(
                f"views: expected batches of {self._rank} dimensions, as example_input has, in a "
                f"sequence or one Tensor (V, B, *), got views of shape {tuple(views[0].shape)}"
            )
        if len(views) < 2 and self.alpha and self.training:
            raise ValueError(f"views: expected at least 2 qualities, got {len(views)}")
        together = views.flatten(0, 1) if isinstance(views, Tensor) else torch.cat(list(views))
        return together, len(views)

    def _objective(
        self,
        output: Any,
        target: Tensor,
        count: int,
        step: _Step | None = None,
    ) -> QualityAgnosticOutput:
        """The loss of a pass that is over; without ``step`` the cross entropy alone."""
        logits = outputs.logits(output, self._find_logits)
        target = validation.own_target(target, logits.unflatten(0, (count, -1))[0])
        targets = target.repeat(count, *[1] * (target.dim() - 1))
        mean = F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)
        loss = mean * count if self.reduction == "sum" else mean
        terms = {"cross_entropy": loss.detach()}
        if self.alpha and step is not None:
            total = self._dependence_of(step, count)
            terms["dependence"] = total.detach()
            loss = loss - self.alpha * total
        return QualityAgnosticOutput(loss, logits.unflatten(0, (count, -1)), terms)

    def _dependence_of(self, step: _Step, count: int) -> Tensor:
        if not len(step.features) == len(step.ran) == len(self.layers):
            raise RuntimeError(
                f"model: expected the layers {self.layers} to run once each, as on example_input, "
                f"got {len(step.ran)} runs (alpha of 0, or remove_hooks, leaves no hooks)"
            )
        of_layers = [step.features[i].chunk(count) for i in range(len(self.layers))]
        mean = self.dependence(list(zip(*of_layers, strict=True)))
        return mean * (count * (count - 1) / 2) if self.reduction == "sum" else mean


class _Step(Step):
    """The features of the layers, all views in one batch."""

    def __init__(self) -> None:
        super().__init__()
        self.features: dict[int, Tensor] = {}

    def take(self, layer: int | None, module: nn.Module, features: Tensor) -> None:
        assert layer is not None
        self.features[layer] = features


def _layers(trace: find.Trace, layers: Sequence[str] | None) -> list[str]:
    if layers is None:
        chosen = find.find_layers(trace)[-len(STAGES) :]
    else:
        find.check_layers(trace, layers)
        chosen = list(layers)  # in the user's order, as the weights are
    if not chosen:
        found = "found none; name the modules" if layers is None else "got none"
        raise ValueError(f"layers: expected at least 1 for the dependence, {found}, or alpha=0")
    return chosen


def _weights(layer_weight: float | Sequence[float] | None, layers: list[str]) -> list[float]:
    if layer_weight is None:
        if len(layers) > len(STAGES):
            raise ValueError(
                f"layer_weight: expected numbers for {len(layers)} layers, got None, which knows "
                f"those of {len(STAGES)}"
            )
        return list(STAGES[-len(layers) :])
    return validation.numbers_per("layer_weight", layer_weight, len(layers), "layer")
