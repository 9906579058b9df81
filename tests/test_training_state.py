"""What a run carries from step to step, and through a checkpoint to its next start."""

from __future__ import annotations

import random

import numpy
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from training_processes import assert_same, checkpoints, config, table

from imcl_fast.runs.errors import CheckpointError
from imcl_fast.training.distributed import Processes
from imcl_fast.training.loop import Loop
from imcl_fast.training.progress import Observer
from imcl_fast.training.records import Records
from imcl_fast.training.state import EpochSums, TrainingState, random_state, set_random_state
from imcl_fast.training.trainer import Trainer


class Together(Processes):
    """One of several processes, the others of which hand in what is given."""

    def __init__(self, rank, others):
        super().__init__(rank, len(others) + 1, torch.device("cpu"))
        self._others = others

    def gather(self, value):
        values = list(self._others)
        values.insert(self.rank, value)
        return values


LOSS = ("loss",)


def state(seed):
    """A state that seeds, and whatever else has been done to it, tell from others."""
    torch.manual_seed(seed)
    objective = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** (3 + seed))
    averaged = AveragedModel(objective)
    for _ in range(seed):
        optimizer.zero_grad()
        scaler.scale(objective(torch.randn(4, 3)).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        averaged.update_parameters(objective)
    return TrainingState(
        objective, optimizer, schedule, scaler, averaged, seed, 2 * seed, 3 * seed,
        EpochSums(seed, {LOSS: seed}, {LOSS: torch.tensor([seed], dtype=torch.float64)},
                  4.0 * seed, 0.5),
        {"loss": torch.tensor(5.0 * seed)}, [{"epoch": epoch} for epoch in range(seed)],
    )  # fmt: skip


def draws():
    return random.random(), float(numpy.random.rand()), float(torch.rand(()))


def test_a_state_comes_back_whole() -> None:
    alone = Processes(0, 1, torch.device("cpu"))
    before = state(3)
    stored = before.state_dict(alone)
    drawn = draws()
    other = state(1)
    assert other.load_state_dict(stored, alone)
    assert draws() == drawn
    assert other.load_state_dict(stored, alone)  # which sets the generators again
    assert_same(other.state_dict(alone), stored)
    assert other.scaler.get_scale() == 2.0**6
    assert (other.epoch, other.step_in_epoch, other.step) == (3, 6, 9)
    assert (other.sums, other.rows) == (before.sums, before.rows)
    assert other.latest == before.latest


def test_each_process_goes_on_with_its_own_generators_and_sums() -> None:
    shares = []
    for seed in (1, 2):
        one = state(seed)
        alone = Processes(0, 1, torch.device("cpu"))
        share = one.state_dict(alone)["processes"][0]
        shares.append((share, draws(), one.sums))
    stored = {**state(3).state_dict(Processes(0, 1, torch.device("cpu"))),
              "processes": [share for share, _, _ in shares]}  # fmt: skip
    for rank, (_, drawn, sums) in enumerate(shares):
        again = state(4)
        assert again.load_state_dict(stored, Together(rank, [None]))
        assert draws() == drawn
        assert again.sums == sums


@pytest.mark.parametrize("world", [1, 3])
def test_other_processes_share_the_sums_of_those_before(world) -> None:
    alone = Processes(0, 1, torch.device("cpu"))
    shares = [state(seed).state_dict(alone)["processes"][0] for seed in (2, 5)]
    stored = {**state(3).state_dict(alone), "processes": shares}
    counts, totals = 0, torch.zeros(1, dtype=torch.float64)
    for rank in range(world):
        again = state(1)
        assert not again.load_state_dict(stored, Together(rank, [None] * (world - 1)))
        assert again.sums.batches == 2  # as many as each of those before had its share of
        counts += again.sums.counts[LOSS]
        totals += again.sums.totals[LOSS]
    assert counts == 7 and totals.item() == 7


def test_generators_of_another_device_are_left_as_they_are() -> None:
    cpu = torch.device("cpu")
    stored = random_state(cpu)
    drawn = draws()
    assert not set_random_state({**stored, "cuda": torch.get_rng_state()}, cpu)
    assert draws() != drawn
    assert set_random_state(stored, cpu) and draws() == drawn


# Whole runs


def train(digits, run, **settings):
    """A run of 4 steps per epoch in ``run``, its trainer and the folder."""
    own = {"ways": (), "epochs": 2, "log_every": 1, "run_dir": run, **settings}
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(256, 20), nn.Tanh(), nn.Linear(20, 10))
    start = network[1].weight.detach().clone()
    Trainer(config(**own), data_set=digits, network=network, observer=Observer()).fit()
    return network[1].weight.detach() - start


def column(run, file, name):
    return [float(row[name]) for row in table(run / file)]


def test_the_learning_rate_follows_its_schedule(digits, tmp_path) -> None:
    train(digits, tmp_path / "run", lr=0.1, schedule="step")
    rates = [0.1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001]
    assert column(tmp_path / "run", "steps.csv", "lr") == pytest.approx(rates)


def test_an_epochs_loss_is_the_mean_over_its_steps(digits, tmp_path) -> None:
    train(digits, tmp_path / "run")
    losses = column(tmp_path / "run", "steps.csv", "loss")
    means = [sum(losses[:4]) / 4, sum(losses[4:]) / 4]
    assert column(tmp_path / "run", "metrics.csv", "train_loss") == pytest.approx(means)


def test_the_best_checkpoint_is_of_the_first_epoch_with_the_highest_accuracy(
    digits, tmp_path, monkeypatch
) -> None:
    accuracies = iter([0.3, 0.5, 0.4, 0.5])
    monkeypatch.setattr(
        Loop, "_measure", lambda loop: {"test_loss": 1.0, "test_accuracy": next(accuracies)}
    )
    train(digits, tmp_path / "run", epochs=4)
    best = torch.load(tmp_path / "run/checkpoints/best.pt", weights_only=True)
    assert best["content"]["position"]["epoch"] == 2


def test_checkpoints_come_every_so_many_steps_and_after_every_epoch(digits, tmp_path) -> None:
    train(digits, tmp_path / "run", checkpoint_every="3", keep=9)
    steps = [int(path.stem[5:]) for path in checkpoints(tmp_path / "run")]
    assert steps == [3, 4, 6, 8]


def test_scaled_gradients_are_clipped_as_they_are(digits, tmp_path) -> None:
    moved = train(
        digits, tmp_path / "run", amp="fp16", clip_norm=1e-3, optimizer="sgd", momentum=0.0,
        weight_decay=0.0, schedule="constant", lr=1.0, epochs=4,
    )  # fmt: skip
    # The first steps may be left out, until the scale fits; none is longer than allowed.
    assert 0.5e-3 < moved.norm() <= 16.1e-3


def test_tables_that_lag_behind_the_checkpoint_catch_up(digits, tmp_path) -> None:
    """As when a process is killed between the checkpoint and the table, or within a row."""
    run = tmp_path / "run"
    train(digits, run, resume="auto")
    whole = {name: (run / name).read_text() for name in ("metrics.csv", "steps.csv")}
    (run / "metrics.csv").write_text("".join(whole["metrics.csv"].splitlines(True)[:2]))
    (run / "steps.csv").write_text(whole["steps.csv"] + "1")  # of step 10
    train(digits, run, resume="auto")
    assert {name: (run / name).read_text() for name in whole} == whole


@pytest.mark.parametrize("changed", [0, 1], ids=["trained on", "true"])
def test_checkpoints_of_other_labels_are_not_gone_on_with(
    digits, tmp_path, monkeypatch, changed
) -> None:
    train(digits, tmp_path / "run", label_noise=0.5, resume="auto")
    own = Loop._labels

    def others(loop):
        labels = own(loop)
        labels[changed] = labels[changed].flip(0)
        return labels

    monkeypatch.setattr(Loop, "_labels", others)
    with pytest.raises(CheckpointError, match="of other training labels"):
        train(digits, tmp_path / "run", label_noise=0.5, resume="auto")


def test_a_row_of_steps_that_lost_a_part_is_left_out_and_kept_aside(tmp_path) -> None:
    whole = "step,epoch,loss\n1,1,0.5\n2,1\n3,1,0.25\n4,1,0.125\n"
    (tmp_path / "steps.csv").write_text(whole)
    said = Records(tmp_path).go_on(3, [])
    assert (tmp_path / "steps.csv").read_text() == "step,epoch,loss\n1,1,0.5\n3,1,0.25\n"
    assert (tmp_path / "steps.csv.damaged").read_text() == whole
    assert "1 damaged" in said
