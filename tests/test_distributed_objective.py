"""IMCL and Song & Chai's networks under DistributedDataParallel, in processes of their own."""

import copy
import os
from pathlib import Path

import pytest
import torch
from process_group import in_group
from torch import distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from imcl_fast import IMCL, sharding
from imcl_fast.ilr import MultiHead

BATCH = 6  # divides by every number of processes
EVERY_CALL = dict(representation_interval=1, kernel_interval=1)  # in processes without conftest
SCHEDULE = dict(representation_interval=2, kernel_interval=4)
CALLS = 4  # of its period


class Small(nn.Module):
    """Of the modules of a ResNet, normalised without statistics of the batch."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3, padding=1)
        self.bn1 = nn.GroupNorm(2, 4)
        self.relu = nn.ReLU()
        self.maxpool = nn.Identity()
        for i, (inputs, outputs) in enumerate(((4, 4), (4, 6), (6, 8), (8, 20)), 1):
            stage = nn.Sequential(
                nn.Conv2d(inputs, outputs, 3, padding=1, stride=2 if i == 2 else 1),
                nn.GroupNorm(2, outputs),
                nn.ReLU(),
            )
            setattr(self, f"layer{i}", stage)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(20, 5)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))


def objective(kind, **options):
    torch.manual_seed(0)
    network = Small().double()
    x = torch.rand(BATCH, 1, 8, 8, dtype=torch.float64)
    y = torch.arange(BATCH) % 5
    torch.manual_seed(1)
    if kind == "ilr":
        return MultiHead(network, heads=4, **options), x, y
    kernels = options.pop("kernels", None)
    layers = ["layer1", "layer3", "layer4"]
    return IMCL(network, x, layers, dropout=0.0, kernels=kernels, **{**EVERY_CALL, **options}), x, y


def gradients(module):
    return {name.removeprefix("module."): p.grad.clone() for name, p in module.named_parameters()}


def process(rank, folder, worlds):
    torch.set_num_threads(1)
    for world in worlds:
        if rank < world:
            found = in_group(folder, lambda world=world: of_world(rank, world), rank, world)
            torch.save(found, Path(folder) / f"{world}-{rank}.pt")


def of_world(rank, world):
    found = {}
    cases = {
        "imcl": ("imcl", {}),
        "sharded": ("imcl", dict(shard_kernels=True)),
        "one layer": ("imcl", dict(shard_kernels=True, kernels=["layer4.0"])),
        "scheduled": ("imcl", dict(shard_kernels=True, **SCHEDULE)),
        "ilr": ("ilr", {}),
        "imcl, static graph": ("imcl", {}),
        "ilr, static graph": ("ilr", {}),
        "imcl, unused": ("imcl", {}),
    }
    for case, (kind, options) in cases.items():
        module, x, y = objective(kind, **options)
        parallel = DistributedDataParallel(
            module, static_graph="static" in case, find_unused_parameters="unused" in case
        )
        order = []
        out = parallel(x[rank::world], y[rank::world])
        if kind == "imcl":  # what the network returned, whole, however DDP takes it apart
            assert torch.equal(out.output, out.logits)
        record_order(out.loss, order)
        out.loss.backward()
        terms = dict(out.terms)
        for _ in range(CALLS - 1 if case == "scheduled" else 0):
            out = parallel(x[rank::world], y[rank::world])
            out.loss.backward()
            terms.update(out.terms)
        found[case] = (gradients(parallel), terms, order)
        if case == "sharded":
            found["kernels"] = copy.copy(module._kernel_share.kernels)
    return found


def record_order(loss, order):
    """Names of the kernels' penalty and the convolutions, as the backward pass reaches them."""
    seen, nodes = set(), [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]
        if node.name().startswith(("PairwisePenalty", "Convolution")):
            kind = node.name().partition("Backward")[0]
            node.register_prehook(lambda _, kind=kind: order.append(kind))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """By number of processes what each of them found."""
    folder = tmp_path_factory.mktemp("processes")
    threads = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        multiprocessing.spawn(process, args=(str(folder), (3, 2)), nprocs=3)
    finally:
        os.environ.pop("OMP_NUM_THREADS")
        if threads is not None:
            os.environ["OMP_NUM_THREADS"] = threads
    return {
        world: [torch.load(folder / f"{world}-{rank}.pt") for rank in range(world)]
        for world in (2, 3)
    }


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize(
    "case",
    ["imcl", "sharded", "one layer", "scheduled", "ilr", "imcl, static graph",
     "ilr, static graph", "imcl, unused"],
)
def test_gradients_are_those_of_one_process(runs, world, case):
    options = dict(kernels=["layer4.0"]) if case == "one layer" else {}
    module, x, y = objective("ilr" if "ilr" in case else "imcl", **options)
    out = module(x, y)
    out.loss.backward()
    expected = gradients(module)
    if case == "scheduled":  # over a period the sum of as many steps with every way
        expected = {name: CALLS * gradient for name, gradient in expected.items()}
    assert all(g.abs().sum() > 0 for g in expected.values())  # every parameter has a share
    for found in runs[world]:
        torch.testing.assert_close(found[case][0], expected, rtol=1e-9, atol=1e-12)
    for key, value in out.terms.items():
        mean = torch.stack([found[case][1][key] for found in runs[world]]).mean()
        torch.testing.assert_close(mean, value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("world", [2, 3])
def test_each_layer_is_one_processs(runs, world):
    module, *_ = objective("imcl")
    shares = [found["kernels"] for found in runs[world]]
    assert sorted(sum(shares, ())) == sorted(module.kernels)
    # The last layer takes more than all others: somebody has it and nothing else.
    assert ("layer4.0",) in shares
    alone = [found["one layer"][1]["kernel_similarity"] for found in runs[world]]
    assert sum(value == 0 for value in alone) == world - 1


def test_kernel_gradients_do_not_hold_communication_back(runs):
    module, x, y = objective("imcl")
    order = []
    out = module(x, y)
    record_order(out.loss, order)
    out.loss.backward()
    assert order[-2:] == ["Convolution", "PairwisePenalty"]
    parallel = runs[2][0]["imcl"][2]
    assert sorted(parallel) == sorted(order)
    assert parallel[0] == "PairwisePenalty" and parallel[-1] == "Convolution"


@pytest.mark.parametrize(
    ("costs", "parts", "expected"),
    [
        ([1, 2, 3, 4], 2, [[3, 0], [2, 1]]),
        ([5], 3, [[0], [], []]),
        ([2, 2, 2], 3, [[0], [1], [2]]),
        ([7, 1, 1], 1, [[0, 1, 2]]),
    ],
)
def test_balance(costs, parts, expected):
    assert sharding.balance(costs, parts) == expected


def test_shares_of_kernels_with_several_roles_add_up(monkeypatch):
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "linear": nn.Linear(8, 6)})
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    scales = {}
    for rank in range(2):
        monkeypatch.setattr(distributed, "get_rank", lambda rank=rank: rank)
        share = sharding.KernelShare.of(["attention.in_proj_weight", "linear"], model, True)
        scales[share.kernels] = share.scale
    assert scales == {("attention.in_proj_weight",): 2 * 3 / 4, ("linear",): 2 * 1 / 4}


def test_a_share_is_that_of_the_process_it_is_used_in(monkeypatch):
    """Not of the one that saved it."""
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed, "get_rank", lambda: 0)
    torch.manual_seed(0)
    x, y = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 3])
    settings = dict(impl="torch", layers=["layer1", "layer2"], output_weight=0.0, **EVERY_CALL)
    imcl = IMCL(Small(), x, shard_kernels=True, **settings)
    first = imcl._kernel_share.kernels
    assert 0 < len(first) < len(imcl.kernels)
    saved = copy.deepcopy(imcl)
    monkeypatch.setattr(distributed, "get_rank", lambda: 1)
    other = copy.deepcopy(saved)
    other._begin()
    assert sorted([*first, *other._kernel_share.kernels]) == sorted(imcl.kernels)
    monkeypatch.setattr(distributed, "is_initialized", lambda: False)
    whole = IMCL(saved.model, x, **settings)(x, y).terms["kernel_similarity"]
    torch.testing.assert_close(saved(x, y).terms["kernel_similarity"], whole)
