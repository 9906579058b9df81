"""Several processes train what one does, and may be interrupted as well."""

import itertools
import os
import re
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from PIL import Image
from training_processes import (
    SMALL,
    Command,
    assert_identical,
    checkpoints,
    resume_flags,
    table,
    wait_for,
)

from imcl_fast.train import main

# No batch normalisation, whose statistics are of a process's share of the batch, and no
# dropout: then only the order of the additions differs. Nor ReLU: a channel about to die
# would make much of a rounding error.
SCRIPT = """
    import sys
    import torch
    from torch import nn
    from imcl_fast import TrainConfig, Trainer

    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.Tanh(),
        nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.Tanh(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.Tanh(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10),
    )
    config = TrainConfig(
        ways=("multilayer", "representation", "kernel"), train_images=160, batch_size=20,
        representation_interval=2, kernel_interval=4, accumulate=int(sys.argv[2]),
        epochs=2, label_noise=0.5, threads=1, log_every=1,
        ways_warmup_epochs=1.5, run_dir=sys.argv[1], report=False, tensorboard=False,
        measure_ways=False,
    )
    Trainer(config, network=network).fit()
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("script") / "script.py"
    path.write_text(textwrap.dedent(SCRIPT))
    return path


def run(*command):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_two_processes_train_what_one_does(script, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    # Of accumulated batches only the last is exchanged.
    run(script, one, 2)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    out = run(*launch, script, two, 2)
    assert out.count("epoch 1/2") == 1 and "on cpu, 2 processes" in out  # one of them speaks
    for name in ("steps.csv", "metrics.csv"):
        rows, others = table(one / name), table(two / name)
        assert len(rows) == len(others) == (8 if name == "steps.csv" else 2)
        for row, other in zip(rows, others, strict=True):
            assert list(row) == list(other)
            for key in row.keys() - {"seconds", "images_per_second", "data_seconds"}:
                assert float(row[key]) == pytest.approx(float(other[key]), rel=2e-5), key
    weights, others = (torch.load(f / "network.pt", weights_only=True) for f in (one, two))
    for name, value in weights.items():
        torch.testing.assert_close(others[name], value, rtol=1e-4, atol=1e-5)
    state = torch.load(checkpoints(two)[-1], weights_only=True)["content"]
    assert len(state["processes"]) == 2  # the generators of both


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_signal_to_either_process_saves_and_both_go_on(tmp_path, rank):
    flags = [*SMALL, "--checkpoint-every", "1000"]
    whole = Command([*flags, "--run-dir", str(tmp_path / "whole")], tmp_path / "a", ranks=2)
    assert whole.wait() == 0, whole.err
    run = tmp_path / "run"
    command = Command([*flags, "--run-dir", str(run)], tmp_path / "b", ranks=2)
    wait_for(lambda: (run / "steps.csv").exists() and len(table(run / "steps.csv")) >= 3)
    command.kill(signal.SIGTERM, rank)
    assert command.wait() == 143, command.err
    assert [process.exitcode for process in command.processes] == [143, 143]
    stopped = int(re.search(r"stopped after step (\d+) of 24", command.err).group(1))
    assert "go on with: torchrun --nproc-per-node 2 -m imcl_fast.train" in command.err
    assert command.outputs[1][1].read_text().count("imcl-train") == 0
    again = Command(resume_flags(command.err), tmp_path / "c", ranks=2)
    assert again.wait() == 0, again.err
    assert f"resumed after step {stopped} of 24" in again.out
    for folder in (run, tmp_path / "whole"):
        for path in checkpoints(folder)[:-1]:
            path.unlink()
    assert_identical(run, tmp_path / "whole")


def test_another_number_of_processes_goes_on_with_a_warning(tmp_path):
    run = tmp_path / "run"
    flags = [*SMALL, "--checkpoint-every", "3", "--run-dir", str(run)]
    command = Command(flags, tmp_path / "a", ranks=2)
    wait_for(lambda: checkpoints(run))
    command.kill()
    command.wait()
    again = Command([*flags, "--resume", "auto"], tmp_path / "b")
    assert again.wait() == 0, again.err
    assert "another device or number of processes than before" in again.out
    assert [row["epoch"] for row in table(run / "metrics.csv")] == ["1", "2", "3"]


def test_an_error_of_the_first_process_ends_all(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text("{}")
    command = Command([*SMALL, "--run-dir", str(run)], tmp_path / "a", ranks=2)
    assert command.wait() == 2
    assert [process.exitcode for process in command.processes] == [2, 2]
    assert command.err.count("\n") == 1 and "holds a run of another kind" in command.err
    assert command.outputs[1][1].read_text() == ""


def test_an_error_of_another_process_is_told(tmp_path):
    images = tmp_path / "images"
    for i, (side, name) in enumerate(itertools.product(("train", "test"), ("x", "y"))):
        folder = images / side / name
        folder.mkdir(parents=True)
        for j in range(4):
            pixels = (torch.arange(256).view(16, 16) * (i + 1) + j) % 256
            Image.fromarray(pixels.to(torch.uint8).numpy()).save(folder / f"{j}.png")
    damaged = images / "test" / "y" / "3.png"  # the last, which is the second process's
    damaged.write_bytes(b"no image")
    flags = ["--dataset", "folder", "--data-root", str(images), "--image-size", "16", "--width",
             "2", "--batch-size", "4", "--epochs", "1", "--ways", "none", "--no-report",
             "--no-tensorboard", "--device", "cpu", "--threads", "1",
             "--run-dir", str(tmp_path / "run")]  # fmt: skip
    command = Command(flags, tmp_path / "a", ranks=2)
    assert command.wait() != 0
    told = command.outputs[1][1].read_text()
    assert str(damaged) in told and "Traceback" not in told


def test_a_device_that_another_process_lacks_is_told(monkeypatch, capsys, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    for name, value in (("RANK", "1"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    assert main([*SMALL, "--device", "cuda", "--run-dir", str(tmp_path / "run")]) == 2
    assert "device: expected one that is there, got 'cuda'" in capsys.readouterr().err


def test_a_batch_that_can_not_be_shared_out_is_named(tmp_path):
    flags = [*SMALL, "--batch-size", "21", "--run-dir", str(tmp_path / "run")]
    command = Command(flags, tmp_path / "a", ranks=2)
    assert command.wait() == 2
    assert "batch_size: expected a multiple of the 2 processes" in command.err
    assert command.err.count("\n") == 1
