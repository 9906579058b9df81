"""Song & Chai's multi-head networks: classifiers that share their low layers.

*Collaborative Learning for Deep Neural Networks* (NeurIPS 2018, arXiv 1805.11761) trains
several heads on shared intermediate-level representations (ILR) and deploys one of them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.utils import parametrize

from . import functional, validation
from .implementations import IMPLEMENTATIONS

RESNET = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4", "avgpool")
VGG = ("features", "avgpool")
FLATTEN = "flatten"  # stands for torch.flatten(x, 1), which is no module of either network


class MultiHeadOutput(NamedTuple):
    """What a training step of ``MultiHead`` returns.

    Attributes:
        loss: the whole objective, a scalar to call ``backward()`` on.
        logits: (B, K), those of the network to deploy (head 0).
        terms: detached scalars ``cross_entropy`` of head 0, ``heads_cross_entropy``, its
            mean over the heads, and ``consistency``, the heads' mean KL(q_h || p_h) at
            temperature T; ``loss`` is ``H (beta heads_cross_entropy + (1-beta) consistency)``.
    """

    loss: Tensor
    logits: Tensor
    terms: dict[str, Tensor]


class MultiHead(nn.Module):
    r"""Multi-head training of a ResNet or VGG (Song & Chai, arXiv 1805.11761).

    The layers above a split exist once per branch. Branch 0 is made of the given network's
    own modules, the others are copies with fresh initial values, of which none is frozen, so
    that ``model`` is the plain network, to be deployed as it is. With the heads' logits z_h,

    .. math:: L = \sum_h \beta\,CE(z_h, y) + (1-\beta)\,CE(q_h, softmax(z_h/T)), \quad
        q_h = softmax(\overline{z_{j \ne h}}/T),

    where no gradient flows into q_h, and at each split the gradient is divided by the number
    of branches (``GradientRescaling``). The cross entropy of q_h is KL(q_h || p_h) plus the
    entropy of q_h, which has no gradient and is left out of the loss. Our consistency weights
    T^2 KL, so its ``kl_weight`` is (1-beta)/T^2.

    Args:
        model: of torchvision's ResNet (``conv1`` to ``layer4``, ``avgpool``, ``fc``) or VGG
            (``features``, ``avgpool``, ``classifier``) shape, and their forward. It maps x
            to logits (B, K). Forward hooks on a Sequential that a split divides don't run
            in training steps.
        heads: 2 ("simple ILR", one split) or 4 ("hierarchical ILR", a binary tree of two).
        splits: for each split the path of the first module of each branch, from input to
            output: a module in RESNET or VGG above, or a child of one that is a Sequential.
            None takes ``layer3``, for 4 heads also ``layer4``, and of a VGG what follows the
            third last pooling of ``features``, and the second last. These are our choice.
        beta: in [0, 1], weight of the labels.
        temperature: T > 0.
        label_smoothing: in [0, 1), of the cross entropy with the labels.
        impl: see ``functional``.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
    """

    def __init__(
        self,
        model: nn.Module,
        heads: int = 2,
        splits: Sequence[str] | None = None,
        beta: float = 0.5,
        temperature: float = 2.0,
        label_smoothing: float = 0.0,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        validation.module("model", model)
        if not validation.is_integer(heads) or heads not in (2, 4):
            raise ValueError(f"heads: expected 2 or 4, got {heads!r}")
        heads = int(heads)
        self.beta = validation.number("beta", beta, low=0, high=math.inf)
        if self.beta > 1:
            raise ValueError(f"beta: expected a number in [0, 1], got {beta}")
        self.temperature = validation.number(
            "temperature", temperature, low=0, high=math.inf, open_low=True
        )
        self.label_smoothing = validation.number("label_smoothing", label_smoothing, low=0, high=1)
        validation.choice("impl", impl, IMPLEMENTATIONS)
        self.impl = impl

        names = _network_stages(model)
        chosen = _default_splits(model, heads) if splits is None else splits
        stages = _divided(model, names, chosen)
        cuts = _cuts(stages, chosen, heads)
        self.model = model
        self.splits = list(chosen)
        self.flatten = nn.Flatten()
        # Of branch 0 at every level, from the trunk on: paths, for the modules are the model's.
        self._stages = [
            stages[begin:end]
            for begin, end in zip([0, *cuts], [*cuts, len(stages)], strict=True)
        ]
        self.copies = nn.ModuleList(
            nn.ModuleList(self._fresh_branch(level) for _ in range(2**level - 1))
            for level in range(1, len(self._stages))
        )

    @property
    def heads(self) -> int:
        """Number of classifiers, that of the network itself included."""
        return 2 ** len(self.splits)

    def forward(self, x: Tensor, target: Tensor | None = None) -> Tensor | MultiHeadOutput:
        """The network's logits (B, K); with ``target``, class indices (B,) or probabilities
        (B, K), a step's output.

        Raises:
            ValueError, TypeError: ``target`` is neither.
        """
        if target is None:
            return self.model(x)
        level = [_run(self._own_branch(0), x)]
        for depth in range(1, len(self._stages)):
            branches = [self._own_branch(depth), *cast(nn.ModuleList, self.copies[depth - 1])]
            inputs = [GradientRescaling.apply(h, 2) for h in level]
            # What both branches get, one that works in place would overwrite.
            shared = not any(getattr(branch[0], "inplace", False) for branch in branches)
            level = [
                _run(branch, inputs[b // 2] if shared else inputs[b // 2].clone())
                for b, branch in enumerate(branches)
            ]
        result = functional.collaborative_consistency(
            level,
            target,
            temperature=self.temperature,
            ce_weight=self.beta,
            kl_weight=(1 - self.beta) / self.temperature**2,
            teacher="others",
            label_smoothing=self.label_smoothing,
            return_terms=True,
            impl=self.impl,
        )
        assert isinstance(result, tuple)  # because of return_terms
        loss, terms = result
        return MultiHeadOutput(
            loss,
            level[0],
            {
                "cross_entropy": terms["cross_entropy"][0],
                "heads_cross_entropy": terms["cross_entropy"].mean(),
                "consistency": terms["kl"].mean() / self.temperature**2,
            },
        )

    def extra_repr(self) -> str:
        return (
            f"heads={self.heads}, splits={self.splits}, beta={self.beta:g}, "
            f"temperature={self.temperature:g}, impl={self.impl!r}"
        )

    def _own_branch(self, level: int) -> list[nn.Module]:
        return [
            self.flatten if name == FLATTEN else self.model.get_submodule(name)
            for name in self._stages[level]
        ]

    def _fresh_branch(self, level: int) -> nn.ModuleList:
        own = nn.ModuleList(self._own_branch(level))
        for module in own.modules():
            _check_fresh(module)
        branch = copy.deepcopy(own)
        _initialise(branch, normal_linear=not hasattr(self.model, "layer1"))
        # What the network has frozen is as it should be; fresh values have yet to learn.
        return branch.train(self.model.training).requires_grad_()


class GradientRescaling(Function):
    """apply(x, branches) -> x, whose gradient is divided by ``branches`` (arXiv 1805.11761).

    Placed before a split: the branches' gradients add up, and their mean flows on, so that
    the layers below learn as fast as with one head.
    """

    @staticmethod
    def forward(ctx, x: Tensor, branches: int) -> Tensor:
        ctx.branches = branches
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad / ctx.branches, None


def _run(modules: Sequence[nn.Module] | nn.ModuleList, x: Tensor) -> Tensor:
    for module in modules:
        x = module(x)
    return x


def _network_stages(model: nn.Module) -> list[str]:
    """The modules that the network's forward calls one after another."""
    children = dict(model.named_children())
    for names, classifier in ((RESNET, "fc"), (VGG, "classifier")):
        if set(children) == {*names, classifier}:
            return [*names, FLATTEN, classifier]
    raise ValueError(
        "model: expected a network with the modules of torchvision's ResNet (conv1, bn1, relu, "
        "maxpool, layer1 to layer4, avgpool, fc) or VGG (features, avgpool, classifier), got "
        f"{type(model).__name__} with {list(children)}"
    )


def _default_splits(model: nn.Module, heads: int) -> list[str]:
    if hasattr(model, "layer1"):
        places = ["layer3", "layer4"]
    else:
        features = list(model.get_submodule("features").named_children())
        pools = [i for i, (_, child) in enumerate(features) if isinstance(child, nn.MaxPool2d)]
        if len(pools) < 3:
            raise ValueError(
                "splits: expected 3 or more MaxPool2d in features to choose from, found "
                f"{len(pools)}; name the modules"
            )
        places = [f"features.{features[i + 1][0]}" for i in pools[-3:-1]]
    return places[: 1 if heads == 2 else 2]


def _divided(model: nn.Module, names: list[str], splits: Sequence[str]) -> list[str]:
    """``names``, with the Sequentials that a split divides replaced by their children."""
    if isinstance(splits, str) or not isinstance(splits, Sequence):
        raise TypeError(
            f"splits: expected a sequence of module paths or None, got {type(splits).__name__}"
        )
    stages: list[str] = []
    for name in names:
        inside = any(str(split).startswith(f"{name}.") for split in splits)
        if inside and isinstance(model.get_submodule(name), nn.Sequential):
            children = model.get_submodule(name).named_children()
            stages += [f"{name}.{child}" for child, _ in children]
        else:
            stages.append(name)
    return stages


def _cuts(stages: list[str], splits: Sequence[str], heads: int) -> list[int]:
    """Positions of the splits among the stages, each with something below it."""
    expected = 1 if heads == 2 else 2
    if len(splits) != expected:
        raise ValueError(f"splits: expected {expected} for {heads} heads, got {list(splits)}")
    cuts = []
    for split in splits:
        # A Sequential that another split divides stands for its first child.
        found = [i for i, name in enumerate(stages) if f"{name}.".startswith(f"{split}.")]
        if not found or found[0] == 0 or split == FLATTEN:
            raise ValueError(
                f"splits: expected modules that the network calls after the first, one of "
                f"{[name for name in stages[1:] if name != FLATTEN]}, got {split!r}"
            )
        cuts.append(found[0])
    if cuts != sorted(set(cuts)):
        raise ValueError(f"splits: expected an order from input to output, got {list(splits)}")
    return cuts


def _initialise(branch: nn.Module, *, normal_linear: bool) -> None:
    """Fresh initial values as torchvision draws them: He's for convolutions (1502.01852)."""
    module: Any
    for module in branch.modules():
        if callable(reset := getattr(module, "reset_parameters", None)):
            reset()
        convolution = isinstance(module, nn.Conv2d)
        linear = isinstance(module, nn.Linear)
        computed = bool(_computed(module))
        weight: Any = getattr(module, "weight", None)
        weight = torch.empty_like(weight) if computed else weight
        if convolution:
            nn.init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu")
        elif linear and normal_linear:
            nn.init.normal_(weight, 0, 0.01)
        elif computed:
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))  # as reset_parameters does
        if computed:
            module.weight = weight
        if (convolution or (linear and normal_linear)) and module.bias is not None:
            nn.init.zeros_(module.bias)


def _check_fresh(module: nn.Module) -> None:
    """Raise a ValueError if ``_initialise`` can't give a module fresh values."""
    computed = _computed(module)
    by_parametrization = parametrize.is_parametrized(module, "weight")
    takes_values = isinstance(module, (nn.Conv2d, nn.Linear)) and by_parametrization
    if computed and not (takes_values and computed == ["weight"]):
        raise ValueError(
            f"model: {' and '.join(computed)} of a {type(module).__name__} is computed from other "
            "tensors, as pruning and the older weight_norm and spectral_norm do, so a head's own "
            "branch can't begin with fresh values; remove that, or use "
            "torch.nn.utils.parametrizations"
        )


def _computed(module: nn.Module) -> list[str]:
    """Which of its weight and bias are made of other parameters, by a parametrization or by the
    hooks of pruning, weight_norm and spectral_norm."""
    return [
        name
        for name in ("weight", "bias")
        if parametrize.is_parametrized(module, name)
        or any(f"{name}_{made_of}" in module._parameters for made_of in ("orig", "g", "v"))
    ]
