"""The Trainer from Python, its parts, and the demo, on the real digits."""

import copy
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace

import numpy
import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import TensorDataset
from training_processes import TERMS, config, table

import imcl_fast
from imcl_fast import (
    Trainer,
    data,
    demo,
    implementations,
    models,
    objectives,
    training,
)
from imcl_fast.data.quality import Quality
from imcl_fast.reports import inspect
from imcl_fast.runs.errors import (
    CheckpointError,
    DiskFullError,
    Interrupted,
    NonFiniteError,
    UsageError,
)
from imcl_fast.runs.folder import read_run
from imcl_fast.runs.network import build_network
from imcl_fast.training.distributed import Processes
from imcl_fast.training.optimization import (
    WaysWarmup,
    build_optimizer,
    build_schedule,
    parameter_groups,
)
from imcl_fast.training.preparation import build_objective, prepare_data
from imcl_fast.training.progress import Console, Observer, epoch_text
from imcl_fast.training.state import EpochSums, _joint_sums
from imcl_fast.training.way_costs import way_seconds

QUIET = Observer()
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:imcl_fast. no fused kernel"),
]


def trained(digits, **settings):
    trainer = Trainer(config(**settings), data_set=digits, observer=QUIET)
    trainer.fit()
    return torch.cat([p.detach().flatten() for p in trainer.network.parameters()])


def small_network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(256, 20), nn.Tanh(), nn.Linear(20, 10))


# Training


@pytest.mark.parametrize("ways", [(), objectives.WAYS], ids=["cross entropy", "four ways"])
def test_training_learns_the_digits(digits, ways):
    settings = config(
        ways=ways, width=4, epochs=4, train_images=None, batch_size=64, schedule="onecycle"
    )
    trainer = Trainer(settings, data_set=digits, observer=QUIET)
    summary = trainer.fit()
    rows = trainer.rows
    assert summary["steps"] == 4 * 20
    assert rows[-1]["train_loss"] < 0.8 * rows[0]["train_loss"]
    assert summary["last_test_accuracy"] > 0.6  # chance is 0.1
    assert rows[-1]["cross_entropy"] < 1.5  # ln 10 = 2.3 before training
    assert [name for name in rows[-1] if name in TERMS] == (TERMS if ways else TERMS[:1])
    assert "fit_noisy" not in rows[-1]
    assert not trainer.network.training


def test_the_same_seed_gives_the_same_network(digits):
    first = trained(digits, seed=5)
    torch.rand(7)  # what else is drawn from torch's generator doesn't matter
    assert torch.equal(trained(digits, seed=5), first)
    assert not torch.equal(trained(digits, seed=6), first)


def test_training_leaves_the_process_as_it_was(digits):
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    trained(digits, threads=2, deterministic=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    assert not torch.are_deterministic_algorithms_enabled()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    try:
        for warn_only in (True, False):
            torch.use_deterministic_algorithms(True, warn_only=warn_only)
            trained(digits, deterministic=not warn_only)
            assert torch.are_deterministic_algorithms_enabled()
            assert torch.is_deterministic_algorithms_warn_only_enabled() == warn_only
    finally:
        torch.use_deterministic_algorithms(False)


def test_methods_start_from_the_same_weights_and_see_the_same_batches(digits):
    def seen(ways):
        network = nn.Sequential(
            nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(2, 4, 3),
            nn.ReLU(), nn.Flatten(), nn.Linear(144, 10),
        )  # fmt: skip
        images = []
        network.register_forward_pre_hook(
            lambda module, args: images.append(args[0]) if module.training else None
        )
        settings = config(ways=ways, label_noise=0.5)
        Trainer(settings, data_set=digits, network=network, observer=QUIET).fit()
        return torch.cat(images)

    plain = seen(())
    assert len(plain) == 200
    assert torch.equal(seen(("kernel", "output")), plain)
    assert len(plain.flatten(1).unique(dim=0)) == 200


def test_a_network_of_ones_own_is_trained_and_stays_plain(digits):
    network = small_network()
    before = network[1].weight.clone()
    trainer = Trainer(
        config(ways=("output",)), data_set=digits, network=network, observer=QUIET
    )
    summary = trainer.fit()
    assert trainer.network is network
    assert not torch.equal(network[1].weight, before)
    assert summary["last_test_accuracy"] > 0


def normalised_network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5),
        nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 10),
    )  # fmt: skip


@pytest.mark.parametrize("ways", [(), ("output", "kernel")], ids=["cross entropy", "two ways"])
@pytest.mark.parametrize("ema", [None, 0.5])
def test_parts_that_are_frozen_in_eval_mode_stay_so(digits, tmp_path, ways, ema):
    network, modes = normalised_network(), []
    network[1].requires_grad_(False).eval()  # as in fine-tuning
    network[3].eval()
    network.register_forward_pre_hook(
        lambda network, _: modes.append([module.training for module in network])
    )
    settings = config(
        ways=ways, ema=ema, epochs=2, run_dir=tmp_path, resume="never", report=True,
        measure_ways=True,
    )  # fmt: skip
    before = {name: value.clone() for name, value in network.state_dict().items()}
    trainer = Trainer(settings, data_set=digits, network=network, observer=QUIET)
    trainer.fit()
    frozen = [i not in (1, 3) for i in range(10)]
    assert frozen in modes and all(mode in (frozen, [False] * 10) for mode in modes)
    for found in (network, trainer.network):
        state = found.state_dict()
        kept = [name for name, value in before.items() if torch.equal(state[name], value)]
        assert kept == [name for name in before if name.startswith("1.")]


@pytest.mark.parametrize("ema", [None, 0.5])
def test_a_pruned_network_is_trained(digits, tmp_path, ema):
    network = normalised_network()
    prune.l1_unstructured(network[4], "weight", 0.5)
    before = network[4].weight_orig.detach().clone()
    settings = config(
        ways=("kernel",), ema=ema, weight_decay=0.0, run_dir=tmp_path, measure_ways=True
    )
    trainer = Trainer(settings, data_set=digits, network=network, observer=QUIET)
    trainer.fit()
    kept = network[4].weight_mask == 1
    assert 0 < kept.sum() < kept.numel()
    assert ((network[4].weight_orig != before) == kept).all()


def test_a_network_in_eval_mode_is_put_in_train_mode(digits):
    network = normalised_network().eval()
    before = network[1].running_var.clone()
    modes = []
    network[1].register_forward_pre_hook(lambda module, _: modes.append(module.training))
    Trainer(config(ways=()), data_set=digits, network=network, observer=QUIET).fit()
    assert not torch.equal(network[1].running_var, before)
    assert modes.count(True) == 4  # steps


def test_layers_and_kernels_are_those_that_are_named(digits):
    paths = {"layers": ("layer2", "layer4"), "kernels": ("layer1.0.conv2", "fc")}
    settings, processes = config(**paths), Processes(0, 1, torch.device("cpu"))
    network = build_network(settings, digits)
    objective = build_objective(settings, network, prepare_data(settings, digits), processes)
    assert {name: tuple(getattr(objective, name)) for name in paths} == paths


def test_a_network_for_other_classes_is_refused(digits):
    network = nn.Sequential(nn.Flatten(), nn.Linear(256, 9))
    with pytest.raises(UsageError, match="model: expected logits of the data's 10 classes"):
        Trainer(config(), data_set=digits, network=network, observer=QUIET).fit()


def test_accumulating_two_batches_is_training_on_both(digits):
    def weights(batch_size, accumulate):
        network = small_network()
        settings = config(
            ways=(), batch_size=batch_size, accumulate=accumulate, augment=False,
            schedule="constant",
        )  # fmt: skip
        Trainer(settings, data_set=digits, network=network, observer=QUIET).fit()
        return network[1].weight

    torch.testing.assert_close(weights(50, 4), weights(200, 1))
    # 3 do not divide the 4 batches: the last step is on the one that is left over.
    assert not torch.equal(weights(50, 3), weights(50, 4))


@pytest.mark.parametrize("ways", [(), objectives.WAYS], ids=["cross entropy", "four ways"])
def test_steps_are_no_longer_than_the_clipped_gradient_allows(digits, ways):
    steps = dict(optimizer="sgd", momentum=0.0, weight_decay=0.0, schedule="constant", lr=0.5)
    steps |= dict(train_images=50, seed=3, ways=ways)  # one step
    torch.manual_seed(3)  # the weights that Trainer begins with
    network = build_network(config(**steps), digits)
    start = torch.cat([p.detach().flatten() for p in network.parameters()])
    free = trained(digits, **steps) - start
    short = trained(digits, clip_norm=1e-3, **steps) - start
    # Heads have a share of the norm, and none is longer than what is allowed.
    assert 0 < short.norm() <= 1.001e-3 * 0.5 < free.norm()
    torch.testing.assert_close(short / short.norm(), free / free.norm(), rtol=0, atol=1e-3)
    torch.testing.assert_close(trained(digits, clip_norm=1e6, **steps) - start, free)


def test_the_moving_average_is_what_is_measured(digits, tmp_path):
    settings = config(ways=(), ema=0.5, epochs=2, run_dir=tmp_path / "run")
    network = small_network()
    trajectory = []

    class Watch(Observer):
        def stepped(self, values):
            trajectory.append(network[1].weight.detach().clone())

    trainer = Trainer(settings, data_set=digits, network=network, observer=Watch())
    trainer.fit()
    average = trajectory[0]
    for weight in trajectory[1:]:
        average = 0.5 * average + 0.5 * weight
    torch.testing.assert_close(trainer.network[1].weight, average)
    stored = torch.load(tmp_path / "run" / "network.pt", weights_only=True)
    assert torch.equal(stored["1.weight"], trainer.network[1].weight)
    assert not torch.equal(network[1].weight, average)


def test_memorised_labels_are_counted(digits):
    """A network that answers with the labels it was given has learnt all of them."""
    settings = config(label_noise=0.4, ways=(), augment=False, train_images=None)
    from imcl_fast.training.preparation import prepare_data

    material = prepare_data(settings, digits)

    class Oracle(nn.Module):
        def __init__(self, labels):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))
            images = material.train.images.float().flatten(1)
            self.register_buffer("known", images / images.norm(dim=1, keepdim=True))
            self.register_buffer("labels", labels)

        def forward(self, x):
            # Normalised images are brought back to grey values, and looked up.
            grey = x.flatten(1) * digits.std[0] + digits.mean[0]
            nearest = (grey @ self.known.T).argmax(1)
            return nn.functional.one_hot(self.labels[nearest], 10) * self.scale

    rows = []
    for labels in (material.train.labels, material.true_labels):
        trainer = Trainer(settings, data_set=digits, network=Oracle(labels), observer=QUIET)
        trainer.fit()
        rows.append(trainer.rows[0])
    wrong = (material.train.labels != material.true_labels).double().mean().item()
    assert rows[0]["fit_noisy"] > 0.99 and rows[0]["train_accuracy"] > 0.99
    assert rows[1]["fit_noisy"] < 0.01
    assert rows[1]["train_accuracy"] == pytest.approx(1 - wrong, abs=0.01)


def test_the_ways_weights_rise_step_by_step(digits, tmp_path):
    settings = config(
        ways=("kernel",), weights={"kernel": 5}, epochs=2, ways_warmup_epochs=1.5, log_every=1,
        run_dir=tmp_path / "run",
    )  # fmt: skip
    Trainer(settings, data_set=digits, observer=QUIET).fit()
    rows = [
        {name: float(value) for name, value in row.items()}
        for row in table(tmp_path / "run" / "steps.csv")
    ]
    shares = [
        (row["loss"] - row["cross_entropy"]) / (5 * row["kernel_similarity"]) for row in rows
    ]
    assert shares == pytest.approx([i / 7 for i in range(1, 7)] + [1, 1], abs=1e-5)


def test_every_way_s_weight_rises_and_ends_as_it_was():
    images = torch.zeros(2, 1, 16, 16)
    network = models.resnet18(10, width=2, channels=1)
    imcl = objectives.build("imcl", network, images, weights={"output": 0.3, "multilayer": 0})
    names = [f"{way}_weight" for way in objectives.WAYS]
    full = [getattr(imcl, name) for name in names]
    warmup = WaysWarmup(imcl, 3)
    for step in (0, 2, 3, 1, 4):  # of the step alone, not of those before
        warmup.before(step)
        share = {0: 1 / 4, 1: 1 / 2, 2: 3 / 4}.get(step, 1)
        assert [getattr(imcl, name) for name in names] == [share * weight for weight in full]
    assert len(imcl(torch.rand(2, 1, 16, 16), torch.tensor([0, 1])).terms) == 4


def test_terms_of_ways_on_a_schedule_are_averaged_over_the_steps_that_have_them(digits, tmp_path):
    settings = config(
        epochs=3, batch_size=20, log_every=1, representation_interval=4, kernel_interval=8,
        evaluate_every=2, run_dir=tmp_path / "run",
    )  # fmt: skip
    trainer = Trainer(settings, data_set=digits, observer=QUIET)
    trainer.fit()
    steps = table(tmp_path / "run" / "steps.csv")
    assert list(steps[0]) == ["step", "epoch", "loss", *TERMS[:4], "lr", TERMS[4]]
    # A step without the way shows what was seen last, nothing before it was seen.
    shown = [row["kernel_similarity"] for row in steps]
    assert shown[:2] == ["", ""] and len(set(shown[2:10])) == 1 and len(set(shown)) == 5
    assert all(float(row["representation_similarity"]) for row in steps)
    for epoch in range(3):
        place = range(10 * epoch, 10 * (epoch + 1))
        for name, every, first in (("representation", 4, 0), ("kernel", 8, 2), ("cross", 1, 0)):
            name = next(term for term in TERMS if term.startswith(name))
            computed = [float(steps[i][name]) for i in place if i % every == first]
            mean = sum(computed) / len(computed)
            assert trainer.rows[epoch][name] == pytest.approx(mean, rel=1e-6), name
        losses = [float(steps[i]["loss"]) for i in place]
        assert trainer.rows[epoch]["train_loss"] == pytest.approx(sum(losses) / 10, rel=1e-6)
    assert [len(row) for row in table(tmp_path / "run" / "metrics.csv")] == 3 * [14]


def test_an_epoch_without_a_way_s_turn_has_an_empty_cell(digits, tmp_path):
    settings = config(
        train_images=100, epochs=3, kernel_interval=8, evaluate_every=2, log_every=1,
        run_dir=tmp_path / "run",
    )  # fmt: skip
    Trainer(settings, data_set=digits, observer=QUIET).fit()
    rows = table(tmp_path / "run" / "metrics.csv")  # of two steps each
    assert [bool(row["kernel_similarity"]) for row in rows] == [True, False, False]
    assert [bool(row["test_accuracy"]) for row in rows] == [False, True, True]
    run = read_run(tmp_path / "run")
    assert run.terms[-1] == "kernel_similarity" and run.metrics["kernel_similarity"][1:] == [
        None, None,
    ]  # fmt: skip


class Two:
    """Stands for two processes that have added up the same."""

    rank, world, first, device = 0, 2, True, torch.device("cpu")

    def sum(self, values):
        return 2 * values


def test_sums_are_kept_for_each_term():
    sums = EpochSums()
    sums.add({"loss": torch.tensor(1.0), "a": torch.tensor(4.0)})
    sums.add({"loss": torch.tensor(3.0)})
    sums.add({"loss": torch.tensor(8.0), "a": torch.tensor(6.0), "b": torch.tensor(0.5)})
    assert sums.means(Two()) == {"loss": 4.0, "a": 5.0, "b": 0.5}
    assert sums.batches == 3


def test_sums_of_other_processes_and_of_older_versions_are_gone_on_with():
    sums = EpochSums()
    for value in (1.0, 3.0):
        sums.add({"loss": torch.tensor(value), "a": torch.tensor(2 * value)})
    sums.add({"loss": torch.tensor(8.0)})
    alone = Processes(0, 1, torch.device("cpu"))
    joint = _joint_sums([dict(vars(sums)), dict(vars(sums)), dict(vars(sums))], alone)
    assert joint.means(alone) == sums.means(alone) == {"loss": 4.0, "a": 4.0}
    assert (joint.batches, sums.batches) == (3, 3)  # a batch is shared by all processes
    # As a version stored them that had the same terms in every batch.
    old = {"batches": 2, "names": ["loss", "a"], "totals": torch.tensor([4.0, 8.0])}
    old = {**old, "seconds": 1.5, "data_seconds": 0.5}
    joint = _joint_sums([old, old], alone)
    assert joint.means(alone) == {"loss": 2.0, "a": 4.0} and joint.batches == 2
    fresh = {"batches": 0, "names": [], "totals": None, "seconds": 0.0, "data_seconds": 0.0}
    assert _joint_sums([fresh], alone) == EpochSums()


def test_accuracy_is_measured_as_often_as_asked_and_at_the_end(digits, tmp_path):
    settings = config(
        ways=(), epochs=5, evaluate_every=2, label_noise=0.5, run_dir=tmp_path / "run"
    )
    lines = []

    class Lines(Observer):
        def epoch_finished(self, row, epochs):
            lines.append(epoch_text(row, epochs))

    trainer = Trainer(settings, data_set=digits, observer=Lines())
    summary = trainer.fit()
    rows = table(tmp_path / "run" / "metrics.csv")
    known = [i for i, row in enumerate(rows) if row["test_accuracy"]]
    assert known == [i for i, line in enumerate(lines) if "test accuracy" in line] == [1, 3, 4]
    for name in ("test_loss", "train_accuracy", "fit_noisy"):
        assert [i for i, row in enumerate(rows) if row[name]] == known
    assert all(float(row["train_loss"]) > 0 for row in rows)
    accuracies = {i: float(rows[i]["test_accuracy"]) for i in known}
    assert summary["last_test_accuracy"] == accuracies[4]
    assert summary["best_test_accuracy"] == max(accuracies.values())
    assert accuracies[summary["best_epoch"] - 1] == max(accuracies.values())
    # Nothing that is trained depends on it.
    every = config(ways=(), epochs=5, label_noise=0.5)
    whole = Trainer(every, data_set=digits, observer=QUIET)
    whole.fit()
    assert [whole.rows[i]["test_accuracy"] for i in known] == list(accuracies.values())


# What goes wrong


class Spoiling(nn.Module):
    """Features that are no numbers any more after so many training batches."""

    def __init__(self, batches):
        super().__init__()
        self.left = batches

    def forward(self, x):
        if self.training:
            self.left -= 1
        return x * float("nan") if self.left < 0 else x


def test_a_loss_that_is_no_number_names_step_term_and_layer(digits, tmp_path):
    network = small_network()
    network.insert(2, Spoiling(3))
    settings = config(
        ways=("output",), epochs=2, run_dir=tmp_path / "run", checkpoint_every="1"
    )
    message = (
        r"^step 4: loss is nan, cross_entropy is nan, output_consistency is nan; first layer with "
        r"features that are not: 2; the checkpoints there are were saved before$"
    )
    with pytest.raises(NonFiniteError, match=message):
        Trainer(settings, data_set=digits, network=network, observer=QUIET).fit()
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == [f"step-0000000{step}.pt" for step in (1, 2, 3)]


def test_weights_that_are_no_numbers_are_not_saved(digits, tmp_path):
    network = small_network()

    class Poison(Observer):
        steps = 0

        def stepped(self, values):
            self.steps += 1
            if self.steps == 2:
                with torch.no_grad():
                    network[1].weight[0, 0] = float("inf")

    settings = config(ways=(), run_dir=tmp_path / "run", checkpoint_every="1")
    trainer = Trainer(settings, data_set=digits, network=network, observer=Poison())
    with pytest.raises(NonFiniteError, match="after step 2 the weights model.1.weight are not"):
        trainer.fit()
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000001.pt"]


def test_a_disk_that_fills_up_keeps_the_checkpoint_before(digits, tmp_path, monkeypatch):
    from imcl_fast.runs import files

    fsync, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if list((tmp_path / "run" / "checkpoints").glob("step-00000002*")):
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(files.os, "fsync", full)
    settings = config(run_dir=tmp_path / "run", checkpoint_every="1")
    with pytest.raises(DiskFullError, match="no room left on the disk to write"):
        Trainer(settings, data_set=digits, observer=QUIET).fit()
    saved = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert saved[0].name == "step-00000001.pt"
    assert torch.load(saved[0], weights_only=True)["content"]["position"]["step"] == 1


def test_an_interrupt_ends_a_run_after_a_step(digits):
    class Impatient(Observer):
        steps = 0

        def stepped(self, values):
            self.steps += 1
            if self.steps == 2:
                os.kill(os.getpid(), signal.SIGINT)

    observer = Impatient()
    with pytest.raises(Interrupted, match="stopped after step 2 of 4, nothing is saved") as error:
        Trainer(config(), data_set=digits, observer=observer).fit()
    assert observer.steps == 2 and error.value.exit_code == 130


def test_interrupted_at_the_end_of_an_epoch_it_goes_on_with_the_measurement(digits, tmp_path):
    class Impatient(Observer):
        def stepped(self, values):
            signal.raise_signal(signal.SIGINT)

    # 4 batches make 2 steps, the second on one batch only.
    settings = config(accumulate=3, run_dir=tmp_path / "run", resume="auto")
    for _ in range(2):
        with pytest.raises(Interrupted):
            Trainer(settings, data_set=digits, observer=Impatient()).fit()
    assert not (tmp_path / "run" / "metrics.csv").exists()
    resumed = Trainer(settings, data_set=digits, observer=QUIET)
    resumed.fit()
    whole = Trainer(config(accumulate=3), data_set=digits, observer=QUIET)
    whole.fit()
    assert resumed.rows[0]["test_loss"] == whole.rows[0]["test_loss"]
    assert resumed.rows[0]["train_loss"] == whole.rows[0]["train_loss"]


def test_a_data_set_that_has_changed_is_not_gone_on_with(digits, tmp_path):
    settings = config(ways=(), run_dir=tmp_path / "run", resume="auto")
    Trainer(settings, data_set=digits, observer=QUIET).fit()
    other = replace(digits, train=data.Split(digits.train.images, digits.train.labels.flip(0)))
    with pytest.raises(CheckpointError, match="the data set has changed since"):
        Trainer(settings, data_set=other, observer=QUIET).fit()
    deeper = nn.Sequential(*small_network(), nn.Linear(10, 10))
    with pytest.raises(CheckpointError, match="don't fit this network and objective"):
        Trainer(settings, data_set=digits, network=deeper, observer=QUIET).fit()


# Parts


def test_weight_decay_spares_biases_and_normalisation():
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(2, 2))
    network[0].bias.requires_grad_(False)
    decayed, spared = parameter_groups(network, 0.1)
    assert decayed["weight_decay"] == 0.1 and spared["weight_decay"] == 0
    assert decayed["params"] == [network[0].weight, network[2].weight]
    assert [id(p) for p in spared["params"]] == [
        id(p) for p in (network[1].weight, network[1].bias, network[2].bias)
    ]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"schedule": "constant"}, [1] * 8),
        ({"schedule": "step"}, [1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01]),
        ({"schedule": "cosine"}, [1, 0.9619, 0.8536, 0.6913, 0.5, 0.3087, 0.1464, 0.0381]),
        ({"schedule": "constant", "warmup_epochs": 0.75}, [1 / 4, 2 / 4, 3 / 4, 1, 1, 1, 1, 1]),
        ({"schedule": "onecycle", "warmup_epochs": 1}, None),
    ],
)
def test_schedules(settings, expected):
    settings = config(epochs=2, lr=1, **settings)
    optimizer = build_optimizer(small_network(), settings)
    schedule = build_schedule(optimizer, settings, steps_per_epoch=4)
    rates = []
    for _ in range(8):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    if expected is None:
        assert rates[3] == max(rates) == pytest.approx(1) and rates[0] < 0.1 and rates[-1] < 0.1
    else:
        assert rates == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("epochs", "warmup"), [(1, 0.25), (1, 0.75), (1, 0.9), (2, 0.25), (2, 1), (2, 1.75), (2, 1.9)]
)
def test_onecycle_takes_any_warm_up(epochs, warmup):
    settings = config(epochs=epochs, lr=1, schedule="onecycle", warmup_epochs=warmup)
    optimizer = build_optimizer(small_network(), settings)
    steps = 4 * epochs
    schedule = build_schedule(optimizer, settings, steps_per_epoch=4)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    highest = min(round(warmup * 4), steps - 1)  # it neither begins nor ends there
    assert rates.index(max(rates)) in (highest - 1, highest) and rates[0] <= 0.05
    assert max(rates) > 0.7 and rates[-1] < 0.1


@pytest.mark.parametrize("anywhere", [torch.inf, -torch.inf])
def test_a_mask_of_infinities_is_no_weight_that_is_spoilt(digits, tmp_path, anywhere):
    network = small_network()
    network.register_buffer("mask", torch.full((2, 2), anywhere).triu(1))
    settings = config(ways=(), run_dir=tmp_path / "run", checkpoint_every="1")
    Trainer(settings, data_set=digits, network=network, observer=QUIET).fit()
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) > 1

    class Poison(Observer):
        def stepped(self, values):
            with torch.no_grad():
                network[1].weight[0, 0] = anywhere

    settings = replace(settings, run_dir=tmp_path / "poisoned")
    with pytest.raises(NonFiniteError, match=r"the weights model\.1\.weight are not finite$"):
        Trainer(settings, data_set=digits, network=network, observer=Poison()).fit()


def test_a_mask_of_infinities_has_no_moving_average(digits, tmp_path, monkeypatch):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = small_network()
            self.register_buffer("mask", torch.full((2, 2), -torch.inf).triu(1))

        def forward(self, x):
            return self.network(x) + 0 * self.mask.softmax(-1).sum()

    settings = config(ways=(), ema=0.5, run_dir=tmp_path / "run", epochs=2)
    trainer = Trainer(settings, data_set=digits, network=Masked(), observer=QUIET)
    summary = trainer.fit()
    assert torch.equal(trainer.network.mask, torch.full((2, 2), -torch.inf).triu(1))
    plain = Trainer(replace(settings, run_dir=None), data_set=digits, network=small_network(),
                    observer=QUIET)  # fmt: skip
    assert plain.fit()["last_test_accuracy"] == summary["last_test_accuracy"]
    assert torch.equal(plain.network[1].weight, trainer.network.network[1].weight)

    update = AveragedModel.update_parameters

    def poisoned(averaged, network):
        update(averaged, network)
        averaged.module.network[1].weight.data[0, 0] = torch.nan

    monkeypatch.setattr(AveragedModel, "update_parameters", poisoned)
    settings = replace(settings, run_dir=tmp_path / "poisoned")
    with pytest.raises(NonFiniteError, match=r"the averaged weights network\.1\.weight are not"):
        Trainer(settings, data_set=digits, network=Masked(), observer=QUIET).fit()


def test_a_second_fit_begins_anew(digits):
    trainer = Trainer(config(ways=()), data_set=digits, observer=QUIET)
    first, weights = trainer.fit(), [p.clone() for p in trainer.network.parameters()]
    second = trainer.fit()
    assert second["model"] == "resnet18"
    assert second["last_test_accuracy"] == first["last_test_accuracy"]
    assert all(map(torch.equal, weights, trainer.network.parameters()))


def test_a_state_that_no_checkpoint_can_hold_is_refused_at_the_start(digits, tmp_path):
    class Counting(nn.Linear):
        def get_extra_state(self):
            return {"scale": self.scale}

        def set_extra_state(self, state):
            self.scale = state["scale"]

    for scale, refused in ((0.5, False), (numpy.float64(0.5), True)):
        network = nn.Sequential(nn.Flatten(), Counting(256, 10))
        network[1].scale = scale
        run = tmp_path / str(refused)
        trainer = Trainer(config(ways=(), run_dir=run), data_set=digits, network=network,
                          observer=QUIET)  # fmt: skip
        if refused:
            with pytest.raises(UsageError, match="network: expected tensors, .*1._extra_state"):
                trainer.fit()
        else:
            trainer.fit()
        assert bool(list(run.glob("checkpoints/*"))) is not refused


def test_data_and_networks_of_one_name_have_fingerprints(digits, tmp_path):
    def used(name, network=None, data_set=digits):
        settings = config(ways=(), run_dir=tmp_path / name)
        Trainer(settings, data_set=data_set, network=network, observer=QUIET).fit()
        return read_run(tmp_path / name).fingerprints

    wide = nn.Sequential(nn.Flatten(), nn.Linear(256, 21), nn.Tanh(), nn.Linear(21, 10))
    prints = [used("one", small_network()), used("again", small_network()), used("wide", wide)]
    assert prints[0] == prints[1] != prints[2] and prints[0].keys() == {"network"}
    assert used("named") == {}
    of_data = []
    for name, flip in (("mine", False), ("same", False), ("flipped", True)):
        sides = [(side.images[:200], side.labels[:200]) for side in (digits.train, digits.test)]
        own = tuple(TensorDataset(x, 9 - y if flip else y) for x, y in sides)
        of_data.append(used(name, data_set=own)["data"])
    assert of_data[0] == of_data[1] != of_data[2]


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_images_are_made_outside_of_autocast(digits, monkeypatch, amp):
    made = []
    seen = Quality.__call__

    def watched(self, images, seeds):
        made.append(torch.is_autocast_enabled("cpu"))
        return seen(self, images, seeds)

    monkeypatch.setattr(Quality, "__call__", watched)
    settings = config(ways=(), qualities=("raw", "blur1"), amp=amp)
    passes = []
    network = small_network()
    network.register_forward_pre_hook(
        lambda *_: passes.append(torch.is_autocast_enabled("cpu"))
    )
    Trainer(settings, data_set=digits, network=network, observer=QUIET).fit()
    assert made and not any(made)
    assert (amp == "bf16") == (sum(passes) > len(made))  # and the network's passes are within


def test_a_run_with_data_and_network_of_ones_own_says_so(tmp_path, capsys):
    folder = tmp_path / "run"
    own = replace(data.load("digits"), name="toy")
    settings = config(ways=(), run_dir=folder)
    summary = Trainer(settings, data_set=own, network=small_network(), observer=QUIET).fit()
    assert (summary["dataset"], summary["model"]) == ("toy", "Sequential")
    run = read_run(folder)
    assert (run.setting("dataset"), run.setting("model")) == ("toy", "Sequential")
    assert inspect.main([str(folder)]) == 2
    said = capsys.readouterr().err
    assert "its run was given dataset toy and model Sequential" in said and "--model" in said
    again = replace(settings, resume="auto")
    assert Trainer(again, data_set=own, network=small_network(), observer=QUIET).fit()


def test_a_run_of_the_data_set_it_names_is_no_own_one(digits, tmp_path, capsys):
    folder = tmp_path / "run"
    settings = config(ways=(), run_dir=folder)
    Trainer(settings, data_set=digits, observer=QUIET).fit()
    assert read_run(folder).own == {}
    assert inspect.main([str(folder), "--images", "4"]) == 0
    assert "layer4.1.conv2" in capsys.readouterr().out


def test_a_state_may_hold_what_is_no_tensor(digits, tmp_path):
    class Counting(nn.Sequential):
        def get_extra_state(self):
            return {"calls": 3}

        def set_extra_state(self, state):
            assert state == {"calls": 3}

    for folder in (None, tmp_path / "run"):
        settings = config(ways=(), run_dir=folder)
        Trainer(
            settings, data_set=digits, network=Counting(*small_network()), observer=QUIET
        ).fit()


def test_the_cost_of_a_way_is_measured_on_copies_without_it():
    images, labels = torch.zeros(2, 3), torch.zeros(2)
    left_out = []

    class Objective(nn.Module):
        def __init__(self, network, without):
            super().__init__()
            self.network = network
            left_out.append(without)

    def step(objective, images, labels):
        assert objective.training and objective.network is not network
        return objective.network(images)

    network = nn.Linear(3, 2)
    costs = way_seconds(
        network, Objective, ("output", "kernel"), step, images, labels, allowed=20
    )
    assert list(costs) == ["output", "kernel"] and left_out == [None, "output", "kernel"]
    short = way_seconds(network, Objective, ("output",), step, images, labels, allowed=0)
    assert short is None


def test_the_cost_of_the_only_way_is_measured_whatever_its_options(digits, tmp_path):
    settings = config(
        ways=("kernel",), kernel_penalty="abs", measure_ways=True, run_dir=tmp_path / "run"
    )
    summary = Trainer(settings, data_set=digits, observer=QUIET).fit()
    assert list(summary["way_seconds"]) == ["kernel"]


def test_the_cost_of_a_way_on_a_schedule_is_spread_over_its_interval(
    digits, tmp_path, monkeypatch
):
    def fixed(network, build, ways, step, images, labels, *, allowed):
        imcl = build(copy.deepcopy(network), "output")
        assert (imcl.representation_interval, imcl.kernel_interval) == (1, 1)
        return dict.fromkeys(ways, 8.0)

    monkeypatch.setattr(training.trainer, "way_seconds", fixed)
    settings = config(
        representation_interval=2, kernel_interval=4, measure_ways=True, run_dir=tmp_path / "run"
    )
    summary = Trainer(settings, data_set=digits, observer=QUIET).fit()
    assert list(summary["way_seconds"].values()) == [8.0, 8.0, 4.0, 2.0]


def test_a_run_says_why_it_has_no_costs_of_ways(digits, tmp_path, monkeypatch):
    said = []

    class Lines(Observer):
        def said(self, line):
            said.append(line)

    monkeypatch.setattr(training.trainer, "way_seconds", lambda *_, **__: None)
    settings = config(measure_ways=True, run_dir=tmp_path / "run")
    summary = Trainer(settings, data_set=digits, observer=Lines()).fit()
    assert "way_seconds" not in summary
    assert said[-1].startswith("What each way costs is left out")


def test_importing_the_package_does_not_import_the_trainer():
    code = (
        "import sys, imcl_fast; assert 'imcl_fast.training' not in sys.modules;"
        "imcl_fast.Trainer; assert 'imcl_fast.training.trainer' in sys.modules;"
        "assert 'matplotlib' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="has no attribute 'Trainers'"):
        imcl_fast.Trainers  # noqa: B018


# What a person sees


class Terminal:
    """A terminal that remembers what was written."""

    encoding = "utf-8"

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass

    def isatty(self):
        return True


def test_a_terminal_gets_a_live_bar(digits):
    terminal = Terminal()
    settings = config(log_every=1, epochs=2, label_noise=0.5)
    Trainer(settings, data_set=digits, observer=Console(terminal)).fit()
    assert "8/8" in terminal.text
    assert re.search(
        r"loss \d+\.\d+ \(CE \S+, out \S+, multi \S+, repr \S+, kern \S+\), \d+ img/s, data \d+%",
        terminal.text,
    )
    assert "epoch 2/2: loss" in terminal.text and "wrong labels fitted" in terminal.text


def test_tensorboard_gets_the_same_numbers(digits, tmp_path):
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    run = tmp_path / "run"
    settings = config(run_dir=run, tensorboard=True, epochs=2, log_every=1)
    Trainer(settings, data_set=digits, observer=QUIET).fit()
    board = event_accumulator.EventAccumulator(str(run / "tb"))
    board.Reload()
    for name, path in (("epoch/test_accuracy", "metrics.csv"), ("step/loss", "steps.csv")):
        shown = [event.value for event in board.Scalars(name)]
        written = [float(row[name.split("/")[1]]) for row in table(run / path)]
        assert shown == pytest.approx(written, rel=1e-6)


# The demo


def test_demo_ends_in_a_table(capsys):
    assert demo.main(["--seeds", "2", "--epochs", "1", "--width", "2"]) == 0
    captured = capsys.readouterr()
    assert "1300 training images, a random 50% of them with a wrong label" in captured.out
    # No terminal, no bar: a line for each run.
    assert captured.err.splitlines() == [
        f"{method}, seed {seed}: 10 steps"
        for seed in range(2) for method in ("cross entropy", "four ways")
    ]  # fmt: skip
    head, rule, plain, ways = re.search(
        r"^method .*\n-+\n.*\n.*$", captured.out, re.MULTILINE
    ).group().split("\n")
    assert re.split(r"  +", head) == [
        "method", "implementation", "test accuracy", "wrong fitted", "s/step", "CE", "output",
        "multi-layer", "represent.", "kernel",
    ]  # fmt: skip
    number = r"\d+\.\d+"
    assert re.fullmatch(
        rf"cross entropy  plain torch +{number} \+- {number} % +{number} % +{number} +{number}"
        r"( +-){4}",
        plain,
    )
    used = implementations.choose("auto", "pairwise", torch.device("cpu"))
    assert re.fullmatch(
        rf"four ways +{used} +{number} \+- {number} % +{number} %( +{number}){{6}}", ways
    )
    assert len(rule) == max(map(len, (head, plain, ways)))
    numbers = re.search(r"seed by seed: ([^ ]+), ([^ ]+) points.*mean ([^)]+)\)", captured.out)
    first, second, mean = map(float, numbers.groups())
    assert mean == pytest.approx((first + second) / 2, abs=0.11)


def test_demo_is_interrupted_in_peace(capsys, monkeypatch):
    runs = []

    class Interrupting(Trainer):
        def fit(self):
            runs.append(self)
            if len(runs) == 3:
                observer = self._observer
                stepped = observer.stepped
                observer.stepped = lambda values: (
                    stepped(values), signal.raise_signal(signal.SIGINT)
                )  # fmt: skip
            return super().fit()

    monkeypatch.setattr(demo, "Trainer", Interrupting)
    assert demo.main(["--epochs", "1", "--width", "2"]) == 130
    out = capsys.readouterr().out
    assert "Interrupted" in out and "four ways " in out and "+-" not in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seeds", "0"], "argument --seeds: expected at least 1, got 0"),
        (["--epochs", "many"], "argument --epochs: invalid int value: 'many'"),
        (["--label-noise", "2"], "argument --label-noise: expected a number in [0, 1], got 2"),
    ],
)
def test_demo_names_bad_flags(capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        demo.main(flags)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
