"""What the project set out to reach, beside what a run found: each target, and what is left."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from .host import ONE_AND_TWO, SCHEDULE
from .step import FUSED, PLAIN, SCHEDULED

Results = Mapping
Found = tuple[float, str]  # a value, and what it is made of, in words


@dataclass(frozen=True)
class Target:
    """A bound on something measured.

    Attributes:
        what: it is, and of what.
        bound: that it is to reach.
        unit: as a format of the value, ``"{:.2f} ms"``.
        find: the value in results and what there is to say of it; raises KeyError where the run
            has not measured it.
        least: whether the bound is a lower one.
    """

    what: str
    bound: float
    unit: str
    find: Callable[[Results], Found]
    least: bool = False

    @property
    def reach(self) -> str:
        return f"at {'least' if self.least else 'most'} {self.unit.format(self.bound)}"

    def met(self, value: float) -> bool:
        return value >= self.bound if self.least else value <= self.bound


def lines(results: Results) -> Iterator[list[str]]:
    """Target, bound, value, whether it is met, what it is made of: of all that were measured."""
    for target in TARGETS:
        try:
            value, said = target.find(results)
        except KeyError:
            continue
        yield [
            target.what,
            target.reach,
            target.unit.format(value),
            "yes" if target.met(value) else "no",
            said,
        ]


PERCENT, TIMES, MS = "{:+.1%}", "{:.2f} x", "{:.2f} ms"


def _step(title: str, compiled: bool, results: Results) -> Found:
    """What the schedule adds to a step, and of it the steps of each kind."""
    one = results["steps"][title]["methods"][f"{SCHEDULED}, compiled" if compiled else SCHEDULED]
    low, high = one["overhead_quartiles"]
    kinds = one["kinds"]
    parts = ", ".join(f"{kind} {over:+.1%}" for kind, over in kinds.items())
    return one["overhead"], f"quartiles {low:+.1%} to {high:+.1%}; similarities computed: {parts}"


def _memory(results: Results) -> Found:
    """The largest of what the schedule adds to a network's peak."""
    found = {
        title: one["methods"][SCHEDULED]["extra_memory"]
        for title, one in results["steps"].items()
        if SCHEDULED in one["methods"]
    }
    most = max(found, key=found.__getitem__, default=None)
    if most is None:
        raise KeyError(SCHEDULED)
    return found[most], f"{most}, the most of {len(found)} networks"


def _host(which: str, results: Results) -> Found:
    ours = results["host"][SCHEDULE]["both"]
    torch = results["host"][ONE_AND_TWO]["both"]
    said = (
        f"the least of its places {1e3 * ours['least']:+.2f} ms, with neither similarity: heads, "
        "views and their consistency; ways 1 and 2 alone in plain PyTorch "
        f"{1e3 * torch['least']:+.2f} at the least"
    )
    return 1e3 * ours[which], said


def _over(title: str, who: str, results: Results) -> Found:
    """How many times the time of the fused kernels another one takes."""
    competitors, floor = _operation(results, title)
    fused = competitors["cpp"]["both"]["median"]
    return (
        competitors[who]["both"]["median"] / fused,
        f"{who} over fused; fused is at {floor / fused:.0%} of the floor",
    )


def _floor(title: str, results: Results) -> Found:
    competitors, floor = _operation(results, title)
    fused = competitors["cpp"]["both"]["median"]
    return fused / floor, f"fused over its floor of {1e3 * floor:.1f} ms"


def _medium(results: Results) -> Found:
    """What "medium" takes over float32, of rows that were measured together."""
    rows = [results["operations"][f"kernel R18 float32{more}"] for more in (" medium", "")]
    if rows[0].get("again") != rows[1].get("again"):
        raise KeyError("again")
    medium, full = (row["competitors"]["cpp"]["both"]["median"] for row in rows)
    return medium / full, f"{1e3 * medium:.1f} ms over {1e3 * full:.1f}"


def _busy(results: Results) -> Found:
    ours, plain = (results["contention"][name]["ratio"] for name in (FUSED, PLAIN))
    return ours / plain, f"{ours:.2f} times the quiet step over {plain:.2f}"


def _operation(results: Results, title: str) -> tuple[Mapping, float]:
    row = results["operations"][title]
    return row["competitors"], row["floors"]["both"]


def _steps() -> Iterator[Target]:
    for title, bound in {
        "resnet18, width 64, 32x32, batch 128, float32": 0.015,
        "resnet18, width 64, 32x32, batch 128, bfloat16 autocast": 0.03,
        "vgg16_bn, width 64, 32x32, batch 64, float32": 0.04,
        "vgg16_bn, width 64, 32x32, batch 64, bfloat16 autocast": 0.06,
        "resnet50, width 64, 32x32, batch 32, float32": 0.03,
        "resnet50, width 64, 32x32, batch 32, bfloat16 autocast": 0.04,
        "resnet18, width 16, 32x32, batch 128, bfloat16 autocast": 0.08,
        "resnet18, width 32, 32x32, batch 64, float32, compiled": 0.04,
    }.items():
        compiled = title.endswith("compiled")
        yield Target(f"step over plain: {title}", bound, PERCENT, partial(_step, title, compiled))


TARGETS = (
    *_steps(),
    Target("peak memory of a step over plain", 0.02, PERCENT, _memory),
    Target("host time of a step over plain, average", 0.4, MS, partial(_host, "average")),
    Target("the same, in its fullest step", 1.0, MS, partial(_host, "fullest")),
    Target(
        "representation R18 float32", 2, TIMES,
        partial(_over, "representation R18 float32", "torch"), least=True,
    ),
    Target("kernel R18 float32", 1.0, TIMES, partial(_floor, "kernel R18 float32")),
    Target("kernel R18 medium over float32", 1.0, TIMES, _medium),
    Target(
        "consistency 5 x 128 x 1000 float32", 4, TIMES,
        partial(_over, "consistency 5 x 128 x 1000 float32", "torch.compile(torch)"), least=True,
    ),
    Target(
        "dependence 3 x R18, batch 64 float32, naive", 4, TIMES,
        partial(_over, "dependence 3 x R18, batch 64 float32", "reference"), least=True,
    ),
    Target(
        "the same, the algebra", 1.5, TIMES,
        partial(_over, "dependence 3 x R18, batch 64 float32", "torch"), least=True,
    ),
    Target(
        "the same, the floor", 1.25, TIMES,
        partial(_floor, "dependence 3 x R18, batch 64 float32"),
    ),
    Target("what a busy process slows the ways down by, over plain", 1.0, TIMES, _busy),
)  # fmt: skip
