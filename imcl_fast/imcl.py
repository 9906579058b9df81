"""``IMCL``: the four ways of teaching within one network, put around any classifier."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from . import functional, kernel_weights, sharding, validation
from . import layers as find
from .autograd import ConsistencyOptions
from .implementations import IMPLEMENTATIONS
from .modes import evaluating
from .schedule import Schedule, Turn
from .sharding import KernelShare
from .taps import Step, Tap, Tape

WEIGHTS = ("output_weight", "multilayer_weight", "representation_weight", "kernel_weight")
IGNORED = -100  # target of samples that count for nothing
EPS = 1e-12  # of the similarities
EVERY_WAY = Turn(0, 1, 1)  # of a call that is not on the schedule


@dataclass(eq=False)
class IMCLOutput:
    """What a training step of ``IMCL`` returns.

    Attributes:
        loss: the whole objective, a scalar to call ``backward()`` on.
        logits: (B, K), the network's own.
        terms: detached, unweighted scalars ``cross_entropy``, ``output_consistency``,
            ``multilayer_consistency``, ``representation_similarity`` and
            ``kernel_similarity``, those of the ways that are on and were computed in this
            call; ``loss`` is ``cross_entropy`` plus the weighted others, a way on a schedule
            times its interval.
    """

    loss: Tensor
    logits: Tensor
    _head_terms: Tensor = field(repr=False)  # (2, H), cross entropies and KL
    _auxiliary: int = field(repr=False)
    _views: int = field(repr=False)
    _representation: Tensor | None = field(repr=False)
    _kernel: Tensor | None = field(repr=False)

    @cached_property
    def terms(self) -> dict[str, Tensor]:
        # Worked out when asked for, so that a step which doesn't log doesn't pay.
        ce, kl = self._head_terms
        n, final = self._auxiliary, self._auxiliary + 1
        terms = {"cross_entropy": ce[n]}
        if self._views:
            terms["output_consistency"] = ce[final:].mean() + kl[final:].mean()
        if n:
            terms["multilayer_consistency"] = ce[:n].mean() + kl[:final].mean()
        if self._representation is not None:
            terms["representation_similarity"] = self._representation
        if self._kernel is not None:
            terms["kernel_similarity"] = self._kernel
        return terms


def _flatten_with_keys(output: IMCLOutput) -> tuple[list, tuple[int, int]]:
    parts = {
        "loss": output.loss,
        "logits": output.logits,
        "_head_terms": output._head_terms,
        # As lists, for None would be a leaf.
        "_representation": [x for x in [output._representation] if x is not None],
        "_kernel": [x for x in [output._kernel] if x is not None],
    }
    keyed = [(pytree.GetAttrKey(name), part) for name, part in parts.items()]
    return keyed, (output._auxiliary, output._views)


def _flatten(output: IMCLOutput) -> tuple[list, tuple[int, int]]:
    keyed, counts = _flatten_with_keys(output)
    return [part for _, part in keyed], counts


def _unflatten(parts: Iterable[Any], counts: tuple[int, int]) -> IMCLOutput:
    loss, logits, head_terms, representation, kernel = parts
    return IMCLOutput(
        loss, logits, head_terms, *counts, *(representation or [None]), *(kernel or [None])
    )


# DistributedDataParallel(static_graph=True) hooks onto the tensors that it finds in what a
# module returns, and where it finds none it averages no gradients.
pytree.register_pytree_node(
    IMCLOutput, _flatten, _unflatten, flatten_with_keys_fn=_flatten_with_keys
)


class IMCL(nn.Module):
    r"""Intra-model collaborative learning around an unmodified classification network.

    ``imcl(x)`` is exactly ``model(x)``; ``imcl(x, target)`` also gives the training loss

    .. math:: CE + w_{out}\,(\overline{CE}_{views} + \overline{KL}_{views})
        + w_{multi}\,(\overline{CE}_{aux} + T^2\,\overline{KL}_{heads})
        + w_{repr}\,S_{features} + w_{kernel}\,S_{kernels},

    where CE is that of the network's own logits, views are dropout views of the last
    features through the one classifier, and the heads are an auxiliary classifier on each
    chosen layer but the last, and the network's own. The backbone runs once. Nothing is
    left over afterwards: ``imcl.model`` is the plain network with its own state_dict, and
    ``remove_hooks`` takes even the idle hooks off it.

    Args:
        model: maps x to logits (B, K). It may be on any device, in any floating dtype.
        example_input: a batch as ``model`` takes it; its first sample is run once, in eval
            mode and without gradients.
        layers: paths of the modules whose outputs (B, C, \*spatial), or tokens (B, T, C),
            take part in multi-layer consistency and representation similarity; choose them
            after their activation. None takes the last block of each spatial resolution, or,
            where all blocks have one (vision transformers), those at 1/4, 2/4, 3/4 and the
            end of the depth. Tokens stand for pixels: they are what a channel's similarity
            runs over and what an auxiliary head averages.
        output_weight, multilayer_weight, representation_weight, kernel_weight: of the four
            ways. 0 leaves a way out: no hook, no head, no call. The others may be
            changed between steps.
        classifier: path of the nn.Linear that computes the logits. None finds it.
        kernels: paths of the modules whose ``weight`` takes part in kernel similarity.
            None takes the convolutions with kernels of more than one pixel, but for those
            that have twice as many kernels as weights in each, or more (a wide stem, a
            depthwise convolution): these can't become unlike.
        views: number of dropout views, at least 2.
        dropout: probability of the views' dropout (none in eval mode).
        output_temperature, multilayer_temperature: T of the two consistencies.
        multilayer_teacher: ``"others"``, ``"mean"``, ``"final"`` or ``"pairwise"``; see
            ``functional.collaborative_consistency``.
        representation_penalty, kernel_penalty: ``"square"``, ``"abs"`` or ``"signed"``.
        center: compare the channels by Pearson's correlation instead of the cosine.
        label_smoothing: in [0, 1), of every cross entropy.
        representation_interval, kernel_interval: k computes the way in every k-th training
            call only, with k times its weight; see below.
        shard_kernels: under DistributedDataParallel let each process compute the kernel
            similarity of a share of the layers only, times the number of processes: the
            mean of the gradients is the same. ``terms["kernel_similarity"]`` is then that
            of the process, 0 if it has no layer; the mean over processes is the value.
            ``torch.distributed`` must be initialised, and all of it train together.
        impl: see ``functional``.

    Raises:
        TypeError, ValueError: an argument is wrong, or what it leaves to be found in
            ``model`` isn't there; the message names the argument.
        RuntimeError: ``shard_kernels`` without ``torch.distributed``.

    Every term is a mean over the batch, or does not depend on it. So the losses of k equal
    parts of a batch, each divided by k, accumulate to the gradient of the whole, but for what
    the network's batch normalisation does.

    A similarity is a regulariser whose gradient changes slowly, and need not be computed in
    every step (lazy regularisation: StyleGAN2, 1912.04958). With an interval of k it is in one
    training call of k, times k, so that the mean gradient is the same: way 3 in calls 0, k, 2k
    and so on, way 4 half of the intervals' greatest common divisor later, so that with 4 and 8
    no call computes both. In the other calls ``terms`` doesn't have it. Only calls in training
    mode and with gradients enabled count, those of all batches that one optimizer step
    accumulates too; any other computes every way at its plain weight. How many have been made is
    in ``state_dict``, so that a resumed training goes on with the schedule; a state_dict from
    before there was one begins it. Who calls twice on the same batch for one optimizer step
    (SAM) wants odd intervals; a CUDA graph replays the ways of the call that it captured.

    Under gradient checkpointing the work on a layer is done once, not again when its segment
    is run again. A layer inside a segment, other than at its end, needs
    ``use_reentrant=False``; ``torch.compile`` then can't have ``fullgraph=True``.

    Features without gradient, of frozen layers or under ``no_grad``, contribute their value
    and learn nothing. Of ``kernels`` all learn whose parameters require a gradient. Weights
    that each run makes anew, as pruning, weight and spectral normalisation do, are compared
    as this run made them.

    The objective reconstructs arXiv 2105.09590 from its abstract, with published relatives:
    output consistency SD-Dropout (2208.05642) and R-Drop (2106.14448), multi-layer
    consistency 1805.11761 and 1905.08094, the penalties RePr (1811.07275). Its defaults
    come from this project's own experiments (docs/accuracy.md), not from the paper.
    """

    output_weight: float
    multilayer_weight: float
    representation_weight: float
    kernel_weight: float

    def __init__(
        self,
        model: nn.Module,
        example_input: Tensor,
        layers: Sequence[str] | None = None,
        output_weight: float = 1.0,
        multilayer_weight: float = 3.0,
        representation_weight: float = 10.0,
        kernel_weight: float = 100.0,
        *,
        classifier: str | None = None,
        kernels: Sequence[str] | None = None,
        views: int = 2,
        dropout: float = 0.3,
        output_temperature: float = 1.0,
        multilayer_temperature: float = 2.0,
        multilayer_teacher: str = "others",
        representation_penalty: str = "square",
        center: bool = True,
        kernel_penalty: str = "square",
        label_smoothing: float = 0.0,
        representation_interval: int = 1,
        kernel_interval: int = 1,
        shard_kernels: bool = False,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
        weights = (output_weight, multilayer_weight, representation_weight, kernel_weight)
        for name, value in zip(WEIGHTS, weights, strict=True):
            setattr(self, name, validation.number(name, value, low=0, high=math.inf))
        self._off = tuple(name for name in WEIGHTS if getattr(self, name) == 0)
        if not validation.is_integer(views) or views < 2:
            raise ValueError(f"views: expected an int of at least 2, got {views!r}")
        self.views = int(views)
        validation.choice("multilayer_teacher", multilayer_teacher, functional.TEACHERS)
        validation.choice("representation_penalty", representation_penalty, functional.PENALTIES)
        validation.choice("kernel_penalty", kernel_penalty, functional.PENALTIES)
        validation.choice("impl", impl, IMPLEMENTATIONS)
        self.center = validation.boolean("center", center)
        shard_kernels = validation.boolean("shard_kernels", shard_kernels)
        self.dropout = validation.number("dropout", dropout, low=0, high=1)
        self.output_temperature = validation.number(
            "output_temperature", output_temperature, low=0, high=math.inf, open_low=True
        )
        self.multilayer_temperature = validation.number(
            "multilayer_temperature", multilayer_temperature, low=0, high=math.inf, open_low=True
        )
        self.multilayer_teacher = multilayer_teacher
        self.representation_penalty = representation_penalty
        self.kernel_penalty = kernel_penalty
        self.label_smoothing = validation.number("label_smoothing", label_smoothing, low=0, high=1)
        self._schedule = Schedule(
            validation.integer("representation_interval", representation_interval, low=1),
            validation.integer("kernel_interval", kernel_interval, low=1),
        )
        self.impl = impl

        self.model = model
        trace = find.trace(model, example_input)
        self.layers: list[str] = []
        self.heads = nn.ModuleList()
        self.classifier: str | None = None
        self.kernels: list[str] = []
        if self.multilayer_weight or self.representation_weight:
            self.layers = _layers(trace, layers, 2 if self.multilayer_weight else 1)
        if self.multilayer_weight:
            self.heads.extend(_head(trace, name) for name in self.layers[:-1])
        if self.output_weight:
            self.classifier = (
                find.find_classifier(trace)
                if classifier is None
                else find.check_classifier(trace, classifier)
            )
        with evaluating(model):  # otherwise, to read a weight under spectral norm changes it
            if self.kernel_weight:
                self.kernels = _kernels(model, kernels)
            self._kernel_share = KernelShare.of(self.kernels, model, shard_kernels)
        self._options: tuple[tuple, ConsistencyOptions] | None = None
        self._tape = Tape()
        self._handles = self._register_hooks(trace.channels_last)
        self._weight_handles = kernel_weights.tap(self._kernel_modules(EVERY_WAY), self._tape)

    def forward(self, x: Tensor, target: Tensor | None = None) -> Tensor | IMCLOutput:
        """The network's logits (B, K); with ``target``, class indices (B,) or probabilities
        (B, K), an ``IMCLOutput``.

        Raises:
            ValueError, TypeError: ``target`` is neither.
            RuntimeError: the network took another course than on ``example_input``.
        """
        if target is None:
            return self.model(x)
        for name in self._off:
            if getattr(self, name):
                raise RuntimeError(
                    f"{name}: this way was switched off (0) when IMCL was built and has no "
                    "hooks; build a new IMCL with a weight above 0"
                )
        if getattr(self, "_is_replica", False):
            raise RuntimeError(
                "IMCL can't be trained under nn.DataParallel, whose replicas share its hooks; use "
                "nn.parallel.DistributedDataParallel"
            )
        # Autograd runs backward what ran forward last. Alone, kernel similarity comes first:
        # its gradient, as large as the weights', is made at the very end, when the
        # activations have been freed, and does not raise the peak. Among several processes
        # it would hold every convolution's gradient back to the end, and with it all of
        # DistributedDataParallel's communication, which is to run beside the backward pass.
        # And weights that the forward pass itself makes are not there before it.
        counts = self.training and torch.is_grad_enabled()
        turn = self._schedule.turn if counts else EVERY_WAY
        modules = self._kernel_modules(turn)
        kernel_first = sharding.world_size() == 1 and kernel_weights.are_parameters(modules)
        kernel = self._kernel_similarity(modules, turn) if kernel_first else None
        if not (kernel_first or torch.compiler.is_compiling()):  # which can't trace it
            self._weight_handles += kernel_weights.tap(modules, self._tape)
        step = _Step(self, turn)
        self._tape.step = step
        try:
            logits = self.model(x)
        finally:
            self._tape.step = None
        step.finish()
        if not kernel_first:
            kernel = self._kernel_similarity(modules, turn, step)
        if step.calls != len(self._handles):
            raise RuntimeError(
                f"model: expected the layers {self.layers} and the classifier "
                f"{self.classifier} to run once each, as on example_input, got {step.calls} "
                f"runs for {len(self._handles)} hooks (0 after remove_hooks)"
            )
        loss, head_terms = self._consistency(step, logits, target)
        representation = None
        if step.similarities:
            layers = len(step.similarities)
            representation = torch.stack(step.similarities).sum()
            weight = turn.representation * self.representation_weight
            loss = torch.add(loss, representation, alpha=weight / layers)
            representation = representation.detach() / layers
        if kernel is not None:
            loss = torch.add(loss, kernel, alpha=turn.kernel * self.kernel_weight)
        if counts:
            self._schedule.turn = turn.next
        return IMCLOutput(
            loss,
            logits,
            head_terms,
            len(step.head_logits),
            0 if step.views is None else self.views,
            representation,
            None if kernel is None else kernel.detach(),
        )

    def remove_hooks(self) -> nn.Module:
        """Take the hooks off the network and return it; ``imcl`` can't train it any more."""
        for handle in [*self._handles, *self._weight_handles]:
            handle.remove()
        return self.model

    @property
    def representation_interval(self) -> int:
        return self._schedule.representation

    @property
    def kernel_interval(self) -> int:
        return self._schedule.kernel

    def get_extra_state(self) -> Tensor:
        """Where the schedule stands; a tensor, which every format of checkpoints can hold."""
        return torch.tensor(self._schedule.turn.position, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        self._schedule = Schedule(self.representation_interval, self.kernel_interval, int(state))

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        # Checkpoints of versions without a schedule.
        state_dict.setdefault(f"{prefix}_extra_state", torch.tensor(0, device="cpu"))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        weights = ", ".join(f"{name}={getattr(self, name):g}" for name in WEIGHTS)
        return (
            f"{weights}, layers={self.layers}, classifier={self.classifier!r}, "
            f"kernels={len(self.kernels)}, impl={self.impl!r}"
        )

    def _register_hooks(self, channels_last: frozenset[str]) -> list[RemovableHandle]:
        handles = []
        for index, name in enumerate(self.layers):
            if self.representation_weight or index < len(self.heads):
                tap = Tap(self._tape, index, name in channels_last)
                module = self.model.get_submodule(name)
                handles.append(module.register_forward_hook(tap, with_kwargs=True))
        if self.classifier is not None:
            tap = Tap(self._tape, None)
            classifier = self.model.get_submodule(self.classifier)
            handles.append(classifier.register_forward_hook(tap, with_kwargs=True))
        return handles

    def _kernel_modules(self, turn: Turn) -> dict[str, nn.Module]:
        """Those whose weights this process compares in this step, by path."""
        if not self.kernel_weight or not turn.kernel:
            return {}
        return {path: _submodule(self.model, path) for path in self._kernel_share.kernels}

    def _kernel_similarity(
        self, modules: dict[str, nn.Module], turn: Turn, step: _Step | None = None
    ) -> Tensor | None:
        """That of the weights that ``step`` has computed with; None: of parameters, before it."""
        if not self.kernel_weight or not turn.kernel:
            return None
        share = self._kernel_share
        if not modules:
            return next(self.model.parameters()).new_zeros(())
        if step is None:
            weights = [cast(Tensor, module.weight) for module in modules.values()]
        else:
            weights = kernel_weights.used(modules, step.weights)
        kind = functional.PENALTIES.index(self.kernel_penalty)
        similarity = functional._pairwise(weights, kind, False, EPS, False, self.impl)
        return similarity if share.scale == 1 else similarity * share.scale

    def _consistency(self, step: _Step, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """All heads of ways 1 and 2 and the network's own cross entropy, in one call."""
        blocks = [step.head_logits[i] for i in sorted(step.head_logits)]
        blocks.append(logits)
        if step.views is not None:
            blocks.append(step.views)
        checked = validation.target(target, blocks, IGNORED)
        return functional._consistency(blocks, checked, self._current_options(), self.impl)

    def _current_options(self) -> ConsistencyOptions:
        """The options of the consistency, made again if what they are made of has changed."""
        if torch.compiler.is_compiling():  # a cache would be one more guard
            return self._consistency_options()
        made_of = self._made_of()
        if self._options is None or self._options[0] != made_of:
            self._options = made_of, self._consistency_options()
        return self._options[1]

    def _made_of(self) -> tuple:
        return (
            self.output_weight,
            self.multilayer_weight,
            self.views,
            self.output_temperature,
            self.multilayer_temperature,
            self.multilayer_teacher,
            self.label_smoothing,
        )

    def _consistency_options(self) -> ConsistencyOptions:
        n, views = len(self.heads), self.views if self.output_weight else 0
        output = self.output_weight / self.views
        groups = 2 if views else 1
        return functional._consistency_options(
            n + 1 + views,
            ce_weight=[self.multilayer_weight / max(n, 1)] * n + [1.0] + [output] * views,
            kl_weight=[self.multilayer_weight / (n + 1)] * (n + 1) + [output] * views,
            groups=[n + 1, views][:groups],
            temperature=[self.multilayer_temperature, self.output_temperature][:groups],
            teacher=[self.multilayer_teacher, "pairwise"][:groups],
            detach_teacher=True,
            label_smoothing=self.label_smoothing,
            ignore_index=IGNORED,
            reduction="mean",
        )


class AuxiliaryHead(nn.Module):
    r"""Classifier on intermediate features: (B, C, \*spatial) -> average -> linear -> (B, K)."""

    def __init__(self, channels: int, classes: int, *, device=None, dtype=None) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, classes, device=device, dtype=dtype)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear(_average(features))


def _average(features: Tensor) -> Tensor:
    """(B, C, *spatial) -> (B, C), with a gradient of one number for all pixels.

    That of ``Tensor.mean`` is as large as the features, and contiguous where they are
    channels_last, which makes adding it to their other gradients ten times as slow.
    """
    if features.dtype not in (torch.float32, torch.float64):
        return _Average.apply(features)
    # The same in fewer microseconds. In half precision a sum can be out of range, and autocast
    # would have a gradient as large as the features after all.
    pixels = math.prod(features.shape[2:])
    return features.sum(dim=tuple(range(2, features.dim()))) / pixels


class _Average(Function):

    @staticmethod
    def forward(ctx, features: Tensor) -> Tensor:
        ctx.shape = features.shape
        return features.mean(dim=tuple(range(2, features.dim())))

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        pixels = math.prod(ctx.shape[2:])
        return (grad / pixels).reshape(*grad.shape, *[1] * (len(ctx.shape) - 2)).expand(ctx.shape)


class _Step(Step):
    """What one training call of an ``IMCL`` collects while its network runs."""

    def __init__(self, imcl: IMCL, turn: Turn) -> None:
        super().__init__()
        self.imcl = imcl
        self.similar = bool(imcl.representation_weight and turn.representation)
        self.similarities: list[Tensor] = []
        self.head_logits: dict[int, Tensor] = {}
        self.views: Tensor | None = None

    def take(self, layer: int | None, module: nn.Module, features: Tensor) -> None:
        if layer is None:
            self._classifier_finished(module, features)
        else:
            self._layer_finished(layer, features)

    def _layer_finished(self, index: int, features: Tensor) -> None:
        """The penalty and the auxiliary head of a layer, as soon as its features exist.

        They are in cache now; and since autograd runs backward in reverse order, the
        penalty's gradient will be made when the backward pass reaches this layer, where
        the layer's own is due, and not all layers' at once at the start.
        """
        imcl = self.imcl
        if self.similar:
            kind = functional.PENALTIES.index(imcl.representation_penalty)
            self.similarities.append(
                functional._pairwise([features], kind, imcl.center, EPS, True, imcl.impl)
            )
        if index < len(imcl.heads):
            self.head_logits[index] = imcl.heads[index](features)

    def _classifier_finished(self, classifier: nn.Module, features: Tensor) -> None:
        """The dropout views, (V, B, K), by one more run of the classifier."""
        imcl = self.imcl
        if imcl.output_weight:
            views = features.expand(imcl.views, *features.shape)  # [V, B, F]
            views = torch.dropout(views, imcl.dropout, imcl.training)
            # Not a call of the module, which would run this very hook again.
            logits = classifier.forward(views.flatten(0, 1))
            self.views = logits.view(imcl.views, len(features), *logits.shape[1:])


def _submodule(module: nn.Module, path: str) -> nn.Module:
    """``module.get_submodule(path)`` in a tenth of its time, of a path that is there."""
    for name in path.split("."):
        child = module._modules.get(name)
        module = getattr(module, name) if child is None else child  # of a compiled module
    return module


def _head(trace: find.Trace, layer: str) -> AuxiliaryHead:
    features = trace.calls[layer][0].output
    assert features is not None  # or it would be none of the layers
    channels = features.shape[-1 if layer in trace.channels_last else 1]
    # Of a network of several dtypes the layer's own; but autocast's is none of a parameter.
    dtypes = [p.dtype for p in trace.model.parameters() if p.is_floating_point()]
    kind = features.device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    own = features.dtype in dtypes and not autocast
    return AuxiliaryHead(
        channels,
        trace.output.shape[1],
        device=features.device,
        dtype=features.dtype if own or not dtypes else dtypes[0],
    )


def _layers(trace: find.Trace, layers: Sequence[str] | None, least: int) -> list[str]:
    chosen = find.find_layers(trace) if layers is None else find.check_layers(trace, layers)
    if len(chosen) < least:
        what = "multi-layer consistency" if least > 1 else "representation similarity"
        off = "multilayer_weight=0" if least > 1 else "representation_weight=0"
        how = "found" if layers is None else "got"
        raise ValueError(
            f"layers: expected at least {least} for {what}, {how} {chosen}; name the modules, "
            f"give a larger example_input, or pass {off}"
        )
    return chosen


def _kernels(model: nn.Module, kernels: Sequence[str] | None) -> list[str]:
    chosen = find.find_kernels(model) if kernels is None else find.check_kernels(model, kernels)
    if not chosen:
        raise ValueError(
            "kernels: expected at least one convolution with kernels of more than one pixel, "
            "fewer than twice the weights in each (more can't become unlike), found none; name "
            "the modules or pass kernel_weight=0"
        )
    return chosen
