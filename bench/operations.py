"""One row measured: the gate, the times, the peak memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .competitors import Competitor, competitors
from .facts import why_no_bfloat16
from .memory import peak_bytes
from .rows import Loss, Row
from .timing import Sample, interleaved_losses, quartiles, replayed, sets_needed

# Of the largest gradient, against the reference in float64. A kernel of the wrong formula is
# off by far more; what a dtype allows is what the tests look into.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}
MEDIUM_TOLERANCE = 5e-2  # factors of float32 rounded to bfloat16
GRAPHS = ("cuda",)  # types of devices that replay graphs


class Measured(NamedTuple):
    """What became of a row: samples, peak bytes and on a GPU seconds within a graph by competitor,
    and who was left out, why."""

    samples: dict[str, list[Sample]]
    peaks: dict[str, int | None]
    graphs: dict[str, float]
    left_out: dict[str, str]
    comparable: tuple[str, ...]  # of the samples' names: those that compute something else

    def as_json(self) -> dict:
        return {
            "competitors": {
                name: {
                    "forward": quartiles([s.forward for s in samples]),
                    "backward": quartiles([s.backward for s in samples]),
                    "both": quartiles([s.both for s in samples]),
                    "rounds": len(samples),
                    "peak_bytes": self.peaks[name],
                    **({"graph": self.graphs[name]} if name in self.graphs else {}),
                    "same": name not in self.comparable,
                }
                for name, samples in self.samples.items()
            },
            "left_out": self.left_out,
        }


def step(loss: Loss, xs: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
    value = loss(xs)
    return value, torch.autograd.grad(value, xs)


def truth_of(row: Row, xs: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """The loss and the gradients of the reference in float64."""
    doubles = [x.detach().double().requires_grad_() for x in xs]
    value, gradients = step(row.loss("reference", device), doubles)
    return [value.detach(), *gradients]


def fault(
    competitor: Competitor, xs: Sequence[Tensor], truth: Sequence[Tensor], row: Row
) -> str | None:
    """What is wrong with a competitor, or None; whoever has a fault is not timed.

    Raises:
        Exception: an error after which this process can do no more on the GPU; see ``lost``.
    """
    try:
        value, gradients = step(competitor.loss, xs)
    except Exception as error:  # whatever foreign code raises is its reason
        if lost(error):
            raise
        return reason_of(error)
    got = [value.detach(), *gradients]
    if not all(bool(g.isfinite().all()) for g in got):
        return "its loss or gradients are not finite"
    if not competitor.same:
        return None
    if row.dtype.itemsize < 4 and "reference" in competitor.name:
        return None  # the naive form rounds every step to its dtype, and is timed for all that
    allowed = TOLERANCE[row.dtype]
    if row.precision == "medium":
        allowed = max(allowed, MEDIUM_TOLERANCE)
    errors = {
        f"the gradient of input {index - 1}" if index else "the loss":
        float((g.double() - t).abs().max() / t.abs().max())
        for index, (g, t) in enumerate(zip(got, truth, strict=True))
    }  # fmt: skip
    wrong = [f"{what} is off by {error:.1e}" for what, error in errors.items()
             if not error <= allowed]  # fmt: skip
    if not wrong:
        return None
    return f"{', '.join(wrong)} of its largest value, {allowed:.0e} is allowed"


def reason_of(error: Exception) -> str:
    """An error in one line, for a table."""
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]


def lost(error: Exception) -> bool:
    """Whether an error of the GPU stays with the process: what came after would fail as well."""
    return isinstance(error, torch.AcceleratorError) or "CUDA error" in str(error)


def measure(
    row: Row,
    device: torch.device,
    seconds: float,
    *,
    only: Sequence[str] | None = None,
    fewest: int = 5,
    most: int = 200,
) -> Measured:
    """Check all competitors of a row, or those named, and time whoever is right."""
    found, left_out = competitors(row, device, only)
    reason = why_no_bfloat16(device) if row.dtype == torch.bfloat16 else None
    if reason is not None:
        left_out |= {one.name: reason for one in found}
        return Measured({}, {}, {}, left_out, ())
    with row.settings():
        sets = [row.inputs(seed, device)
                for seed in range(sets_needed(row.bytes, len(found), device))]  # fmt: skip
        truth = truth_of(row, sets[0], device)
        right = []
        for one in found:
            wrong = fault(one, sets[0], truth, row)
            if wrong is None:
                right.append(one)
            else:
                left_out[one.name] = wrong
        del truth
        if not right:
            return Measured({}, {}, {}, left_out, ())
        peaks = {
            one.name: peak_bytes(lambda one=one: step(one.loss, sets[0]), device) for one in right
        }
        samples = interleaved_losses(
            {one.name: one.loss for one in right}, sets, seconds, device, fewest=fewest, most=most
        )
        graphs = {}
        for one in right if device.type in GRAPHS else ():
            try:
                graphs[one.name] = replayed(one.loss, sets, len(samples[one.name]))
            except RuntimeError as error:  # which ends the capture with an error of the GPU's
                left_out[f"{one.name}, as a graph"] = reason_of(error)
    comparable = tuple(one.name for one in right if not one.same)
    return Measured(samples, peaks, graphs, left_out, comparable)
