"""Stored rows are of the runs that the studies have, and those that moved were moved rightly."""

from __future__ import annotations

import dataclasses
import shutil
from collections import Counter
from pathlib import Path

import pytest

from bench.accuracy import results, study_file
from bench.accuracy.migrations import (
    MOVED,
    found_kernels,
    intervals,
    migrate,
    never_committed,
    places,
    weights_by_way,
)
from bench.accuracy.migrations import __main__ as command
from bench.accuracy.results import Store
from bench.accuracy.study import PlannedRun

STORED = [name for name in study_file.names() if results.read(results.FOLDER / f"{name}.csv")]
STEPS = {"cpu-screening": weights_by_way, "cpu-wide": found_kernels}


@pytest.mark.parametrize("name", STORED)
def test_a_stored_row_is_of_a_run_that_its_study_has(name) -> None:
    """Fails where fingerprints change: run those rows again, or move them by a migration."""
    assert Store(results.FOLDER / f"{name}.csv", study_file.load(name)).stale == []


@pytest.mark.parametrize("migration", [found_kernels, intervals])
def test_rows_that_were_committed_before_and_after_are_moved(migration, tmp_path) -> None:
    rows = results.read(MOVED.with_name(f"{migration.__name__.rpartition('.')[2]}.csv"))
    assert rows
    now = {row for name in STORED for row in results.read(results.FOLDER / f"{name}.csv")}
    assert not now & set(rows)
    for name in STORED:
        own = [row for row in rows if row.study == name]
        moved = migrate(study_file.load(name), own, migration.before)
        assert set(moved) <= now and len(set(moved)) == len(own)
    # The same by the command's function, and once only.
    for name in STORED:
        (tmp_path / f"{name}.csv").write_text(
            results.to_csv(row for row in rows if row.study == name)
        )
    assert command.apply(migration.before, tmp_path) == sorted(
        rows, key=lambda row: STORED.index(row.study)
    )
    assert command.apply(migration.before, tmp_path) == []


def test_rows_of_other_settings_stay_as_they_are() -> None:
    study = study_file.load("cpu")
    row = next(row for row in results.read(MOVED) if row.method == "imcl")
    other = dataclasses.replace(row, seed=row.seed + 1)  # another seed's fingerprint
    assert migrate(study, [other], found_kernels.before) == [other]
    # The same run, but told what it wasn't.
    lr = dataclasses.replace(study, runs=tuple(
        dataclasses.replace(run, config=dataclasses.replace(run.config, lr=0.2))
        for run in study.runs
    ))  # fmt: skip
    assert migrate(lr, [row], found_kernels.before) == [row]


def wide() -> PlannedRun:
    """One that leaves conv1 out, as the rule did for a while, and not that before it."""
    return next(r for r in study_file.load("cpu-wide").runs if r.method == "imcl")


def test_kernels_that_were_not_found_then_had_to_be_named() -> None:
    run = wide()
    assert "conv1" in found_kernels.found_before(run.config)
    named = dataclasses.replace(run.config, kernels=tuple(run.told["kernels"][0]))
    then = {key: value for key, value in run.told.items() if key != "kernels"}
    (only,) = found_kernels.before(run)
    assert only == found_kernels.hashed({**then, "kernels": list(named.kernels)})
    assert weights_by_way.before(run) == set()


def test_kernels_that_depend_on_the_images_move_nothing(monkeypatch) -> None:
    monkeypatch.setattr("bench.accuracy.study._found_kernels", lambda config: [["a"], ["a", "b"]])
    run = next(r for r in study_file.load("cpu").runs if r.method == "imcl")
    assert found_kernels.before(run) == set() == weights_by_way.before(run)


def test_rows_never_committed_as_they_were_are_listed_and_accounted_for() -> None:
    lines = never_committed()
    assert len({line["was"] for line in lines}) == len(lines)
    for name, step in STEPS.items():
        own = {tuple(line[key] for key in ("condition", "network", "method", "seed")): line
               for line in lines if line["study"] == name}  # fmt: skip
        rows = {(row.condition, row.network, row.method, str(row.seed)): row
                for row in results.read(results.FOLDER / f"{name}.csv")}  # fmt: skip
        runs = {(run.condition, run.network, run.method, str(run.seed)): run
                for run in study_file.load(name).runs}  # fmt: skip
        for key, line in own.items():
            assert rows[key].commit == line["commit"]
            assert line["was"] in step.before(runs[key])
            assert line["fingerprint"] == rows[key].fingerprint == runs[key].fingerprint
    assert {line["study"] for line in lines} == set(STEPS)


def test_the_table_counts_them() -> None:
    rows = Counter(row.study for row in results.read(MOVED))
    unseen = Counter(line["study"] for line in never_committed())
    said = places({"cpu": 168, "cpu-wide": 24, "gpu": 0})["migrations:rows"]()
    assert f"| cpu | 168 | {rows['cpu']} | 0 |" in said
    assert f"| cpu-wide | 24 | 0 | {unseen['cpu-wide']} |" in said
    assert "gpu" not in said


def test_the_command_keeps_the_rows_as_they_were(tmp_path, monkeypatch, capsys) -> None:
    folder = tmp_path / "results"
    shutil.copytree(results.FOLDER, folder)
    before = results.read(MOVED)
    (folder / "cpu.csv").write_text(results.to_csv(row for row in before if row.study == "cpu"))
    monkeypatch.setattr(results, "FOLDER", folder)
    monkeypatch.setattr(command, "FOLDER", tmp_path)
    (tmp_path / "found_kernels.py").touch()
    assert command.main(["found_kernels"]) == 0
    kept = results.read(Path(tmp_path, "found_kernels.csv"))
    assert kept == [row for row in before if row.study == "cpu"]
    assert capsys.readouterr().out == f"found_kernels: moved {len(kept)} rows\n"
