"""python -m bench.accuracy: what a study is, how it is run and resumed, and what is said of it.

Most runs here are those of a stand-in for imcl-train that writes a run folder at once.
"""

from __future__ import annotations

import csv
import dataclasses
import inspect
import json
import os
import re
import shutil
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import data_files
import pytest
import torch
from conftest import INTERVALS
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.accuracy import __main__ as command
from bench.accuracy import migrations, penalties, plot, results, runs, study_file, tables
from bench.accuracy import study as studies
from bench.accuracy.analysis import Analysis
from bench.accuracy.progress import Progress
from bench.accuracy.results import Result, Store
from bench.accuracy.study import Study
from bench.render import fill_places
from imcl_fast.imcl import IMCL
from imcl_fast.reports.paired import interval
from imcl_fast.runs.config import OBJECTIVE, SETTINGS, TrainConfig
from imcl_fast.runs.network import build_network
from imcl_fast.training.distributed import Processes
from imcl_fast.training.preparation import build_objective, prepare_data
from imcl_fast.training.progress import Observer
from imcl_fast.training.trainer import Trainer

SMALL = """
title = "A small study"
baseline = "ce"
compare = [["imcl", "label-smoothing"]]

[train]
dataset = "digits"
train_images = 160
batch_size = 20
width = 2
epochs = 2
device = "cpu"

[conditions.clean]
title = "clean labels"

[conditions.noise]
title = "wrong labels"
label_noise = 0.5

[networks.a]
title = "network A"

[networks.b]
title = "network B"
width = 4

[methods.ce]
title = "plain CE"
seeds = 3
ways = []

[methods.label-smoothing]
title = "label smoothing"
seeds = 2
ways = []
label_smoothing = 0.1

[methods.imcl]
title = "all four"
seeds = 3

[methods.kernel]
title = "kernel"
seeds = 1
ways = ["kernel"]
networks = ["a"]
conditions = ["noise"]
versus = "imcl"
"""

# Takes the flags of imcl-train and leaves a run folder whose accuracy depends on them. With a file
# "hold" above the run folders it saves a checkpoint and waits to be told to stop; one called "fail"
# has the method that it names fail.
STAND_IN = """
import json, pathlib, signal, sys, time
words = sys.argv[1:]
value = lambda name, default: words[words.index(name) + 1] if name in words else default
folder = pathlib.Path(value("--run-dir", None))
folder.mkdir(parents=True, exist_ok=True)
log = folder.parent.parent / "log"
def note(what):
    with log.open("a") as file:
        file.write(f"{what} {folder.name} {time.monotonic()}\\n")
fail = folder.parent.parent / "fail"
if fail.exists() and fail.read_text() in folder.name:
    print("one line", "imcl-train: no room", sep="\\n", file=sys.stderr)
    sys.exit(1)
def stop(number, frame):
    note("stopped")
    sys.exit(128 + number)
signal.signal(signal.SIGTERM, stop)
if (folder / "config.json").exists() and value("--resume", "never") != "auto":
    sys.exit("imcl-train: already holds a run")
(folder / "checkpoints").mkdir(exist_ok=True)
(folder / "config.json").write_text(json.dumps({
    "validation_images": 0, "label_noise": float(value("--label-noise", 0)),
    "versions": {"torch": "2.13.0", "commit": "0123456789abcdef"},
    "machine": {"accelerator": None},
}))
note("resumed" if (folder / "checkpoints/1.pt").exists() else "began")
(folder / "checkpoints/1.pt").touch()
end = time.monotonic() + 15
while (folder.parent.parent / "hold").exists() and time.monotonic() < end:
    time.sleep(0.02)
time.sleep(0.05)
seed = int(value("--seed", 0))
summary = {
    "last_test_accuracy": 0.7 + seed / 100, "best_test_accuracy": 0.8, "best_epoch": 1,
    "train_accuracy": 0.9, "epochs": 2, "seconds_per_step": 0.01, "peak_memory_bytes": 2**20,
}
if "--label-noise" in words:
    summary["fit_noisy"] = 0.25
(folder / "summary.json").write_text(json.dumps(summary))
note("ended")
"""

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def small(tmp_path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    return path


class Runner:
    """Runs a study with the stand-in."""

    def __init__(self, folder: Path, jobs: int = 4) -> None:
        self.folder, self.jobs = folder, jobs
        self.csv = folder / "results/small.csv"
        (folder / "stand_in.py").write_text(STAND_IN)

    def run(self, study: Study, minutes: float | None = None) -> int:
        store = Store(self.csv, study)
        pending = [run for run in study.runs if run.name not in store.results]
        options = runs.Options(
            self.folder / "runs", None, False, self.jobs, 1, minutes,
            (sys.executable, "-S", str(self.folder / "stand_in.py")),
        )  # fmt: skip
        progress = Progress(len(study.runs), len(study.runs) - len(pending))
        try:
            return runs.execute(study, pending, store, options, progress)
        finally:
            progress.close()

    def once_begun(self, count: int, act: Callable[[], object]) -> threading.Thread:
        """Waits beside the tests until so many runs have begun, then acts."""

        def wait() -> None:
            end = time.monotonic() + 60
            while len(self.log("began")) < count and time.monotonic() < end:
                time.sleep(0.01)
            act()

        thread = threading.Thread(target=wait)
        thread.start()
        return thread

    def log(self, what: str) -> list[str]:
        """The folders of the runs that noted so."""
        path = self.folder / "log"
        lines = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
        return [name for noted, name, _ in lines if noted == what]


@pytest.fixture
def runner(tmp_path) -> Runner:
    return Runner(tmp_path)


def few(path: Path, *methods: str) -> Study:
    """The study in ``path`` with one network, the noisy condition and two seeds at most."""
    study = study_file.load(str(path))
    kept = [run for run in study.runs if run.network == "a" and run.condition == "noise"
            and run.seed <= 2 and run.method in methods]  # fmt: skip
    return dataclasses.replace(study, runs=tuple(kept))


# ---- what a study is -------------------------------------------------------------------


def test_a_study_goes_seed_by_seed(small) -> None:
    study = study_file.load(str(small))
    names = [run.name for run in study.runs]
    assert names[:3] == ["clean-a-ce-s1", "clean-a-label-smoothing-s1", "clean-a-imcl-s1"]
    assert [run.seed for run in study.runs] == 13 * [1] + 12 * [2] + 8 * [3]
    assert [name for name in names if "kernel" in name] == ["noise-a-kernel-s1"]
    first, last = study.runs[0].config, study.runs[-1].config
    assert (first.width, first.label_noise, first.ways) == (2, 0, ())
    assert (last.width, last.label_noise, last.seed, last.label) == (4, 0.5, 3, "imcl")


@pytest.mark.parametrize("name", study_file.names())
def test_runs_of_a_seed_differ_by_their_method_alone(name) -> None:
    study = study_file.load(name)
    first: dict[tuple, TrainConfig] = {}
    for run in study.runs:
        base = first.setdefault((run.condition, run.network, run.seed), run.config)
        different = run.config.differences(base)
        assert {SETTINGS[setting].group for setting in different} <= {OBJECTIVE}
    assert study.methods[study.baseline].seeds == max(m.seeds for m in study.methods.values())


# What a screening's settings have that those of the CPU study have not.
SCREENINGS = {
    "cpu-quality-screening": {
        "validation_images": 5000, "amp": "off", "qualities": ["raw", "jpeg20", "jpeg5", "down2"],
    },
    "cpu-screening": {"validation_images": 5000, "evaluate_every": 5},
    "cpu-wide-screening": {"validation_images": 5000, "width": 64},
    "kernel-shifts-screening": {"validation_images": 5000, "amp": "off"},
}


@pytest.mark.parametrize("name", SCREENINGS)
def test_settings_are_screened_on_held_out_images(name) -> None:
    final, screening = study_file.load("cpu"), study_file.load(name)
    assert screening.held_out == 5000
    assert screening.train == {**final.train, **SCREENINGS[name]}
    assert screening.conditions == final.conditions


def test_a_confirmation_runs_the_same_on_seeds_that_the_study_did_not_have() -> None:
    seen, fresh = study_file.load("cpu-wide"), study_file.load("cpu-wide-confirmation")
    assert fresh.train == {**seen.train, "amp": "off"}
    assert fresh.conditions == seen.conditions
    assert fresh.networks == seen.networks and fresh.ways == seen.ways
    for name, method in fresh.methods.items():
        assert method.settings == seen.methods[name].settings
    assert {run.seed for run in seen.runs} == {1, 2, 3}
    assert {run.seed for run in fresh.runs} == {4, 5, 6}


def test_forms_of_way_4_are_studied_on_seeds_that_the_screening_did_not_have() -> None:
    seen, fresh = study_file.load("kernel-shifts-screening"), study_file.load("kernel-shifts")
    assert {**fresh.train, "validation_images": 5000} == seen.train and fresh.ways == seen.ways
    assert fresh.conditions == seen.conditions
    for name in ("ce", "kernel", "imcl", "inputs-100"):
        assert fresh.methods[name].settings == seen.methods[name].settings
        assert fresh.methods[name].form == seen.methods[name].form
    stages = seen.methods["shifts-stages-300"]
    assert fresh.methods["stages-300"].settings == stages.settings
    for name in ("stages-300", "inputs-100"):  # all four with a form differ in the ways alone
        alone, together = fresh.methods[name], fresh.methods[f"all-{name}"]
        assert alone.form == together.form
        assert alone.settings == {"ways": ["kernel"], **together.settings}
    assert {run.seed for run in seen.runs} == {1, 2, 3}
    assert {run.seed for run in fresh.runs} == {4, 5, 6, 7, 8}


def test_schedules_are_compared_in_float32_under_the_settings_of_the_cpu_study() -> None:
    final, schedules = study_file.load("cpu"), study_file.load("cpu-schedule")
    assert schedules.train == {**final.train, "amp": "off"}
    assert schedules.conditions == final.conditions and schedules.networks == final.networks
    # Written out: the study must mean the same when the defaults have become what it decides.
    intervals = {
        (config.representation_interval, config.kernel_interval)
        for config in (run.config for run in schedules.runs)
    }
    assert intervals == {(1, 1), (4, 8), (8, 16)}
    assert {run.seed for run in schedules.runs} == {1, 2, 3, 4, 5}


def test_qualities_are_studied_under_the_settings_that_they_were_screened_under() -> None:
    screening, final = (study_file.load(f"cpu-quality{x}") for x in ("-screening", ""))
    assert {**final.train, "validation_images": 5000} == screening.train
    assert final.conditions == screening.conditions and final.ways == screening.ways
    screened = [run.config for run in screening.runs]
    for run in final.runs:
        assert run.config.alpha in {None, *(config.alpha for config in screened)}
        assert run.config.awp in {config.awp for config in screened}
        assert (run.config.method == "imcl") == (run.method == "ce")
        assert run.method == "ce" or run.config.quality_reduction == "mean"
    assert {run.seed for run in final.runs} == {1, 2, 3, 4, 5}


def test_accuracy_at_each_quality_is_kept_and_shown(found, tmp_path) -> None:
    plain = results.to_csv(found.results)
    assert "at_qualities" not in plain
    shares = [f"raw={row.accuracy} jpeg5={row.accuracy / 2}" for row in found.results]
    rows = [dataclasses.replace(row, at_qualities=each)
            for row, each in zip(found.results, shares, strict=True)]  # fmt: skip
    (tmp_path / "small.csv").write_text(results.to_csv(rows))
    assert results.read(tmp_path / "small.csv") == rows
    lines = tables.qualities(Analysis(found.study, rows)).splitlines()
    assert lines[2] == "| accuracy, % | seeds | raw | jpeg5 |"
    raw, jpeg = (float(cell) for cell in lines[4].split("|")[3:5])
    assert jpeg == pytest.approx(raw / 2, abs=0.01)
    ours = studies.PlannedRun("few", "resnet18", "x", TrainConfig(method="qad-imcl"))
    told = ours.told
    assert told["objective"]["alpha"] == 0.1 and told["weights"]["kernel"] == 100
    alone = studies.PlannedRun("few", "resnet18", "x", TrainConfig(method="qad")).told
    assert alone["objective"]["normalize"] is True and "weights" not in alone


def test_what_is_no_screening_is_measured_on_test_images() -> None:
    held_out = [name for name in study_file.names() if study_file.load(name).held_out]
    assert held_out == list(SCREENINGS)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('baseline = "ce"', "", "small.toml: baseline is missing"),
        ('baseline = "ce"', 'baseline = "c"', "small.toml: baseline: expected one of ce, label-"),
        ('baseline = "ce"', "baseline = 1", r"small.toml: baseline: expected str, got 1 \(int\)"),
        ("title = ", "titel = ", "small.toml: unknown key 'titel'"),
        ("epochs = 2", "epochs = 0", r"small.toml: \[train\] epochs: expected at least 1, got 0"),
        ("width = 4", "widht = 4", r"\[networks.b\] widht: expected a setting of imcl-train"),
        ("width = 4", "seed = 4", r"\[networks.b\] seed: every run is given its own"),
        ("ways = []", 'ways = ["kernels"]', r"\[methods.ce\] ways: expected one of output"),
        ("ways = []", 'beta = "x"', r"\[methods.ce\] beta: expected float, got 'x'"),
        ("ways = []", "found = true", r"\[methods.ce\] found: expected the kernels that were"),
        ("seeds = 3", "seeds = 0", r"\[methods.ce\] seeds: expected at least 1, got 0"),
        ("seeds = 3", "", r"\[methods.ce\] seeds: expected int, got nothing"),
        ("[train]", "first_seed = 0\n[train]", "toml: first_seed: expected at least 1, got 0"),
        ('networks = ["a"]', 'networks = ["c"]', r"\[methods.kernel\] networks: expected one of a"),
        ('"imcl", "label-smoothing"', '"imcl"', "compare: expected pairs of methods"),
        ("[networks.a]", "[networks.A]", r"\[networks.A\]: expected a name of a-z"),
        ("label_noise = 0.5", "validation_images = 5", "validation_images: expected the same"),
        ("[networks.b]", "[networks.a]", "small.toml: "),
        ("[networks.a]", "[conditions.clean-a]\n[networks.a-a]\n[networks.a]", "name of its own"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(old, new, message, small, capsys) -> None:
    small.write_text(SMALL.replace(old, new, 1))
    assert command.main(["--study", str(small), "--list"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and re.search(message, err)


def test_an_unknown_study_is_named(capsys) -> None:
    assert command.main(["--study", "gpus"]) == 2
    assert re.search("study: expected one of cifar10, .*, got 'gpus'", capsys.readouterr().err)


def test_the_fingerprint_is_of_what_results_depend_on(small) -> None:
    run = study_file.load(str(small)).runs[0]

    def changed(**settings) -> str:
        config = dataclasses.replace(run.config, **settings)
        return dataclasses.replace(run, config=config).fingerprint

    same = changed(data_root=Path("x"), threads=3, run_dir=Path("y"), keep=1)
    assert same == run.fingerprint == changed(lr=0.1)
    assert len({same, changed(lr=0.2), changed(label_smoothing=0.1), changed(seed=2)}) == 4


def test_results_are_stale_when_an_objective_gets_other_defaults(small, monkeypatch) -> None:
    study = study_file.load(str(small))
    before = {run.name: run.fingerprint for run in study.runs}
    monkeypatch.setitem(IMCL.__init__.__kwdefaults__, "dropout", 0.4)
    stale = {run.method for run in study.runs if run.fingerprint != before[run.name]}
    assert stale == {"imcl", "kernel"}


@pytest.mark.parametrize(("default", "stale"), [(1, set()), (8, {"imcl", "kernel"})])
def test_a_new_argument_makes_results_stale_by_a_default_that_changes_something(
    default, stale, small, monkeypatch
) -> None:
    study = study_file.load(str(small))
    new = inspect.Parameter("kernel_interval", inspect.Parameter.KEYWORD_ONLY, default=default)
    own = inspect.signature(IMCL).parameters.values()
    others = [parameter for parameter in own if parameter.name != new.name]
    monkeypatch.setattr(IMCL, "__signature__", inspect.Signature(others), raising=False)
    before = {run.name: run.fingerprint for run in study.runs}
    monkeypatch.setattr(IMCL, "__signature__", inspect.Signature([*others, new]))
    assert {run.method for run in study.runs if run.fingerprint != before[run.name]} == stale


def test_an_interval_of_1_is_the_same_whoever_chose_it(small, monkeypatch) -> None:
    """And where another is left to the objective, rows depend on it."""

    def fingerprints(default: int) -> dict[str, str]:
        for name in INTERVALS:
            monkeypatch.setitem(IMCL.__init__.__kwdefaults__, name, default)
        return {run.name: run.fingerprint for run in study_file.load(str(small)).runs}

    left, scheduled = fingerprints(1), fingerprints(8)
    assert {name.split("-")[-2] for name in left if left[name] != scheduled[name]} == {
        "imcl", "kernel"
    }  # fmt: skip
    ways = "".join(f"{name} = 1\n" for name in INTERVALS)
    small.write_text(SMALL.replace("[conditions.", f"[ways]\n{ways}\n[conditions.", 1))
    assert fingerprints(1) == fingerprints(8) == left


def test_settings_of_ways_are_those_of_the_methods_that_have_some(small) -> None:
    own = "kernel_interval = 5\n"
    small.write_text(
        SMALL.replace("[conditions.", "[ways]\nkernel_interval = 3\n\n[conditions.", 1)
        .replace("[methods.kernel]\n", f"[methods.kernel]\n{own}")
    )  # fmt: skip
    study = study_file.load(str(small))
    intervals = {run.method: run.config.kernel_interval for run in study.runs}
    assert {m: i for m, i in intervals.items() if i} == {"imcl": 3, "kernel": 5}
    assert "kernel_interval = 3" in tables.settings(Analysis(study, []))


def test_results_are_stale_when_other_kernels_are_found(small, monkeypatch) -> None:
    named = '[methods.named]\ntitle = "named"\nseeds = 1\nways = ["kernel"]\nkernels = ["conv1"]\n'
    without = '[methods.without]\ntitle = "without"\nseeds = 1\nways = ["output"]\n'
    small.write_text(f"{SMALL}\n{named}\n{without}")
    runs = study_file.load(str(small)).runs
    before = {run.name: run.fingerprint for run in runs}
    monkeypatch.setattr(studies, "_found_in", lambda *network: ["conv1"])
    stale = {run.method for run in runs if run.fingerprint != before[run.name]}
    assert stale == {"imcl", "kernel"}


@pytest.mark.parametrize(
    ("name", "gpu", "asked", "expected"),
    [
        ("cpu", False, (None, None), (8, 1)),
        ("cpu", True, (None, None), (8, 1)),  # which asks for the CPU
        ("cpu", False, (2, None), (2, 1)),
        ("cpu", False, (None, 4), (2, 4)),
        ("gpu", True, (None, None), (4, 2)),
        ("cifar10", True, (None, None), (1, 8)),
        ("cifar10", False, (None, None), (8, 1)),
        ("cifar10", True, (3, None), (3, 2)),
    ],
)
def test_cores_are_shared_out(name, gpu, asked, expected, monkeypatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: gpu)
    for function in ("cpu_count", "process_cpu_count"):
        monkeypatch.setattr(os, function, lambda: 8, raising=False)
    assert runs.shares(study_file.load(name), *asked) == expected


# ---- results ---------------------------------------------------------------------------

TEXT = st.text(st.characters(codec="utf-8", exclude_categories=("C",)), max_size=8)
SHARE = st.floats(0, 1)
RESULTS = st.builds(
    Result, study=TEXT, condition=TEXT, network=TEXT, method=TEXT, seed=st.integers(0),
    fingerprint=TEXT, held_out=TEXT, accuracy=SHARE, best_accuracy=SHARE,
    best_epoch=st.integers(1), train_accuracy=SHARE, fit_noisy=st.none() | SHARE,
    epochs=st.integers(1), seconds_per_step=SHARE, peak_memory_bytes=st.integers(0),
    seconds=SHARE, threads=st.integers(1), jobs=st.integers(1), machine=TEXT, torch=TEXT,
    commit=TEXT, date=TEXT,
)  # fmt: skip


@settings(max_examples=50, deadline=None)
@given(st.lists(RESULTS, max_size=4))
def test_results_are_read_as_they_were_written(tmp_path_factory, rows) -> None:
    path = tmp_path_factory.getbasetemp() / "results.csv"
    path.write_text(results.to_csv(rows), newline="", encoding="utf-8")
    assert results.read(path) == rows


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda text: text.replace("accuracy", "acuracy", 1), "expected the columns study,"),
        (lambda text: text.replace(",0.71,", ",x,", 1), r"line \d+: could not convert"),
        (lambda text: text[: text.rindex(",")], r"line \d+: "),
        (lambda text: "", "expected the columns study,"),
    ],
)
def test_broken_results_are_named_and_left_alone(break_it, message, small, runner, capsys) -> None:
    assert runner.run(few(small, "ce")) == 0
    broken = break_it(runner.csv.read_text())
    runner.csv.write_text(broken)
    arguments = ["--study", str(small), "--results", str(runner.csv.parent), "--list"]
    assert command.main(arguments) == 2
    assert re.search(f"small.csv.*{message}", capsys.readouterr().err)
    assert runner.csv.read_text() == broken


# ---- running and going on --------------------------------------------------------------


def test_a_whole_study(small, runner, capsys) -> None:
    study = study_file.load(str(small))
    assert runner.run(study) == 0
    rows = results.read(runner.csv)
    assert [row.name for row in rows] == [run.name for run in study.runs]
    first = rows[0]
    assert (first.accuracy, first.best_accuracy, first.fit_noisy) == (0.71, 0.8, None)
    assert (first.threads, first.jobs, first.commit) == (1, 4, "0123456789ab")
    assert first.held_out == "test" and first.seconds > 0
    assert {row.fit_noisy for row in rows if row.condition == "noise"} == {0.25}
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 33 and lines[-1].startswith("33/33 ")
    assert re.search(r"^1/33 \S+: test accuracy 71.00% \(best .*\), \d s; about 0:", lines[0])
    # Checkpoints are what takes room.
    assert not list((runner.folder / "runs").glob("*/checkpoints"))
    # All is done, whether or not the folders are still there.
    shutil.rmtree(runner.folder / "runs")
    written = runner.csv.stat().st_mtime_ns
    assert runner.run(study) == 0
    assert len(runner.log("began")) == 33 and runner.csv.stat().st_mtime_ns == written


@pytest.mark.parametrize("jobs", [1, 3])
def test_so_many_runs_go_on_at_a_time(jobs, small, tmp_path) -> None:
    runner = Runner(tmp_path, jobs)
    (tmp_path / "hold").touch()
    thread = runner.once_begun(jobs, (tmp_path / "hold").unlink)
    assert runner.run(few(small, "ce", "imcl", "label-smoothing")) == 0
    thread.join()
    events = sorted(
        (float(when), 1 if what == "began" else -1)
        for what, _, when in map(str.split, (tmp_path / "log").read_text().splitlines())
    )
    under_way = [sum(step for _, step in events[: i + 1]) for i in range(len(events))]
    assert max(under_way) == jobs


def test_a_changed_setting_is_run_again_and_nothing_else(small, runner) -> None:
    assert runner.run(few(small, "ce", "imcl")) == 0
    small.write_text(SMALL.replace('title = "all four"', 'title = "four"\nlabel_smoothing = 0.2'))
    study = few(small, "ce", "imcl")
    store = Store(runner.csv, study)
    assert store.stale == ["noise-a-imcl-s1", "noise-a-imcl-s2"]
    assert list(store.results) == ["noise-a-ce-s1", "noise-a-ce-s2"]
    assert runner.run(study) == 0
    again = runner.log("began")[4:]
    assert sorted(name[:15] for name in again) == store.stale
    rows = results.read(runner.csv)
    assert len(rows) == 4 and not Store(runner.csv, study).stale


def test_a_run_that_fails_is_told_and_the_others_go_on(small, runner, capsys) -> None:
    study = few(small, "ce", "imcl")
    (runner.folder / "fail").write_text("imcl-s1")
    assert runner.run(study) == 1
    out = capsys.readouterr().out
    assert "noise-a-imcl-s1 failed: exit status 1\n  one line\n  imcl-train: no room\n" in out
    assert len(results.read(runner.csv)) == 3
    (runner.folder / "fail").unlink()
    assert runner.run(study) == 0
    assert len(results.read(runner.csv)) == 4 and len(runner.log("began")) == 4


def test_when_time_is_up_no_more_are_started(small, runner) -> None:
    study = few(small, "ce", "imcl")
    assert runner.run(study, minutes=0) == 0
    assert runner.log("began") == [] and not runner.csv.exists()
    assert runner.run(study, minutes=10) == 0
    assert len(runner.log("began")) == 4


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_runs_that_go_on_later(number, small, tmp_path, capsys) -> None:
    runner, study = Runner(tmp_path, jobs=2), few(small, "ce", "imcl")
    (tmp_path / "hold").touch()

    thread = runner.once_begun(2, lambda: os.kill(os.getpid(), number))
    assert runner.run(study) == 128 + number
    thread.join()
    assert len(runner.log("stopped")) == 2 and runner.log("ended") == []
    assert "failed" not in capsys.readouterr().out
    (tmp_path / "hold").unlink()
    assert runner.run(study) == 0
    assert sorted(runner.log("resumed")) == sorted(runner.log("stopped"))
    assert len(runner.log("ended")) == 4


def test_what_ended_without_a_row_is_not_run_again(small, runner) -> None:
    study = few(small, "ce")
    assert runner.run(study) == 0
    before = runner.csv.read_text()
    runner.csv.unlink()
    assert runner.run(study) == 0
    assert runner.csv.read_text() == before and len(runner.log("began")) == 2


def test_a_study_is_run_once_at_a_time(small, runner, capsys) -> None:
    study = few(small, "ce")
    (runner.folder / "runs").mkdir()
    with runs.locked(runner.folder / "runs"), pytest.raises(runs.Busy, match="in use by another"):
        runner.run(study)
    assert runner.run(study) == 0


def test_the_list_says_what_is_done(small, runner, capsys) -> None:
    assert runner.run(few(small, "ce")) == 0
    (runner.folder / "runs").rename(runner.folder / "small")
    study = study_file.load(str(small))
    started = next(run for run in study.runs if run.name == "noise-a-imcl-s1")
    (runs.run_folder(runner.folder / "small", started) / "checkpoints").mkdir(parents=True)
    capsys.readouterr()
    arguments = ["--study", str(small), "--results", str(runner.csv.parent), "--runs",
                 str(runner.folder), "--list"]  # fmt: skip
    assert command.main([*arguments, "--only", "noise-a-*-s[12]"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "done     noise-a-ce-s1", "to do    noise-a-label-smoothing-s1",
        "started  noise-a-imcl-s1", "to do    noise-a-kernel-s1", "done     noise-a-ce-s2",
        "to do    noise-a-label-smoothing-s2", "to do    noise-a-imcl-s2",
    ]  # fmt: skip
    assert command.main([*arguments, "--only", "nothing"]) == 2


@pytest.mark.slow
def test_real_runs_of_a_seed_are_paired(small, tmp_path, capsys) -> None:
    # So small a learning rate leaves weights as they began, and statistics as the images give them.
    small.write_text(SMALL.replace("epochs = 2", "epochs = 1\nlr = 1e-12"))
    arguments = ["--study", str(small), "--results", str(tmp_path / "out"), "--runs",
                 str(tmp_path / "runs"), "--jobs", "2", "--threads", "1",
                 "--only", "noise-a-[ci]*-s1"]  # fmt: skip
    assert command.main(arguments) == 0
    rows = results.read(tmp_path / "out/small.csv")
    assert [row.name for row in rows] == ["noise-a-ce-s1", "noise-a-imcl-s1"]
    folders = [next((tmp_path / "runs/small").glob(f"{row.name}-*")) for row in rows]
    for row, folder in zip(rows, folders, strict=True):
        with (folder / "metrics.csv").open() as file:
            (epoch,) = csv.DictReader(file)
        assert row.accuracy == float(epoch["test_accuracy"])
        assert row.fit_noisy == float(epoch["fit_noisy"])
        assert row.peak_memory_bytes > 2**26 and row.seconds > row.seconds_per_step > 0
        config = json.loads((folder / "config.json").read_text())
        assert (config["threads"], config["report"], config["tensorboard"]) == (1, False, False)
    noises, networks = (
        [torch.load(folder / name, weights_only=True) for folder in folders]
        for name in ("noise.pt", "network.pt")
    )
    assert torch.equal(noises[0]["noisy"], noises[1]["noisy"])
    for (name, x), y in zip(networks[0].items(), networks[1].values(), strict=True):
        torch.testing.assert_close(x, y, msg=name)
    assert "| plain CE | 1 |" in capsys.readouterr().out


# ---- what is said of them --------------------------------------------------------------


def result(condition: str, network: str, method: str, seed: int, accuracy: float, **more) -> Result:
    values = dict(
        study="small", condition=condition, network=network, method=method, seed=seed,
        fingerprint="", held_out="test", accuracy=accuracy, best_accuracy=accuracy + 0.01,
        best_epoch=2, train_accuracy=0.9, fit_noisy=0.2 if condition == "noise" else None,
        epochs=2, seconds_per_step=0.01, peak_memory_bytes=300 * 2**20, seconds=60.0, threads=1,
        jobs=2, machine="A CPU", torch="2.13.0", commit="abc", date="2026-11-25",
    )  # fmt: skip
    return Result(**(values | more))


CE = {1: 0.70, 2: 0.72, 3: 0.71}
FOUR = {"a": {1: 0.75, 2: 0.78, 3: 0.75}, "b": {1: 0.71, 2: 0.76, 3: 0.73}}


@pytest.fixture
def found(small) -> Analysis:
    rows = [result("noise", network, "ce", seed, CE[seed]) for network in "ab" for seed in CE]
    rows += [
        result("noise", network, "imcl", seed, accuracy, seconds_per_step=0.01 + 0.001 * seed,
               best_accuracy=0.8)
        for network, values in FOUR.items() for seed, accuracy in values.items()
    ]  # fmt: skip
    rows.append(result("noise", "a", "label-smoothing", 1, 0.705))
    rows.append(result("noise", "a", "kernel", 1, 0.74, machine="Another CPU"))
    return Analysis(study_file.load(str(small)), rows)


def shown(numbers: list[float]) -> str:
    mean, low, high, _ = interval(numbers)
    return f"{100 * mean:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]"


def test_a_table_has_means_paired_differences_and_costs(found) -> None:
    text = tables.tables(found)
    assert text.startswith("**wrong labels, network A**, accuracy on test images\n")
    difference = shown([FOUR["a"][seed] - CE[seed] for seed in CE])
    spread = 100 * statistics.stdev(FOUR["a"].values())
    best = 100 * statistics.fmean(0.8 - CE[seed] - 0.01 for seed in CE)
    assert (
        f"| all four | 3 | 76.00 ± {spread:.2f} | {difference} | 80.00 | {best:+.2f} | 20.0 | "
        "12.0 | 1.20 | 300 |" in text
    )
    assert "| plain CE | 3 | 71.00 ± 1.00 |  | 72.00 |  | 20.0 | 10.0 |  | 300 |" in text
    assert "| label smoothing | 1 | 70.50 | +0.50 | 71.50 | +0.50 |" in text
    # Times of another machine are compared with nothing.
    assert re.search(r"\| kernel \| 1 \|.*\| 10.0 \|  \| 300 \|", text)


def test_networks_are_pooled_within_each_seed(found) -> None:
    pooled = [
        statistics.fmean(FOUR[network][seed] - CE[seed] for network in "ab") for seed in CE
    ]
    text = tables.summary(found)
    assert "| plain CE |  | 71.00 % | 1.00 |\n" in text
    assert f"| all four |  | {shown(pooled)} | 1.20 |\n" in text
    # A method of one network is pooled over that.
    assert "| kernel |  | +4.00 |  |\n" in text
    # Label smoothing hasn't run on the second.
    assert "label smoothing" not in tables.compare(found)


def test_tables_say_what_was_tried_and_what_there_is(found) -> None:
    # One condition hasn't run.
    assert "| kernel | all four |  | -1.00 | 1 |  |" in tables.tried(found)
    assert "| all four | plain CE |  | +3.67 | 3 |  |" in tables.tried(found)
    # It has run on one of its two networks.
    assert "| label smoothing | plain CE |  | +0.50 | 1 |  |" in tables.tried(found)

    def with_clean(ce: float, imcl: float, kernel: float) -> str:
        clean = [result("clean", network, method, 1, accuracy) for network in "ab" for method,
                 accuracy in (("ce", ce), ("imcl", imcl), ("kernel", kernel))]  # fmt: skip
        return tables.tried(Analysis(found.study, [*found.results, *clean]))

    assert "| all four | plain CE | -1.00 | +3.67 | 1, 3 |  |" in with_clean(0.9, 0.89, 0.9)
    assert "| all four | plain CE | +1.00 | +3.67 | 1, 3 | won |" in with_clean(0.89, 0.9, 0.9)
    assert "| kernel | all four | -1.00 | -1.00 | 1 | lost |" in with_clean(0.89, 0.9, 0.89)
    said = tables.facts(found)
    assert said.startswith("14 of 33 runs in 7 minutes on A CPU (2 at a time, 1 thread) (13 of the")
    assert "commit abc, 2026-11-25.\n" in said
    said = tables.settings(found)
    assert "imcl-train --train-images 160 --width 2 --epochs 2 --batch-size 20 --device cpu" in said
    assert "| condition | wrong labels | label_noise = 0.5 |" in said
    assert "| method | plain CE | ways = none |" in said


def test_every_table_is_one_with_all_results_or_none(found, tmp_path) -> None:
    nothing = Analysis(found.study, [])
    for name, render in tables.places({"some": found, "none": nothing}).items():
        text = render()
        assert text.endswith("\n")
        if name.startswith("none") and name != "none:settings":
            assert text == "Not run yet.\n"
        for block in text.split("\n\n"):
            lines = [line for line in block.splitlines() if line.startswith("|")]
            assert len({line.count("|") for line in lines}) <= 1, name


def test_the_document_has_places_for_tables_that_exist(tmp_path) -> None:
    document = tmp_path / "accuracy.md"
    shutil.copy(command.ROOT / "docs/accuracy.md", document)
    studies = {name: Analysis(study_file.load(name), []) for name in study_file.names()}
    places = {
        **tables.places(studies), **penalties.places(tmp_path), **migrations.places({}),
    }  # fmt: skip
    filled = fill_places(document, "accuracy", places)
    assert {place.partition(":")[0] for place in filled} == {
        "cpu", "cpu-quality", "cpu-quality-screening", "cpu-regimes", "cpu-schedule",
        "cpu-screening", "cpu-wide", "cpu-wide-confirmation", "cpu-wide-screening", "gpu",
        "kernel-shifts", "kernel-shifts-screening", "migrations", "penalties",
    }  # fmt: skip
    assert "(accuracy-cpu" not in document.read_text()  # no link to a plot that isn't there


def test_the_tables_in_the_documents_are_those_of_the_stored_results(tmp_path) -> None:
    analyses = {}
    for name in study_file.names():
        study = study_file.load(name)
        store = Store(results.FOLDER / f"{name}.csv", study)
        analyses[name] = Analysis(study, store.results.values())
    places = {
        **tables.places(analyses), **penalties.places(results.FOLDER),
        **migrations.places({name: len(found.results) for name, found in analyses.items()}),
    }  # fmt: skip
    for document in command.DOCUMENTS:
        copy = tmp_path / document.name
        copy.write_text(document.read_text())
        fill_places(copy, "accuracy", places)
        assert copy.read_text() == document.read_text()


def test_a_plot_is_the_same_for_the_same_results(found, tmp_path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib isn't installed")
    paths = [tmp_path / "a.svg", tmp_path / "b.svg"]
    for path in paths:
        plot.plot(found, path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    other = [dataclasses.replace(row, accuracy=row.accuracy**2) for row in found.results]
    plot.plot(Analysis(found.study, other), paths[1])
    assert paths[0].read_bytes() != paths[1].read_bytes()


# ---- the studies of the project --------------------------------------------------------


def shrunk(config: TrainConfig, root: Path) -> TrainConfig:
    """The same on the small data set that lies in ``root``."""
    return dataclasses.replace(
        config, data_root=root, train_images=None, validation_images=0, width=4, epochs=1,
        ways_warmup_epochs=0.0, batch_size=4, device="cpu", threads=1, compile=False,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "stl10", "imagenet32"])
def test_studies_of_other_data_train_on_their_files(name, tmp_path) -> None:
    study = study_file.load(name)
    data_files.WRITERS[study.runs[0].config.dataset](tmp_path)
    cells = cycle([(c, n) for c in study.conditions for n in study.networks])
    for cell, method in zip(cells, study.methods, strict=False):
        run = next(r for r in study.runs if (r.condition, r.network, r.method) == (*cell, method))
        summary = Trainer(shrunk(run.config, tmp_path), observer=Observer()).fit()
        assert summary["dataset"] == name and summary["measured_on"] == "test"


@pytest.mark.parametrize(
    "name",
    [
        "cpu", "cpu-quality", "cpu-quality-screening", "cpu-regimes", "cpu-schedule",
        "cpu-screening", "cpu-wide", "cpu-wide-confirmation", "cpu-wide-screening", "gpu",
    ],
)  # fmt: skip
def test_every_method_of_a_study_can_be_built(name, tmp_path) -> None:
    study = study_file.load(name)
    data_files.write_fashion_mnist(tmp_path)
    material = prepare_data(shrunk(study.runs[0].config, tmp_path))
    processes = Processes(0, 1, torch.device("cpu"))
    for run in {(run.network, run.method): run for run in study.runs}.values():
        config = shrunk(run.config, tmp_path)
        network = build_network(config, material.data_set)
        build_objective(config, network, material, processes)
