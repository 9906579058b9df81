"""``IMCL``: the four ways of teaching within one network, put around any classifier."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from . import calls, dense, kernel_weights, outputs, plan, sharding, taps, validation
from . import layers as find
from .choice import choose
from .dense_outputs import Resize
from .heads import head_for
from .imcl_consistency import HeadsConsistency
from .imcl_output import IMCLOutput
from .imcl_state import WEIGHTS, IMCLState
from .imcl_step import EPS, IMCLStep
from .modes import evaluating
from .schedule import Schedule, Turn
from .sharding import KernelShare
from .taps import Tap, Tape
from .unlearnt import HeadsMove
from .watch import Watch, ran, zero

EVERY_WAY = Turn(0, 1, 1)  # of a call that is not on the schedule
NO_CHANCE = 16  # calls in a row that no network leaves all layers out of at random


class IMCL(IMCLState):
    r"""Intra-model collaborative learning around an unmodified network.

    ``imcl(x)`` is exactly ``model(x)``; ``imcl(x, target)`` also gives the training loss

    .. math:: CE + w_{out}\,(\overline{CE}_{views} + T_{out}^2\,\overline{KL}_{views})
        + w_{multi}\,(\overline{CE}_{aux} + T_{multi}^2\,\overline{KL}_{heads})
        + w_{repr}\,S_{features} + w_{kernel}\,S_{kernels},

    where CE is that of the network's own logits, views are dropout views of the last
    features through the one classifier, and the heads are an auxiliary classifier on each
    chosen layer but the last, and the network's own. Where the logits are dense, (B, K, \*spatial)
    of segmentation or (B, \*tokens, K) of tokens, every pixel or token is a sample, auxiliary
    classifiers are 1x1 convolutions or linear layers of each token, and what they and the views
    give is interpolated to the size of the logits. The backbone runs once. Nothing is
    left over afterwards: ``imcl.model`` is the plain network with its own state_dict, and
    ``remove_hooks`` takes even the idle hooks off it. ``criterion`` puts any other loss in
    the place of CE, and ``watch`` leaves the training call to a loop of your own.

    Args:
        model: maps x to logits (B, K), (B, K, \*spatial) or (B, \*tokens, K), or, for ways 3
            and 4, to anything. It may be on any device, in any floating dtype.
        example_input: a batch as ``model`` takes it: a Tensor, whose first sample is run once,
            or a tuple of arguments or a dict of keyword arguments, run as they are, in eval
            mode and without gradients.
        layers: paths of the modules whose outputs (B, C, \*spatial), or tokens (B, T, C),
            take part in multi-layer consistency and representation similarity; choose them
            after their activation. None takes the last block of each spatial resolution, or,
            where all blocks have one (vision transformers), those at 1/4, 2/4, 3/4 and the
            end of the depth; of an encoder-decoder, which is given ``decoder_input_ids`` or the
            like by name, those of the decoder. Tokens stand for pixels: they are what a
            channel's similarity runs over and what an auxiliary head averages. Of a module
            that returns a tuple it is the first.
        output_weight, multilayer_weight, representation_weight, kernel_weight: of the four
            ways. 0 leaves a way out: no hook, no head, no call. The others may be
            changed between steps.
        classifier: path of the nn.Linear that computes the logits, or, of dense ones, the
            convolution, also where these are interpolated afterwards. None finds it.
        kernels: paths of the modules whose ``weight`` takes part in kernel similarity, or of
            other weights themselves (``"lstm.weight_ih_l0"``). None takes the convolutions with
            kernels of more than one pixel, and, where those hold less than half of the network's
            weights, its 1x1 convolutions and linear layers too, the classifier excepted; but no
            layer that has twice as many kernels as weights in each, or more, for these can't
            become unlike: depthwise convolutions and layers that widen, but not an ungrouped
            convolution of more than one pixel (a stem). Rows that are queries, keys and
            values of one layer, or gates of a recurrent one, are compared within their role.
        views: number of dropout views, at least 2.
        dropout: probability of the views' dropout (none in eval mode).
        output_temperature, multilayer_temperature: T of the two consistencies.
        multilayer_teacher: ``"others"``, ``"mean"``, ``"final"`` or ``"pairwise"``; see
            ``functional.collaborative_consistency``.
        representation_penalty, kernel_penalty: ``"square"``, ``"abs"`` or ``"signed"``.
        center: compare the channels by Pearson's correlation instead of the cosine.
        label_smoothing: in [0, 1), of every cross entropy.
        representation_interval, kernel_interval: k computes the way in every k-th training
            call only, with k times its weight; 1 in every call. See below.
        shard_kernels: under DistributedDataParallel let each process compute the kernel
            similarity of a share of the layers only, times the number of processes: the
            mean of the gradients is the same. ``terms["kernel_similarity"]`` is then that
            of the process, 0 if it has no layer; the mean over processes is the value.
            ``torch.distributed`` must be initialised, and all of it train together. Not with
            weights that FSDP2 has in shards: these are gathered whole in every process, in the
            calls that compute way 4 (``kernel_interval``), which must be the same in all.
        criterion: ``(output, target) -> scalar``, of what ``model`` returns, in place of the
            cross entropy of its logits; of heads and views, where there are any, the cross
            entropy stays. ``target`` is then whatever it takes, and for an output that is no
            logits ways 3 and 4 are left.
        logits: ``(output) -> Tensor``, the logits in what ``model`` returns. None takes a
            Tensor, ``output.logits``, ``output["logits"]``, or a tuple's first.
        class_dim: where dense logits have their classes: 1 for (B, K, \*spatial), -1 for
            (B, \*tokens, K). None goes by the first of these that tells: ``labels`` in
            ``example_input``; the module whose output the logits are; the positions of the
            input, if the logits have the same; whether the network's convolutions have as many
            spatial dimensions. An output of 3 dimensions or more counts as logits only if this,
            ``logits`` or ``activation="sigmoid"`` is given, or a linear layer or convolution
            computes it, which gives more or fewer channels than the input has (an image would
            have as many), or ``labels`` or the name ``logits`` tell; and never under a
            ``criterion`` unless this or ``logits`` is given.
        ignore_index: target of samples, pixels or tokens that count for nothing.
        activation: ``"softmax"``, or ``"sigmoid"`` where the K labels of a sample hold or not, each
            by itself: targets are floating, shaped like the logits. The cross entropy is then
            summed over the labels, K times what ``binary_cross_entropy_with_logits`` averages;
            see ``functional.collaborative_consistency``.
        impl: see ``functional``.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
        RuntimeError: ``shard_kernels`` without ``torch.distributed``.

    A way that has nothing to act on in this network is switched off, with one warning that
    says why: way 1 without a linear layer (or convolution) that computes the logits, way 2
    without two layers, or ones whose positions lie over those of dense logits (tokens of a
    transformer do, row by row, but not beside a class token), way 3 without one, way 4 without
    kernels that can become unlike.

    Every term is a mean over the batch, or does not depend on it. So the losses of k equal
    parts of a batch, each divided by k, accumulate to the gradient of the whole, but for what
    the network's batch normalisation does.

    A similarity is a regulariser whose gradient changes slowly, and need not be computed in
    every step (lazy regularisation: StyleGAN2, 1912.04958). With an interval of k it is in one
    training call of k, times k, so that the mean gradient is the same: way 3 in calls 0, k, 2k
    and so on, way 4 half of the intervals' greatest common divisor later, so that with 8 and 16
    no call computes both. In the other calls ``terms`` doesn't have it. The defaults are those
    of the longest schedule under which accuracy was that of every call, in a study of 640 steps
    a run; in a training of a few dozen steps such a call is a jolt, and 1 is the better choice.
    Only calls in training mode and with gradients enabled count, those of all batches that one
    optimizer step accumulates too; any other computes every way at its plain weight. How many
    have been made is in ``state_dict``, so that a resumed training goes on with the schedule; a
    state_dict from before there was one begins it. Who calls an even number of times for one
    optimizer step (SAM; real and made images of a GAN) wants odd intervals, for otherwise the
    same one of these calls has all turns; a CUDA graph replays the ways of the call that it
    captured.

    ``torch.compile`` makes a graph for each set of ways that a call computes, for a batch of
    another size (the last one of an epoch), and for calls in eval mode or without a target: with
    the defaults seven or more. It takes 8, after which ``fullgraph=True`` is an error and without
    it calls run uncompiled: set ``torch._dynamo.config.recompile_limit`` to 16. The
    weights of ways 1 and 2, temperatures and label smoothing are constants of a graph: one that
    changes in every step makes a graph in every step.

    Under gradient checkpointing the work on a layer is done once, not again when its segment
    is run again. A segment is a part of the network: one that holds the call of the ``IMCL``
    itself would run the schedule's next call when it is run again. A layer inside a segment,
    other than at its end, needs ``use_reentrant=False``; ``torch.compile`` then can't have
    ``fullgraph=True``. So does way 4 under DistributedDataParallel, or there
    ``static_graph=True`` and a ``kernel_interval`` of 1.

    FSDP2 takes the whole ``IMCL``: ``fully_shard(imcl)`` after modules inside of it, before the
    network first runs. Where an ``IMCL`` is built around a network that FSDP2 has already, call
    ``fully_shard(head, mesh=mesh)`` on each of ``imcl.heads`` as well. An adapter (LoRA) that is
    put around the classifier later belongs to it, unless the ``IMCL`` is compiled by then.

    A layer that a call leaves out, as layerdrop does, is left out of that call's ways 2 and 3,
    which are means over the others; the first time a warning names it.

    Features without gradient, of frozen layers or under ``no_grad``, contribute their value
    and learn nothing. Of ``kernels`` all learn whose parameters require a gradient, so freeze
    layers by ``requires_grad_(False)``; a warning names those that ``no_grad`` freezes. Weights
    that each run makes anew, as pruning, weight and spectral normalisation do, are compared
    as this run made them.

    The objective reconstructs arXiv 2105.09590 from its abstract, with published relatives:
    output consistency SD-Dropout (2208.05642) and R-Drop (2106.14448), multi-layer
    consistency 1805.11761 and 1905.08094, the penalties RePr (1811.07275). Its defaults
    come from this project's own experiments (docs/accuracy.md), not from the paper.
    """

    # To transformers' Trainer: that the loss of a part of a batch is a mean, to be divided by the
    # number of parts, although forward takes whatever keyword arguments there are.
    accepts_loss_kwargs = False

    def __init__(
        self,
        model: nn.Module,
        example_input: Any,
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
        representation_interval: int = 8,
        kernel_interval: int = 16,
        shard_kernels: bool = False,
        criterion: Callable[[Any, Any], Tensor] | None = None,
        logits: Callable[[Any], Tensor] | None = None,
        class_dim: int | None = None,
        ignore_index: int = -100,
        activation: str = "softmax",
        impl: str = "auto",
    ) -> None:
        super().__init__()
        validation.module("model", model)
        self.output_weight = output_weight
        self.multilayer_weight = multilayer_weight
        self.representation_weight = representation_weight
        self.kernel_weight = kernel_weight
        self.views, self.dropout = views, dropout
        self.output_temperature = output_temperature
        self.multilayer_temperature = multilayer_temperature
        self.multilayer_teacher = multilayer_teacher
        self.representation_penalty, self.center = representation_penalty, center
        self.kernel_penalty = kernel_penalty
        self.label_smoothing, self.ignore_index = label_smoothing, ignore_index
        self.activation, self.criterion, self.impl = activation, criterion, impl
        shard_kernels = validation.boolean("shard_kernels", shard_kernels)
        self._schedule = Schedule(
            validation.integer("representation_interval", representation_interval, low=1),
            validation.integer("kernel_interval", kernel_interval, low=1),
        )
        self._find_logits = validation.function("logits", logits)

        dense.check_class_dim(class_dim)
        self.model = model
        trace = find.trace(
            model, example_input, logits, class_dim, criterion is not None, activation == "sigmoid"
        )
        self.class_dim, self._no_logits = trace.class_dim, trace.why
        with evaluating(model):  # otherwise, to read a weight under spectral norm changes it
            values = {name: getattr(self, name) for name in WEIGHTS}
            choice = choose(trace, values, layers, classifier, kernels)
            self._kernel_share = KernelShare.of(choice.kernels, trace.model, shard_kernels)
        self._shard_kernels = shard_kernels
        if choice.nothing:
            for name in choice.nothing:
                setattr(self, name, 0.0)
            warnings.warn(choice.warning, stacklevel=2)
        self._nothing = choice.nothing
        self.layers, self.kernels = choice.layers, choice.kernels
        self.classifier = choice.classifier
        self.heads = nn.ModuleList(head_for(trace, name) for name in choice.headed)
        self._head_of = {self.layers.index(name): i for i, name in enumerate(choice.headed)}
        self._upstream = [trace.upstream(name, self.kernels) for name in self.layers]
        self._resize = trace.makers.get(choice.classifier or "", Resize())
        self._off = tuple(name for name in WEIGHTS if getattr(self, name) == 0)
        self._heads_move = HeadsMove()
        self._told_of_mask = self._told_of_plain = self._told_of_absent = False
        self._told_of_heads = self._told_of_frozen = False
        self._consistency = HeadsConsistency()
        self._tape = Tape()
        self._without_layers = 0  # calls in a row that have run none
        self._tapped: list[int | None] = []  # the layers, and the classifier, that have hooks
        self._handles = self._register_hooks(trace.channels_last)
        self._weight_handles = kernel_weights.tap(self._kernel_weights(EVERY_WAY), self._tape)
        self._watch_handles: list[RemovableHandle] = []
        if isinstance(example_input, Mapping):
            outputs.show_parameters_of(model, self)

    def forward(
        self,
        x: Any = outputs.MISSING,
        target: Any = None,
        *,
        labels: Any = None,
        token_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        r"""What the network returns; with ``target``, an ``IMCLOutput``.

        Args:
            x: the network's input; a tuple is its arguments, a dict its keyword arguments.
            target: class indices (B,) or probabilities (B, K), of dense logits (B, \*spatial),
                (B, \*tokens) or probabilities shaped like them; or what ``criterion`` takes.
            labels: the target under transformers' name, where ``target`` isn't given; the
                network doesn't get it. In eval mode, where its Trainer reads ``eval_loss``, the
                loss is the cross entropy (or ``criterion``) alone.
            token_mask: (B, T) or (B, \*spatial), True or not 0 where a position counts: padding
                takes no part in representation similarity and in what the heads average, nor,
                where dense logits have as many positions, in anything that is computed from
                them, their own cross entropy among it. The network doesn't get it. None takes
                its argument ``attention_mask``, if there is one, where it fits; of an
                encoder-decoder ``decoder_attention_mask`` for the logits and the decoder.
            kwargs: handed on to the network.

        Raises:
            ValueError, TypeError: ``target`` is neither.
            RuntimeError: the network took another course than on ``example_input``.
        """
        args, kwargs = outputs.arguments(x, kwargs)
        within = kwargs.pop(outputs.LABELS, None)
        if target is None:
            target = within if labels is None else labels
            if target is None:
                self._notice_plain_training()
                return self.model(*args, **kwargs)
            if self.criterion is None or self.class_dim is not None:
                outputs.check_labels(self.model, kwargs, self.class_dim is not None)
            if not self.training:
                validation.tensor_or_none("token_mask", token_mask)
                return self._evaluate(self.model(*args, **kwargs), target, token_mask, kwargs)
        step = self._begin(token_mask)
        step.keywords = kwargs
        try:
            step.outputs.append(self.model(*args, **kwargs))
        finally:
            self._tape.step = None
        self._end(step)
        return self._objective(step, target)

    def watch(self, token_mask: Tensor | None = None) -> Watch:
        """The ways around a forward pass of your own, for any loop and any loss.

        ::

            with imcl.watch() as ways:
                output = model(batch)  # as it always was called, once
            loss = my_loss(output, batch) + ways.loss(target)

        ``ways.loss(target)`` is everything but the network's own task loss: the heads' and
        views' cross entropies and KL, and both similarities; without ``target`` the cross
        entropies are left out. ``ways.terms`` are its parts, as ``IMCLOutput.terms``;
        ``token_mask`` is that of ``forward``. Under DistributedDataParallel wrap the whole
        ``IMCL``, and call that in the block; with ``find_unused_parameters`` call it with a target
        instead, for the heads, of which the network's output tells nothing, count as unused. A
        network that is compiled must have been watched once before it first runs.

        Raises:
            RuntimeError: on leaving the block, if the model has not run once in it.
        """
        if not self._watch_handles:
            self._watch_handles = ran(self.model, self._tape)
        return Watch(self, token_mask)

    def _begin(self, token_mask: Tensor | None = None) -> IMCLStep:
        """A step under way, until ``_tape.step`` is taken back: the network is to run once."""
        validation.tensor_or_none("token_mask", token_mask)
        for name in self._off:
            if getattr(self, name):
                raise RuntimeError(
                    f"{name}: this way was switched off (0) when IMCL was built and has no "
                    "hooks; build a new IMCL with a weight above 0"
                )
        taps.refuse_replica(self, "IMCL")
        if self._tape.step is not None:
            raise RuntimeError(
                "IMCL: a step is under way; within a watch block call the network itself, without "
                "a target, and begin no second block"
            )
        # Autograd runs backward what ran forward last. Alone, kernel similarity comes first:
        # its gradient, as large as the weights', is made at the very end, when the
        # activations have been freed, and does not raise the peak. Among several processes
        # it would hold every convolution's gradient back to the end, and with it all of
        # DistributedDataParallel's communication, which is to run beside the backward pass; and
        # FSDP2, also in one process, frees by then what it had gathered.
        # And weights that the forward pass itself makes are not there before it.
        counts = self.training and torch.is_grad_enabled()
        turn = self._schedule.turn if counts else EVERY_WAY
        weights = self._kernel_weights(turn)
        kernel_first = not sharding.initialised() and kernel_weights.are_parameters(weights)
        kernel = self._kernel_similarity(weights, turn) if kernel_first else None
        if not (kernel_first or torch.compiler.is_compiling()):  # which can't trace it
            self._weight_handles += kernel_weights.tap(weights, self._tape)
        step = IMCLStep(self, turn, counts)
        step.mask = token_mask
        if not torch.compiler.is_compiling():
            self._look_at_classifier(step)
            self._look_at_heads()
        step.kernel, step.kernels = kernel, None if kernel_first else weights
        if kernel_first:
            step.compared = weights, kernel_weights.parameters(weights)
        self._tape.step = step
        return step

    def _look_at_classifier(self, step: IMCLStep) -> None:
        """An adapter (LoRA) that has been put around it belongs to it; FSDP2 may have it."""
        if self.classifier is None or not self._handles:
            return
        try:
            classifier = self.model.get_submodule(self.classifier)
        except AttributeError:  # taken out: that it doesn't run is told afterwards
            return
        if taps.is_around(classifier, self._handles[-1]):
            self._handles[-1].remove()
            self._handles[-1] = self._tap_classifier(classifier)
        if sharding.initialised():
            step.sharded = kernel_weights.is_shard(getattr(classifier, "weight", None))

    def _look_at_heads(self) -> None:
        if self._told_of_heads or not self.heads or sharding.world_size() == 1:
            return
        self._told_of_heads = True
        of_heads = map(kernel_weights.is_unit, [self, *self.heads.modules()])
        if any(map(kernel_weights.is_unit, self.model.modules())) and not any(of_heads):
            warnings.warn(
                "IMCL: FSDP2 has the network, but not the auxiliary heads, whose gradients no "
                "process averages with the others'. Call fully_shard on the whole IMCL before its "
                "network first runs, or fully_shard(head, mesh=mesh) for each head of imcl.heads",
                stacklevel=6,  # where the IMCL is called
            )

    def _end(self, step: IMCLStep) -> None:
        """What is left to do when the network has run."""
        step.finish()
        if step.without_gradient:
            self._look_at_frozen(step)
        if step.kernels is not None:
            step.kernel = self._kernel_similarity(step.kernels, step.turn, step)
        if not len(set(step.ran)) == len(step.ran) == len(self._tapped):
            self._left_out(step.ran)
        elif self._without_layers:
            self._without_layers = 0

    def _look_at_frozen(self, step: IMCLStep) -> None:
        """Who freezes layers by no_grad expects that nothing moves them."""
        if self._told_of_frozen or not self.kernel_weight or torch.compiler.is_compiling():
            return
        upstream = {path for i in step.without_gradient for path in self._upstream[i]}
        found = [kernel_weights.locate(self.model, path)[0] for path in upstream]
        if any(p.requires_grad for module in found for p in module.parameters()):
            self._told_of_frozen = True
            warnings.warn(
                f"IMCL: the network runs {[self.layers[i] for i in step.without_gradient]} under "
                "no_grad, so that nothing is learnt up to there; but way 4 compares weights "
                "themselves, and moves those of convolutions all the same. Freeze them with "
                "requires_grad_(False), or leave them out of kernels",
                stacklevel=6,  # where the IMCL is called
            )

    def _left_out(self, ran: Sequence[int | None]) -> None:
        """Layers may be, at random; anything else is another course than on the example."""
        absent = taps.left_out(self._tapped, ran, self._handles)
        compiling = torch.compiler.is_compiling()
        if not compiling:  # or each number would be another graph
            alone = absent and not any(layer is not None for layer in ran)
            self._without_layers = self._without_layers + 1 if alone else 0
        if not absent or self._without_layers == NO_CHANCE:
            raise RuntimeError(
                f"model: expected the layers {self.layers} and the classifier "
                f"{self.classifier} to run once each, as on example_input, got {len(ran)} "
                f"runs for {len(self._tapped)} hooks (0 after remove_hooks)"
            )
        if not (self._told_of_absent or compiling):
            self._told_of_absent = True
            warnings.warn(
                f"IMCL: in this call the network left out {[self.layers[i] for i in absent]}, as "
                "layerdrop does. What a call leaves out has no part in its ways 2 and 3, which are "
                "means over the other layers",
                stacklevel=6,  # where the IMCL is called
            )

    def _objective(self, step: IMCLStep, target: Any, task: bool = True) -> IMCLOutput:
        """The loss of a step that is over; without ``task`` all but the network's own."""
        output = step.outputs[0]
        own = task and self.criterion is None
        loss = head_terms = criterion = None
        if own or step.head_logits or step.views is not None:
            logits = outputs.logits(output, self._find_logits)
            loss, head_terms = self._consistency(self, step, logits, target, own)
        else:
            logits = self._logits_if_any(output)
        if task and self.criterion is not None:
            criterion = _scalar(self.criterion(output, target))
            loss = criterion if loss is None else loss + criterion
            criterion = criterion.detach()
        turn, representation, kernel = step.turn, None, step.kernel
        if loss is None:
            loss = zero(self.model)
        if step.similarities:
            layers = len(step.similarities)
            representation = torch.stack(step.similarities).sum()
            weight = turn.representation * self.representation_weight
            loss = torch.add(loss, representation, alpha=weight / layers)
            representation = representation.detach() / layers
        if kernel is not None:
            loss = torch.add(loss, kernel, alpha=turn.kernel * self.kernel_weight)
        if step.counts:
            self._schedule.turn, step.counts = turn.next, False
            if not (self._heads_move.done or torch.compiler.is_compiling()):
                self._heads_move.look(self.model.parameters(), list(self.heads.parameters()))
        return IMCLOutput(
            loss,
            logits,
            _criterion=criterion,
            _head_terms=head_terms,
            _representation=representation,
            _kernel=None if kernel is None else kernel.detach(),
            _own=own,
            _auxiliary=len(step.head_logits),
            _multilayer=self.multilayer_weight != 0,
            _views=0 if step.views is None else self.views,
            output=output,
        )

    def _evaluate(
        self, output: Any, target: Any, token_mask: Tensor | None, keywords: Mapping[str, Any]
    ) -> IMCLOutput:
        """The task's own loss of an output, without the ways."""
        if self.criterion is not None:
            loss = _scalar(self.criterion(output, target))
            logits = self._logits_if_any(output)
            return IMCLOutput(loss, logits, _criterion=loss.detach(), output=output)
        logits = outputs.logits(output, self._find_logits)
        masks = token_mask, outputs.Padding.of(keywords).of_logits
        loss, head_terms = self._consistency.own(self, logits, target, masks)
        return IMCLOutput(loss, logits, _head_terms=head_terms, _own=True, output=output)

    def _notice_plain_training(self) -> None:
        if self._told_of_plain or torch.compiler.is_compiling():
            return
        on = self.training and torch.is_grad_enabled() and len(self._off) < len(WEIGHTS)
        if on and self._tape.step is None:
            self._told_of_plain = True
            warnings.warn(
                "IMCL: called in training mode without a target, which is the plain network: no "
                "way is computed. Pass the target, or train within imcl.watch(); of transformers' "
                "Trainer label_smoothing_factor and compute_loss_func keep the labels back (IMCL "
                "has label_smoothing and criterion)",
                stacklevel=5,  # where the module is called
            )

    def _logits_if_any(self, output: Any) -> Any:
        try:
            return outputs.logits(output, self._find_logits)
        except TypeError:
            return None

    def remove_hooks(self) -> nn.Module:
        """Take the hooks off the network and return it; ``imcl`` can't train it any more."""
        for handle in [*self._handles, *self._weight_handles, *self._watch_handles]:
            handle.remove()
        self._handles.clear()
        return self.model

    @property
    def representation_interval(self) -> int:
        return self._schedule.representation

    @representation_interval.setter
    def representation_interval(self, value: int) -> None:
        interval = validation.integer("representation_interval", value, low=1)
        self._schedule = Schedule(interval, self.kernel_interval, self._schedule.turn.position)

    @property
    def kernel_interval(self) -> int:
        return self._schedule.kernel

    @kernel_interval.setter
    def kernel_interval(self, value: int) -> None:
        interval = validation.integer("kernel_interval", value, low=1)
        self._schedule = Schedule(
            self.representation_interval, interval, self._schedule.turn.position
        )

    def get_extra_state(self) -> Tensor:
        """Where the schedule stands; a tensor, which every format of checkpoints can hold."""
        return torch.tensor(self._schedule.turn.position, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        self._schedule = Schedule(self.representation_interval, self.kernel_interval, int(state))

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        # Checkpoints of versions without a schedule.
        state_dict.setdefault(f"{prefix}_extra_state", torch.tensor(0, device="cpu"))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _replicate_for_data_parallel(self) -> IMCL:
        replica = super()._replicate_for_data_parallel()
        replica.__dict__.pop("forward", None)  # that of ``self``, see show_parameters_of
        return replica

    def __getstate__(self) -> dict[str, Any]:
        # What forward shows is pickled as the class's own, and made again of the model.
        state = super().__getstate__()  # without what has been compiled
        for name in ("_handles", "_weight_handles", "_watch_handles"):
            state[name] = taps.living(state[name])
        if outputs.shows_parameters(self):
            del state["forward"]
            state["_shows_parameters"] = True
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        shows = state.pop("_shows_parameters", False)
        super().__setstate__(state)
        if shows:
            outputs.show_parameters_of(self.model, self)

    def plan(self) -> str:
        """What each way acts on, and what share of the weights way 4; for people to read."""
        return plan.text(self, self._nothing)

    def extra_repr(self) -> str:
        weights = ", ".join(f"{name}={getattr(self, name):g}" for name in WEIGHTS)
        share = plan.share(self.model, self.kernels)
        return (
            f"{weights}, layers={self.layers}, classifier={self.classifier!r}, "
            f"kernels={len(self.kernels)} ({share:.1%} of the weights), impl={self.impl!r}"
        )

    def _register_hooks(self, channels_last: frozenset[str]) -> list[RemovableHandle]:
        handles = []
        for index, name in enumerate(self.layers):
            if self.representation_weight or index in self._head_of:
                tap = Tap(self._tape, index, name in channels_last)
                module = self.model.get_submodule(name)
                handles.append(module.register_forward_hook(tap, with_kwargs=True))
                self._tapped.append(index)
        if self.classifier is not None:
            handles.append(self._tap_classifier(self.model.get_submodule(self.classifier)))
            self._tapped.append(None)
        return handles

    def _tap_classifier(self, classifier: nn.Module) -> RemovableHandle:
        # Before hooks that are there: FSDP2's gives the weight back that the views need.
        tap = Tap(self._tape, None)
        return classifier.register_forward_hook(tap, with_kwargs=True, prepend=True)

    def _kernel_weights(self, turn: Turn) -> kernel_weights.Weights:
        """Where those are that this process compares in this step."""
        if not self.kernel_weight or not turn.kernel:
            return {}
        if self._shard_kernels and self._kernel_share.place != sharding.place():
            # It was saved in another process.
            together = sharding.initialised()
            self._kernel_share = KernelShare.of(self.kernels, self.model, together)
        return {
            path: kernel_weights.locate(self.model, path) for path in self._kernel_share.kernels
        }

    def _kernel_similarity(
        self, where: kernel_weights.Weights, turn: Turn, step: IMCLStep | None = None
    ) -> Tensor | None:
        """That of the weights that ``step`` has computed with; None: of parameters, before it."""
        if not self.kernel_weight or not turn.kernel:
            return None
        share = self._kernel_share
        if not where:
            return next(self.model.parameters()).new_zeros(())
        if step is None:
            weights = kernel_weights.parameters(where)
        else:
            kernel_weights.reshard(self, where)
            weights = kernel_weights.used(where, step.weights)
        if share.place is not None and any(map(kernel_weights.is_shard, weights)):
            raise RuntimeError(
                "shard_kernels: expected whole weights, got such as FSDP2 has in shards, which all "
                "processes gather together; pass shard_kernels=False"
            )
        weights = kernel_weights.whole(weights)
        for path, weight in zip(where, weights, strict=True):
            if weight.dim() < 2:
                raise RuntimeError(
                    f"kernel_weight: the weight of {path!r} is not there whole, its shape is "
                    f"{tuple(weight.shape)}: FSDP1 and ZeRO-3 take weights apart; use FSDP2, or "
                    "set kernel_weight to 0"
                )
        weights = kernel_weights.by_role(weights, share.roles, where)
        kind = calls.PENALTIES.index(self.kernel_penalty)
        similarity = calls.pairwise(weights, kind, False, EPS, False, self.impl)
        return similarity if share.scale == 1 else similarity * share.scale


def _scalar(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor):
        raise TypeError(f"criterion: expected it to return a Tensor, got {type(loss).__name__}")
    if loss.dim():
        raise ValueError(
            f"criterion: expected it to return a scalar, got shape {tuple(loss.shape)}; reduce it, "
            "for instance with .mean()"
        )
    return loss
