"""Runs that are killed, told to stop, or left without room, and go on as if they hadn't been."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from data_files import write_folder
from training_processes import (
    SMALL,
    Command,
    assert_identical,
    checkpoints,
    resume_flags,
    table,
    wait_for,
)

from imcl_fast.runs.folder import read_run

# How often runs are killed: 20 and more for a study of it.
KILLS = int(os.environ.get("IMCL_FAST_KILLS", "3"))
EVERY_STEP = (
    "--checkpoint-every", "1", "--ema", "0.9", "--accumulate", "2", "--keep", "2",
    "--ways-warmup-epochs", "2", "--evaluate-every", "2", "--mixup", "0.4", "--cutmix", "1",
    # Of the two batches of a step the first, the second or none has such a way; the first step
    # has no way 4, so that its row has an empty cell.
    "--representation-interval", "5", "--kernel-interval", "10",
)  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A whole run, and how long it took."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    Command(["--help"], folder).wait()  # starts the server, which takes seconds
    start = time.monotonic()
    command = Command([*SMALL, *EVERY_STEP, "--run-dir", str(folder / "run")], folder)
    assert command.wait() == 0, command.err
    return folder / "run", time.monotonic() - start


def flags(run, *more):
    return [*SMALL, *EVERY_STEP, "--run-dir", str(run), "--resume", "auto", *more]


def start(run, *more):
    return Command(flags(run, *more), run.parent)


def test_killed_at_any_moment_it_ends_the_same(uninterrupted, tmp_path):
    whole, duration = uninterrupted
    rng = random.Random(int(os.environ.get("IMCL_FAST_KILLS_SEED", "0")))
    killed, number = 0, 0
    while killed < KILLS:
        run = tmp_path / str(number) / "run"
        run.parent.mkdir()
        number += 1
        while True:
            command = start(run)
            moment = rng.uniform(0, duration) if killed < KILLS else 3600
            command.processes[0].join(moment)
            if not command.running:
                assert command.wait() == 0, command.err
                break
            command.kill()
            command.wait()
            killed += 1
        assert_identical(run, whole)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_says_how_to_go_on(uninterrupted, tmp_path, number, code):
    run = tmp_path / "run"
    # Otherwise it would save at the ends of epochs only.
    command = start(run, "--checkpoint-every", "1000", "--keep", "9")
    wait_for(lambda: (run / "steps.csv").exists() and len(table(run / "steps.csv")) >= 2)
    command.kill(number)
    assert command.wait() == code
    assert "Traceback" not in command.err
    stopped = int(re.search(r"stopped after step (\d+) of 12", command.err).group(1))
    assert checkpoints(run)[-1].name == f"step-{stopped:08d}.pt"
    again = Command(resume_flags(command.err), tmp_path)
    assert again.wait() == 0, again.err
    assert f"resumed after step {stopped} of 12" in again.out
    shutil.copytree(uninterrupted[0], tmp_path / "whole")
    for folder in (run, tmp_path / "whole"):  # they kept different ones
        for path in checkpoints(folder)[:-1]:
            path.unlink()
    assert_identical(run, tmp_path / "whole")


def test_a_signal_to_the_whole_group_saves_where_workers_decode(tmp_path):
    """As batch systems and torchrun send it: the workers, too, get it, and must not die of it."""
    write_folder(tmp_path / "images", per_class=8)
    run = tmp_path / "run"
    flags = ["--dataset", "folder", "--data-root", str(tmp_path / "images"), "--image-size", "16",
             "--width", "2", "--batch-size", "4", "--epochs", "400", "--ways", "none", "--device",
             "cpu", "--threads", "1", "--log-every", "1", "--workers", "2", "--no-tensorboard",
             "--run-dir", str(run)]  # fmt: skip
    command = subprocess.Popen(
        [sys.executable, "-m", "imcl_fast.train", *flags], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    with command:
        wait_for(lambda: (run / "steps.csv").exists() and len(table(run / "steps.csv")) >= 9)
        os.killpg(command.pid, signal.SIGTERM)
        _, err = command.communicate(timeout=120)
    assert command.returncode == 143 and "Traceback" not in err, err
    assert "stopped after step" in err and checkpoints(run)


def test_a_damaged_checkpoint_falls_back_to_the_one_before(uninterrupted, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(uninterrupted[0], run)
    before, newest = checkpoints(run)
    newest.write_bytes(newest.read_bytes()[:-1000])
    command = start(run)
    assert command.wait() == 0, command.err
    assert f"{newest}: truncated, corrupt or no checkpoint" in command.out
    assert "resumed after step 11 of 12" in command.out
    assert_identical(run, uninterrupted[0])


def test_with_no_good_checkpoint_it_stops(uninterrupted, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(uninterrupted[0], run)
    for path in checkpoints(run):
        path.write_bytes(b"")
    metrics = (run / "metrics.csv").read_text()
    command = start(run)
    assert command.wait() == 2
    assert command.err.count("\n") == 1 and "none of the 2 checkpoints can be read" in command.err
    assert (run / "metrics.csv").read_text() == metrics


def test_with_no_checkpoint_at_all_it_starts_anew(uninterrupted, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(uninterrupted[0], run)
    shutil.rmtree(run / "checkpoints")
    (run / "summary.json").unlink()  # it was killed before the first
    (run / "steps.csv").write_text("step,epoch\n1,1\n1,")
    command = start(run)
    assert command.wait() == 0, command.err
    assert_identical(run, uninterrupted[0])


@pytest.mark.parametrize("left", ["summary.json", "checkpoints/best.pt"])
@pytest.mark.parametrize("more", [(), ("--epochs", "4")])
def test_results_without_checkpoints_are_not_overwritten(uninterrupted, tmp_path, left, more):
    run = tmp_path / "run"
    shutil.copytree(uninterrupted[0], run)
    for path in (*checkpoints(run), run / "summary.json", run / "checkpoints" / "best.pt"):
        if path != run / left:
            path.unlink()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    command = start(run, *more)
    assert command.wait() == 2
    assert command.err.count("\n") == 1
    assert f"{run} has {left} of a run, but none of its checkpoints" in command.err
    assert {path: path.read_bytes() for path in before} == before


def test_a_complete_run_is_left_as_it_is(uninterrupted, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(uninterrupted[0], run)
    # What only the process that trained could measure.
    summary = json.loads((run / "summary.json").read_text())
    measured = {"peak_memory_bytes": 1, "peak_memory_of": "test", "way_seconds": {"kernel": 2.0}}
    (run / "summary.json").write_text(json.dumps({**summary, **measured}))
    command = start(run)
    assert command.wait() == 0, command.err
    assert "resumed after step 12 of 12" in command.out and "last test accuracy" in command.out
    summary = json.loads((run / "summary.json").read_text())
    assert {name: summary[name] for name in measured} == measured
    assert_identical(run, uninterrupted[0])


def test_damaged_tables_are_mended(uninterrupted, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(uninterrupted[0], run)
    lines = (run / "steps.csv").read_bytes().splitlines(keepends=True)
    (run / "steps.csv").write_bytes(b"".join([*lines[:5], b"\xff\0,\n", *lines[6:]]))
    (run / "metrics.csv").write_bytes(b"\xff\0,\n")
    command = start(run)
    assert command.wait() == 0, command.err
    assert f"{run}/steps.csv: 1 damaged lines are left out" in command.out
    assert (run / "steps.csv").read_bytes() == b"".join(lines[:5] + lines[6:])
    assert table(run / "metrics.csv") == table(uninterrupted[0] / "metrics.csv")


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (["--lr", "0.2", "--epochs", "4"], r"epochs \(was 3, is 4\), lr \(was 0.1, is 0.2\)"),
        (["--ways", "kernel"], r"ways \(was .*, is \('kernel',\)\)"),
    ],
)
def test_other_settings_are_refused(uninterrupted, tmp_path, changed, named):
    before = checkpoints(uninterrupted[0])
    command = Command(flags(uninterrupted[0], *changed), tmp_path)
    assert command.wait() == 2
    assert re.search(rf"was run with other settings: {named}", command.err)
    assert command.err.count("\n") == 1
    assert checkpoints(uninterrupted[0]) == before


def test_a_run_of_an_older_version_keeps_its_intervals(tmp_path):
    """They were 1 where 0.1 left them out, and are others by default today."""
    run, every = tmp_path / "run", ["--representation-interval", "1", "--kernel-interval", "1"]
    whole = Command([*SMALL, *every, "--epochs", "1", "--run-dir", str(run)], tmp_path / "a")
    assert whole.wait() == 0, whole.err
    config = json.loads((run / "config.json").read_text())
    assert config["versions"]["imcl_fast"] != "0.1.0"
    config["versions"]["imcl_fast"] = "0.1.0"
    config |= {"representation_interval": None, "kernel_interval": None}
    (run / "config.json").write_text(json.dumps(config))
    again = [*SMALL, "--epochs", "1", "--run-dir", str(run), "--resume", "auto"]
    command = Command(again, tmp_path / "b")
    assert command.wait() == 2
    assert (
        "representation_interval (was 1, is left out), kernel_interval (was 1, is left out)"
        in command.err
    )
    command = Command([*again, *every], tmp_path / "c")
    assert command.wait() == 0, command.err
    assert "resumed after step 8 of 8" in command.out


def test_a_folder_with_a_run_in_it_is_refused(uninterrupted, tmp_path):
    command = Command([*SMALL, "--run-dir", str(uninterrupted[0])], tmp_path)
    assert command.wait() == 2
    assert command.err.count("\n") == 1 and "already holds a run" in command.err


def test_a_run_that_is_going_on_is_left_alone(tmp_path):
    run = tmp_path / "run"
    command = Command([*SMALL, "--epochs", "1000", "--run-dir", str(run)], tmp_path)
    wait_for(lambda: (run / "steps.csv").exists())
    try:
        command.kill(signal.SIGSTOP)
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        pid = command.processes[0].pid
        for more in (["--resume", "auto", "--epochs", "1000"], ["--width", "4"]):
            other = Command([*SMALL, *more, "--run-dir", str(run)], tmp_path / "other")
            assert other.wait() == 2
            assert other.err.count("\n") == 1 and f"(process {pid} on " in other.err
            assert {path: path.read_bytes() for path in before} == before
            assert set(before) == {path for path in run.rglob("*") if path.is_file()}
        assert not read_run(run).finished  # whoever wants to look may
    finally:
        command.kill()
        command.wait()
    again = Command([*SMALL, "--epochs", "9", "--resume", "auto", "--run-dir", str(run)], tmp_path)
    assert again.wait() == 2 and "was run with other settings" in again.err  # no longer locked


@contextlib.contextmanager
def small_disk(folder, size):
    """A file system of ``size`` bytes in memory at ``folder``."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "imcl-fast-test", str(folder)]
    result = subprocess.run(mount, capture_output=True, text=True)
    if result.returncode:
        pytest.skip(f"can't mount a small file system: {result.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_costs_nothing_but_time(uninterrupted, tmp_path):
    whole = uninterrupted[0]
    disk = tmp_path / "disk"
    disk.mkdir()
    room = int(2.5 * checkpoints(whole)[0].stat().st_size)
    with small_disk(disk, room):
        run = disk / "run"
        command = Command(flags(run), tmp_path)
        assert command.wait() == 1
        assert "no room left on the disk" in command.err and "Traceback" not in command.err
        assert "go on with: imcl-train" in command.err
        saved = checkpoints(run)
        assert saved and not list(run.rglob("*.tmp"))
        for path in saved:
            torch.load(path, weights_only=True)
        remount = ["mount", "-o", "remount,size=64m", str(disk)]
        subprocess.run(remount, check=True)
        again = Command(resume_flags(command.err), tmp_path)
        assert again.wait() == 0, again.err
        assert f"resumed after step {int(saved[-1].stem[5:])} " in again.out
        assert_identical(run, whole)
