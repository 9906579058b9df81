"""The parent of the processes that measure: asks, waits, and starts another where one is lost."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[2]
COMMAND = (sys.executable, "-m", "bench.gpu.worker")


class Workers:
    """One worker at a time, started when first asked; ``command`` is given the descriptor of its
    end of a pipe, and what it prints goes into ``log``."""

    def __init__(self, log: IO[str], command: Sequence[str] = COMMAND) -> None:
        self.command, self.log = command, log
        self.running: tuple[subprocess.Popen, Connection] | None = None

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
            return {"failed": f"its process ended with exit status {process.returncode}; gpu.log "
                              "says more"}  # fmt: skip
        if said.pop("gone", False):
            self.close()
        return said

    def _start(self) -> tuple[subprocess.Popen, Connection]:
        pipe, theirs = Pipe()
        with theirs:
            process = subprocess.Popen(
                [*self.command, str(theirs.fileno())], cwd=ROOT, stdin=subprocess.DEVNULL,
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
