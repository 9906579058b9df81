"""python -m bench.accuracy.penalties: what the penalties find in a network during training."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from bench.accuracy import penalties
from bench.accuracy.penalties import Probe, kernels, measure, penalty
from bench.accuracy.tables import NOT_RUN
from imcl_fast import models, reference
from imcl_fast.imcl import IMCL
from imcl_fast.runs.config import TrainConfig
from imcl_fast.training.progress import Observer
from imcl_fast.training.trainer import Trainer

CONFIG = TrainConfig(
    dataset="digits", train_images=160, batch_size=20, width=4, epochs=2, device="cpu", ways=(),
    threads=1,
)  # fmt: skip
DOCUMENT = Path(__file__).parents[1] / "docs/accuracy.md"


@pytest.fixture
def network():
    torch.manual_seed(0)
    return models.resnet18(10, width=4, channels=1).double()


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(8, 1, 16, 16, generator=generator, dtype=torch.float64)
    return images, torch.arange(8)


@pytest.mark.parametrize("way", penalties.PENALTIES)
def test_value_and_share_are_those_of_the_definitions(network, batch, way):
    images, labels = batch
    imcl = IMCL(copy.deepcopy(network), images[:2])
    plain = copy.deepcopy(network).train()
    features = []
    for name in imcl.layers:
        plain.get_submodule(name).register_forward_hook(lambda m, i, o: features.append(o))
    weights = [plain.get_submodule(name).weight for name in imcl.kernels]
    loss = nn.functional.cross_entropy(plain(images), labels)
    xs, batched = (weights, False) if way == "kernel" else (features, True)
    value = reference.pairwise_penalty(
        xs, penalty="square", center=batched, eps=1e-12, batched=batched
    )
    weighted = getattr(imcl, f"{way}_weight") * value
    own = torch.autograd.grad(weighted, weights, retain_graph=True)
    share = torch.cat([g.flatten() for g in own]).norm()
    share = share / torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)]).norm()

    found = penalty(network, images, labels, way)

    assert found["value"] == pytest.approx(float(value.detach()), rel=1e-9)
    assert found["share"] == pytest.approx(float(share), rel=1e-6)


def test_looking_leaves_the_network_as_it_was(network, batch):
    network.eval()
    before = copy.deepcopy(network.state_dict())
    penalty(network, *batch, "representation")
    kernels(network, batch[0])
    assert not network.training
    assert all(torch.equal(x, before[name]) for name, x in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters())
    assert not any(module._forward_hooks for module in network.modules())


def test_a_look_changes_nothing_of_the_training(monkeypatch):
    monkeypatch.setattr(penalties, "EVERY", 1)
    undisturbed = Trainer(CONFIG, observer=Observer()).fit()
    measured = measure(CONFIG)
    assert measured["accuracy"] == undisturbed["last_test_accuracy"]
    assert [look["epoch"] for look in measured["seen"]] == [0, 1, 2]


@pytest.mark.slow
def test_looks_follow_the_training():
    """What is trained with becomes smaller, and before the first step all methods are equal."""
    config = replace(CONFIG, epochs=10)
    plain = measure(config)
    trained = measure(replace(config, ways=("kernel",)))
    assert plain["seen"][0] == trained["seen"][0]
    assert plain["before"] == trained["before"]
    assert trained["seen"][-1]["kernel"]["value"] < plain["seen"][-1]["kernel"]["value"]
    mean = sum(layer["mean_square_cos"] for layer in trained["after"]) / len(trained["after"])
    assert trained["seen"][-1]["kernel"]["value"] == pytest.approx(mean, rel=1e-4)


def test_tables_have_a_row_for_each_run_and_each_layer(tmp_path):
    look = {"epoch": 0, "kernel": {"value": 0.0123, "share": 0.5},
            "representation": {"value": 0.4, "share": 0.0012}}  # fmt: skip
    layer = {"name": "conv1", "rows": 4, "columns": 9, "mean_square_cos": 0.3, "welch_bound": 0.0}
    runs = [
        {"condition": condition, "method": method, "accuracy": 0.5,
         "seen": [look, {**look, "epoch": 10}], "before": [layer],
         "after": [{**layer, "mean_square_cos": 0.25}]}
        for condition in ("few", "noise") for method in penalties.METHODS
    ]  # fmt: skip
    facts = {"cpu": "some CPU", "torch": "2", "commit": "0123abc", "date": "2026-01-02"}
    found = {"facts": facts, "seed": 1, "images": 512, "runs": runs}
    (tmp_path / penalties.FILE).write_text(json.dumps(found))
    made = {name: make() for name, make in penalties.places(tmp_path).items()}
    values = made["penalties:values"].splitlines()
    assert len(values) == 2 + 2 * len(runs)
    assert values[2].endswith("| 0.4000 | 0.4000 |")
    assert "| 50.0 % | 50.0 % |" in made["penalties:shares"]
    assert made["penalties:layers"].splitlines()[2] == (
        "| conv1 | 4 x 9 | 0.0000 | 0.3000 | 0.2500 | 0.2500 | 0.2500 |"
    )
    assert "some CPU, torch 2, commit 0123abc, 2026-01-02" in made["penalties:facts"]
    found["facts"]["commit"] = "unknown"
    (tmp_path / penalties.FILE).write_text(json.dumps(found))
    said = penalties.places(tmp_path)["penalties:facts"]()
    assert "torch 2, commit not recorded, 2026-01-02" in said


def test_without_results_the_places_say_so(tmp_path):
    made = penalties.places(tmp_path)
    assert {make() for make in made.values()} == {NOT_RUN}


def test_the_document_has_a_place_for_every_table(tmp_path):
    text = DOCUMENT.read_text(encoding="utf-8")
    assert all(f"<!-- accuracy:{name} -->" in text for name in penalties.places(tmp_path))


def test_a_probe_looks_before_the_first_step_and_every_tenth_epoch(network, batch):
    probe = Probe(network, *batch)
    probe.started(0, 100)
    for epoch in range(1, 21):
        probe.epoch_finished({"epoch": epoch}, 20)
    assert [look["epoch"] for look in probe.seen] == [0, 10, 20]
