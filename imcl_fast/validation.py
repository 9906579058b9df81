"""Checks of what a user passes in; every message names the argument and what to do."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

from . import dense
from .dtypes import widest

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
IGNORED = -100  # no class, unless another number is said to be none
INDICES = (
    torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.uint16, torch.uint32, torch.uint64,
)  # fmt: skip


def tensors(name: str, value: Any, rank: str, allowed: range) -> list[Tensor]:
    """``value``, a tensor or a sequence of them, as a non-empty list on one device."""
    items = [value] if isinstance(value, Tensor) else value
    if not isinstance(items, Sequence) or isinstance(items, (str, bytes)):
        raise TypeError(
            f"{name}: expected a Tensor or a sequence of Tensors, got {type(value).__name__}"
        )
    if len(items) == 0:
        raise ValueError(f"{name}: expected at least one Tensor, got an empty sequence")
    for i, x in enumerate(items):
        if (
            isinstance(x, Tensor)
            and x.dtype in FLOATS
            and x.layout is torch.strided
            and x.dim() in allowed
            and x.device == items[0].device
        ):
            continue
        label = name if isinstance(value, Tensor) else f"{name}[{i}]"
        if not isinstance(x, Tensor):
            raise TypeError(f"{label}: expected a Tensor, got {type(x).__name__}")
        if x.dtype not in FLOATS:
            raise TypeError(
                f"{label}: expected float16, bfloat16, float32 or float64, got {x.dtype}; "
                "convert it with .float()"
            )
        if x.layout != torch.strided:
            raise TypeError(f"{label}: expected a dense (strided) Tensor, got {x.layout}")
        if x.dim() not in allowed:
            raise ValueError(f"{label}: expected {rank}, got shape {tuple(x.shape)}")
        raise ValueError(
            f"{label}: expected all tensors on one device ({items[0].device}, as {name}[0]), "
            f"got {x.device}"
        )
    return list(items)


def tensor_or_none(name: str, value: Any) -> Tensor | None:
    if value is not None and not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a Tensor or None, got {type(value).__name__}")
    return value


def choice(name: str, value: Any, allowed: Sequence[str]) -> int:
    """The index of ``value`` in ``allowed``."""
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected a str, got {type(value).__name__}")
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")
    return list(allowed).index(value)


def number(name: str, value: Any, *, low: float, high: float, open_low: bool = False) -> float:
    """``value``, any real number, as a finite float in [low, high), or (low, high) if
    ``open_low``."""
    if type(value) is float and low < value < high:
        return value
    if not is_real(value):
        raise TypeError(f"{name}: expected a number, got {_kind(value)}")
    result = as_float(value)
    inside = result < high and (result > low if open_low else result >= low)
    if not inside:  # also true of NaN
        bracket = "(" if open_low else "["
        raise ValueError(f"{name}: expected a number in {bracket}{low:g}, {high:g}), got {result}")
    return result


def beta(value: Any) -> float:
    """The teacher's part in the mixture of a Jensen-Shannon divergence."""
    if is_real(value) and as_float(value) in (0, 1):
        limit = "reverse_kl" if value else "kl"
        raise ValueError(
            f"beta: expected a number in (0, 1), got {value}, of which the divergence is 0; its "
            f'limit there is divergence="{limit}"'
        )
    return number("beta", value, low=0, high=1, open_low=True)


def mixture(name: str, value: Any, heads: int) -> list[float]:
    """Weights of a label and of each head, which sum to 1, from the label's or from all."""
    if is_real(value):
        label = number(name, value, low=0, high=1, open_low=True)
        return [label, *[(1 - label) / heads] * heads]
    if isinstance(value, (str, Tensor)) or not isinstance(value, Sequence):
        raise TypeError(
            f"{name}: expected a number or a sequence of {heads + 1}, of the label and of each "
            f"head, got {_kind(value)}"
        )
    weights = [number(name, weight, low=0, high=1, open_low=True) for weight in value]
    if len(weights) != heads + 1 or not math.isclose(sum(weights), 1, abs_tol=1e-6):
        raise ValueError(
            f"{name}: expected {heads + 1} weights, of the label and of each head, which sum to 1, "
            f"got {weights}"
        )
    return weights


def module(name: str, value: Any) -> None:
    """``value`` must be an nn.Module."""
    if not isinstance(value, nn.Module):
        raise TypeError(f"{name}: expected an nn.Module, got {type(value).__name__}")


def is_real(value: Any) -> bool:
    """Whether ``value`` is a real number, of Python's or NumPy's, and no bool."""
    if isinstance(value, (int, float)):
        return not isinstance(value, bool)
    return isinstance(value, numbers.Real)


def as_float(value: Any) -> float:
    """The float nearest to a real number; infinite for one that is larger than any."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def boolean(name: str, value: Any) -> bool:
    """``value``, a bool of Python's or NumPy's, as a bool."""
    if not is_bool(value):
        raise TypeError(f"{name}: expected a bool, got {_kind(value)}")
    return bool(value)


def is_bool(value: Any) -> bool:
    """Whether ``value`` is a bool, of Python's or NumPy's."""
    if isinstance(value, bool):
        return True
    # By name, for NumPy need not be there; it is bool_ before NumPy 2.
    kind = type(value)
    return kind.__module__ == "numpy" and kind.__name__ in ("bool", "bool_")


def function(name: str, value: Any) -> Any:
    """``value``, if it can be called or is None."""
    if value is not None and not callable(value):
        raise TypeError(f"{name}: expected a callable or None, got {_kind(value)}")
    return value


def integer(name: str, value: Any, low: int | None = None) -> int:
    """``value``, an integer of 64 bits of Python's or NumPy's, as an int."""
    if not is_integer(value):
        if isinstance(value, Tensor):
            raise TypeError(f"{name}: expected an int, got {_kind(value)}")
        raise TypeError(f"{name}: expected an int, got {value!r} ({type(value).__name__})")
    result = int(value)
    if not -(2**63) <= result < 2**63:
        raise ValueError(f"{name}: expected an int of 64 bits, got one of {result.bit_length()}")
    if low is not None and result < low:
        raise ValueError(f"{name}: expected an int of at least {low}, got {result}")
    return result


def is_integer(value: Any) -> bool:
    """Whether ``value`` is an integer, of Python's or NumPy's, and no bool."""
    if isinstance(value, int):
        return not isinstance(value, bool)
    return isinstance(value, numbers.Integral)


def _kind(value: Any) -> str:
    """The name of a value's type; of a Tensor or an array also what to do."""
    if isinstance(value, Tensor):
        return (
            "Tensor; read it with .tolist() outside of the training step, which would wait for "
            "its device"
        )
    kind = type(value).__name__
    return f"{kind}; convert it with .tolist()" if kind == "ndarray" else kind


def plain(value: Any) -> Any:
    """NumPy's numbers and bools, alone or in a list or tuple, as Python's: ``torch.compile``
    takes NumPy's for Tensors. Anything else as it is."""
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if is_bool(value):
        return bool(value)
    if is_integer(value):
        return int(value)
    return as_float(value) if is_real(value) else value


def partition(name: str, value: Any, total: int) -> list[int]:
    """``value`` as positive sizes that sum to ``total``."""
    if isinstance(value, (str, Tensor)) or not isinstance(value, Sequence):
        raise TypeError(f"{name}: expected a sequence of ints, got {_kind(value)}")
    sizes = [integer(name, size) for size in value]
    if any(size < 1 for size in sizes) or sum(sizes) != total:
        raise ValueError(
            f"{name}: expected positive sizes that sum to the {total} heads of logits, got {sizes}"
        )
    return sizes


def per(name: str, value: Any, count: int, what: str) -> list[Any]:
    """``value`` repeated for each of ``count`` things, or the sequence of one for each."""
    if isinstance(value, str) or is_real(value) or is_bool(value):
        return [value] * count
    if isinstance(value, Tensor) or not isinstance(value, Sequence):
        raise TypeError(
            f"{name}: expected one value or a sequence of one per {what}, got {_kind(value)}"
        )
    if len(value) != count:
        raise ValueError(f"{name}: expected {count} values, one per {what}, got {len(value)}")
    return list(value)


def numbers_per(
    name: str, value: Any, count: int, what: str, low: float = -math.inf
) -> list[float]:
    """A finite number above ``low`` for each of ``count`` things, from one or as many."""
    return [
        number(name, each, low=low, high=math.inf, open_low=True)
        for each in per(name, value, count, what)
    ]


def rows(name: str, xs: Sequence[Tensor], dim: int, kind: str) -> None:
    """At least two rows in every matrix: a penalty between pairs needs a pair."""
    for i, x in enumerate(xs):
        if x.shape[dim] < 2:
            raise ValueError(
                f"{name}[{i}]: expected at least 2 {kind} (dimension {dim}), "
                f"got shape {tuple(x.shape)}"
            )


def samples(names: Sequence[str], values: Sequence[Any], least: int) -> None:
    """Tensors (B, *) of one B on one device; B is at least ``least``, or 0."""
    for name, value in zip(names, values, strict=True):
        (x,) = tensors(name, [value], "(B, *)", range(1, 64))
        if x.device != values[0].device:
            raise ValueError(
                f"{name}: expected all tensors on one device ({values[0].device}, as {names[0]}), "
                f"got {x.device}"
            )
        if x.shape[0] != values[0].shape[0]:
            raise ValueError(
                f"{name}: expected {values[0].shape[0]} samples, as {names[0]}, got shape "
                f"{tuple(x.shape)}"
            )
    batch = values[0].shape[0]
    if 0 < batch < least:
        raise ValueError(
            f"{names[0]}: expected at least {least} samples, got {batch}"
            + ("; the biased estimator does with 2" if batch > 1 else "")
        )


def masks(value: Any, features: Sequence[Tensor]) -> list[Tensor | None]:
    """One mask (B, *spatial), of bools or integers, for each of the features, or None."""
    each = [value] * len(features) if isinstance(value, Tensor) else value
    if not isinstance(each, Sequence):
        raise TypeError(f"mask: expected a Tensor or a sequence of them, got {_kind(value)}")
    if len(each) != len(features):
        raise ValueError(
            f"mask: expected one Tensor or {len(features)}, one per layer, got {len(each)}"
        )
    for i, (mask, x) in enumerate(zip(each, features, strict=True)):
        label = "mask" if isinstance(value, Tensor) else f"mask[{i}]"
        if tensor_or_none(label, mask) is None:
            continue
        if mask.is_floating_point() or mask.is_complex():
            raise TypeError(
                f"{label}: expected bools or integers, True or not 0 where a position counts, got "
                f"{mask.dtype}"
            )
        shape = (len(x), *x.shape[2:])
        if tuple(mask.shape) != shape:
            raise ValueError(
                f"{label}: expected shape {shape}, a value for each position of features "
                f"{tuple(x.shape)}, got {tuple(mask.shape)}"
            )
        if mask.device != x.device:
            raise ValueError(
                f"{label}: expected a Tensor on {x.device}, as the features, got {mask.device}"
            )
    return list(each)


def target(
    value: Any, logits: Sequence[Tensor], ignore_index: int, sigmoid: bool = False
) -> Tensor | None:
    """Class indices (B,) as int64, in [0, K) or ``ignore_index``, or class probabilities (B, K)
    in the dtype of the loss, on the device of logits (B, K) or (h, *samples, K); of the labels of
    a sigmoid probabilities only."""
    if tensor_or_none("target", value) is None:
        return None
    shape = (*dense.samples(logits[0]), logits[0].shape[-1])
    samples, classes = shape[:-1], shape[-1]
    kinds = f"class indices {samples}, or probabilities {shape} of a floating dtype"
    if sigmoid:
        kinds = f"probabilities {shape} of a floating dtype, one of each label of a sigmoid"
    if value.dtype in FLOATS:
        return _probabilities(value, shape, logits, ignore_index, kinds)
    if sigmoid:
        raise TypeError(
            f"target: expected {kinds}, got {value.dtype}; convert labels with .float()"
        )
    if value.dtype not in INDICES:
        raise TypeError(
            f"target: expected {kinds}, got {value.dtype}; convert indices with .long()"
        )
    if value.shape != samples:
        hint = "; one-hot labels are probabilities: convert them with .float()"
        raise ValueError(
            f"target: expected {kinds}, got shape {tuple(value.shape)} of {value.dtype}"
            f"{hint if value.shape == shape else ''}"
        )
    _on_the_device("target", value, logits)
    value = value.long()
    # On other devices the check would have to wait for the device; kernels answer
    # with a NaN loss there instead.
    if value.device.type != "cpu" or torch.compiler.is_compiling() or value.numel() == 0:
        return value
    if torch._C._are_functorch_transforms_active() or is_fake(value):
        return value
    low, high = torch.aminmax(value)
    if low.item() >= 0 and high.item() < classes:
        return value
    outside = ((value < 0) | (value >= classes)) & (value != ignore_index)
    if outside.any():
        raise ValueError(
            f"target: expected classes in [0, {classes}) or ignore_index={ignore_index}, "
            f"got {int(value[outside][0])}"
        )
    return value


def own_target(value: Any, logits: Tensor) -> Tensor:
    """A target as PyTorch's own cross entropy takes it of logits (B, K, *spatial): class indices
    (B, *spatial) as int64, or probabilities (B, K, *spatial) as they are."""
    if not isinstance(value, Tensor):
        raise TypeError(f"target: expected a Tensor, got {type(value).__name__}")
    heads = [logits if logits.dim() == 2 else logits.movedim(1, -1).unsqueeze(0)]
    if value.is_floating_point() and value.dim() == logits.dim():
        target(value.detach().movedim(1, -1), heads, IGNORED)  # PyTorch's takes one that learns
        return value
    return cast(Tensor, target(value, heads, IGNORED))


def _probabilities(
    value: Tensor, shape: tuple[int, ...], logits: Sequence[Tensor], ignore_index: int, kinds: str
) -> Tensor:
    if value.shape != shape:
        indices = value.shape == shape[:-1] and not kinds.endswith("sigmoid")
        hint = "; convert indices with .long()" if indices else ""
        raise ValueError(
            f"target: expected {kinds}, got shape {tuple(value.shape)} of {value.dtype}{hint}"
        )
    if ignore_index >= 0:
        raise ValueError(
            "ignore_index: expected a negative number, which names no class, with probabilities "
            f"as target, got {ignore_index}; leave samples out by a sample_weight of 0"
        )
    return _constant("target", value, logits)


def weights(
    name: str, value: Any, shape: Sequence[int], logits: Sequence[Tensor]
) -> Tensor | None:
    """Weights of a shape, or None, in the dtype of the loss, on the logits' device."""
    if tensor_or_none(name, value) is None:
        return None
    if value.dtype not in FLOATS:
        raise TypeError(
            f"{name}: expected a floating dtype, got {value.dtype}; convert it with .float()"
        )
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(value.shape)}")
    return _constant(name, value, logits)


def _constant(name: str, value: Tensor, logits: Sequence[Tensor]) -> Tensor:
    """``value`` in the dtype of the loss; no gradient flows into it."""
    _on_the_device(name, value, logits)
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name}: expected a Tensor that requires no gradient, for none flows into it, got "
            "one that does; pass it with .detach()"
        )
    return value.to(widest(logits))


def _on_the_device(name: str, value: Tensor, logits: Sequence[Tensor]) -> None:
    if value.device != logits[0].device:
        raise ValueError(
            f"{name}: expected a Tensor on {logits[0].device}, as the logits, got {value.device}"
        )
    if value.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense (strided) Tensor, got {value.layout}")
