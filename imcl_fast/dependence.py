"""Dependence between representations (HSIC, CKA) as functions: validate, choose, call.

The Grams of the samples come from a kernel, one call for all views and layers; what becomes of
them is small and plain PyTorch (``algebra.dependence``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import implementations, reference, validation
from .algebra import dependence as algebra
from .autograd import SampleGrams, without_autocast
from .dtypes import accumulation
from .operators import Gram

KERNELS = ("linear", "gaussian")
ESTIMATORS = ("biased", "unbiased")


def dependence(
    x: Tensor,
    y: Tensor,
    *,
    kernel: str = "gaussian",
    bandwidth: float | str = "median",
    estimator: str = "unbiased",
    normalize: bool = False,
    impl: str = "auto",
) -> Tensor:
    r"""Dependence between two representations of the same samples: HSIC, or CKA.

    With K and L the kernels of the samples (B, B), the Hilbert-Schmidt independence criterion is,
    biased (Gretton et al. 2005), :math:`tr(K H L H)/(B-1)^2` with :math:`H = I - 1 1^T/B`, or
    unbiased (Song et al. 2012), diagonals set to 0,

    .. math:: \frac{1}{B(B-3)} \Big[tr(K L) + \frac{1^T K 1\; 1^T L 1}{(B-1)(B-2)}
        - \frac{2}{B-2} 1^T K L 1\Big].

    It is 0 where the representations are independent, and larger the better one can be foretold
    from the other.

    Args:
        x, y: (B, \*), the same B samples, of any two shapes; float16, bfloat16, float32 or
            float64, of any strides.
        kernel: ``"gaussian"`` :math:`\exp(-|x_i - x_j|^2/(2 \sigma^2 D))` for D features, or
            ``"linear"`` :math:`\langle x_i, x_j \rangle`.
        bandwidth: of the Gaussian kernel: sigma, from 1e-12 to 1e12, or ``"median"``:
            :math:`\sigma^2 D` is the median of :math:`|x_i - x_j|^2` over all pairs, a constant to
            the gradient. Where half of the pairs or more are of identical samples that (lower)
            median is 0; sigma is 1 then. Identical are those that no rounded sum can tell apart,
            some 1e-3 of their norms in float32.
        estimator: ``"unbiased"`` or ``"biased"``.
        normalize: centred kernel alignment (CKA, arXiv 1905.00414):
            :math:`HSIC(K, L)/\sqrt{HSIC(K, K)\,HSIC(L, L)}`; 0, with a gradient of 0, where one of
            these two is no more than rounding leaves of 0: of constant features, and to the
            unbiased estimator also where all samples but one are alike, or all pairs equally
            unlike.
        impl: see the module. That ``"auto"`` is ``"triton"`` on a GPU, and not ``"torch"``, follows
            a prediction, which no GPU has measured: of 64 samples ``"torch"`` moves 4 (float32) to
            11 (bfloat16) times the bytes forward and 2 to 7 times backward, in several launches
            for each view of each layer instead of one for all. ``"cuda"`` shares the work out as
            ``"triton"`` does; that it isn't the quicker one is a guess.

    Returns:
        A scalar; float64 if x or y is, float32 otherwise. To be maximised: subtract it from a
        loss. An empty batch gives 0, a NaN in x or y NaN.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: an argument has a wrong shape, device or value; fewer than 4 samples for the
            unbiased estimator, or than 2 for the biased one.
        RuntimeError: ``impl`` can't run here; the message says why.

    Source: quality-agnostic training (QAD, arXiv 2309.05911) maximises it between images of
    several qualities; its estimator is not public, this choice is ours.
    """
    for name, value in (("x", x), ("y", y)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(value).__name__}")
    return _dependence(["x", "y"], [x, y], 2, [1.0], kernel, bandwidth, estimator, normalize, impl)


def view_dependence(
    views: Sequence[Tensor | Sequence[Tensor]],
    *,
    layer_weight: float | Sequence[float] = 1.0,
    kernel: str = "gaussian",
    bandwidth: float | str = "median",
    estimator: str = "unbiased",
    normalize: bool = False,
    impl: str = "auto",
) -> Tensor:
    r"""Dependence between several views of the same samples, layer by layer.

    .. math:: \sum_l w_l \frac{2}{V(V-1)} \sum_{v < w} HSIC(x_{v,l}, x_{w,l})

    All V L representations are read once, in one call.

    Args:
        views: V >= 2 views, each a Tensor (B, \*), or a sequence of as many Tensors, one per layer,
            whose shapes may differ.
        layer_weight: one number, or one per layer.
        kernel, bandwidth, estimator, normalize, impl: see ``dependence``.

    Returns, raises: as ``dependence``.

    Source: the collaboration of QAD (arXiv 2309.05911), which sums over the pairs.
    """
    if isinstance(views, Tensor) or not isinstance(views, Sequence):
        raise TypeError(
            f"views: expected a sequence of Tensors, or of sequences of them, got "
            f"{type(views).__name__}"
        )
    if len(views) < 2:
        raise ValueError(f"views: expected at least 2 views, got {len(views)}")
    each = [[view] if isinstance(view, Tensor) else list(view) for view in views]
    layers = len(each[0])
    for v, view in enumerate(each):
        if len(view) != layers or not layers:
            raise ValueError(
                f"views[{v}]: expected as many layers as views[0], at least 1, got {len(view)} "
                f"and {layers}"
            )
    weights = validation.numbers_per("layer_weight", layer_weight, layers, "layer")
    names = [f"views[{v}][{i}]" for i in range(layers) for v in range(len(each))]
    xs = [view[i] for i in range(layers) for view in each]
    return _dependence(
        names, xs, len(each), weights, kernel, bandwidth, estimator, normalize, impl
    )


def _dependence(
    names: Sequence[str],
    xs: Sequence[Tensor],
    views: int,
    layer_weight: list[float],
    kernel: str,
    bandwidth: float | str,
    estimator: str,
    normalize: bool,
    impl: str,
) -> Tensor:
    """Of layers times views tensors, the views of a layer side by side."""
    kind = validation.choice("kernel", kernel, KERNELS)
    how = validation.choice("estimator", estimator, ESTIMATORS)
    normalize = validation.boolean("normalize", normalize)
    width = check_bandwidth(bandwidth)
    validation.samples(names, xs, 4 if how == algebra.UNBIASED else 2)
    device = xs[0].device
    impl = implementations.choose(impl, "dependence", device, [x.dtype for x in xs])
    if len({x.dtype == torch.float64 for x in xs}) > 1:
        xs = [x.double() for x in xs]
    if impl == "triton":
        xs = implementations.as_they_lie(xs)
    with without_autocast(device):
        if xs[0].shape[0] == 0:
            return torch.stack([x.sum() for x in xs]).sum().to(accumulation(xs[0].dtype))
        if impl == "reference":
            return reference.dependence(
                [xs[v::views] for v in range(views)],
                kernel=kernel,
                bandwidth=width,
                estimator=estimator,
                normalize=normalize,
                layer_weight=layer_weight,
            )
        scale = [1.0] * len(xs)
        if kind == algebra.GAUSSIAN and width is not None:
            scale = [1 / (width**2 * max(x[0].numel(), 1)) for x in xs]
        grams = _grams(implementations.dependence(impl), scale, xs)
        kernels = algebra.kernels(
            grams.unflatten(0, (-1, views)), kind, width is None,
            algebra.rounding(xs, products=impl == "torch"),
        )  # fmt: skip
        if normalize:
            kernels = algebra.scaled(kernels, how)
        values = algebra.hsic(kernels.values, how)  # [L, V, V]
        if normalize:
            values = algebra.cka(values, algebra.least_hsic(kernels, how))
        pairs = views * (views - 1) / 2
        # Not the sum of all less the diagonal, beside which what is looked for can be small.
        of_layers = values.triu(1).sum((-2, -1))
        total = sum(w / pairs * each for w, each in zip(layer_weight, of_layers, strict=True))
        return total.to(accumulation(xs[0].dtype))


def _grams(implementation: Gram, scale: list[float], xs: Sequence[Tensor]) -> Tensor:
    """Grams (n, B, B) of all; those that learn in a call of their own, or a gradient of the others,
    as of a teacher's features, would be made as well."""
    learning = [i for i, x in enumerate(xs) if x.requires_grad]
    others = [i for i, x in enumerate(xs) if not x.requires_grad]
    if not (learning and others and torch.is_grad_enabled()):
        return SampleGrams.apply(implementation, scale, *xs)
    grams: dict[int, Tensor] = {}
    for part in (learning, others):
        found = SampleGrams.apply(implementation, [scale[i] for i in part], *[xs[i] for i in part])
        grams.update(zip(part, found.unbind(), strict=True))
    return torch.stack([grams[i] for i in range(len(xs))])


def check_bandwidth(value: float | str) -> float | None:
    """Sigma, or None for the median distance."""
    if isinstance(value, str):
        if value != "median":
            raise ValueError(
                f"bandwidth: expected a number from 1e-12 to 1e12 or 'median', got {value!r}"
            )
        return None
    return validation.number("bandwidth", value, low=1e-12, high=1e12)
