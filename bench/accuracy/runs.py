"""Runs what is left of a study, each run a process of its own that goes on where it stopped."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from imcl_fast.runs import flags, lock
from imcl_fast.runs.folder import CHECKPOINTS, Run, UnreadableRun, read_run
from imcl_fast.training.interruption import Interruption

from .progress import Progress
from .results import Store, of_run
from .study import PlannedRun, Study

TRAIN = (sys.executable, "-m", "imcl_fast.train")
FORMED = (sys.executable, "-m", "bench.accuracy.kernel_forms")
STDERR, SECONDS = "stderr.txt", "seconds.txt"
LAST_LINES = 5
POLL_SECONDS = 0.1


class Busy(Exception):
    """Another process runs the same study in the same folder."""


@dataclass(frozen=True)
class Options:
    """How runs are run.

    Attributes:
        folder: for the run folders.
        data_root, download: as of ``imcl-train``.
        jobs: runs at a time.
        threads: CPU threads of each.
        minutes: after which no more are started; None for no limit.
        train: the command that takes the flags of ``imcl-train``.
    """

    folder: Path
    data_root: Path | None
    download: bool
    jobs: int
    threads: int
    minutes: float | None = None
    train: Sequence[str] = TRAIN


@dataclass(frozen=True)
class Child:
    """A run under way."""

    planned: PlannedRun
    folder: Path
    process: subprocess.Popen
    start: float


def shares(study: Study, jobs: int | None, threads: int | None) -> tuple[int, int]:
    """Runs at a time, and threads of each: as asked for, else as the study has it, else all cores
    are shared out to runs of one thread each. A GPU is given to one run at a time."""
    cores = getattr(os, "process_cpu_count", os.cpu_count)() or 1  # the former from 3.13 on
    on_cpu = study.runs[0].config.device == "cpu" or not torch.accelerator.is_available()
    threads = threads or study.threads
    jobs = jobs or study.jobs or (max(cores // (threads or 1), 1) if on_cpu else 1)
    return jobs, threads or max(cores // jobs, 1)


def run_folder(folder: Path, planned: PlannedRun) -> Path:
    """Where a run lies; with other settings it lies elsewhere, for a folder holds one run."""
    return folder / f"{planned.name}-{planned.fingerprint}"


def flags_of(planned: PlannedRun, options: Options) -> list[str]:
    """The flags of ``imcl-train`` for a run."""
    config = replace(
        planned.config,
        run_dir=run_folder(options.folder, planned),
        data_root=options.data_root,
        download=options.download,
        threads=options.threads,
        resume="auto",
        tensorboard=False,
        report=False,
        measure_ways=False,
    )
    return flags.command(config)


def execute(
    study: Study, pending: Sequence[PlannedRun], store: Store, options: Options, progress: Progress
) -> int:
    """Run ``pending``, and put what each gives into ``store`` as soon as it has ended.

    SIGINT and SIGTERM have the runs that are under way save themselves and stop.

    Returns:
        An exit status: 0, also if time was up; 1 if a run failed; 128 and the signal's number.

    Raises:
        Busy: the study is being run already.
        DiskFullError: the results can't be written.
    """
    options.folder.mkdir(parents=True, exist_ok=True)
    with locked(options.folder) as lock, Interruption() as interruption:
        return _Execution(study, store, options, progress, lock).run(pending, interruption)


@dataclass
class _Execution:
    study: Study
    store: Store
    options: Options
    progress: Progress
    lock: int
    failed: bool = False

    def run(self, pending: Sequence[PlannedRun], interruption: Interruption) -> int:
        waiting, children = deque(pending), list[Child]()
        minutes = math.inf if self.options.minutes is None else self.options.minutes
        end = time.monotonic() + 60 * minutes
        told = False
        try:
            while children or waiting:
                if interruption.signal and not told:
                    self.progress.said("stopping: runs under way are saving themselves")
                    for child in children:
                        child.process.terminate()
                    told = True
                    waiting.clear()
                if waiting and time.monotonic() > end:
                    self.progress.said(f"time is up: {len(waiting)} runs are left for later")
                    waiting.clear()
                while waiting and len(children) < self.options.jobs:
                    planned = waiting.popleft()
                    folder = run_folder(self.options.folder, planned)
                    # Ended, but for its row, when this program was killed.
                    run = _finished(folder)
                    if run is not None:
                        self._record(planned, run)
                    else:
                        children.append(self._start(planned, folder))
                for child in [c for c in children if c.process.poll() is not None]:
                    children.remove(child)
                    self._ended(child, told)
                if children:
                    time.sleep(POLL_SECONDS)
        finally:
            for child in children:
                child.process.terminate()
        if interruption.signal:
            return 128 + interruption.signal
        return 1 if self.failed else 0

    def _start(self, planned: PlannedRun, folder: Path) -> Child:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / STDERR, "wb") as stderr:
            process = subprocess.Popen(
                [*self._command(planned), *flags_of(planned, self.options)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # the run folder has a log
                stderr=stderr,
                # The terminal's Ctrl-C would reach a run twice, and the second kills it.
                process_group=0,
                # As long as a run is under way the study is locked, whatever comes of this process.
                pass_fds=[self.lock],
            )
        return Child(planned, folder, process, time.monotonic())

    def _command(self, planned: PlannedRun) -> Sequence[str]:
        return (*FORMED, planned.form) if planned.form else self.options.train

    def _ended(self, child: Child, told: bool) -> None:
        with open(child.folder / SECONDS, "a", encoding="utf-8") as file:
            file.write(f"{time.monotonic() - child.start:.1f}\n")
        code = child.process.returncode
        run = _finished(child.folder)
        if code == 0 and run is not None:
            self._record(child.planned, run)
        elif not told:
            self.failed = True
            stderr = (child.folder / STDERR).read_text(encoding="utf-8", errors="replace")
            why = f"ended by signal {-code}" if code < 0 else f"exit status {code}"
            lines = [f"{child.planned.name} failed: {why}", *stderr.splitlines()[-LAST_LINES:]]
            self.progress.failed("\n  ".join(lines))

    def _record(self, planned: PlannedRun, run: Run) -> None:
        result = of_run(
            self.study.name,
            planned,
            run,
            seconds=_seconds(run.folder),
            threads=self.options.threads,
            jobs=self.options.jobs,
        )
        self.store.add(result)
        # Of all that a run leaves they are the most, and nothing goes on from them.
        shutil.rmtree(run.folder / CHECKPOINTS, ignore_errors=True)
        self.progress.finished(result)


def state(folder: Path) -> str:
    """What there is of a run that isn't among the results: ``started`` or ``to do``."""
    return "started" if (folder / CHECKPOINTS).is_dir() else "to do"


def _finished(folder: Path) -> Run | None:
    try:
        run = read_run(folder)
    except UnreadableRun:
        return None
    return run if run.finished else None


def _seconds(folder: Path) -> float:
    """How long the run took in all its parts."""
    path = folder / SECONDS
    return sum(map(float, path.read_text().split())) if path.exists() else 0.0


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Hold a lock that ends with the last process that has its file open."""
    with contextlib.ExitStack() as stack:
        try:
            descriptor = stack.enter_context(lock.hold(folder))
        except lock.Held as error:
            raise Busy(
                f"{folder}: in use by another python -m bench.accuracy ({error}), or by runs that "
                "one has started and that are still stopping; wait for them, or end them"
            ) from error
        yield descriptor
