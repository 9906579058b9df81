"""The operators and the order of their arguments, stated once: the Triton operators are
registered by ``SCHEMAS`` and autograd hands on the options as they stand here; a test holds
csrc/registration.cpp and the enumerations of csrc/problem.h against it."""

from __future__ import annotations

from typing import NamedTuple, get_type_hints


class PairwiseOptions(NamedTuple):
    """Of the pairwise penalty."""

    penalty: int
    center: bool
    eps: float
    batched: bool
    precision: int


class ConsistencyOptions(NamedTuple):
    """Of the consistency; lists have an element for each head or group."""

    ce_weight: list[float]
    kl_weight: list[float]
    groups: list[int]
    temperature: list[float]
    teacher: list[int]
    detach: list[bool]
    divergence: list[int]
    beta: list[float]
    label_smoothing: float
    ignore_index: int
    binary: bool
    reduction: int


# The overload's name of every operator. torch.compile keeps compiled code on disk by the operators'
# full names, and with it the sizes that their outputs had; code of an earlier release would refuse
# what this one returns. Who changes a size, dtype or layout in a fake kernel changes this name.
LAYOUT = "v4"

_TYPES = {each: each.__name__ for each in (int, float, bool)} | {
    list[int]: "int[]", list[float]: "float[]", list[bool]: "bool[]",
}  # fmt: skip


def _arguments(options: type) -> str:
    return ", ".join(f"{_TYPES[kind]} {name}" for name, kind in get_type_hints(options).items())


_PAIRWISE = _arguments(PairwiseOptions)

# By name: arguments and results. ``keep`` asks for what the backward needs.
SCHEMAS = {
    "pairwise": f"(Tensor[] xs, {_PAIRWISE}, bool keep) -> (Tensor, Tensor[])",
    "pairwise_backward": f"(Tensor grad, Tensor[] xs, Tensor[] state, {_PAIRWISE}) -> Tensor[]",
    "consistency": "(Tensor[] logits, Tensor? target, Tensor? weight, Tensor? sample_weight, "
    f"{_arguments(ConsistencyOptions)}, bool keep) -> (Tensor, Tensor, Tensor[])",
    "gram_forward": "(Tensor[] xs, float[] scale) -> (Tensor, Tensor[])",
    "gram_backward": "(Tensor s, Tensor[] xs, Tensor[] means) -> Tensor[]",
}
