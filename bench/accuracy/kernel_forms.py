"""Other forms of way 4, tried before any is built: ``python -m bench.accuracy.kernel_forms FORM
FLAGS``, FLAGS those of imcl-train.

Naive forms in plain PyTorch in the place of ``IMCL``'s kernel similarity; its weight and the layers
that take part are imcl-train's settings. FORM is words: a kind, and what goes with it.

shifts          kernels at every shift against each other that is a multiple of the layer's stride
                and leaves an overlap, c_ij(d) = sum_p <w_i(p), w_j(p + d)>/(n_i n_j):
                (sum_ij sum_d c_ij(d)^2 - N_live)/(N (N - 1)); "abs" sums |c_ij(d)|. A kernel's
                likeness to itself counts at every shift but none, "without-self" at none. (Kernel
                orthogonality at every shift: 1911.12207.)
inputs          today's penalty of the kernels' parts, by the input channel that each is of
welch           today's penalty less its least value for N kernels of D weights,
                max(0, (N - D)/(D (N - 1))), 0 where it is less
falling=STEPS   the weight falls to 0 over so many steps
"""

from __future__ import annotations

import functools
import itertools
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd import Function

from imcl_fast import functional, train
from imcl_fast.imcl import IMCL

KINDS = ("shifts", "inputs", "welch")


class Form(NamedTuple):
    """What the words of a form say."""

    kind: str
    penalty: str = "square"
    with_self: bool = True
    falling: int | None = None  # steps


def parse(words: str) -> Form:
    """A form from its words.

    Raises:
        ValueError: they aren't one.
    """
    kind, *rest = words.split() or [""]
    if kind not in KINDS:
        raise ValueError(f"form: expected one of {', '.join(KINDS)} first, got {words!r}")
    form = Form(kind)
    for word in rest:
        if word == "abs" and kind == "shifts":
            form = form._replace(penalty="abs")
        elif word == "without-self" and kind == "shifts":
            form = form._replace(with_self=False)
        elif found := re.fullmatch(r"falling=([1-9][0-9]*)", word):
            form = form._replace(falling=int(found[1]))
        else:
            raise ValueError(f"form: expected abs or without-self (of shifts) or falling=STEPS, "
                             f"got {word!r}")  # fmt: skip
    return form


class _AlikeAtShifts(Function):
    """apply(unit kernels (N, *k, C), stride, form) -> sum_ij sum_d phi(c_ij(d)), and its gradient,
    made in the forward: a product of matrices for each pair of opposite shifts, whose c are each
    other's transposes. A convolution of the kernels with themselves takes three times as long."""

    @staticmethod
    def forward(ctx, unit: Tensor, stride: Sequence[int], form: Form) -> Tensor:
        total, gradient = unit.new_zeros(()), torch.zeros_like(unit)
        for ahead, behind, is_none in _overlaps(unit.shape[1:-1], stride):
            a, b = unit[ahead].flatten(1), unit[behind].flatten(1)
            c = a @ b.T
            if not (is_none or form.with_self):
                c.fill_diagonal_(0)
            pairs = 1 if is_none else 2
            if form.penalty == "abs":
                total += pairs * c.abs().sum()
                slope = pairs * c.sign()
            else:
                total += pairs * c.square().sum()
                slope = 2 * pairs * c
            gradient[ahead] += (slope @ b).view_as(gradient[ahead])
            gradient[behind] += (slope.T @ a).view_as(gradient[behind])
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor):
        (gradient,) = ctx.saved_tensors
        return grad * gradient, None, None


Places = tuple[slice, ...]


def _overlaps(
    size: Sequence[int], stride: Sequence[int]
) -> Iterator[tuple[Places, Places, bool]]:
    """Of each shift, and the opposite one, where the two kernels lie over each other, and whether
    it is none."""
    ranges = [range(-((k - 1) // s) * s, k, s) for k, s in zip(size, stride, strict=True)]
    for shift in itertools.product(*ranges):
        if shift >= (0,) * len(shift):
            ahead = [slice(max(d, 0), k + min(d, 0)) for d, k in zip(shift, size, strict=True)]
            behind = [slice(max(-d, 0), k - max(d, 0)) for d, k in zip(shift, size, strict=True)]
            yield (slice(None), *ahead), (slice(None), *behind), not any(shift)


def at_shifts(weight: Tensor, stride: Sequence[int], form: Form) -> Tensor:
    """The penalty of one layer's kernels (N, C, *k)."""
    rows = weight.flatten(1)
    norms = rows.norm(dim=1)
    live = norms > 0
    safe = torch.where(live, norms, 1)
    unit = torch.where(live.unsqueeze(1), rows / safe.unsqueeze(1), 0).view_as(weight)
    alike = _AlikeAtShifts.apply(unit.movedim(1, -1).contiguous(), stride, form)
    n = len(weight)
    return (alike - live.sum()) / (n * (n - 1))


def penalty(weight: Tensor, stride: Sequence[int], form: Form) -> Tensor:
    """That of one layer's weight, (N, C, *k) or (N, D)."""
    if form.kind == "shifts":
        return at_shifts(weight if weight.dim() > 2 else weight.unsqueeze(-1), stride, form)
    if form.kind == "inputs":
        if weight.shape[1] < 2:  # the first layer of grey images: one input, and no pair
            return weight.new_zeros(())
        return functional.kernel_similarity(weight.transpose(0, 1))
    n, d = weight.flatten(1).shape
    least = max(0, (n - d) / (d * (n - 1)))  # Welch's bound
    return (functional.kernel_similarity(weight) - least).clamp_min(0)


def install(form: Form) -> None:
    """Have every ``IMCL`` of this process penalise its kernels by ``form``."""
    build = IMCL.__init__

    @functools.wraps(build)  # whose defaults are asked for
    def init(self: IMCL, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        self.register_buffer("kernel_calls", torch.zeros(()))  # goes into checkpoints

    def similarity(self: IMCL, where: Any, turn: Any, step: Any = None) -> Tensor | None:
        if not self.kernel_weight or not turn.kernel:
            return None
        found = []
        for module, name in where.values():
            if getattr(module, "groups", 1) > 1 or max(getattr(module, "dilation", (1,))) > 1:
                raise ValueError(f"form: expected one group and no dilation, got {module}")
            stride = getattr(module, "stride", (1,))
            found.append(penalty(cast(Tensor, module._parameters[name]), stride, form))
        value = torch.stack(found).mean()
        if form.falling is None or not (self.training and torch.is_grad_enabled()):
            return value
        left = (1 - cast(Tensor, self.kernel_calls) / form.falling).clamp_min(0)
        self.kernel_calls += 1
        return value * left

    IMCL.__init__, IMCL._kernel_similarity = init, similarity  # type: ignore[method-assign]


def main(arguments: Sequence[str]) -> int:
    """``FORM FLAGS``; returns the exit code of imcl-train."""
    try:
        install(parse(arguments[0] if arguments else ""))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return train.main(list(arguments[1:]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
