"""What a run writes into its folder beside checkpoints: configuration, tables, TensorBoard."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..machine import processor
from ..runs import files, lock
from ..runs.checkpoint import BEST, CheckpointStore
from ..runs.config import TrainConfig
from ..runs.errors import UsageError
from ..runs.folder import (
    CHECKPOINTS,
    CONFIG,
    METRICS,
    NOISE,
    STEPS,
    SUMMARY,
    TENSORBOARD,
    USED,
)  # fmt: skip

# What is written after the configuration, and anew when a run begins again.
WRITTEN_LATER = (METRICS, STEPS, SUMMARY, NOISE, USED)
# Of the summary: what only the process that trained can measure.
MEASURED_ONCE = ("peak_memory_bytes", "peak_memory_of", "way_seconds")


class Records:
    """The files of a run folder, written by one process.

    Args:
        folder: of the run, which ``claim`` holds.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._steps: Any = None
        self._writer: Any = None
        self._board: Any = None

    @staticmethod
    @contextlib.contextmanager
    def claim(folder: Path, config: TrainConfig) -> Iterator[None]:
        """Make ``folder`` if it isn't there, and see that it has no other run in it, nor gets
        one as long as the context lasts.

        Raises:
            UsageError: it can't be made, another process trains in it, or it holds a run that
                ``config`` doesn't go on with.
        """
        with contextlib.ExitStack() as stack:
            try:
                with files.disk_full_named(folder):
                    folder.mkdir(parents=True, exist_ok=True)
                    stack.enter_context(lock.hold(folder))
                Records._check(folder, config)
            except OSError as error:
                raise UsageError(
                    f"run_dir: can't use {folder}: {error.strerror or error}"
                ) from error
            except lock.Held as error:
                raise UsageError(
                    f"run_dir: a run is going on in {folder} ({error}); wait for it or stop it, "
                    "then --resume auto goes on with it, or name another folder"
                ) from error
            yield

    @staticmethod
    def _check(folder: Path, config: TrainConfig) -> None:
        if not (folder / CONFIG).exists():
            if any((folder / CHECKPOINTS).glob("*.pt")):
                raise UsageError(
                    f"run_dir: {folder} has checkpoints but no {CONFIG}; name another folder"
                )
            others = [name for name in WRITTEN_LATER if (folder / name).exists()]
            if others:
                raise UsageError(
                    f"run_dir: {folder} has {' and '.join(others)} but no {CONFIG}, so no run made "
                    "them, and one would overwrite them; name another folder"
                )
            return
        try:
            existing = TrainConfig.read(folder / CONFIG)
        except (TypeError, ValueError) as error:
            raise UsageError(f"run_dir: {folder} holds a run of another kind ({error})") from error
        if config.resume != "auto":
            raise UsageError(
                f"run_dir: {folder} already holds a run; --resume auto goes on with it, or name "
                "another folder"
            )
        if not CheckpointStore(folder / CHECKPOINTS, config.keep).paths():
            left = [name for name in (SUMMARY, f"{CHECKPOINTS}/{BEST}") if (folder / name).exists()]
            if left:
                raise UsageError(
                    f"resume: {folder} has {' and '.join(left)} of a run, but none of its "
                    "checkpoints to go on from, and to train anew would overwrite them; name "
                    "another folder"
                )
        names = existing.differences(config)
        if names == ["epochs"] and (folder / SUMMARY).exists() and config.epochs > existing.epochs:
            return  # a run that has ended, and is to go on
        if names:
            changed = ", ".join(
                f"{name} (was {_said(getattr(existing, name))}, is {_said(getattr(config, name))})"
                for name in names
            )
            raise UsageError(
                f"resume: {folder} was run with other settings: {changed}"
                + ("; more epochs can be had once it has ended" if names == ["epochs"] else "")
            )

    def begin(
        self, config: TrainConfig, used: Mapping[str, Any], noise: Mapping[str, torch.Tensor] | None
    ) -> None:
        """Write what is known before the first step, and leave nothing of an earlier start.

        Args:
            used: what ``Run.used`` is.
            noise: labels to keep.
        """
        files.remove_temporaries(self.folder)
        for name in WRITTEN_LATER:
            (self.folder / name).unlink(missing_ok=True)
        self.json(CONFIG, {**config.as_json(), "versions": versions(), "machine": machine()})
        self.json(USED, used)
        if noise is not None:
            self.tensors(NOISE, noise)

    def extend(self, config: TrainConfig) -> None:
        """Write down that the run goes on for more epochs than it had, if it does."""
        content = json.loads((self.folder / CONFIG).read_text(encoding="utf-8"))
        if content["epochs"] != config.epochs:
            self.json(CONFIG, {**content, "epochs": config.epochs})
            (self.folder / SUMMARY).unlink(missing_ok=True)

    def measured_before(self) -> dict[str, Any]:
        """What the summary of the run, if it has one, says that can't be measured any more."""
        try:
            summary = json.loads((self.folder / SUMMARY).read_text(encoding="utf-8"))
            return {key: summary[key] for key in MEASURED_ONCE if key in summary}
        except (OSError, ValueError, TypeError):  # it is written anew
            return {}

    def go_on(self, step: int, rows: Sequence[Mapping[str, Any]]) -> str | None:
        """Make the tables what they were after ``step``, when ``rows`` were complete.

        Returns:
            A line about what was damaged in ``steps.csv``, which alone is made from itself and
            not from ``rows``; None if nothing was.
        """
        files.remove_temporaries(self.folder)
        if rows:
            self._write_metrics(rows)
        else:
            (self.folder / METRICS).unlink(missing_ok=True)
        return self._keep_steps_until(step)

    def metrics(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """Write the rows of all epochs, the last of which ended with ``step``."""
        self._write_metrics(rows)
        self._show("epoch", rows[-1], step)

    def _write_metrics(self, rows: Sequence[Mapping[str, Any]]) -> None:
        # The whole file, so that it never has half a row, or one twice.
        text = io.StringIO()
        # The row of an epoch without measurements, or without a way's turn, gets empty cells.
        columns = dict.fromkeys(name for row in sorted(rows, key=len)[::-1] for name in row)
        writer = csv.DictWriter(text, list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        files.write(self.folder / METRICS, text.getvalue().encode())

    def _keep_steps_until(self, step: int) -> str | None:
        """Drop the rows of ``steps.csv`` that come after ``step``: they will come again."""
        path = self.folder / STEPS
        if not path.exists():
            return None
        content = path.read_bytes()
        # What comes after the last line's end may be half a line.
        header, *lines = content.split(b"\n")[:-1] or [b""]
        if not (header.startswith(b"step,") and header.isascii()):
            header = b""
        rows = [(line, _step_of(line, header)) for line in lines]
        kept = [line for line, number in rows if number is not None and number <= step]
        if header:
            kept.insert(0, header)
        files.write(path, b"".join(line + b"\n" for line in kept))
        damaged = [number for _, number in rows].count(None)
        if not damaged:
            return None
        aside = path.with_name(f"{STEPS}.damaged")
        files.write(aside, content)
        return f"{path}: {damaged} damaged lines are left out; the file as it was is {aside}"

    def step(self, row: Mapping[str, Any]) -> None:
        """Append a row to ``steps.csv``, and a column for each value that is new in it."""
        path = self.folder / STEPS
        with files.disk_full_named(path):
            if self._steps is None or not row.keys() <= set(self._writer.fieldnames):
                self._open_steps(path, row)
            self._writer.writerow(row)
            self._steps.flush()
        values = {name: value for name, value in row.items() if name not in ("step", "epoch")}
        self._show("step", values, row["step"])

    def _open_steps(self, path: Path, row: Mapping[str, Any]) -> None:
        """Open ``steps.csv`` with columns for ``row``; new ones are empty in the rows there are."""
        self._close_steps()
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        header, *rows = text.splitlines() or [""]
        columns = header.split(",") if header else []
        new = [name for name in row if name not in columns]
        if new:
            lines = [",".join(columns + new), *(line + "," * len(new) for line in rows)]
            files.write(path, ("\n".join(lines) + "\n").encode())
        self._steps = open(path, "a", encoding="utf-8", newline="")  # noqa: SIM115
        self._writer = csv.DictWriter(self._steps, columns + new, lineterminator="\n")

    def sync(self) -> None:
        """Have ``steps.csv`` reach the disk, before the checkpoint that it must not lag."""
        if self._steps is not None:
            with files.disk_full_named(self.folder / STEPS):
                os.fsync(self._steps.fileno())

    def json(self, name: str, content: Any) -> None:
        """Write ``content`` to the file called ``name``."""
        files.write_json(self.folder / name, content)

    def open_board(self, purge_step: int) -> bool:
        """Start TensorBoard's files, from which what came after ``purge_step`` is taken out.

        Returns:
            False, with nothing done, if TensorBoard isn't installed.
        """
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return False
        self._board = SummaryWriter(str(self.folder / TENSORBOARD), purge_step=purge_step + 1)
        return True

    def _show(self, group: str, values: Mapping[str, Any], step: int) -> None:
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(f"{group}/{name}", value, step)

    def tensors(self, name: str, tensors: Mapping[str, Any]) -> None:
        """Write ``tensors``, and a state's plain values, to the file called ``name``, for
        ``torch.load``."""
        on_cpu = {
            key: value.cpu() if isinstance(value, torch.Tensor) else value
            for key, value in tensors.items()
        }
        files.write_tensors(self.folder / name, on_cpu)

    def _close_steps(self) -> None:
        if self._steps is not None:
            self._steps.close()
            self._steps = None

    def close(self) -> None:
        """Close what is open."""
        self._close_steps()
        if self._board is not None:
            self._board.close()
            self._board = None


def _said(setting: Any) -> str:
    return "left out" if setting is None else str(setting)


def _step_of(line: bytes, header: bytes) -> int | None:
    """The step that a row of ``steps.csv`` is of; None if it isn't a whole row."""
    cells = line.split(b",")
    if not header or len(cells) != len(header.split(b",")):
        return None
    try:
        for cell in filter(None, cells):  # empty where a way's turn was still to come
            float(cell)
        return int(cells[0])
    except ValueError:
        return None


def versions() -> dict[str, str | None]:
    """What a result was made with."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "imcl_fast": __version__,
        "commit": _commit(),
    }


def machine() -> dict[str, Any]:
    """What a result was made on."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    name = None
    if accelerator is not None and accelerator.type == "cuda":
        name = torch.cuda.get_device_name()
    elif accelerator is not None:
        name = accelerator.type
    return {
        "system": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "accelerator": name,
    }


def _commit() -> str | None:
    """The commit this package was checked out at; None if it is not in its repository."""
    package = Path(__file__).parents[1]
    command = ["git", "rev-parse", "--show-toplevel", "HEAD"]
    try:
        result = subprocess.run(
            command, cwd=package, capture_output=True, text=True, timeout=10, check=True
        )
        top, commit = result.stdout.split("\n")[:2]
        # Installed into an environment inside another repository, its commit says nothing.
        return commit if (Path(top) / package.name).samefile(package) else None
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
