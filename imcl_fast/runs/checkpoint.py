"""Checkpoints on disk: written whole or not at all, read without trusting them.

A checkpoint is what ``torch.save`` writes of tensors, numbers, strings and containers of
them. It is read with ``weights_only=True``, which runs no code of the file's, after the
checksums of its zip archive have been compared, which ``torch.load`` doesn't do.
"""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from . import files
from .errors import CheckpointError, UsageError

KIND = "imcl_fast checkpoint"
VERSION = 1
NAME = re.compile(r"step-(\d{8})\.pt")
BEST = "best.pt"


def save(path: Path, content: dict[str, Any]) -> None:
    """Write ``content``, tensors and plain Python values, as a checkpoint.

    Raises:
        DiskFullError, OSError: see ``files.write``.
    """
    files.write_tensors(path, {"kind": KIND, "version": VERSION, "content": content})


def load(path: Path) -> dict[str, Any]:
    """The ``content`` that was saved, its tensors on the CPU.

    Raises:
        CheckpointError: the file is missing, truncated, corrupt, of another format version,
            no checkpoint at all, or holds objects other than tensors and plain values.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if (damaged := archive.testzip()) is not None:
                raise CheckpointError(f"{path}: corrupt (checksum of {damaged!r})")
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: there is no such checkpoint") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: refused, for it holds objects other than tensors and plain values, which "
            "could run code; imcl_fast writes no such checkpoint"
        ) from error
    except zipfile.BadZipFile as error:
        raise CheckpointError(f"{path}: truncated, corrupt or no checkpoint ({error})") from error
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read ({error.strerror or error})") from error
    except Exception as error:  # a damaged archive can fail anywhere in torch.load
        reason = str(error).split("\n")[0] or type(error).__name__
        raise CheckpointError(f"{path}: truncated, corrupt or no checkpoint ({reason})") from error
    if not isinstance(stored, dict) or stored.get("kind") != KIND:
        raise CheckpointError(f"{path}: a file of torch, but no checkpoint of a training run")
    if stored.get("version") != VERSION:
        raise CheckpointError(
            f"{path}: has format version {stored.get('version')!r}, this imcl_fast reads "
            f"{VERSION}; use the imcl_fast that wrote it"
        )
    return stored["content"]


def check_state(state: Mapping[str, Any]) -> None:
    """Refuse what a module keeps as its extra state and ``load`` would refuse later.

    Raises:
        UsageError: an entry of ``state`` holds objects other than tensors and plain values.
    """
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            continue
        buffer = io.BytesIO()
        torch.save(value, buffer)
        buffer.seek(0)
        try:
            torch.load(buffer, weights_only=True)
        except pickle.UnpicklingError as error:
            raise UsageError(
                f"network: expected tensors, numbers and strings as its state, which a checkpoint "
                f"holds, got {type(value).__name__} with other objects as {name!r}"
            ) from error


class CheckpointStore:
    """The checkpoints of one run: ``step-00000123.pt`` and so on, and ``best.pt``.

    Args:
        folder: where they lie; made by the first ``save``.
        keep: how many of the newest to keep. The best is kept beside them.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    def paths(self) -> list[Path]:
        """The numbered checkpoints, newest first."""
        if not self.folder.is_dir():
            return []
        numbered = [path for path in self.folder.iterdir() if NAME.fullmatch(path.name)]
        return sorted(numbered, key=lambda path: path.name, reverse=True)

    def save(self, step: int, content: dict[str, Any], *, best: bool = False) -> Path:
        """Write the checkpoint of ``step``, then delete those too many, and those of later steps:
        that the run is at this one says that they can't be read.

        Raises:
            DiskFullError, OSError: it can't be written; those there are stay.
        """
        with files.disk_full_named(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step-{step:08d}.pt"
        save(path, content)
        if best:
            files.replace_by_link(self.folder / BEST, path)
        there = self.paths()
        kept = [one for one in there if one.name <= path.name][: self.keep]
        for other in there:
            if other not in kept:
                other.unlink(missing_ok=True)
        return path

    def load_newest(self, warn: Callable[[str], None]) -> dict[str, Any] | None:
        """The newest checkpoint that can be read; None if there is none at all.

        Args:
            warn: called with a line about each newer one that can't be read.

        Raises:
            CheckpointError: there are some, and none can be read.
        """
        if self.folder.is_dir():
            files.remove_temporaries(self.folder)
        paths = self.paths()
        for path in paths:
            try:
                return load(path)
            except CheckpointError as error:
                warn(f"{error}; trying the one before it")
        if paths:
            raise CheckpointError(
                f"{self.folder}: none of the {len(paths)} checkpoints can be read (see above); "
                "to train anew, name another --run-dir or move this one away"
            )
        return None
