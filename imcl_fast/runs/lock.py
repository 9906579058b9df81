"""One process at a time in a folder: a lock that ends with the process that holds it.

The lock is the kernel's (``flock``), which a killed process can't leave behind and which
Linux's NFS passes on to the server; two hosts that mount a file system with locks of their
own (``local_lock``) don't see each other's. Where the file system has no locks the file's
word counts: of a process of this host it shows whether it still runs, one of another host
is taken to.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

NAME = ".lock"
SETTLING_SECONDS = 0.2

_descriptors: set[int] = set()


class Held(Exception):
    """The folder's lock is held; the message says by whom, in a few words."""


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[int]:
    """Hold the lock of ``folder``, which must be there, as long as the context lasts.

    Yields:
        The lock's file descriptor. A program that is started with it holds the lock too;
        a forked process doesn't.

    Raises:
        Held: another process holds it, or this one does already. Nothing has changed.
        OSError: the folder can't be written to.
    """
    path = folder.absolute() / NAME
    descriptor = _acquire(path)
    _descriptors.add(descriptor)
    try:
        yield descriptor
    finally:
        if descriptor in _descriptors:  # or this is a forked process
            _descriptors.remove(descriptor)
            _release(path, descriptor)


def _acquire(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        with contextlib.ExitStack() as refused:
            refused.callback(os.close, descriptor)
            locked = _lock(descriptor)
            # Or it was deleted by its holder since it was opened.
            if _is_at(descriptor, path):
                if not locked and _holder_runs(_read(descriptor)):
                    raise Held(f"{_holder(descriptor)}; delete {path} if that has ended")
                _write(descriptor, _this_process())
                if not locked:
                    # Of two that come at once, the one that wrote last.
                    time.sleep(SETTLING_SECONDS)
                    if _read(descriptor) != _this_process():
                        raise Held(_holder(descriptor))
                refused.pop_all()
                return descriptor


def _release(path: Path, descriptor: int) -> None:
    # Nothing is wrong if any of it fails: the file alone locks nothing, or says who it was.
    with contextlib.suppress(OSError, Held):
        os.close(descriptor)
        descriptor = os.open(path, os.O_RDWR)
        try:
            # Programs that were started with it may hold it still, and others may be quicker.
            mine = _lock(descriptor) or _read(descriptor) == _this_process()
            if mine and _is_at(descriptor, path):
                path.unlink()
        finally:
            os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Take the kernel's lock; False where there is none to take."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise Held(_holder(descriptor)) from error
        if error.errno in (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK):
            return False
        raise
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _this_process() -> dict[str, Any]:
    pid = os.getpid()
    return {"host": socket.gethostname(), "pid": pid, "began": _beginning(pid)}


def _beginning(pid: int) -> str | None:
    """What no other process of that number has, before a restart or after; None without one."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The name of the program, in brackets, may hold anything.
    return f"{boot} {stat.rpartition(')')[2].split()[19]}"


def _holder_runs(record: dict[str, Any]) -> bool:
    if not record:
        return False
    if record.get("host") != socket.gethostname() or not os.path.isdir("/proc/self"):
        return True
    return _beginning(record["pid"]) == record.get("began")


def _holder(descriptor: int) -> str:
    record = _read(descriptor)
    if not record:  # it is about to be written
        return "another process"
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(os.fstat(descriptor).st_mtime))
    return f"process {record['pid']} on {record['host']}, since {since}"


def _read(descriptor: int) -> dict[str, Any]:
    """The file's record; empty if there is none, or none that is whole."""
    os.lseek(descriptor, 0, os.SEEK_SET)
    try:
        record = json.loads(os.read(descriptor, 4096))
    except ValueError:
        return {}
    whole = isinstance(record, dict) and {"host", "pid"} <= set(record)
    return record if whole and isinstance(record["pid"], int) else {}


def _write(descriptor: int, record: dict[str, Any]) -> None:
    os.ftruncate(descriptor, 0)
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.write(descriptor, (json.dumps(record) + "\n").encode())


def _forget() -> None:
    for descriptor in _descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _descriptors.clear()


if fcntl is not None:
    # A data loader's process that outlives a killed run for a while must not hold its lock.
    os.register_at_fork(after_in_child=_forget)
