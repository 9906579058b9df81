"""``make gpu`` walked through where there is no GPU: it must come to its end, whatever fails."""

from __future__ import annotations

import collections
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

pytest.importorskip("triton")

import gpu_stubs
from gpu_stubs import EVERY

from bench import operations, rows
from bench.gpu import __main__ as gpu
from bench.gpu import suite, worker, workers
from bench.step import PLAIN

# A row of each kind and two files are quick, all of them are not.
pytestmark = pytest.mark.slow if EVERY else []

HERE = Path(__file__).parent
FAULTY = "kernel R18 bfloat16"
FEW = ("tests/test_triton.py", "tests/test_autograd.py")
DRAWN = "tests/test_consistency.py::test_drawn"
PIPE = (
    "import sys, time; from multiprocessing.connection import Connection\n"
    "pipe = Connection(int(sys.argv[1]))\n"
)
COMPILERS = "tests/test_offline_compile.py"  # which are not for a GPU


def stub_worker(launches: Path, faulty: str = "") -> list[str]:
    return [sys.executable, str(HERE / "stub_worker.py"), str(launches), faulty]


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, str, collections.Counter, set]:
    """Results, report, launches and rows of a walk on which one row's kernel faults."""
    out = tmp_path_factory.mktemp("gpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suite, "processes", lambda: 1)
        patch.setattr(rows, "GPU_CONSISTENCIES", ((5, 4, 10),))
        patch.setattr(rows, "gpu_rows", gpu_stubs.few_rows)
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (workers.ROOT, HERE))))
        names = {row.name for row in rows.gpu_rows()}
        code = gpu.main(["--out", str(out), "--rounds", "2", "--no-tests", "--minutes", "20"],
                        stub_worker(out / "launches", FAULTY))  # fmt: skip
    assert code == 1  # for something failed, and the rest went on
    launches: collections.Counter = collections.Counter()
    for line in (out / "launches").read_text().splitlines():
        launches.update(json.loads(line))
    results = json.loads((out / "gpu.json").read_text())
    return results, (out / "gpu.txt").read_text(), launches, names


def test_every_implementation_of_every_row_gets_an_answer(walked: tuple) -> None:
    results, report, _, names = walked
    assert set(results["operations"]) == names
    for name, row in results["operations"].items():
        for impl in gpu.COMPETITORS:
            if impl == "cuda":
                assert "there is no GPU" in row["left_out"][impl]
            elif (name, impl) == (FAULTY, "triton"):
                assert "illegal memory access" in row["left_out"][impl]
            else:
                assert row["competitors"][impl]["both"]["median"] > 0, (name, impl, row)
        assert name.removeprefix(f"{row['operation']} ") in report
    (step,) = results["steps"].values()
    assert set(step["methods"]) == {PLAIN, *gpu.STEPS} - {"four ways, cuda"}
    assert set(step["left_out"]) == {"four ways, cuda"}
    assert "over plain" in report and "as a graph ms" in report


def test_what_copies_to_the_device_is_not_captured_and_the_rest_goes_on(walked: tuple) -> None:
    results, *_ = walked
    for name, row in results["operations"].items():
        fused, plain = (row["competitors"].get(impl) for impl in ("triton", "torch"))
        assert not fused or "graph" in fused, name  # the fused kernels capture everything
        assert ("graph" in plain) != ("torch, as a graph" in row["left_out"]), name


def test_few_kernels_are_compiled(walked: tuple) -> None:
    _, _, launches, _ = walked
    kernels = collections.Counter(kernel.split("'")[1] for kernel in launches)
    print(dict(kernels))
    # One for each dtype, layout, centring and direction that the rows and the step have.
    assert kernels["forward_kernel"] <= 16 and kernels["backward_kernel"] <= 12


def test_a_worker_that_hangs_is_ended_and_the_next_one_goes_on(tmp_path: Path) -> None:
    program = f"{PIPE}while True: time.sleep(60 * (pipe.recv()['kind'] == 'hang')); pipe.send({{}})"
    with (tmp_path / "log").open("w") as log:
        parent = workers.Workers(log, [sys.executable, "-c", program])
        assert parent.ask(30, kind="answer") == {}
        assert "no answer within" in parent.ask(0.5, kind="hang")["failed"]
        assert parent.ask(30, kind="answer") == {}
        parent.command = [sys.executable, "-c", "raise SystemExit(3)"]
        parent.close()
        assert "exit status 3" in parent.ask(30, kind="answer")["failed"]


def test_where_a_worker_crashed_is_looked_at_once(tmp_path: Path) -> None:
    crash = f"{PIPE}import os, signal; pipe.recv(); os.kill(os.getpid(), signal.SIGSEGV)"
    debugger = tmp_path / "debugger"
    debugger.write_text('#!/bin/sh\necho "stacks of $*"\n')
    debugger.chmod(0o755)
    with (tmp_path / "log").open("w") as log:
        parent = workers.Workers(log, [sys.executable, "-c", crash])
        parent.debugger = str(debugger)
        for _ in range(2):
            assert "exit status -11" in parent.ask(30, kind="answer")["failed"]
    said = (tmp_path / "log").read_text()
    assert said.count("stacks of -batch -ex run -ex bt") == 1 and sys.executable in said


@pytest.mark.skipif(shutil.which("gdb") is None, reason="gdb is not installed")
def test_a_debugger_says_where_a_worker_crashed(tmp_path: Path) -> None:
    crash = f"{PIPE}import ctypes; pipe.recv(); ctypes.string_at(8)"
    with (tmp_path / "log").open("w") as log:
        parent = workers.Workers(log, [sys.executable, "-c", crash])
        assert "exit status -11" in parent.ask(60, kind="answer")["failed"]
    said = (tmp_path / "log").read_text()
    assert "SIGSEGV" in said and ("string_at" in said or "strlen" in said), said


def test_a_fused_kernel_that_is_wrong_has_failed_and_others_are_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wrong = dict.fromkeys(gpu.COMPETITORS, "the loss is off by 1.0e+00")
    found = operations.Measured({}, {}, {}, wrong, ())
    monkeypatch.setattr(operations, "measure", lambda *_, **__: found)
    monkeypatch.setattr(worker, "why_not", lambda name, *_: "too old" if name == "cuda" else None)
    asked = {"kind": "operation", "row": FAULTY, "rounds": 2}
    with pytest.raises(RuntimeError, match="the loss is off"):
        worker.answer({**asked, "name": "triton"})
    for name in ("cuda", "torch"):
        assert worker.answer({**asked, "name": name}) == found.as_json()


def test_measuring_ends_at_its_deadline(tmp_path: Path) -> None:
    results = gpu.Results(tmp_path)
    program = f"{PIPE}while True: pipe.recv(); pipe.send({{'found': {{}}}})"
    gpu.measure(results, 0.0, 2, [sys.executable, "-c", program])
    said = [entry["left_out"] for entry in results.found["operations"].values()]
    late = dict.fromkeys(gpu.COMPETITORS, "the time for measuring was over")
    assert said == [late] * len(rows.gpu_rows())


def test_it_needs_no_installed_package_and_no_git(tmp_path: Path) -> None:
    """Without a GPU it says so, from any folder, with nothing in its path but the checkout."""
    environment = {"PATH": str(tmp_path), "PYTHONPATH": "", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu", "--out", str(tmp_path / "out")],
        cwd=workers.ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    import torch

    if not torch.cuda.is_available():
        assert done.returncode == 1 and "torch sees no GPU" in done.stderr, done.stderr


def select(out: Path, files: Sequence[str], hypothesis: bool) -> tuple[dict, str, dict]:
    """What became of the tests selected for a GPU, their log, and their launches."""
    (out / "hide.py").write_text(
        "import importlib.util\nfind = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda n, *a: None if n == 'hypothesis' else find(n, *a)\n"
    )
    plugins = () if hypothesis else ("hide",)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IMCL_FAST_LAUNCHES", str(out / "launches"))
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (out, HERE))))
        patch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
        patch.delenv("TRITON_INTERPRET", raising=False)
        plugins = (*plugins, "as_gpu", *suite.PLUGINS)
        found = suite.run(out, 1200, lambda found: None, plugins, files, 1)
    return found, (out / "part-0-of-1.log").read_text(), json.loads((out / "launches").read_text())


@pytest.fixture(scope="module")
def selected(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, str, dict]:
    """Few of them, as where hypothesis isn't installed; or all of them, as where it is."""
    files = (*suite.FILES, COMPILERS) if EVERY else (*FEW, DRAWN, COMPILERS)
    return select(tmp_path_factory.mktemp("selected"), files, EVERY)


@pytest.mark.slow
def test_the_tests_selected_for_a_gpu_pass_as_far_as_set_up_goes(selected: tuple) -> None:
    found, log, kernels = selected
    # test_gpu.py alone finds nothing to run, for it asks torch itself.
    assert suite.failures(found) == ["test_gpu"] and found["test_gpu"]["exit"] == 5, log
    assert found["part 0 of 1"]["outcomes"]["passed"] > 10
    # 122 of few, since layers that learn beside frozen ones are a call of their own.
    assert len(kernels) < (600 if EVERY else 125), "too many kernels to compile in four minutes"


def test_what_is_not_for_a_gpu_is_not_selected(selected: tuple) -> None:
    """No compilers, and no float64 for Triton."""
    _, log, _ = selected
    names = re.findall(r"^(tests/\S+::\S+)", log, re.MULTILINE)
    files = {name.split("::")[0] for name in names}
    assert files == {*(suite.FILES if EVERY else (*FEW, DRAWN.split("::")[0]))}
    assert not [name for name in names if "[" in name and "triton" in name and "float64" in name]


def test_where_hypothesis_is_missing_its_tests_are_skipped(selected: tuple, tmp_path: Path) -> None:
    _, log, _ = select(tmp_path, [DRAWN], False) if EVERY else selected
    assert re.search(rf"^{DRAWN}.* SKIPPED", log, re.MULTILINE), log
    assert "hypothesis is not installed" in log
