"""imcl-train with networks by name, implementations that can't run, runs that go on for longer."""

import json
import sys

import pytest
import torch
from torch import nn
from training_processes import (
    SMALL,
    Command,
    assert_identical,
    checkpoints,
    config,
    table,
    wait_for,
)

import imcl_fast
from imcl_fast import train
from imcl_fast.models import import_torchvision
from imcl_fast.reports import compare, inspect
from imcl_fast.runs.errors import UsageError
from imcl_fast.runs.network import build_network, named
from imcl_fast.training.trainer import Trainer

import_torchvision()
FACTORIES = """
import torch

def make(num_classes):
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3, 2, 1), torch.nn.ReLU(),
        torch.nn.Conv2d(4, 8, 3, 2, 1), torch.nn.ReLU(),
        torch.nn.Flatten(), torch.nn.Linear(8 * 16, num_classes),
    )

def ten():
    return make(10)

def nothing():
    return None
"""


@pytest.fixture
def factories(tmp_path, monkeypatch):
    (tmp_path / "networks_of_mine.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [path for path in sys.path if path])
    return "networks_of_mine"


# Networks by name


@pytest.mark.parametrize("name", ["make", "ten"])
def test_a_network_of_ones_own(factories, name, tmp_path, capsys):
    flags = [flag for flag in SMALL if flag not in ("--width", "2")]
    flags = [*flags, "--model", f"{factories}:{name}", "--epochs", "1", "--ways", "multilayer"]
    assert train.main(flags) == 0
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name == f"digits-{factories}-{name}-multilayer-s0"
    capsys.readouterr()
    # The same name, and the run itself, is understood by imcl-inspect.
    assert inspect.main([str(run), "--plan"]) == 0
    assert inspect.main([f"{factories}:{name}", "--classes", "10", "--image-size", "16",
                         "--plan"]) == 0  # fmt: skip
    assert capsys.readouterr().out.count("2 multi-layer consistency, weight") == 2


def test_a_network_of_timms(tmp_path):
    pytest.importorskip("timm", reason="timm is not installed")
    settings = dict(train_images=100, batch_size=50, width=64, epochs=1, impl="torch")
    for name, channels in (("resnet10t", 64), ("vit_tiny_patch16_224", 192)):
        trainer = Trainer(
            config(**settings, model=f"timm:{name}", image_size=32, run_dir=tmp_path / name,
                   ways=("kernel",)),
        )  # fmt: skip
        summary = trainer.fit()
        assert summary["model"] == f"timm:{name}" and trainer.network.num_classes == 10
        assert trainer.network.num_features in (channels, 512)
        assert trainer.network(torch.rand(1, 1, 32, 32)).shape == (1, 10)
        assert inspect.main([str(tmp_path / name)]) == 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet19", "model: expected one of resnet18,.*timm:NAME or package.module:factory, got"),
        (":make", "model: expected one of"),
        ("timm:no_such", "timm:no_such: can't be built"),
        ("no.such:make", r"no.such:make: can't be built \(ModuleNotFoundError: No module named"),
        ("{}:nothing", "nothing: expected an nn.Module, got NoneType"),
        ("{}:absent", r"absent: can't be built \(AttributeError"),
    ],
)
def test_other_names_are_refused(factories, name, message, digits):
    if name.startswith("timm"):
        pytest.importorskip("timm", reason="timm is not installed")
    with pytest.raises((UsageError, ValueError), match=message):
        build_network(config(model=name.format(factories), width=64), digits)


def test_a_network_that_cannot_be_built_leaves_no_folder(factories, tmp_path, capsys):
    flags = [flag for flag in SMALL if flag not in ("--width", "2")]
    run = tmp_path / "run"
    assert train.main([*flags, "--model", f"{factories}:absent", "--run-dir", str(run)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "absent: can't be built (AttributeError" in err
    assert not run.exists()


def test_settings_of_this_packages_networks_are_for_them_alone(factories, digits):
    with pytest.raises(UsageError, match="width: expected none for .*:make, which has its own"):
        build_network(config(model=f"{factories}:make", width=8), digits)
    network = named(f"{factories}:make", 7)
    assert isinstance(network, nn.Module) and network[-1].out_features == 7


# What stops a run before it leaves anything


def test_an_implementation_that_cannot_run_leaves_no_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for more in ([], ["--ways", "none"], ["--method", "song-chai-2"]):
        flags = [*SMALL, *more, "--impl", "triton", "--device", "cpu"]
        assert train.main([*flags, "--run-dir", str(tmp_path / "run")]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and 'impl="triton" can\'t run: it runs on CPU tensors' in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("main", [train.main, inspect.main, compare.main])
def test_every_command_tells_its_version(main, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.split()[-1] == imcl_fast.__version__


@pytest.mark.parametrize(
    ("ways", "said"), [("none", "plain cross entropy on digits"), ("kernel", "kernel on digits")]
)
def test_it_says_what_it_trains_with(ways, said, tmp_path, capsys):
    flags = [*SMALL, "--epochs", "1", "--ways", ways, "--run-dir", str(tmp_path / "run")]
    assert train.main(flags) == 0
    assert capsys.readouterr().out.startswith(said)


# More epochs


def go_on(folder, epochs, *more):
    return Command([*SMALL, "--epochs", str(epochs), "--run-dir", str(folder), "--resume", "auto",
                    *more], folder.parent)  # fmt: skip


@pytest.mark.parametrize(
    "schedule",
    ["cosine", *(pytest.param(name, marks=pytest.mark.slow) for name in ("constant", "step"))],
)
def test_a_run_that_has_ended_goes_on_for_more_epochs(schedule, tmp_path):
    more = ("--schedule", schedule, "--checkpoint-every", "1")
    for epochs in (2, 4):
        command = go_on(tmp_path / "run", epochs, *more)
        assert command.wait() == 0, command.err
    said = command.out.splitlines()
    assert said[0].startswith("4 epochs instead of 2: the learning rate goes on as that of 4, at ")
    assert said[1] == "resumed after step 16 of 32, in epoch 3 of 4"
    rows = table(tmp_path / "run" / "metrics.csv")
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4"]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["epochs"] == 4
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["epochs"] == 4 and summary["steps"] == 32
    # The learning rates are from there on those of a run of so many epochs.
    whole = go_on(tmp_path / "whole", 4, *more)
    assert whole.wait() == 0, whole.err
    rates = [
        [float(row["lr"]) for row in table(tmp_path / name / "steps.csv")]
        for name in ("run", "whole")
    ]
    assert rates[0][16:] == pytest.approx(rates[1][16:])
    # Killed on the way, it goes on to the same bits.
    for epochs in (2, 4):
        command = go_on(tmp_path / "killed", epochs, *more)
        if epochs == 4:
            wait_for(lambda: checkpoints(tmp_path / "killed")[-1].stem >= "step-00000019")
            command.kill()
        command.wait()
    command = go_on(tmp_path / "killed", 4, *more)
    assert command.wait() == 0, command.err
    assert_identical(tmp_path / "killed", tmp_path / "run")


def test_a_run_under_way_and_a_shorter_one_are_refused(tmp_path):
    command = go_on(tmp_path / "run", 2)
    assert command.wait() == 0, command.err
    shorter = go_on(tmp_path / "run", 1)
    assert shorter.wait() == 2 and "epochs (was 2, is 1)" in shorter.err
    (tmp_path / "run" / "summary.json").unlink()
    longer = go_on(tmp_path / "run", 3)
    assert longer.wait() == 2
    assert "epochs (was 2, is 3); more epochs can be had once it has ended" in longer.err


def test_a_schedule_that_ends_with_its_run_cannot_go_on(tmp_path):
    for epochs, code in ((1, 0), (2, 2), (1, 0)):
        command = go_on(tmp_path / "run", epochs, "--schedule", "onecycle")
        assert command.wait() == code, command.err
        if code:
            assert command.err.count("\n") == 1 and "epochs: expected no more" in command.err
