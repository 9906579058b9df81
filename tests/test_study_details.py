"""Details of the accuracy study: its statistics, what a row holds, how runs are started and
watched, of which a fault went unseen by its own tests."""

import dataclasses
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from test_accuracy_penalties import CONFIG
from test_accuracy_study import few, found, result, runner, small

from bench.accuracy import penalties, plot, progress, results, runs, study_file, tables
from bench.accuracy.analysis import Analysis
from imcl_fast.machine import processor
from imcl_fast.runs import flags

__all__ = ["found", "runner", "small"]  # fixtures


@pytest.mark.parametrize("other", [{"jobs": 4}, {"threads": 2}])
def test_times_of_another_share_of_the_machine_are_compared_with_nothing(other, found):
    rows = [dataclasses.replace(row, **other) if row.method == "imcl" else row
            for row in found.results]  # fmt: skip
    assert found.slowdown("noise", "a", "imcl") == pytest.approx(1.2)
    assert Analysis(found.study, rows).slowdown("noise", "a", "imcl") is None


def test_a_variant_that_changes_nothing_has_lost(found):
    rows = [result(c, "a", m, 1, 0.5) for c in ("clean", "noise") for m in ("ce", "imcl")]
    assert "| all four | plain CE | +0.00 | +0.00 | 1 | lost |" in tables.tried(
        Analysis(found.study, rows)
    )


def test_a_pair_is_compared_on_the_networks_that_both_are_for(found):
    study = dataclasses.replace(found.study, compare=(("imcl", "kernel"),))
    assert "| all four minus kernel |  | +1.00 |" in tables.compare(Analysis(study, found.results))


def test_a_row_has_all_that_its_run_gave(small):
    planned = study_file.load(str(small)).runs[0]
    summary = {
        "last_test_accuracy": 0.5, "best_test_accuracy": 0.6, "best_epoch": 3, "epochs": 7,
        "train_accuracy": 0.8, "seconds_per_step": 0.25, "peak_memory_bytes": 9,
        "last_test_accuracy_at": {"raw": 1 / 3, "jpeg5": 0.25},
    }  # fmt: skip
    config = {"versions": {"commit": "abc", "torch": "2"}, "machine": {"accelerator": "A GPU"}}
    run = SimpleNamespace(summary=summary, config=config, held_out="validation")

    def row(device):
        of = dataclasses.replace(planned, config=dataclasses.replace(planned.config, device=device))
        return results.of_run("small", of, run, seconds=1.0, threads=2, jobs=3)

    got = row("cpu")
    assert (got.best_epoch, got.epochs, got.train_accuracy) == (3, 7, 0.8)
    assert (got.held_out, got.seconds_per_step, got.peak_memory_bytes) == ("validation", 0.25, 9)
    assert got.qualities == summary["last_test_accuracy_at"]
    assert (got.machine, row("auto").machine) == (processor(), "A GPU")


def test_minutes_are_of_sixty_seconds(small, runner, monkeypatch):
    seconds = iter(range(0, 10**6, 20))
    clock = SimpleNamespace(monotonic=lambda: next(seconds), sleep=time.sleep)
    monkeypatch.setattr(runs, "time", clock)
    assert runner.run(few(small, "ce"), minutes=10) == 0
    assert len(runner.log("began")) == 2


def test_runs_are_given_the_folder_of_the_data(small, tmp_path):
    planned = study_file.load(str(small)).runs[0]
    options = runs.Options(tmp_path, tmp_path / "data", True, 1, 3)
    config = flags.parse(runs.flags_of(planned, options), "imcl-train", "")
    assert (config.data_root, config.download, config.threads) == (tmp_path / "data", True, 3)


def test_the_seconds_of_a_run_are_those_of_all_its_parts(small, runner):
    study = few(small, "ce")
    folder = runs.run_folder(runner.folder / "runs", study.runs[0])
    folder.mkdir(parents=True)
    (folder / runs.SECONDS).write_text("100.0\n20.0\n")
    assert runner.run(study) == 0
    assert results.read(runner.csv)[0].seconds > 120


def test_a_run_has_a_group_of_its_own_and_holds_the_lock(small, tmp_path):
    with runs.locked(tmp_path) as lock:
        code = (
            f"import os, sys; os.fstat({lock}); sys.stderr.write(str(os.getpgrp() == os.getpid()))"
        )
        options = runs.Options(tmp_path, None, False, 1, 1, None, (sys.executable, "-c", code))
        execution = runs._Execution(None, None, options, None, lock)
        child = execution._start(few(small, "ce").runs[0], tmp_path / "run")
        assert child.process.wait() == 0
    assert (tmp_path / "run" / runs.STDERR).read_text() == "True"


def test_the_time_left_is_reckoned_from_the_runs_that_were_run_now(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    said = []
    shown = progress.Progress(10, 6)
    shown.said = said.append
    clock[0] = 60.0
    shown.finished(result("noise", "a", "ce", 1, 0.5))
    shown.close()
    assert said[0].startswith("7/10 ") and said[0].endswith("; about 0:03:00 left")


def test_what_is_measured_begins_and_ends_with_the_trained_network(monkeypatch):
    """On images and labels that are trained on."""
    seen = []
    monkeypatch.setattr(penalties, "penalty", lambda n, x, y, way: seen.append((x, y)) or {})
    config = dataclasses.replace(CONFIG, seed=3)
    found = penalties.measure(config)
    material = penalties.prepare_data(config)
    assert len(seen[0][0]) == 160 and torch.equal(seen[0][1], material.train.labels)
    torch.manual_seed(3)
    network = penalties.build_network(config, material.data_set)
    assert found["before"] == penalties.kernels(network, seen[0][0])
    assert found["before"] != found["after"]


def test_a_plot_is_of_what_the_tables_say(found, tmp_path, monkeypatch):
    axes = pytest.importorskip("matplotlib.axes").Axes
    drawn = []
    monkeypatch.setattr(axes, "plot", lambda self, x, y, mark, **_: drawn.append((mark, x)))
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *_, **__: None)
    plot.plot(found, tmp_path / "a.svg")
    ours = drawn[3:7]  # after label smoothing, of one seed, on network A
    last = [100 * x for x in found.points("noise", ["a"], "imcl", "ce")]
    mean, low, high, _ = plot.interval(last)
    best = found.difference("noise", ["a"], "imcl", "ce", "best_accuracy").mean
    assert min(last) > 0 and abs(100 * best - mean) > 0.1
    assert ours == [(".", last), ("-", [low, high]), ("o", mean), ("D", pytest.approx(100 * best))]
