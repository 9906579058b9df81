"""Measures what it is asked for through a pipe: ``python -m bench.gpu.worker DESCRIPTOR``.

A process of its own, because after a fault of the GPU a process can't go on.
"""

from __future__ import annotations

import faulthandler
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import torch

from imcl_fast.implementations import why_not

from .. import operations, roofline, rows, step
from ..competitors import competitors
from ..facts import facts
from . import FUSED

DEVICE = torch.device("cuda")
STEP = step.Step("resnet18", 128, bfloat16=True)


def answer(asked: dict[str, Any]) -> Any:
    kind, name, rounds = asked["kind"], asked.get("name", ""), asked["rounds"]
    if kind == "facts":
        if not torch.cuda.is_available():
            return {"no_gpu": "torch sees no GPU here; `make test` is what can run without one"}
        return facts(DEVICE)
    if kind == "rates":
        return roofline.measure_rates(DEVICE)
    if kind == "step":
        one = replace(STEP, methods=(step.PLAIN, name))
        return step.measure(one, DEVICE, 0, fewest=rounds, strict=True)
    row = next(row for row in rows.gpu_rows() if row.name == asked["row"])
    if kind == "compile":  # what it compiles stays in the caches on disk
        for one in competitors(row, DEVICE, [name])[0]:
            operations.step(one.loss, row.inputs(0, DEVICE))
        return None
    found = operations.measure(row, DEVICE, 0, only=[name], fewest=rounds, most=rounds)
    ought_to = name in FUSED and why_not(name, DEVICE.type, [row.dtype]) is None
    if ought_to and name in found.left_out:  # wrong, and no reason to leave it out
        raise RuntimeError(found.left_out[name])
    return found.as_json()


def main(answer: Callable[[dict[str, Any]], Any] = answer) -> None:
    faulthandler.enable()
    pipe = Connection(int(sys.argv[1]))
    while True:
        try:
            asked = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send({"found": answer(asked)})
        except Exception as error:
            print(asked, traceback.format_exc(), sep="\n", file=sys.stderr, flush=True)
            gone = operations.lost(error)
            pipe.send({"failed": operations.reason_of(error), "gone": gone})
            if gone:
                sys.exit(1)


if __name__ == "__main__":
    main()
