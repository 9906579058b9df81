"""Hypothesis strategies: the shapes, memory formats, values and options the tests draw.

What is drawn is a small named tuple of numbers that prints well when a test fails;
``build`` turns it into tensors, from its own seed.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

PENALTIES = ("square", "abs", "signed")
TEACHERS = ("others", "mean", "final", "pairwise")
REDUCTIONS = ("mean", "sum", "none")

# Sizes around the widths of vectors and tiles, where remainders are handled.
SIZES = (1, 2, 3, 5, 7, 8, 9, 13, 15, 16, 17, 23, 31, 32, 33)
LAYOUTS = (
    "contiguous",
    "channels_last",  # for features (B, C, *spatial): channels vary fastest
    "transposed",  # the first two dimensions swapped in memory
    "reversed",  # all dimensions in reverse order in memory
    "sliced",  # every dimension a step or a part of a larger one: dense in none
    "misaligned",  # contiguous, but starts one element off its allocation
    "expanded_first",  # stride 0 in the first dimension
    "expanded_last",  # stride 0 in the last dimension
)


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The values of x (but for expanded dimensions, which repeat) in the layout named."""
    if layout == "channels_last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "transposed":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "reversed":
        order = list(reversed(range(x.dim())))
        return x.permute(order).contiguous().permute(order)
    if layout == "sliced":
        room = x.new_full([size + 3 if i == 0 else 2 * size + 1 for i, size in enumerate(x.shape)],
                          math.nan)
        view = room[tuple(slice(2, 2 + size) if i == 0 else slice(1, 1 + 2 * size, 2)
                          for i, size in enumerate(x.shape))]
        view.copy_(x)
        return view
    if layout == "misaligned":
        room = x.new_full((x.numel() + 1,), math.nan)
        view = room[1:].view(x.shape)
        view.copy_(x)
        return view
    if layout == "expanded_first":
        return x[:1].expand_as(x)
    if layout == "expanded_last":
        return x[..., :1].expand_as(x)
    return x.contiguous()


class Matrices(NamedTuple):
    """Features (B, C, *spatial), or a weight (Cout, ...), with rows of all kinds."""

    shape: tuple[int, ...]
    batched: bool
    layout: str = "contiguous"
    dead: float = 0.0  # fraction of rows that are 0
    twins: bool = False  # whether the last row is a multiple of the first
    spread: float = 1.0  # norms lie between 1/spread and spread
    offset: float = 0.0  # added to every element, in units of its row's deviation
    seed: int = 0
    shared: float = 0.0  # of a pattern all rows share, of either sign: no cosine is near 0

    def build(self, dtype: torch.dtype, device: str = "cpu") -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        x = torch.randn(self.shape, generator=generator, dtype=torch.float64)
        rows = x.flatten(2) if self.batched else x.flatten(1).unsqueeze(0)  # [B, N, D], a view
        if rows.numel():
            if self.shared:
                pattern = torch.randn(rows.shape[-1], generator=generator, dtype=torch.float64)
                sign = torch.randint(0, 2, rows.shape[:2], generator=generator) * 2 - 1
                rows += self.shared * sign.unsqueeze(-1) * pattern
            rows += self.offset
            size = torch.rand(rows.shape[:2], generator=generator, dtype=torch.float64)
            rows *= torch.exp((2 * size - 1) * math.log(self.spread)).unsqueeze(-1)
            if self.twins:
                rows[:, -1] = -0.5 * rows[:, 0]
            alive = torch.rand(rows.shape[:2], generator=generator) >= self.dead
            rows *= alive.unsqueeze(-1)
        return lay_out(x.to(dtype).to(device), self.layout)


@st.composite
def features(draw: st.DrawFn, layouts=LAYOUTS) -> Matrices:
    """Features of 3 to 5 dimensions, (B, C, *spatial)."""
    batch = draw(st.integers(1, 4))
    channels = draw(st.sampled_from(SIZES[1:]))
    spatial = draw(st.lists(st.integers(1, 7), min_size=1, max_size=3))
    return draw(_matrices((batch, channels, *spatial), True, layouts))


@st.composite
def weights(draw: st.DrawFn, layouts=LAYOUTS) -> Matrices:
    """Weights of linear (out, in) and convolution (Cout, Cin/groups, *k) layers."""
    rows = draw(st.sampled_from(SIZES[1:]))
    columns = draw(st.sampled_from(SIZES))
    kernel = draw(st.sampled_from([(), (), (1,), (3,), (1, 1), (3, 3), (2, 3), (2, 2, 2)]))
    layouts = [name for name in layouts if kernel or name != "channels_last"]
    return draw(_matrices((rows, columns, *kernel), False, layouts))


def _matrices(shape: tuple[int, ...], batched: bool, layouts) -> st.SearchStrategy[Matrices]:
    return st.builds(
        Matrices,
        shape=st.just(shape),
        batched=st.just(batched),
        layout=st.sampled_from(list(layouts)),
        dead=st.sampled_from([0.0, 0.0, 0.3, 0.8, 1.0]),
        twins=st.booleans(),
        spread=st.sampled_from([1.0, 4.0, 30.0]),
        offset=st.sampled_from([0.0, 0.0, 1.0, 10.0]),
        seed=st.integers(0, 10**6),
        shared=st.sampled_from([0.0, 0.0, 3.0]),
    )


def layers(one: st.SearchStrategy[Matrices]) -> st.SearchStrategy[list[Matrices]]:
    """Ragged lists of layers."""
    return st.lists(one, min_size=1, max_size=4)


class Heads(NamedTuple):
    """Logits as stacks of heads, labels, and every option of the consistency."""

    batch: int
    classes: int
    stacks: tuple[int, ...]  # heads of each stack: 0 is (B, K), h > 0 is (h, B, K)
    layouts: tuple[str, ...]
    groups: tuple[int, ...]
    temperature: tuple[float, ...]
    teacher: tuple[str, ...]
    detach_teacher: tuple[bool, ...]
    ce_weight: tuple[float, ...]
    kl_weight: tuple[float, ...]
    label_smoothing: float = 0.0
    reduction: str = "mean"
    ignored: float | None = 0.0  # fraction of samples; None is no target at all
    size: float = 1.0  # the logits' standard deviation
    seed: int = 0

    def build(self, dtype: torch.dtype, device: str = "cpu") -> tuple[list[Tensor], Tensor | None]:
        """The logits and the target."""
        generator = torch.Generator().manual_seed(self.seed)
        logits = []
        for heads, layout in zip(self.stacks, self.layouts, strict=True):
            shape = (heads, self.batch, self.classes) if heads else (self.batch, self.classes)
            z = self.size * torch.randn(shape, generator=generator, dtype=torch.float64)
            logits.append(lay_out(z.to(dtype).to(device), layout))
        if self.ignored is None:
            return logits, None
        target = torch.randint(0, self.classes, (self.batch,), generator=generator)
        target[torch.rand(self.batch, generator=generator) < self.ignored] = -100
        return logits, target.to(device)

    def options(self) -> dict:
        return {
            "groups": list(self.groups),
            "temperature": list(self.temperature),
            "teacher": list(self.teacher),
            "detach_teacher": list(self.detach_teacher),
            "ce_weight": list(self.ce_weight),
            "kl_weight": list(self.kl_weight),
            "label_smoothing": self.label_smoothing,
            "reduction": self.reduction,
        }


@st.composite
def heads(draw: st.DrawFn) -> Heads:
    """One to eight heads in one to four groups and any mixture of stacks."""
    stacks = tuple(draw(st.lists(st.integers(0, 3), min_size=1, max_size=4)))
    while sum(max(b, 1) for b in stacks) > 8:
        stacks = stacks[1:]
    count = sum(max(b, 1) for b in stacks)
    groups: list[int] = []
    while sum(groups) < count:
        groups.append(draw(st.integers(1, count - sum(groups))))

    def each(strategy: st.SearchStrategy, length: int) -> tuple:
        return tuple(draw(st.lists(strategy, min_size=length, max_size=length)))

    layouts = ("contiguous", "transposed", "reversed", "sliced", "misaligned",
               "expanded_first", "expanded_last")
    weight = st.sampled_from([0.0, 0.25, 1.0, 1.0, 3.0, -0.5])
    return Heads(
        batch=draw(st.integers(1, 9)),
        classes=draw(st.sampled_from((*SIZES, 100))),
        stacks=stacks,
        layouts=each(st.sampled_from(layouts), len(stacks)),
        groups=tuple(groups),
        temperature=each(st.sampled_from([0.5, 1.0, 2.0, 4.0]), len(groups)),
        teacher=each(st.sampled_from(TEACHERS), len(groups)),
        detach_teacher=each(st.booleans(), len(groups)),
        ce_weight=each(weight, count),
        kl_weight=each(weight, count),
        label_smoothing=draw(st.sampled_from([0.0, 0.0, 0.1, 0.9])),
        reduction=draw(st.sampled_from(["mean", "sum", "none"])),
        ignored=draw(st.sampled_from([0.0, 0.0, 0.4, 1.0, None])),
        size=draw(st.sampled_from([0.01, 1.0, 5.0, 30.0])),
        seed=draw(st.integers(0, 10**6)),
    )


class Targets(NamedTuple):
    """What is taught to heads beside class indices: probabilities, and weights of all kinds."""

    heads: Heads
    kind: str  # of target: "indices", "probabilities" of any sum, "one-hot"
    weight: str  # of the classes: "none", "ones", "some 0", "all 0"
    sample_weight: str
    layout: str
    seed: int

    def build(
        self, dtype: torch.dtype, device: str = "cpu"
    ) -> tuple[list[Tensor], Tensor | None, dict[str, Tensor | None]]:
        """The logits, the target, and the weights by their names."""
        logits, target = self.heads.build(dtype, device)
        generator = torch.Generator().manual_seed(self.seed)
        batch, classes = self.heads.batch, self.heads.classes
        if target is not None and self.kind != "indices":
            drawn = torch.rand(batch, classes, generator=generator, dtype=torch.float64)
            drawn *= torch.rand(drawn.shape, generator=generator) < 0.7  # some are 0
            if self.kind == "one-hot":
                drawn = torch.eye(classes, dtype=torch.float64)[target.cpu().clamp(min=0)]
            target = lay_out(drawn.to(dtype), self.layout).to(device)

        def weights(kind: str, size: int) -> Tensor | None:
            if kind == "none":
                return None
            drawn = torch.rand(size, generator=generator, dtype=torch.float64) + 0.25
            if kind == "ones":
                drawn = torch.ones(size, dtype=torch.float64)
            elif kind != "some":
                drawn *= torch.rand(size, generator=generator) < (0.5 if kind == "some 0" else 0)
            spaced = lay_out(drawn.to(dtype).unsqueeze(1).expand(size, 2), "contiguous")[:, 1]
            return spaced.to(device)

        named = {
            "weight": weights(self.weight, classes),
            "sample_weight": weights(self.sample_weight, batch),
        }
        return logits, target, named


@st.composite
def targets(draw: st.DrawFn) -> Targets:
    """Heads with a target and weights of every kind."""
    weights = st.sampled_from(["none", "ones", "some", "some", "some 0", "all 0"])
    return Targets(
        draw(heads()),
        draw(st.sampled_from(["indices", "probabilities", "probabilities", "one-hot"])),
        draw(weights),
        draw(weights),
        draw(st.sampled_from(["contiguous", "transposed", "sliced", "misaligned"])),
        draw(st.integers(0, 10**6)),
    )
