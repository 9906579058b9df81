"""Files that are either as they were or as they should be, whenever the machine stops."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .errors import DiskFullError

TEMPORARY = ".tmp"


def write(path: Path, content: bytes) -> None:
    """Replace ``path`` by ``content``: a temporary file beside it, synced, then renamed.

    Raises:
        DiskFullError: there is no room; ``path`` is as it was.
        OSError: it can't be written for another reason; ``path`` is as it was.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "there is no such folder", str(path.parent))
    with disk_full_named(path):
        temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        sync_folder(path.parent)


def deliver(path: Path, content: bytes) -> None:
    """``write`` to where a user wants it: through links, and straight into a pipe or a device."""
    if path.is_symlink():
        path = path.resolve()
    if path.exists() and not path.is_file():
        with disk_full_named(path), open(path, "wb") as file:
            file.write(content)
        return
    write(path, content)


def as_json(content: Any) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def write_json(path: Path, content: Any) -> None:
    """``write`` of ``content`` as JSON."""
    write(path, as_json(content))


def write_tensors(path: Path, content: Any) -> None:
    """``write`` of ``content`` as ``torch.save`` does it."""
    # By way of memory: torch's archive writer meets a full disk with more than one error.
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write(path, buffer.getvalue())


def replace_by_link(path: Path, target: Path) -> None:
    """Make ``path`` another name of the file ``target``, or a copy where links can't be."""
    temporary = path.with_name(f".{path.name}.link{TEMPORARY}")
    temporary.unlink(missing_ok=True)
    try:
        os.link(target, temporary)
    except OSError:
        write(path, target.read_bytes())
        return
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Have renames in ``folder`` reach the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_temporaries(folder: Path) -> None:
    """Delete what a killed ``write`` left behind, and nothing of other programs."""
    for path in folder.glob(f".*{TEMPORARY}"):
        if re.fullmatch(rf"\..+\.(\d+|link)\{TEMPORARY}", path.name):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def disk_full_named(path: Path) -> Iterator[None]:
    """Turn the system's "no space left" into one line about ``path``."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise DiskFullError(
            f"no room left on the disk to write {path}; what was there before is untouched. "
            "Free some space, then resume"
        ) from error
