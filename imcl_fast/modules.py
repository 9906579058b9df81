"""The losses as ``nn.Module``s: the functions of ``functional`` with their arguments kept."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from . import calls, dependence, functional, validation


class RepresentationSimilarityLoss(nn.Module):
    r"""``functional.representation_similarity`` with its arguments kept.

    Args and errors are those of the function; ``forward(features, *, mask=None)`` takes a Tensor
    (B, C, \*spatial) or a sequence of them and returns a scalar.
    """

    def __init__(
        self,
        *,
        penalty: str = "square",
        center: bool = False,
        eps: float = 1e-12,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        validation.choice("penalty", penalty, calls.PENALTIES)
        self.penalty, self.impl = penalty, impl
        self.center, self.eps = validation.plain(center), validation.plain(eps)

    def forward(
        self,
        features: Tensor | Sequence[Tensor],
        *,
        mask: Tensor | Sequence[Tensor | None] | None = None,
    ) -> Tensor:
        return functional.representation_similarity(
            features,
            penalty=self.penalty,
            center=self.center,
            eps=self.eps,
            mask=mask,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        return f"penalty={self.penalty!r}, center={self.center}, impl={self.impl!r}"


class KernelSimilarityLoss(nn.Module):
    r"""``functional.kernel_similarity`` with its arguments kept.

    Args and errors are those of the function; ``forward(weights)`` takes a Tensor
    (Cout, Cin, \*k) or (out, in), or a sequence of them, and returns a scalar.
    """

    def __init__(
        self, *, penalty: str = "square", eps: float = 1e-12, impl: str = "auto"
    ) -> None:
        super().__init__()
        validation.choice("penalty", penalty, calls.PENALTIES)
        self.penalty, self.eps, self.impl = penalty, validation.plain(eps), impl

    def forward(self, weights: Tensor | Sequence[Tensor]) -> Tensor:
        return functional.kernel_similarity(
            weights, penalty=self.penalty, eps=self.eps, impl=self.impl
        )

    def extra_repr(self) -> str:
        return f"penalty={self.penalty!r}, impl={self.impl!r}"


class CollaborativeConsistencyLoss(nn.Module):
    """``functional.collaborative_consistency`` with its arguments kept.

    Args and errors are those of the function; ``forward(logits, target, *, sample_weight=None)``
    takes a sequence of (B, K) or one (H, B, K), and class indices (B,), class probabilities
    (B, K), or None, or dense ones. ``weight`` is a buffer, as in ``nn.CrossEntropyLoss``.
    """

    weight: Tensor | None

    def __init__(
        self,
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
        class_dim: int | None = None,
        divergence: str | Sequence[str] = "kl",
        beta: float | Sequence[float] = 0.5,
        activation: str = "softmax",
        impl: str = "auto",
    ) -> None:
        super().__init__()
        validation.choice("reduction", reduction, calls.REDUCTIONS)
        validation.choice("activation", activation, calls.ACTIVATIONS)
        self.temperature = validation.plain(temperature)
        self.ce_weight, self.kl_weight = validation.plain(ce_weight), validation.plain(kl_weight)
        self.detach_teacher = validation.plain(detach_teacher)
        self.groups = validation.plain(groups)
        self.label_smoothing = validation.plain(label_smoothing)
        self.ignore_index = validation.plain(ignore_index)
        self.teacher, self.reduction, self.impl = teacher, reduction, impl
        self.return_terms, self.class_dim = return_terms, class_dim
        self.divergence, self.activation = divergence, activation
        self.beta = validation.plain(beta)
        self.register_buffer("weight", validation.tensor_or_none("weight", weight))

    def forward(
        self,
        logits: Tensor | Sequence[Tensor],
        target: Tensor | None,
        *,
        sample_weight: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        return functional.collaborative_consistency(
            logits,
            target,
            temperature=self.temperature,
            ce_weight=self.ce_weight,
            kl_weight=self.kl_weight,
            teacher=self.teacher,
            detach_teacher=self.detach_teacher,
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            return_terms=self.return_terms,
            groups=self.groups,
            weight=self.weight,
            sample_weight=sample_weight,
            class_dim=self.class_dim,
            divergence=self.divergence,
            beta=self.beta,
            activation=self.activation,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        return (
            f"temperature={self.temperature}, teacher={self.teacher!r}, "
            f"divergence={self.divergence!r}, impl={self.impl!r}"
        )


class JensenShannonLoss(nn.Module):
    """``functional.jensen_shannon`` with its arguments kept.

    Args and errors are those of the function; ``forward(logits, target, *, sample_weight=None)``
    takes a sequence of (B, K) or one (H, B, K), and class indices (B,) or class probabilities
    (B, K), or dense ones.
    """

    def __init__(
        self,
        *,
        pi: float | Sequence[float] = 0.5,
        normalize: bool = True,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        reduction: str = "mean",
        class_dim: int | None = None,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        validation.choice("reduction", reduction, calls.REDUCTIONS)
        self.pi, self.normalize = validation.plain(pi), validation.plain(normalize)
        self.label_smoothing = validation.plain(label_smoothing)
        self.ignore_index = validation.plain(ignore_index)
        self.reduction, self.class_dim, self.impl = reduction, class_dim, impl

    def forward(
        self,
        logits: Tensor | Sequence[Tensor],
        target: Tensor,
        *,
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        return functional.jensen_shannon(
            logits,
            target,
            pi=self.pi,
            normalize=self.normalize,
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            sample_weight=sample_weight,
            class_dim=self.class_dim,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        return f"pi={self.pi}, normalize={self.normalize}, impl={self.impl!r}"


class ViewDependence(nn.Module):
    r"""``functional.view_dependence`` with its arguments kept.

    Args and errors are those of the function; ``forward(views)`` takes V views, each a Tensor
    (B, \*) or a sequence of one per layer, and returns a scalar, to be maximised.
    """

    def __init__(
        self,
        *,
        layer_weight: float | Sequence[float] = 1.0,
        kernel: str = "gaussian",
        bandwidth: float | str = "median",
        estimator: str = "unbiased",
        normalize: bool = False,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        validation.choice("kernel", kernel, dependence.KERNELS)
        validation.choice("estimator", estimator, dependence.ESTIMATORS)
        self.kernel, self.estimator, self.impl = kernel, estimator, impl
        self.layer_weight = validation.plain(layer_weight)
        dependence.check_bandwidth(bandwidth)
        self.bandwidth = bandwidth if isinstance(bandwidth, str) else validation.plain(bandwidth)
        self.normalize = validation.boolean("normalize", normalize)

    def forward(self, views: Sequence[Tensor | Sequence[Tensor]]) -> Tensor:
        return functional.view_dependence(
            views,
            layer_weight=self.layer_weight,
            kernel=self.kernel,
            bandwidth=self.bandwidth,
            estimator=self.estimator,
            normalize=self.normalize,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        return (
            f"kernel={self.kernel!r}, bandwidth={self.bandwidth!r}, estimator={self.estimator!r}, "
            f"normalize={self.normalize}, impl={self.impl!r}"
        )
