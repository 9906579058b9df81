"""``imcl-train``, or ``python -m imcl_fast.train``: train a network from the command line."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from .runs import flags
from .runs.config import TrainConfig
from .runs.errors import (
    DiskFullError,
    Interrupted,
    TrainingError,
    one_line,
    printable,
)
from .runs.extra import needed_by
from .runs.folder import UnreadableRun

with needed_by("imcl-train"):
    from .training.progress import Console, summary_table
    from .training.trainer import Trainer

DESCRIPTION = (
    "Train a network with intra-model collaborative learning, or with what it is compared to. "
    "Everything the run writes goes to one folder. Several processes: torchrun "
    "--nproc-per-node N -m imcl_fast.train ..."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code.

    0: the run is complete; 1: the loss is not finite, or a file can't be written; 2: the flags, the
    environment, the data, the run folder or its checkpoints don't allow the run; 130, 143:
    interrupted and saved.
    """
    config = flags.parse(arguments, "imcl-train", DESCRIPTION)
    folder = config.run_dir or default_folder(config)
    config = replace(config, run_dir=folder)
    # The first of several; also where the environment is nonsense.
    world, rank = os.environ.get("WORLD_SIZE", "1"), os.environ.get("RANK", "0")
    speaks = rank == "0" or not (world + rank).isdecimal() or int(rank) >= int(world)
    try:
        observer = Console()
        summary = Trainer(config, observer=observer).fit()
        if speaks and config.report:
            observer.said(_report(folder))
    except TrainingError as error:
        # All stop together at a signal; whatever else stops one is told where it came up.
        if speaks or not (error.told or isinstance(error, Interrupted)):
            print(f"imcl-train: {one_line(error)}", file=sys.stderr)
        if speaks and isinstance(error, (Interrupted, DiskFullError)):
            print(f"imcl-train: go on with: {resume_command(config)}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:  # while reports are written, when everything is saved
        print("imcl-train: interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"imcl-train: {one_line(error)}", file=sys.stderr)
        return 1
    if speaks:
        print(printable(f"\n{summary_table(summary)}\nrun folder{'':11s}{folder}"))
    return 0


def _report(folder: Path) -> str:
    """Write the report; a line that says where, or why there is none."""
    from .reports.charts import MissingMatplotlib  # slow to import, and used once
    from .reports.html import write_report

    try:
        return printable(f"report: {write_report(folder)}")
    except (MissingMatplotlib, UnreadableRun) as error:
        return printable(f"no report: {error}")


def default_folder(config: TrainConfig) -> Path:
    """Where a run goes whose user named no folder."""
    model = re.sub(r"[^\w.-]+", "-", config.model)  # of timm:NAME and the like
    return Path("runs", f"{config.dataset}-{model}-{config.label}-s{config.seed}")


def resume_command(config: TrainConfig) -> str:
    """The command that goes on with an interrupted run, for a shell."""
    world = os.environ.get("LOCAL_WORLD_SIZE", "1")
    start = ["imcl-train"]
    if world != "1":
        start = ["torchrun", "--nproc-per-node", world, "-m", "imcl_fast.train"]
    return shlex.join([*start, *flags.command(replace(config, resume="auto"))])


if __name__ == "__main__":
    sys.exit(main())
