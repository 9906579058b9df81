"""Runs of networks whose forward does as it likes: what it returns, keeps and refuses."""

import pytest
import torch
from test_training import QUIET, config, table
from torch import nn

from imcl_fast import Trainer, train
from imcl_fast.reports import inspect
from imcl_fast.training.progress import Observer

pytestmark = pytest.mark.usefixtures("one_thread")


class Plain(nn.Module):
    def __init__(self, classes=10):
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Sequential(
            nn.Conv2d(1, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 8, 3, 2, 1), nn.ReLU()
        )
        self.fc = nn.Linear(8, classes)

    def forward(self, x):
        return self.fc(self.features(x).mean((2, 3)))


class Kept(Plain):
    """Keeps a loss of its own, as networks of experts do; what has a graph can't be copied."""

    def forward(self, x):
        h = self.features(x)
        if self.training:
            self.balance = h.square().mean()
        return self.fc(h.mean((2, 3)))


class Several(Plain):
    """Returns more than the logits while it trains, as GoogLeNet does."""

    def forward(self, x):
        logits = super().forward(x)
        return (logits, logits.detach()) if self.training else logits


class Named(Plain):
    def forward(self, x):
        return {"features": x, "logits": super().forward(x)}


class Strict(Plain):
    def forward(self, x):
        if x.shape[-1] != 16:
            raise AssertionError(f"expected images of 16 pixels,\ngot {x.shape[-1]}")
        return super().forward(x)


class Versioned(Plain):
    def get_extra_state(self):
        return {"version": 1}

    def set_extra_state(self, state):
        assert state == {"version": 1}


class Lines(Observer):
    def __init__(self):
        self.lines = []

    def said(self, line):
        self.lines.append(line)


def fit(network, digits, observer=QUIET, **settings):
    trainer = Trainer(config(**settings), data_set=digits, network=network, observer=observer)
    return trainer, trainer.fit()


def test_what_cannot_be_measured_at_the_end_is_left_out_of_a_run_that_is_complete(digits, tmp_path):
    lines = Lines()
    _, summary = fit(Kept(), digits, lines, ways=("kernel",), kernel_interval=1,
                     measure_ways=True, run_dir=tmp_path / "run")  # fmt: skip
    assert "way_seconds" not in summary and (tmp_path / "run" / "summary.json").exists()
    assert any("What each way costs is left out: RuntimeError" in line for line in lines.lines)


@pytest.mark.parametrize("kind", [Several, Named])
@pytest.mark.parametrize("ways", [(), ("kernel",)])
def test_logits_are_found_in_what_a_network_returns(digits, tmp_path, kind, ways):
    plain, _ = fit(Plain(), digits, ways=ways)
    other, summary = fit(kind(), digits, ways=ways, measure_ways=True, run_dir=tmp_path / "run")
    assert other.rows[0]["test_accuracy"] == plain.rows[0]["test_accuracy"]
    assert other.rows[0]["train_loss"] == plain.rows[0]["train_loss"]
    assert ("way_seconds" in summary) == bool(ways)


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module that the command line can name, of this file's networks."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "forwards.py").write_text("from test_any_network import *\n")
    return "forwards"


FLAGS = ["--dataset", "digits", "--train-images", "100", "--batch-size", "50", "--epochs", "1",
         "--threads", "1", "--no-report", "--no-measure-ways", "--no-tensorboard"]  # fmt: skip


@pytest.mark.parametrize("ways", ["none", "kernel"])
def test_what_a_network_says_of_images_it_cannot_take_is_one_line(module, tmp_path, capsys, ways):
    flags = [*FLAGS, "--model", f"{module}:Strict", "--ways", ways, "--image-size", "32"]
    assert train.main([*flags, "--run-dir", "run"]) == 2
    err = capsys.readouterr().err
    told = "model: can't run on images (1, 32, 32); try another image_size (AssertionError: expec"
    assert err.count("\n") == 1 and told in err and "got 32)" in err
    options = ["--classes", "10", "--image-size", "32"]
    for more in ([], ["--plan"], ["--cka"]):
        assert inspect.main([f"{module}:Strict", *options, *more]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and "can't run on images (" in err


def test_a_run_of_a_network_with_extra_state_is_inspected(module, tmp_path, capsys):
    flags = [*FLAGS, "--model", f"{module}:Versioned", "--ways", "none", "--run-dir", "run"]
    assert train.main(flags) == 0
    run = tmp_path / "run"
    assert len(table(run / "metrics.csv")) == 1
    for path in (run, *(run / "checkpoints").glob("step-*.pt")):
        assert inspect.main([str(path), "--images", "2"]) == 0, capsys.readouterr().err
        assert "features.0" in capsys.readouterr().out
