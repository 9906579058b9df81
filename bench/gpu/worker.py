"""Measures what its standard input asks for, one JSON line each way.

A process of its own, because after a fault of the GPU a process can't go on.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch

import bench.facts
from imcl_fast import implementations

from .. import roofline
from . import measure, rows


def facts() -> dict[str, str]:
    """What a figure depends on; nothing but torch need be there to find it out."""
    if not torch.cuda.is_available():
        raise measure.NotTimed("torch sees no GPU here; `make test` is what can run without one")
    driver = ""
    if shutil.which("nvidia-smi"):
        driver = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True, text=True,
        ).stdout.strip()  # fmt: skip
    runs = {f"impl={name}": implementations.why_not(name, "cuda") or "runs" for name in rows.FUSED}
    return {**bench.facts.facts(measure.DEVICE), "driver": driver or "unknown", **runs}


def answer(asked: dict[str, Any]) -> Any:
    kind, rounds = asked["kind"], asked["rounds"]
    if kind == "facts":
        return facts()
    if kind == "rates":
        return roofline.measure_rates(measure.DEVICE)
    if kind == "step":
        return measure.training_step(asked["impl"], rounds)
    row = next(row for row in rows.rows() if row.name == asked["row"])
    if kind == "prepare":
        return measure.prepare(row, asked["impl"])
    return measure.operation(row, asked["impl"], rounds)


def main(answer: Callable[[dict[str, Any]], Any] = answer) -> None:
    out = sys.stdout
    sys.stdout = sys.stderr  # what libraries print is no answer
    for line in sys.stdin:
        try:
            said = {"found": answer(json.loads(line))}
        except measure.NotTimed as reason:
            said = {"not_timed": str(reason)}
        except Exception as error:
            said = {"failed": f"{type(error).__name__}: {error}".splitlines()[0],
                    "traceback": traceback.format_exc()}  # fmt: skip
            # An error of the GPU stays with the process: what came after would fail as well.
            if isinstance(error, torch.AcceleratorError) or "CUDA error" in str(error):
                said["gone"] = True
        print(json.dumps(said), file=out, flush=True)
        if said.get("gone"):
            sys.exit(1)


if __name__ == "__main__":
    main()
