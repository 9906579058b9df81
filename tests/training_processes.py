"""imcl-train in processes of their own, which tests may kill.

They are forked from a server that has imported everything: a process then starts in
milliseconds, and is otherwise what the command line would start.
"""

from __future__ import annotations

import csv
import multiprocessing
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from imcl_fast import TrainConfig

CONTEXT = multiprocessing.get_context("forkserver")
# The compiler, for torchvision imports it, and takes longest to.
CONTEXT.set_forkserver_preload(
    ["imcl_fast.train", "sklearn.datasets", "sklearn.model_selection", "torch._dynamo"]
)
# Columns whose values depend on the machine's speed.
TIMES = ("seconds", "images_per_second", "data_seconds")
# Those of the four ways, as the columns of a table are called.
TERMS = [
    "cross_entropy",
    "output_consistency",
    "multilayer_consistency",
    "representation_similarity",
    "kernel_similarity",
]
# Small enough for a run to take a second, on real digits.
SMALL = (
    "--width", "2", "--train-images", "160", "--batch-size", "20", "--epochs", "3",
    "--label-noise", "0.5", "--threads", "1", "--log-every", "1",
    "--no-report", "--no-measure-ways", "--no-tensorboard",
)  # fmt: skip


def config(**settings) -> TrainConfig:
    """Of a run in this process that is as small."""
    small = {"width": 2, "train_images": 200, "batch_size": 50, "epochs": 1, "device": "cpu",
             "tensorboard": False, "report": False, "measure_ways": False}  # fmt: skip
    return TrainConfig(**{**small, **settings})


class Command:
    """imcl-train under way, in one process or in as many as torchrun would start."""

    def __init__(self, flags: Sequence[str], folder: Path, ranks: int = 1) -> None:
        folder.mkdir(exist_ok=True)
        self.outputs = [(folder / f"out-{rank}", folder / f"err-{rank}") for rank in range(ranks)]
        port = str(_free_port())
        self.processes = []
        for rank, (out, err) in enumerate(self.outputs):
            variables = {}
            if ranks > 1:
                variables = {
                    "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
                    "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": port,
                }  # fmt: skip
            process = CONTEXT.Process(target=_main, args=(list(flags), out, err, variables))
            process.start()
            self.processes.append(process)

    def kill(self, number: int = signal.SIGKILL, rank: int | None = None) -> None:
        """Send a signal to one process, or to all; one that has ended gets none."""
        for process in self.processes if rank is None else [self.processes[rank]]:
            if process.is_alive():
                os.kill(process.pid, number)

    def wait(self, seconds: float = 120) -> int:
        """The exit code of the first process, once all have ended."""
        end = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(end - time.monotonic(), 0))
        if self.running:
            self.kill()
            raise AssertionError(f"still running after {seconds} s")
        return self.processes[0].exitcode

    @property
    def running(self) -> bool:
        return any(process.is_alive() for process in self.processes)

    @property
    def out(self) -> str:
        return self.outputs[0][0].read_text()

    @property
    def err(self) -> str:
        return self.outputs[0][1].read_text()


def wait_for(condition, seconds: float = 60) -> None:
    """Return as soon as ``condition()`` is true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it didn't happen"
        time.sleep(0.005)


def checkpoints(run: Path) -> list[Path]:
    """The numbered ones, oldest first."""
    return sorted((run / "checkpoints").glob("step-*.pt"))


def table(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def results(run: Path) -> dict:
    """What must not depend on whether, and when, a run was interrupted."""
    rows = table(run / "metrics.csv")
    last = torch.load(checkpoints(run)[-1], weights_only=True)["content"]
    return {
        "network": torch.load(run / "network.pt", weights_only=True),
        "metrics": [{k: v for k, v in row.items() if k not in TIMES} for row in rows],
        "steps": (run / "steps.csv").read_text(),
        "objective": last["objective"],
        "optimizer": last["optimizer"]["state"],
        "averaged": last["averaged"],
        "random": [share["random"]["torch"] for share in last["processes"]],
    }


def assert_identical(run: Path, other: Path) -> None:
    """Both runs ended with the same weights and tables, bit for bit, and nothing else."""
    first, second = results(run), results(other)
    assert_same(first, second)
    names = [{str(path.relative_to(folder)) for path in folder.rglob("*")}
             for folder in (run, other)]  # fmt: skip
    assert names[0] == names[1]


def assert_same(a: object, b: object, where: str = "") -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


def resume_flags(err: str) -> list[str]:
    """The flags of the command that an interrupted run says it goes on with."""
    line = re.search(r"go on with: (.*)", err).group(1)
    return line.split(" imcl_fast.train " if "torchrun" in line else "imcl-train ")[1].split()


def _main(flags: list[str], out: Path, err: Path, variables: dict[str, str]) -> None:
    os.environ.update(variables)
    for stream, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server ignores it
    from imcl_fast import train

    sys.exit(train.main(flags))


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
