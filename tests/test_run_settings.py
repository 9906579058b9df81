"""What the settings of a run do: to its data, its optimizer, its schedule and its objective."""

import contextlib
import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from test_training import QUIET, config, small_network, table
from torch import nn
from torch.nn.functional import cross_entropy

from imcl_fast import Trainer
from imcl_fast.training import preparation, trainer, way_costs
from imcl_fast.training.distributed import Processes
from imcl_fast.training.evaluation import predict
from imcl_fast.training.loop import _interval
from imcl_fast.training.optimization import build_optimizer, build_schedule
from imcl_fast.training.preparation import build_objective, prepare_data
from imcl_fast.training.way_costs import way_seconds

pytestmark = pytest.mark.usefixtures("one_thread")


def test_optimizers_have_the_settings_of_the_run():
    adamw = build_optimizer(small_network(), config(optimizer="adamw", momentum=0.7, lr=0.01))
    assert isinstance(adamw, torch.optim.AdamW) and adamw.defaults["betas"] == (0.7, 0.999)
    for momentum in (0.0, 0.8):
        sgd = build_optimizer(small_network(), config(momentum=momentum))
        assert [(g["momentum"], g["nesterov"]) for g in sgd.param_groups] == [
            (momentum, momentum > 0)
        ] * 2


def rates_of(epochs=2, **settings):
    settings = config(epochs=epochs, lr=1, **settings)
    optimizer = build_optimizer(small_network(), settings)
    schedule = build_schedule(optimizer, settings, steps_per_epoch=4)
    rates, momenta = [], []
    for _ in range(4 * epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        momenta.append(optimizer.param_groups[0]["momentum"])
        optimizer.step()
        schedule.step()
    return rates, momenta


def test_a_schedule_begins_when_the_rise_has_ended():
    rates, _ = rates_of(schedule="cosine", warmup_epochs=1)
    assert rates == pytest.approx(
        [0.2, 0.4, 0.6, 0.8, *((1 + math.cos(math.pi * i / 4)) / 2 for i in range(4))]
    )


@pytest.mark.parametrize(
    ("momentum", "least", "most"), [(0.9, 0.85, 0.95), (0.5, 0.45, 0.55), (0.98, 0.97, 0.99)]
)
def test_onecycle_moves_the_momentum_around_that_of_the_user(momentum, least, most):
    _, seen = rates_of(epochs=5, schedule="onecycle", momentum=momentum)
    assert (min(seen), seen[0], max(seen)) == pytest.approx((least, most, most), abs=1e-3)
    if momentum == 0.9:  # the very bits of torch's defaults
        assert seen[0] == 0.95


def test_onecycle_rises_for_thirty_percent_unless_told():
    rates, _ = rates_of(epochs=10, schedule="onecycle")
    assert rates.index(max(rates)) == 11  # 0.3 * 40 - 1


def test_minutes_are_sixty_seconds():
    assert _interval("10m") == (1 << 62, 600.0) and _interval("500") == (500, math.inf)


def test_a_row_of_steps_is_the_mean_over_the_batches_it_accumulates(digits, tmp_path):
    trainer = Trainer(
        config(
            ways=(),
            epochs=1,
            accumulate=2,
            batch_size=16,
            train_images=192,
            log_every=1,
            run_dir=tmp_path / "run",
        ),
        data_set=digits,
        observer=QUIET,
    )
    trainer.fit()
    steps = [float(row["loss"]) for row in table(tmp_path / "run" / "steps.csv")]
    assert len(steps) == 6
    assert sum(steps) / 6 == pytest.approx(trainer.rows[0]["train_loss"], rel=1e-5)


def test_images_are_counted_as_often_as_there_are(digits):
    trainer = Trainer(
        config(ways=(), epochs=1, batch_size=128, train_images=40), data_set=digits, observer=QUIET
    )
    trainer.fit()
    row = trainer.rows[0]
    assert row["images_per_second"] * row["seconds"] == pytest.approx(40)


def test_wrong_labels_are_those_of_the_images_that_are_measured(digits, monkeypatch):
    """Of a network that always answers class 0."""
    monkeypatch.setattr(preparation, "TRAIN_MEASURED", 300)
    settings = config(label_noise=0.4, ways=(), augment=False, train_images=None, lr=1e-9)
    material = preparation.prepare_data(settings, digits)

    class Zero(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return self.scale * nn.functional.one_hot(torch.zeros(len(x), dtype=torch.int64), 10)

    trainer = Trainer(settings, data_set=digits, network=Zero(), observer=QUIET)
    trainer.fit()
    labels, true = material.train.labels[material.measured], material.true_labels[material.measured]
    expected = (labels[labels != true] == 0).double().mean().item()
    assert trainer.rows[0]["fit_noisy"] == pytest.approx(expected)


def test_statistics_of_normalisation_are_averaged_too(digits):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(256), nn.Linear(256, 10))
    trainer = Trainer(
        config(ways=(), epochs=1, ema=0.5, batch_size=48, train_images=192),
        data_set=digits,
        network=network,
        observer=QUIET,
    )
    seen = []
    network[1].register_forward_hook(
        lambda m, args, out: seen.append(m.running_mean.clone()) if m.training else None
    )
    trainer.fit()
    average = seen[0]
    for mean in seen[1:4]:
        average = 0.5 * average + 0.5 * mean
    assert len(seen) == 4
    torch.testing.assert_close(trainer.network[1].running_mean, average)


@pytest.mark.parametrize("part", ["train_images", "validation_images"])
def test_the_choice_of_images_has_a_seed_of_its_own_and_wrong_labels_the_runs(digits, part):
    settings = {"train_images": None, "validation_images": 0, part: 200, "label_noise": 0.3}
    one, other, elsewhere = (
        prepare_data(config(seed=seed, split_seed=split, **settings), digits)
        for seed, split in ((1, 0), (2, 0), (1, 5))
    )
    assert torch.equal(one.train.images, other.train.images) and torch.equal(
        one.test.images, other.test.images
    )
    assert not torch.equal(one.train.labels, other.train.labels)
    assert not torch.equal(one.train.images, elsewhere.train.images)


def test_wrong_labels_are_drawn_by_the_seed_alone(digits):
    one, other = (
        prepare_data(config(train_images=None, label_noise=0.3, split_seed=split), digits)
        for split in (0, 5)
    )
    assert torch.equal(one.train.labels, other.train.labels)


def test_the_networks_objective_smooths_labels(digits):
    for ways in ((), ("kernel",)):
        settings = config(label_smoothing=0.2, ways=ways)
        objective = build_objective(
            settings,
            small_network()
            if not ways
            else torch.nn.Sequential(
                torch.nn.Conv2d(1, 4, 3),
                torch.nn.AdaptiveAvgPool2d(1),
                torch.nn.Flatten(),
                torch.nn.Linear(4, 10),
            ),
            prepare_data(settings, digits),
            Processes(0, 1, torch.device("cpu")),
        )
        assert objective.label_smoothing == 0.2


def test_asymmetric_noise_of_a_run_follows_the_pairs_of_its_data(digits):
    settings = config(label_noise=1.0, noise_type="asymmetric", train_images=None)
    material = prepare_data(settings, dataclasses.replace(digits, noise_pairs={0: 7}))
    true = digits.train.labels
    assert torch.equal(material.train.labels, torch.where(true == 0, 7, true))


def test_the_cost_of_a_way_is_what_the_median_step_takes_longer_with_it(monkeypatch):
    calls, clock = [], [0.0]
    monkeypatch.setattr(way_costs, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def step(objective, images, labels):
        calls.append(objective.way)
        late = objective.way == "kernel" and calls.count("kernel") == 3
        clock[0] += 0.03 if objective.way is None else 0.2 if late else 0.01

    def build(network, way):
        network.way = way
        return network

    network = small_network()
    found = way_seconds(
        network, build, ["kernel"], step, torch.zeros(2, 1, 16, 16), torch.zeros(2), allowed=1.0
    )
    assert found["kernel"] == pytest.approx(0.02)


def test_loss_of_half_logits_is_summed_in_full_precision():
    network = small_network().bfloat16()
    x, y = torch.randn(2000, 1, 16, 16).bfloat16(), torch.randint(0, 10, (2000,))
    _, total = predict(network, [(x, y)])
    with torch.no_grad():
        assert total.item() == pytest.approx(
            cross_entropy(network(x).double(), y, reduction="sum").item(), rel=1e-5
        )


@pytest.mark.parametrize("rank", [0, 1])
def test_each_process_drops_out_other_features(digits, monkeypatch, rank):

    class Begun(Exception):
        pass

    def train(loop, interruption):
        raise Begun(torch.initial_seed())

    monkeypatch.setattr(
        trainer,
        "joined",
        lambda device: contextlib.nullcontext(Processes(rank, 1, torch.device("cpu"))),
    )
    monkeypatch.setattr(trainer.Loop, "train", train)
    with pytest.raises(Begun) as begun:
        Trainer(config(ways=(), seed=3), data_set=digits, observer=QUIET).fit()
    assert begun.value.args == (3 + 7919 * rank,)
