"""The tests on the GPU: test_gpu.py, then the others in many processes, then the sanitizers."""

from __future__ import annotations

import collections
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from imcl_fast.implementations import why_not

from .workers import ROOT

PLUGINS = ("bench.gpu.selection",)
FILES = tuple(
    f"tests/test_{name}.py"
    for name in (
        "triton", "pairwise", "consistency", "dependence", "autograd", "exactness", "compile",
        "modules", "validation",
    )
)  # fmt: skip
_OUTCOME = re.compile(r"^\S+::.* (PASSED|FAILED|SKIPPED|ERROR|XFAIL)\b", re.MULTILINE)


def processes() -> int:
    """Most of a test's time goes into compiling, on one core."""
    return max(1, min(12, (os.cpu_count() or 1) - 2))


def run(
    out: Path, seconds: float, save: Callable[[dict[str, Any]], None],
    plugins: Sequence[str] = PLUGINS, files: Sequence[str] = FILES, parts: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """What became of each process, in its log in ``out`` and in ``save`` as it ends."""
    deadline = time.monotonic() + seconds
    found: dict[str, Any] = {}

    def add(name: str, result: dict[str, Any]) -> None:
        found[name] = result
        print(f"tests, {name}: {_sentence(result)}", flush=True)
        save(found)

    # What runs alone first: it is short, and says whether anything works at all.
    first = {"test_gpu": _pytest(plugins, ["tests/test_gpu.py"])}
    for name, result in _all(first, out, time.monotonic() + seconds / 3):
        add(name, result)
    parts = parts or processes()
    others = {
        f"part {i} of {parts}": _pytest(plugins, files, f"{i}/{parts}") for i in range(parts)
    }
    for name, result in _all(others, out, deadline):
        add(name, result)
    sanitizer = shutil.which("compute-sanitizer")
    few = _pytest(plugins, ["tests/test_gpu.py", "-x", "-k", "repeat and cuda"])
    for kind in ("memcheck", "racecheck"):
        reason = why_not("cuda", "cuda") if sanitizer else "no compute-sanitizer on this machine"
        if sanitizer is None or reason is not None:
            add(kind, {"left_out": reason})
            continue
        command = [sanitizer, "--tool", kind, "--error-exitcode", "9", *few[0]], few[1]
        for name, result in _all({kind: command}, out, deadline):
            add(name, result)
    return found


_Command = tuple[list[str], dict[str, str]]


def _pytest(plugins: Sequence[str], what: Sequence[str], part: str = "0/1") -> _Command:
    """Arguments and environment. The project's own options name plugins that may be absent."""
    arguments = [sys.executable, "-m", "pytest", "-v", "-ra", "-o", "addopts=", "--strict-markers",
                 "-p", "no:cacheprovider"]  # fmt: skip
    for plugin in plugins:
        arguments += ["-p", plugin]
    return [*arguments, *what], {"IMCL_FAST_PART": part, "PYTHONPATH": _path()}


def _path() -> str:
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))


def _all(
    commands: dict[str, _Command], out: Path, deadline: float
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Runs all of them at once; each when it has ended, by itself or at the deadline."""
    running = {}
    for name, (arguments, environment) in commands.items():
        log = out / f"{name.replace(' ', '-')}.log"
        with log.open("w") as file:
            process = subprocess.Popen(
                arguments, cwd=ROOT, env={**os.environ, **environment}, stdout=file,
                stderr=subprocess.STDOUT,
            )  # fmt: skip
        running[name] = process, log
    while running:
        late = time.monotonic() >= deadline
        for name, (process, log) in list(running.items()):
            code: int | str | None = process.poll()
            if code is None and late:
                process.kill()
                process.wait()
                code = "stopped: its time was over"
            if code is not None:
                del running[name]
                yield name, _result(code, log.read_text(errors="replace"))
        time.sleep(0.1)


def _result(code: int | str, said: str) -> dict[str, Any]:
    outcomes = collections.Counter(word.lower() for word in _OUTCOME.findall(said))
    failed = [line for line in said.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    result: dict[str, Any] = {"exit": code, "outcomes": dict(outcomes), "failed": failed}
    if isinstance(code, str):
        result["last_line"] = (said.strip().splitlines() or [""])[-1]
    return result


def _sentence(result: dict[str, Any]) -> str:
    if "left_out" in result:
        return f"left out: {result['left_out']}"
    counts = ", ".join(f"{n} {word}" for word, n in sorted(result["outcomes"].items()))
    return f"exit {result['exit']}: {counts or 'no tests'}"


def failures(found: dict[str, Any]) -> list[str]:
    """Names of what didn't end well; a process that found no test to run did not."""
    return [n for n, one in found.items() if "left_out" not in one and one["exit"] != 0]
