"""The parent of the processes that measure: asks, waits, and starts another where one is lost."""

from __future__ import annotations

import contextlib
import json
import selectors
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[2]
COMMAND = (sys.executable, "-m", "bench.gpu.worker")


class Workers:
    """One worker at a time, started when first asked."""

    def __init__(self, log: IO[str], command: Sequence[str] = COMMAND) -> None:
        self.command, self.log = command, log
        self.process: subprocess.Popen[bytes] | None = None

    def ask(self, seconds: float, **what: Any) -> dict[str, Any]:
        """Its answer, or ``{"failed": why}`` where it hangs longer than that or dies."""
        if self.process is None:
            self.process = subprocess.Popen(
                self.command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=self.log,
            )  # fmt: skip
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(json.dumps(what).encode() + b"\n")
            self.process.stdin.flush()
            line = _line(self.process.stdout, seconds)
        except BrokenPipeError:
            line = b""
        if line is None:
            self.process.kill()
            self.close()
            return {"failed": f"no answer within {seconds:.0f} s: its process was ended"}
        if not line:
            code = self.process.wait()
            self.close()
            return {"failed": f"its process ended with exit status {code}; gpu.log says more"}
        said = json.loads(line)
        if said.pop("gone", False):
            self.close()
        if "traceback" in said:
            self.log.write(f"{what}\n{said.pop('traceback')}\n")
            self.log.flush()
        return said

    def close(self) -> None:
        if self.process is not None:
            assert self.process.stdin
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()  # which ends it
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            self.process = None


def _line(stream: IO[bytes], seconds: float) -> bytes | None:
    """The next line, b"" at the end, None if it doesn't come in time. One line is due at most."""
    deadline = time.monotonic() + seconds
    said = b""
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        while not said.endswith(b"\n"):
            if not selector.select(max(deadline - time.monotonic(), 0)):
                return None
            some = stream.read1(2**16)  # type: ignore[attr-defined]
            if not some:
                return b""
            said += some
    return said
