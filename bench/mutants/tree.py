"""A copy of the tree, in which a line is changed, built and tested, and put back."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from .mutant import ROOT, Mutant, Tests

LEFT_OUT = (".*", "build", "dist", "__pycache__", "*.egg-info")
RUNS = "runs"  # imcl-train's folder, at the top; the package has one of this name
# What the tests' environment has, and what of the user's it has not.
ENVIRONMENT = {
    "PYTHONDONTWRITEBYTECODE": "1",  # a change within a second, of as many bytes, must be seen
    "OMP_WAIT_POLICY": "passive",
    "CUDA_VISIBLE_DEVICES": "",  # the mutants of GPU kernels run on the CPU
    "IMCL_FAST_BUILD": "cpu",
}
NOT_THE_USERS = ("TRITON_INTERPRET", "CUDA_ON_CPU", "PYTEST_ADDOPTS")

KILLED, SURVIVED, BROKEN, TIMEOUT = "killed", "survives", "does not run", "timeout"


class Outcome(NamedTuple):
    """What became of a mutant, or of the tests without one.

    Attributes:
        verdict: one of the above; "does not run" is a mutant that doesn't compile, or that no
            test could even be collected with.
        by: the test that failed, or of what doesn't run the last lines it said.
        seconds: what it took.
    """

    verdict: str
    by: str
    seconds: float


class Tree:
    """A copy of the tree at ``root`` in ``folder``, where tests are run.

    Args:
        level: the ISA level to build at.
    """

    def __init__(self, root: Path, folder: Path, level: str) -> None:
        self.folder, self._level = folder, level
        self._process: subprocess.Popen | None = None
        everywhere = shutil.ignore_patterns(*LEFT_OUT)

        def left_out(path: str, names: list[str]) -> set[str]:
            at_the_top = {RUNS} if Path(path) == root else set()
            return everywhere(path, names) | at_the_top & set(names)

        shutil.copytree(root, folder, symlinks=True, ignore=left_out)
        objects = root / "build/objects"
        if objects.is_dir():  # but not ninja's log: there they are of other files
            shutil.copytree(objects, folder / "build/objects",
                            ignore=shutil.ignore_patterns(".ninja*"))  # fmt: skip
        (folder / "build").mkdir(exist_ok=True)  # where the tests' files go
        self._stale = True  # what is compiled, for mutants that are
        self._spoilt = False  # by such a mutant, for all others too

    def test(self, tests: Tests, seconds: float | None, compiled: bool = True) -> Outcome:
        """Build if that is due, of a mutant that isn't ``compiled`` only after one that was, and
        run ``tests`` for at most ``seconds``."""
        start = time.monotonic()

        def outcome(verdict: str, by: str = "") -> Outcome:
            return Outcome(verdict, by, time.monotonic() - start)

        if self._spoilt or (compiled and self._stale):
            code, said = self._run([sys.executable, "-m", "bench.mutants.build", self._level])
            if code:
                return outcome(BROKEN, _last_lines(said))
            self._stale = self._spoilt = False
        plugins = ["-p", "no:cacheprovider", "-p", "bench.mutants.unshrunk"]
        code, said = self._run(
            [sys.executable, "-m", "pytest", "-x", "-q", *plugins,
             f"--basetemp={self.folder / 'build/pytest'}", *tests.arguments],
            dict(tests.environment), seconds,
        )  # fmt: skip
        if code is None:
            return outcome(TIMEOUT)
        if code == 0:
            return outcome(SURVIVED)
        if code < 0:
            return outcome(KILLED, "a crash")
        failed = re.search(r"^(?:FAILED|ERROR) \S+::(\w+)", said, re.MULTILINE)
        if code == 1 and failed:
            return outcome(KILLED, failed[1])
        return outcome(BROKEN, _last_lines(said))

    def try_out(self, mutant: Mutant, limits: dict[Tests, float]) -> Outcome:
        """What the tests of ``mutant`` say of it; the first that fails is enough."""
        path = self.folder / mutant.file
        text = path.read_text(encoding="utf-8")
        path.write_text(mutant.applied_to(text), encoding="utf-8")
        self._stale |= mutant.compiled
        seconds = 0.0
        try:
            for tests in mutant.tests:
                outcome = self.test(tests, limits[tests], mutant.compiled)
                seconds += outcome.seconds
                if outcome.verdict != SURVIVED:
                    break
        finally:
            path.write_text(text, encoding="utf-8")
            self._stale |= mutant.compiled
            self._spoilt |= mutant.compiled
        return outcome._replace(seconds=seconds)

    def stop(self) -> None:
        """End what is running."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def _run(
        self, command: list[str], more: dict[str, str] | None = None, seconds: float | None = None
    ) -> tuple[int | None, str]:
        """The exit code, None past ``seconds``, and the output."""
        environment = {k: v for k, v in os.environ.items() if k not in NOT_THE_USERS}
        # The copy's own modules come first; a tree that has no plugin gets this one's.
        path = os.pathsep.join([str(self.folder), str(ROOT)])
        environment |= ENVIRONMENT | {"PYTHONPATH": path} | (more or {})
        self._process = subprocess.Popen(
            command, cwd=self.folder, env=environment, start_new_session=True, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace",
        )  # fmt: skip
        try:
            said, _ = self._process.communicate(timeout=seconds)
            return self._process.returncode, said
        except subprocess.TimeoutExpired:
            return None, ""
        finally:
            self.stop()  # with whatever it has left behind
            self._process.wait()
            self._process = None


def _last_lines(said: str) -> str:
    return "\n".join(said.strip().splitlines()[-20:])
