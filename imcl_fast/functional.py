"""The fused losses as functions: validate, choose an implementation, call it.

All accept ``impl``: ``"auto"`` (the fastest there is), ``"cpp"`` (CPU),
``"triton"`` and ``"cuda"`` (GPU), ``"torch"`` (the same algebra in plain PyTorch,
any device) and ``"reference"`` (the naive definition, differentiable twice, and what
``"auto"`` is under the transforms of ``torch.func``).
Inputs are never written to. ``"cpp"``, ``"triton"`` and ``"cuda"`` read them as they lie,
whatever their strides, and copy none, but for logits of mixed dtypes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, overload

from torch import Tensor

from . import calls, dense, padding, reference, validation
from .calls import ACTIVATIONS, PENALTIES
from .dependence import dependence, view_dependence

__all__ = [
    "collaborative_consistency",
    "dependence",
    "jensen_shannon",
    "kernel_similarity",
    "representation_similarity",
    "view_dependence",
]


def representation_similarity(
    features: Tensor | Sequence[Tensor],
    *,
    penalty: str = "square",
    center: bool = False,
    eps: float = 1e-12,
    mask: Tensor | Sequence[Tensor | None] | None = None,
    impl: str = "auto",
) -> Tensor:
    r"""Similarity between the channels of intermediate representations (way 3).

    Every sample of a layer gives a matrix whose rows x_i are its C channels and
    whose columns are its pixels. With c_ij the cosine of x_i and x_j the penalty is

    .. math:: \frac{1}{C(C-1)} \sum_{i \ne j} \phi(c_{ij}),

    averaged over the batch and then over the layers.

    Args:
        features: (B, C, \*spatial), or a sequence of such tensors, one per layer,
            whose shapes may differ; C >= 2. float16, bfloat16, float32 or float64,
            of any strides (channels_last is read as it lies).
        penalty: ``"square"`` c^2, ``"abs"`` \|c\| (RePr, arXiv 1811.07275; its
            derivative at 0 is 0), or ``"signed"`` c.
        center: subtract each channel's mean over its pixels first, which turns the
            cosine into Pearson's correlation.
        eps: a channel whose norm is at most ``eps`` is dead: its similarities are 0
            and its gradient is exactly 0. With ``center`` so is a channel whose
            centred norm is at most 1e-5 of its norm. One whose squared norm float32 can't
            hold (1.8e19 and more; float64 for float64) makes the loss NaN. Gradients lose digits
            from 1e18 on, and with an ``eps`` of 0 below norms of 1e-19, where they may overflow.
        mask: (B, \*spatial), of bools or integers, True or not 0 where a position counts; a
            channel then runs over these only, as if the others, the padded tokens of a batch,
            were not there, and gets no gradient at those. One for all layers, or a sequence of
            one, or None, per layer. It costs one pass that copies the features.
        impl: see the module.

    Returns:
        A scalar; float64 if a feature is, float32 otherwise. An empty batch gives 0. Its
        precision is that of ``kernel_similarity``.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: an argument has a wrong shape, device or value.
        RuntimeError: ``impl`` can't run here; the message says why.

    The definition reconstructs intra-model collaborative learning (arXiv 2105.09590).
    """
    xs = validation.tensors("features", features, "(B, C, *spatial)", range(3, 64))
    validation.rows("features", xs, 1, "channels")
    kind = validation.choice("penalty", penalty, PENALTIES)
    center = validation.boolean("center", center)
    eps = validation.number("eps", eps, low=0, high=math.inf)
    if mask is None:
        return calls.pairwise(xs, kind, center, eps, True, impl)
    masks = validation.masks(mask, xs)
    if impl == "reference":
        return reference.masked_penalty(xs, masks, penalty=penalty, center=center, eps=eps)
    xs = [
        x if m is None else padding.neutral(x, padding.broadcast(m, x), center)
        for x, m in zip(xs, masks, strict=True)
    ]
    return calls.pairwise(xs, kind, center, eps, True, impl)


def kernel_similarity(
    weights: Tensor | Sequence[Tensor],
    *,
    penalty: str = "square",
    eps: float = 1e-12,
    impl: str = "auto",
) -> Tensor:
    r"""Similarity between the kernels of each convolution or linear layer (way 4).

    A weight is a matrix whose N rows are its output channels' kernels. With c_ij the
    cosine of kernels i and j the penalty is ``1/(N(N-1)) sum_{i != j} phi(c_ij)``,
    averaged over the layers.

    Args:
        weights: (Cout, Cin/groups, \*k) or (out, in), or a sequence of such tensors
            whose shapes may differ; Cout >= 2. float16, bfloat16, float32 or float64,
            of any strides.
        penalty: ``"square"`` c^2, ``"abs"`` \|c\| (RePr, arXiv 1811.07275; its
            derivative at 0 is 0), or ``"signed"`` c.
        eps: a kernel whose norm is at most ``eps`` is dead: its similarities are 0 and
            its gradient is exactly 0. One whose squared norm float32 can't hold makes the loss
            NaN.
        impl: see the module.

    Returns:
        A scalar; float64 if a weight is, float32 otherwise. The precision of its
        products follows ``torch.get_float32_matmul_precision()`` (compiled code notices a change
        from or to ``"highest"`` only, as PyTorch's compiler does): ``"medium"`` may
        round float32 inputs to bfloat16, and so may autocast to bfloat16; the others do
        not.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: an argument has a wrong shape, device or value.
        RuntimeError: ``impl`` can't run here; the message says why.

    The definition reconstructs intra-model collaborative learning (arXiv 2105.09590).
    """
    xs = validation.tensors("weights", weights, "(Cout, Cin, *k) or (out, in)", range(2, 64))
    validation.rows("weights", xs, 0, "kernels")
    kind = validation.choice("penalty", penalty, PENALTIES)
    eps = validation.number("eps", eps, low=0, high=math.inf)
    return calls.pairwise(xs, kind, False, eps, False, impl)


@overload
def collaborative_consistency(
    logits: Tensor | Sequence[Tensor],
    target: Tensor | None,
    *,
    temperature: float | Sequence[float] = ...,
    ce_weight: float | Sequence[float] = ...,
    kl_weight: float | Sequence[float] = ...,
    teacher: str | Sequence[str] = ...,
    detach_teacher: bool | Sequence[bool] = ...,
    label_smoothing: float = ...,
    ignore_index: int = ...,
    reduction: str = ...,
    return_terms: Literal[False] = ...,
    groups: Sequence[int] | None = ...,
    weight: Tensor | None = ...,
    sample_weight: Tensor | None = ...,
    class_dim: int | None = ...,
    divergence: str | Sequence[str] = ...,
    beta: float | Sequence[float] = ...,
    activation: str = ...,
    impl: str = ...,
) -> Tensor: ...


@overload
def collaborative_consistency(
    logits: Tensor | Sequence[Tensor],
    target: Tensor | None,
    *,
    temperature: float | Sequence[float] = ...,
    ce_weight: float | Sequence[float] = ...,
    kl_weight: float | Sequence[float] = ...,
    teacher: str | Sequence[str] = ...,
    detach_teacher: bool | Sequence[bool] = ...,
    label_smoothing: float = ...,
    ignore_index: int = ...,
    reduction: str = ...,
    return_terms: Literal[True],
    groups: Sequence[int] | None = ...,
    weight: Tensor | None = ...,
    sample_weight: Tensor | None = ...,
    class_dim: int | None = ...,
    divergence: str | Sequence[str] = ...,
    beta: float | Sequence[float] = ...,
    activation: str = ...,
    impl: str = ...,
) -> tuple[Tensor, dict[str, Tensor]]: ...


@overload
def collaborative_consistency(
    logits: Tensor | Sequence[Tensor],
    target: Tensor | None,
    *,
    temperature: float | Sequence[float] = ...,
    ce_weight: float | Sequence[float] = ...,
    kl_weight: float | Sequence[float] = ...,
    teacher: str | Sequence[str] = ...,
    detach_teacher: bool | Sequence[bool] = ...,
    label_smoothing: float = ...,
    ignore_index: int = ...,
    reduction: str = ...,
    return_terms: bool,
    groups: Sequence[int] | None = ...,
    weight: Tensor | None = ...,
    sample_weight: Tensor | None = ...,
    class_dim: int | None = ...,
    divergence: str | Sequence[str] = ...,
    beta: float | Sequence[float] = ...,
    activation: str = ...,
    impl: str = ...,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]: ...


def collaborative_consistency(
    logits: Tensor | Sequence[Tensor],
    target: Tensor | None,
    *,
    temperature: float | Sequence[float] = 2.0,
    ce_weight: float | Sequence[float] = 1.0,
    kl_weight: float | Sequence[float] = 1.0,
    teacher: str | Sequence[str] = "others",
    detach_teacher: bool | Sequence[bool] = True,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    return_terms: bool = False,
    groups: Sequence[int] | None = None,
    weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
    class_dim: int | None = None,
    divergence: str | Sequence[str] = "kl",
    beta: float | Sequence[float] = 0.5,
    activation: str = "softmax",
    impl: str = "auto",
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    r"""Consistency between H classifiers on the same samples (ways 1 and 2).

    With p_h = softmax(z_h/T) and the logits z_h of head h,

    .. math:: \sum_h w^{CE}_h\,CE(z_h, y) + w^{KL}_h\,T^2\,KL(q_h \,\|\, p_h),

    or another ``divergence`` of q_h and p_h in place of KL.

    A logit of -inf, or of the lowest finite number of its dtype, masks its class: p_h is 0
    there. A class masked in every head is as if it were not there, and its gradient is
    exactly 0; a teacher that is a mean rules out what any of its heads masks. Where a
    teacher is 0 the KL adds 0; where only the head is, it is infinite, and so is
    the cross entropy of a masked label (with ``label_smoothing``, of any masked class), as
    in PyTorch; gradients stay finite there for detached teachers. ``"reverse_kl"`` is infinite
    where only the teacher is 0, and has no finite gradient for that head; ``"jsd"`` is finite
    everywhere. A part whose weight is 0
    adds 0 to the loss, whatever its term, and so does a class of a label whose probability or
    weight is 0. A sample or teacher without a class left gives
    NaN, and any other non-finite logit a non-finite loss.

    Args:
        logits: a sequence of (B, K), or one (H, B, K); entries of a sequence may also
            be (h, B, K) stacks of heads. float16, bfloat16, float32 or float64;
            mixed dtypes are promoted. Dense outputs may be (B, K, \*spatial), as PyTorch
            has them, or (B, \*tokens, K), and either with heads in front; every pixel, or
            token, is a sample then, and they are read as they lie. Which have heads in front the
            target tells; without one a single Tensor has, and of a sequence the entries of fewest
            dimensions have none.
        target: class indices (B,) of an integer dtype, or class probabilities (B, K) of a
            floating one and of any sum (mixup, another network's softmax), as
            ``torch.nn.functional.cross_entropy`` takes them; None leaves out the cross entropy.
            No gradient flows into it. Of dense outputs (B, \*spatial) or (B, \*tokens), or
            probabilities shaped like them.
        temperature: T > 0. The value of T^2 KL, far less its gradient, loses digits as T grows,
            for the rounding of KL is multiplied by T^2: take float64 from hundreds on.
        ce_weight, kl_weight: one number, or one per head.
        teacher: q_h is ``"others"`` softmax(mean_{j != h} z_j/T) (Song & Chai,
            arXiv 1805.11761), ``"mean"`` softmax(mean_j z_j/T), ``"final"`` the last
            head's p, which then gets no KL itself (arXiv 1905.08094), or
            ``"pairwise"``: the mean of KL(p_j || p_h) over j != h (arXiv 1906.00675).
        detach_teacher: whether no gradient flows into the teacher.
        label_smoothing: in [0, 1), of the cross entropy.
        ignore_index: samples with this target count for nothing at all; negative where the
            target is probabilities, as it then says nothing.
        reduction: ``"mean"`` over the samples that count, ``"sum"``, or ``"none"``: (B,), or
            (B, \*spatial).
        return_terms: also return the detached, unweighted terms.
        groups: heads that teach one another, as sizes of consecutive groups that sum
            to H; temperature, teacher, detach_teacher, divergence and beta may then be given
            one per group. All groups still take one pass. None makes one group of all heads;
            a group of one head has no KL.
        weight: (K,), of the classes in the cross entropy. As in PyTorch, its mean over
            class indices divides by the sum of the weights of their classes.
        sample_weight: (B,), or shaped like indices, multiplies all of a sample's loss.
            ``"mean"`` divides by the weights' sum: a sample of weight 2 is as good as two of
            it, and one of weight 0 counts for nothing at all. For another mean, divide the
            ``"sum"``.
        class_dim: where dense outputs have their classes, 1 or -1, if the target's shape
            doesn't tell: there is none, they are probabilities, or as many classes as tokens.
        divergence: ``"kl"`` KL(q_h || p_h), ``"reverse_kl"`` KL(p_h || q_h), or ``"jsd"``, the
            Jensen-Shannon divergence of GKD (arXiv 2306.13649), beta KL(q_h || m) +
            (1 - beta) KL(p_h || m) with m = beta q_h + (1 - beta) p_h. The factor T^2 is that of
            each. With ``"pairwise"`` teachers ``"kl"`` takes O(H) steps, the others O(H^2).
        beta: of ``"jsd"``, in (0, 1): the teacher's part in m. Towards 0 the divergence over
            beta is ``"kl"``, towards 1 over 1 - beta it is ``"reverse_kl"``.
        activation: ``"softmax"``, one of K classes; or ``"sigmoid"``, K labels that each hold or
            not: p_h = sigmoid(z_h/T), and the teachers likewise of the same means. The cross
            entropy is then that of ``binary_cross_entropy_with_logits``, and the divergence that
            between (p, 1 - p) and (q, 1 - q), summed over the labels and averaged over samples:
            of one label it is ``"softmax"`` with the logits (z, 0); torch's mean over labels as
            well is 1/K of it. The target is probabilities that they hold, (B, K);
            ``label_smoothing`` draws them to 1/2, ``weight`` multiplies each label's cross
            entropy, and a masked label is one that does not hold, p_h = 0.
        impl: see the module.

    Returns:
        The loss, float64 if a head is, float32 otherwise; with ``return_terms`` also
        ``{"cross_entropy": (H,), "kl": (H,)}``, T^2 included, summed for reduction
        ``"sum"`` and averaged otherwise. Where no sample counts, or the weights of those
        that do sum to 0, a mean is 0.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: an argument has a wrong shape, device or value. A target out of
            range raises on the CPU only; elsewhere, and under ``torch.compile``, it
            makes the loss NaN.
        RuntimeError: ``impl`` can't run here; the message says why.

    The definition reconstructs intra-model collaborative learning (arXiv 2105.09590).
    """
    ignore_index = validation.integer("ignore_index", ignore_index)
    sigmoid = validation.choice("activation", activation, ACTIVATIONS) == 1
    stacks, target, sample_weight, heads = _checked(
        logits, target, sample_weight, ignore_index, class_dim, sigmoid
    )
    weight = validation.weights("weight", weight, stacks[0].shape[-1:], stacks)
    options = calls.consistency_options(
        heads,
        temperature=temperature,
        ce_weight=ce_weight,
        kl_weight=kl_weight,
        teacher=teacher,
        detach_teacher=detach_teacher,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        reduction=reduction,
        groups=groups,
        divergence=divergence,
        beta=beta,
        binary=sigmoid,
    )
    loss, terms = calls.consistency(stacks, target, options, impl, weight, sample_weight)
    if not return_terms:
        return loss
    return loss, {"cross_entropy": terms[0], "kl": terms[1]}


def jensen_shannon(
    logits: Tensor | Sequence[Tensor],
    target: Tensor,
    *,
    pi: float | Sequence[float] = 0.5,
    normalize: bool = True,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    sample_weight: Tensor | None = None,
    class_dim: int | None = None,
    impl: str = "auto",
) -> Tensor:
    r"""Generalised Jensen-Shannon divergence between a label and H heads: a task loss that is
    robust to wrong labels (Englesson & Azizpour, arXiv 2105.04522).

    With p_h = softmax(z_h), y the label and H(.) the entropy,

    .. math:: \frac{1}{Z}\Big(H(m) - \pi_0 H(y) - \sum_h \pi_h H(p_h)\Big),
        \qquad m = \pi_0 y + \sum_h \pi_h p_h.

    It stands in place of the cross entropy and of the consistency: every head learns from the
    mixture of all and the label, so there is no teacher, no temperature and nothing detached.
    Of one head it is the cross entropy for :math:`\pi_0 \to 0`, and for :math:`\pi_0 \to 1`
    :math:`1 - p_y`, half of the absolute error and the most robust. Masked classes are as in
    ``collaborative_consistency``, but it is finite whatever is masked, the label included.

    Args:
        logits: the heads', or those of several views of a sample, as in
            ``collaborative_consistency``.
        target: class indices (B,), or class probabilities (B, K) that sum to 1, dense ones
            likewise. No gradient flows into it.
        pi: the weight of the label, in (0, 1), the heads sharing the rest equally; or 1 + H
            positive weights, that of the label first, which sum to 1.
        normalize: divide by Z = -(1 - pi_0) log(1 - pi_0), as the paper does; else Z is 1.
        label_smoothing: in [0, 1), of the target.
        ignore_index, reduction, sample_weight, class_dim: as in ``collaborative_consistency``.
        impl: see the module.

    Returns:
        The loss, float64 if a head is, float32 otherwise.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: an argument has a wrong shape, device or value. A target out of
            range raises on the CPU only; elsewhere, and under ``torch.compile``, it
            makes the loss NaN.
        RuntimeError: ``impl`` can't run here; the message says why.
    """
    if target is None:
        raise TypeError("target: expected a Tensor, got NoneType; the loss is one to a label")
    ignore_index = validation.integer("ignore_index", ignore_index)
    stacks, labels, sample_weight, heads = _checked(
        logits, target, sample_weight, ignore_index, class_dim, False
    )
    options = calls.mixture_options(
        heads,
        pi=pi,
        normalize=normalize,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        reduction=reduction,
    )
    return calls.consistency(stacks, labels, options, impl, None, sample_weight)[0]


def _checked(
    logits: Tensor | Sequence[Tensor],
    target: Tensor | None,
    sample_weight: Tensor | None,
    ignore_index: int,
    class_dim: int | None,
    sigmoid: bool,
) -> tuple[list[Tensor], Tensor | None, Tensor | None, int]:
    """Logits with their classes last, target, sample weights, the number of heads."""
    stacks = validation.tensors("logits", logits, dense.RANKS, range(2, 8))
    target = validation.tensor_or_none("target", target)
    stacks, target = dense.classes_last(stacks, target, class_dim, isinstance(logits, Tensor))
    samples, classes = dense.samples(stacks[0]), stacks[0].shape[-1]
    if classes < 1:
        raise ValueError(f"logits: expected at least 1 class, got shape {tuple(stacks[0].shape)}")
    heads = sum(stack.shape[0] if stack.dim() > 2 else 1 for stack in stacks)
    if heads < 1:
        raise ValueError("logits: expected at least 1 head, got none")
    target = validation.target(target, stacks, ignore_index, sigmoid)
    if isinstance(sample_weight, Tensor) and sample_weight.shape == samples[:1]:
        sample_weight = sample_weight.view(-1, *[1] * (len(samples) - 1)).expand(samples)
    sample_weight = validation.weights("sample_weight", sample_weight, samples, stacks)
    return stacks, target, sample_weight, heads
