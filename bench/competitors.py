"""Who competes for a row: every implementation, torch.compile of the plain ones, and published
losses that compute the same or a comparable thing."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from imcl_fast.implementations import IMPLEMENTATIONS, why_not

from .rows import TEMPERATURE, Loss, Row


class Competitor(NamedTuple):
    """A way to compute a row.

    Attributes:
        same: whether it computes the row's own quantity, and is held to it; what is only
            comparable must give finite gradients.
    """

    name: str
    loss: Loss
    same: bool = True


class LeftOut(Exception):
    """Why someone does not compete."""


def competitors(
    row: Row, device: torch.device, only: Sequence[str] | None = None
) -> tuple[list[Competitor], dict[str, str]]:
    """Those that can run, and why the others can't; of those named where some are."""
    found: list[Competitor] = []
    left_out: dict[str, str] = {}

    def wanted(name: str) -> bool:
        return only is None or name in only

    for impl in filter(wanted, IMPLEMENTATIONS[1:]):
        reason = why_not(impl, device.type, [row.dtype])
        if reason is None:
            found.append(Competitor(impl, row.loss(impl, device)))
        else:
            left_out[impl] = reason
    for impl in ("torch", "reference"):
        name = f"torch.compile({impl})"
        if not wanted(name):
            continue
        if row.compiled:
            torch.compiler.reset()
            found.append(Competitor(name, torch.compile(row.loss(impl, device))))
        else:
            left_out[name] = "compiled for one row of each operation only, and not in a quick run"
    for name, operation, make in THIRD_PARTY:
        if operation != row.implemented_by or not wanted(name):
            continue
        try:
            found.append(make(name, row, device))
        except ImportError as error:
            left_out[name] = f"not installed: {error}"
        except LeftOut as reason_:
            left_out[name] = str(reason_)
    return found, left_out


def _others(xs: Sequence[Tensor]) -> list[Tensor]:
    """Teacher logits of every head: the mean of the other heads, detached."""
    stacked = torch.stack([x.detach() for x in xs])
    return [(stacked.sum(0) - x) / (len(xs) - 1) for x in stacked]


def _channel_similarity(name: str, row: Row, device: torch.device) -> Competitor:
    # A student's channel Gram against a teacher's. The features of another sample serve as
    # teacher; both Grams are made at each call, as in its users' training steps.
    loss = importlib.import_module("torchdistill.losses.mid_level").ChSimLoss
    return Competitor(
        name,
        lambda xs: torch.stack([loss.batch_loss(x, x.detach().flip(0)) for x in xs]).sum(),
        same=False,
    )


def _sample_similarity(name: str, row: Row, device: torch.device) -> Competitor:
    # The B x B Gram of the samples instead of each sample's C x C one.
    module = importlib.import_module("torchdistill.losses.mid_level")
    loss = module.SPKDLoss("student", "teacher", "batchmean")
    return Competitor(
        name,
        lambda xs: torch.stack(
            [loss.compute_spkd_loss(x.detach().flip(0), x) for x in xs]
        ).sum(),
        same=False,
    )


def _distillation(name: str, row: Row, device: torch.device) -> Competitor:
    module = importlib.import_module("torchdistill.losses.mid_level")
    loss = module.KDLoss("z", "output", "q", "output", TEMPERATURE, alpha=1.0, beta=1.0)
    y = row.target(device)

    def total(xs: Sequence[Tensor]) -> Tensor:
        return torch.stack([
            loss({"z": {"output": z}}, {"q": {"output": q}}, y)
            for z, q in zip(xs, _others(xs), strict=True)
        ]).sum()  # fmt: skip

    return Competitor(name, total)


def _liger_kl(name: str, row: Row, device: torch.device) -> Competitor:
    module = importlib.import_module("liger_kernel.transformers.kl_div")
    if device.type != "cuda":
        raise LeftOut("Liger's kernels need a GPU")
    y = row.target(device)
    kl = module.LigerKLDIVLoss(reduction="batchmean")

    def total(xs: Sequence[Tensor]) -> Tensor:
        terms = []
        for z, q in zip(xs, _others(xs), strict=True):
            terms.append(torch.nn.functional.cross_entropy(z, y))
            log_p = torch.log_softmax(z / TEMPERATURE, -1)
            terms.append(TEMPERATURE**2 * kl(log_p, torch.softmax(q / TEMPERATURE, -1)))
        return torch.stack([term.float() for term in terms]).sum()

    return Competitor(name, total)


def _liger_jsd(name: str, row: Row, device: torch.device) -> Competitor:
    module = importlib.import_module("liger_kernel.transformers.jsd")
    if device.type != "cuda":
        raise LeftOut("Liger's kernels need a GPU")
    jsd = module.LigerJSD()

    def total(xs: Sequence[Tensor]) -> Tensor:
        return torch.stack([
            jsd(torch.log_softmax(z / TEMPERATURE, -1), torch.log_softmax(q / TEMPERATURE, -1))
            for z, q in zip(xs, _others(xs), strict=True)
        ]).sum()  # fmt: skip

    return Competitor(name, total, same=False)


THIRD_PARTY: tuple[tuple[str, str, Callable[[str, Row, torch.device], Competitor]], ...] = (
    ("torchdistill ChSimLoss", "representation", _channel_similarity),
    ("torchdistill SPKDLoss", "representation", _sample_similarity),
    ("torchdistill KDLoss", "consistency", _distillation),
    ("Liger KL", "consistency", _liger_kl),
    ("Liger JSD", "consistency", _liger_jsd),
)
