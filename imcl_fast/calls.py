"""What ``functional`` does once its arguments are known to be right: options, the choice of an
implementation, and the call. ``IMCL``, which has seen to its arguments when it was built, calls it
directly."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import implementations, independent, reference, tracing, validation
from .algebra.divergences import MIXTURE
from .autograd import CollaborativeConsistency, PairwisePenalty, without_autocast
from .schemas import ConsistencyOptions, PairwiseOptions

PENALTIES = ("square", "abs", "signed")
TEACHERS = ("others", "mean", "final", "pairwise")
DIVERGENCES = ("kl", "reverse_kl", "jsd")
ACTIVATIONS = ("softmax", "sigmoid")
REDUCTIONS = ("mean", "sum", "none")
PRECISIONS = ("highest", "high", "medium")
PLAIN = (float, int, bool, str, type(None))  # types of options that are remembered


def _of_one_dtype(stacks: list[Tensor]) -> list[Tensor]:
    """Logits in the widest of their dtypes; the lowest number of a narrower one, which masks a
    class, becomes -inf, for in a wider one it is a number like others."""
    widest = functools.reduce(torch.promote_types, [stack.dtype for stack in stacks])
    return [stack if stack.dtype == widest else _widened(stack, widest) for stack in stacks]


def _widened(stack: Tensor, dtype: torch.dtype) -> Tensor:
    with torch.no_grad():  # added, for a gradient comes back through that as it is
        masked = torch.zeros_like(stack, dtype=dtype)
        masked.masked_fill_(stack <= torch.finfo(stack.dtype).min, -math.inf)
    return stack.to(dtype) + masked


def _remembered(function: Callable) -> Callable:
    """Keeps what a function makes of single numbers, bools and names: to validate them again
    takes longer than the operation."""
    cached = functools.lru_cache(maxsize=64, typed=True)(function)

    @functools.wraps(function)
    def call(*args, **options):
        plain = all(type(value) in PLAIN for value in options.values())
        return (cached if plain and not torch.compiler.is_compiling() else function)(
            *args, **options
        )

    return call


@_remembered
def consistency_options(
    heads: int,
    *,
    temperature: float | Sequence[float],
    ce_weight: float | Sequence[float],
    kl_weight: float | Sequence[float],
    teacher: str | Sequence[str],
    detach_teacher: bool | Sequence[bool],
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
    groups: Sequence[int] | None,
    divergence: str | Sequence[str] = "kl",
    beta: float | Sequence[float] = 0.5,
    binary: bool = False,
) -> ConsistencyOptions:
    """Arguments of ``collaborative_consistency`` for so many heads, validated, with its errors."""
    sizes = [heads] if groups is None else validation.partition("groups", groups, heads)
    kl_weights = validation.numbers_per("kl_weight", kl_weight, heads, "head")
    ends = itertools.accumulate(sizes)
    weighs = [any(kl_weights[end - n : end]) for n, end in zip(sizes, ends, strict=True)]
    return ConsistencyOptions(
        ce_weight=validation.numbers_per("ce_weight", ce_weight, heads, "head"),
        kl_weight=kl_weights,
        groups=sizes,
        temperature=validation.numbers_per(
            "temperature", temperature, len(sizes), "group", low=0
        ),
        teacher=[
            validation.choice("teacher", name, TEACHERS)
            for name in validation.per("teacher", teacher, len(sizes), "group")
        ],
        # What weighs nothing teaches nothing: a gradient less to take 0 times.
        detach=[
            validation.boolean("detach_teacher", value) or not weighs[group]
            for group, value in enumerate(
                validation.per("detach_teacher", detach_teacher, len(sizes), "group")
            )
        ],
        divergence=[
            validation.choice("divergence", name, DIVERGENCES)
            for name in validation.per("divergence", divergence, len(sizes), "group")
        ],
        beta=[validation.beta(b) for b in validation.per("beta", beta, len(sizes), "group")],
        label_smoothing=validation.number("label_smoothing", label_smoothing, low=0, high=1),
        ignore_index=ignore_index,
        binary=binary,
        reduction=validation.choice("reduction", reduction, REDUCTIONS),
    )


@_remembered
def mixture_options(
    heads: int,
    *,
    pi: float | Sequence[float],
    normalize: bool,
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
) -> ConsistencyOptions:
    """Those that make of the consistency ``jensen_shannon``, validated, with its errors."""
    weights = validation.mixture("pi", pi, heads)
    z = 1.0
    if validation.boolean("normalize", normalize):
        z = -(1 - weights[0]) * math.log1p(-weights[0])
    return ConsistencyOptions(
        ce_weight=[weights[0] / (z * heads)] * heads,
        kl_weight=[weight / z for weight in weights[1:]],
        groups=[heads],
        temperature=[1.0],
        teacher=[0],
        detach=[True],
        divergence=[MIXTURE],
        beta=[weights[0]],
        label_smoothing=validation.number("label_smoothing", label_smoothing, low=0, high=1),
        ignore_index=ignore_index,
        binary=False,
        reduction=validation.choice("reduction", reduction, REDUCTIONS),
    )


def consistency(
    stacks: list[Tensor],
    target: Tensor | None,
    options: ConsistencyOptions,
    impl: str,
    weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The loss, and the terms (2, H): cross entropies and KL."""
    stacks = _of_one_dtype(stacks)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        # A teacher's under inference_mode, which autograd doesn't keep.
        stacks = [z.clone() if z.is_inference() else z for z in stacks]
    dtype, device = stacks[0].dtype, stacks[0].device
    impl = implementations.choose(impl, "consistency", device, [dtype])
    if impl == "triton":
        stacks = implementations.as_they_lie(stacks)
        rest = [target, weight, sample_weight]
        target, weight, sample_weight = implementations.as_they_lie(rest)
    with without_autocast(device):
        if impl == "reference":
            return _reference(stacks, target, options, weight, sample_weight)
        if options.binary:
            given = independent.as_samples(stacks, target, weight, sample_weight, options)
            loss, terms = CollaborativeConsistency.apply(implementations.consistency(impl), *given)
            return independent.of_samples(loss, terms, stacks[0].shape[-1], options.reduction)
        return CollaborativeConsistency.apply(
            implementations.consistency(impl), options, target, weight, sample_weight, *stacks
        )


def _reference(
    stacks: list[Tensor],
    target: Tensor | None,
    options: ConsistencyOptions,
    weight: Tensor | None,
    sample_weight: Tensor | None,
) -> tuple[Tensor, Tensor]:
    reduction = REDUCTIONS[options.reduction]
    if options.divergence == [MIXTURE]:
        assert target is not None
        loss = reference.jensen_shannon(
            stacks,
            target,
            sample_weight,
            label_weight=sum(options.ce_weight),
            head_weights=options.kl_weight,
            label_smoothing=options.label_smoothing,
            ignore_index=options.ignore_index,
            reduction=reduction,
        )
        return loss, loss
    return reference.consistency(
        stacks,
        target,
        weight,
        sample_weight,
        ce_weight=options.ce_weight,
        kl_weight=options.kl_weight,
        groups=options.groups,
        temperature=options.temperature,
        teacher=[TEACHERS[kind] for kind in options.teacher],
        detach=options.detach,
        label_smoothing=options.label_smoothing,
        ignore_index=options.ignore_index,
        reduction=reduction,
        divergence=[DIVERGENCES[name] for name in options.divergence],
        beta=options.beta,
        activation=ACTIVATIONS[options.binary],
    )


def pairwise(
    xs: list[Tensor], penalty: int, center: bool, eps: float, batched: bool, impl: str
) -> Tensor:
    """The penalty (), the mean over ``xs`` of any sizes and dtypes."""
    learning = [x for x in xs if x.requires_grad]
    if 0 < len(learning) < len(xs) and torch.is_grad_enabled() and impl != "reference":
        # Together with them a gradient of the others would be made as well.
        parts = learning, [x for x in xs if not x.requires_grad]
        return sum(  # type: ignore[return-value]
            pairwise(part, penalty, center, eps, batched, impl) * (len(part) / len(xs))
            for part in parts
        )
    device = xs[0].device
    impl = implementations.choose(impl, "pairwise", device, [x.dtype for x in xs])
    if impl == "triton":
        xs = implementations.as_they_lie(xs)
    options = PairwiseOptions(penalty, center, eps, batched, _precision(device.type))
    with without_autocast(device):
        if impl == "reference":
            return reference.pairwise_penalty(
                xs, penalty=PENALTIES[penalty], center=center, eps=eps, batched=batched
            )
        return PairwisePenalty.apply(implementations.pairwise(impl), options, *xs)


@tracing.constant
def _precision(device: str) -> int:
    # Autocast to bfloat16 says the same of products as "medium": their factors may be rounded.
    if device == "meta":
        return 0
    if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16:
        return PRECISIONS.index("medium")
    return PRECISIONS.index(torch.get_float32_matmul_precision())
