"""Which weights take part in kernel similarity, and how their rows are grouped."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from .kernel_weights import locate
from .layers import unknown

# Names of linear layers that make queries, keys and values at once, each a third of the rows. Not
# "query_key_value": GPT-NeoX and BLOOM have those three of each head side by side.
QUERIES_KEYS_VALUES = ("qkv", "Wqkv", "qkv_proj", "in_proj_weight")
# Of a recurrent layer's weights, but for an LSTM's projection.
GATES = {nn.LSTM: 4, nn.LSTMCell: 4, nn.GRU: 3, nn.GRUCell: 3}
GATED = ("weight_ih", "weight_hh")


def find_kernels(model: nn.Module, leave_out: Collection[str] = ()) -> list[str]:
    """The convolutions with kernels larger than one pixel, at least two.

    Where all such convolutions hold less than half of the network's weights, as in transformers
    and networks of bottlenecks, the 1x1 convolutions and the linear layers, the input projections
    of ``nn.MultiheadAttention`` among them, take part too.

    The mean squared cosine of N vectors in D dimensions is (N - D) / (D (N - 1)) or more (Welch),
    that of random ones 1/D. From N = 2D on more than half of the latter must stay, as in depthwise
    convolutions and layers that widen. These are left out, but not a stem of larger kernels: with
    it all four ways were better on seeds kept to tell (docs/accuracy.md). Of a layer with several
    roles (see ``roles``) N is the number of rows of one.

    Args:
        leave_out: paths of layers whose rows stand for something, as a classifier's.
    """
    weights = dict(_weights(model))
    larger = {name for name, shape in weights.items() if math.prod(shape[2:]) > 1}
    everything = sum(p.numel() for p in model.parameters())
    among = weights.keys() - set(leave_out)
    if 2 * sum(math.prod(weights[name]) for name in larger) >= everything:
        among &= larger
    grouped = {
        name
        for name, module in model.named_modules()
        if isinstance(module, _ConvNd) and module.groups > 1
    }
    stems = larger - grouped  # those of so few channels that 2D <= N
    return [
        name
        for name, shape in weights.items()
        if name in among
        and (rows := shape[0] // roles(model, name)) > 1
        and (rows < 2 * math.prod(shape[1:]) or name in stems)
    ]


def _weights(model: nn.Module) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Path and shape of the weights of convolutions and linear layers.

    None is read: of one that is computed whenever it is read, that can change it.
    """
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None and not weight.is_floating_point():
            continue  # the codes of a quantized layer
        if isinstance(module, _ConvNd):
            if not isinstance(module, _ConvTransposeNd):  # its rows are input channels
                channels = module.in_channels // module.groups
                yield name, (module.out_channels, channels, *module.kernel_size)
        elif isinstance(module, nn.Linear):
            yield name, (module.out_features, module.in_features)
        elif isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            path = f"{name}.in_proj_weight".removeprefix(".")
            yield path, (3 * module.embed_dim, module.embed_dim)


def check_kernels(model: nn.Module, kernels: Sequence[str]) -> list[str]:
    """``kernels``, if they are paths of weights (N, ...) of N >= 2 rows, or of modules with one.

    Raises:
        TypeError, ValueError: they are not.
    """
    if isinstance(kernels, str) or not isinstance(kernels, Sequence):
        raise TypeError(
            f"kernels: expected a sequence of module paths or None, got {type(kernels).__name__}"
        )
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters())
    for name in kernels:
        weight = _weight(model, name)
        if name not in modules and weight is None:
            raise unknown("kernels", name, [*modules, *parameters])
        if weight is None or weight.dim() < 2 or len(weight) < 2:
            found = f" is {type(modules[name]).__name__}" if name in modules else ""
            shape = f" has shape {tuple(weight.shape)}" if isinstance(weight, Tensor) else ""
            raise ValueError(
                "kernels: expected modules with a weight of at least 2 rows, (Cout, Cin, *k) or "
                f"(out, in), or the path of such a weight; {name!r}{found or shape}"
            )
        if not weight.is_floating_point():
            raise ValueError(
                f"kernels: expected floating-point weights, that of {name!r} is {weight.dtype}"
            )
        if len(weight) < 2 * (shares := roles(model, name)):
            raise ValueError(
                f"kernels: expected weights of at least 2 rows for each of the {shares} roles that "
                f"they have in {name!r}, its weight has shape {tuple(weight.shape)}"
            )
    return list(kernels)


def _weight(model: nn.Module, path: object) -> Tensor | None:
    """The weight of that path or of the module of that path, also one made of parameters, as
    pruning does; None: there is none."""
    if not isinstance(path, str):
        return None
    try:
        module, attribute = locate(model, path)
        found = getattr(module, attribute)
    except AttributeError:
        return None
    learns = isinstance(found, Tensor) and attribute not in module._buffers
    return found if learns else None


def roles(model: nn.Module, path: str) -> int:
    """How many roles the rows of a weight have, in equal shares one after another: queries, keys
    and values, or the gates of a recurrent layer. Rows are compared within their role."""
    module, attribute = locate(model, path)
    if not isinstance(module, nn.Linear):
        if attribute in QUERIES_KEYS_VALUES:
            return 3
        kinds = [n for kind, n in GATES.items() if isinstance(module, kind)]
        return kinds[0] if kinds and attribute.startswith(GATED) else 1
    # With fewer keys than queries their shares aren't equal.
    thirds = module.out_features == 3 * module.in_features
    return 3 if thirds and path.rpartition(".")[2] in QUERIES_KEYS_VALUES else 1
