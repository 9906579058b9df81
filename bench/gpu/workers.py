"""The parent of the processes that measure: asks, waits, and starts another where one is lost."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[2]
COMMAND = (sys.executable, "-m", "bench.gpu.worker")
DEBUGGERS = ("gdb", "cuda-gdb", "/usr/local/cuda/bin/cuda-gdb")
STACKS = ("-batch", "-ex", "run", "-ex", "bt", "-ex", "thread apply all bt 12", "--args")
TRACED = 60.0  # seconds that a second run may take, for where the first one crashed


class Workers:
    """One worker at a time, started when first asked; ``command`` is given the descriptor of its
    end of a pipe, and what it prints goes into ``log``."""

    def __init__(self, log: IO[str], command: Sequence[str] = COMMAND) -> None:
        self.command, self.log = command, log
        self.running: tuple[subprocess.Popen, Connection] | None = None
        self.debugger = next(filter(None, map(shutil.which, DEBUGGERS)), None)

    def ask(self, seconds: float, **what: Any) -> dict[str, Any]:
        """``{"found": its answer}``, or ``{"failed": why}`` also where it hangs longer than that
        or dies."""
        process, pipe = self.running = self.running or self._start()
        try:
            pipe.send(what)
            if not pipe.poll(seconds):
                process.kill()
                self.close()
                return {"failed": f"no answer within {seconds:.0f} s: its process was ended"}
            said = pipe.recv()
        except (EOFError, OSError):
            self.close()
            if process.returncode < 0:
                self._trace(min(seconds, TRACED), what)
            return {"failed": f"its process ended with exit status {process.returncode}; gpu.log "
                              "says more"}  # fmt: skip
        if said.pop("gone", False):
            self.close()
        return said

    def _trace(self, seconds: float, what: dict[str, Any]) -> None:
        """Once for all crashes: ask again under a debugger, which says in the log where it was."""
        if self.debugger is None:
            return
        process, pipe = self.running = self._start(self.debugger, *STACKS)
        self.debugger = None
        with contextlib.suppress(EOFError, OSError):
            pipe.send(what)
            pipe.poll(seconds)  # until it has ended, as it did before
        if process.poll() is None:
            process.kill()
        self.close()

    def _start(self, *under: str) -> tuple[subprocess.Popen, Connection]:
        pipe, theirs = Pipe()
        with theirs:
            process = subprocess.Popen(
                [*under, *self.command, str(theirs.fileno())], cwd=ROOT, stdin=subprocess.DEVNULL,
                stdout=self.log, stderr=self.log, pass_fds=[theirs.fileno()],
            )  # fmt: skip
        return process, pipe

    def close(self) -> None:
        if self.running is not None:
            process, pipe = self.running
            pipe.close()  # which ends it
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            self.running = None
