"""FSDP2: shards of the whole ``IMCL``, of modules inside it, and of a network alone."""

import warnings

import pytest
import torch
from process_group import in_group
from test_distributed_objective import Small
from torch import distributed, multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from imcl_fast import IMCL

WORLD = 4
LAYERS = ["layer1", "layer3", "layer4"]


def objective(shard=None, **options):
    torch.manual_seed(0)
    network = Small().double()
    x = torch.rand(4, 1, 8, 8, dtype=torch.float64)
    if shard is not None:
        fully_shard(network.fc, mesh=shard)
        fully_shard(network, mesh=shard)
    torch.manual_seed(1)
    # Also in processes without conftest.
    options = {"representation_interval": 1, "kernel_interval": 1, **options}
    return IMCL(network, x, LAYERS, dropout=0.0, **options), x, torch.arange(4)


def gradients(imcl):
    return {
        name: getattr(p.grad, "full_tensor", p.grad.clone)() for name, p in imcl.named_parameters()
    }


def plain(steps=1, **options):
    """What a process without shards finds: a way's value and all gradients, of each step."""
    imcl, x, y = objective(**options)
    found = []
    for _ in range(steps):
        imcl.zero_grad()
        out = imcl(x, y)
        out.loss.backward()
        found.append([out.terms.get("kernel_similarity"), gradients(imcl)])
    return found


# One process


@pytest.mark.parametrize("late", [False, True])
def test_fsdp2_of_one_process_and_of_an_imcl_built_after_it(late, tmp_path):
    ((_, expected),) = plain()

    def work():
        mesh = init_device_mesh("cpu", (1,))
        imcl, x, y = objective(shard=mesh if late else None)
        if not late:
            fully_shard(imcl.model.fc, mesh=mesh)
            fully_shard(imcl, mesh=mesh)
        for _ in range(2):
            imcl.zero_grad()
            imcl(x, y).loss.backward()
            torch.testing.assert_close(gradients(imcl), expected)

    in_group(tmp_path, work)


def test_weights_that_an_evaluation_left_gathered(tmp_path):
    """They are freed before what was computed first has its turn backward."""
    ((_, expected),) = plain()

    def work():
        imcl, x, y = objective()
        mesh = init_device_mesh("cpu", (1,))
        for layer in (imcl.model.layer1, imcl.model.layer2):
            fully_shard(layer, mesh=mesh, reshard_after_forward=False)
        fully_shard(imcl, mesh=mesh)
        imcl(x, y).loss.backward()
        imcl.zero_grad()  # while the parameters are those that have gradients
        with torch.no_grad():
            imcl.eval()(x)
        imcl.train()(x, y).loss.backward()
        torch.testing.assert_close(gradients(imcl), expected)

    in_group(tmp_path, work)


# Several


def process(rank, folder):
    torch.set_num_threads(1)
    torch.save(in_group(folder, lambda: of_several(rank), rank, WORLD), f"{folder}/{rank}.pt")


def of_several(rank):
    mesh = init_device_mesh("cpu", (WORLD,))

    def steps(imcl, x, y, count=1):
        found = []
        for _ in range(count):
            imcl.zero_grad()
            out = imcl(x[rank : rank + 1], y[rank : rank + 1])
            out.loss.backward()
            found.append([out.terms.get("kernel_similarity"), gradients(imcl)])
        return found

    def sharded(imcl, x, y, names=("layer1", "layer2", "layer4", "fc"), **options):
        for name in names:
            fully_shard(imcl.model.get_submodule(name), mesh=mesh, **options)
        fully_shard(imcl, mesh=mesh)
        return imcl, x, y

    found = {"plain": steps(*sharded(*objective(kernel_interval=2)), 2)}
    found["two by two"] = steps(*sharded(*objective(), reshard_after_forward=2))
    compiled = objective()
    compiled[0].model.compile(backend="aot_eager")
    found["compiled"] = steps(*sharded(*compiled))

    late, x, y = objective(shard=mesh)
    for head in late.heads:
        fully_shard(head, mesh=mesh)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found["late"] = steps(late, x, y)
    late, x, y = objective(shard=mesh)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(2):
            late(x, y)
    found["told"] = [str(warning.message) for warning in told]

    shared, x, y = sharded(*objective(shard_kernels=True), names=[f"layer{i}" for i in range(1, 5)])
    try:
        shared(x, y)
    except RuntimeError as error:
        found["refused"] = str(error)
    distributed.barrier()
    return found


def test_fsdp2_with_sharded_modules_inside(tmp_path):
    multiprocessing.spawn(process, (str(tmp_path),), nprocs=WORLD)
    expected = plain(2, kernel_interval=2)
    assert [value is None for value, _ in expected] == [False, True]
    every_call = plain()
    for rank in range(WORLD):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(found["plain"], expected)
        for name in ("two by two", "compiled", "late"):
            torch.testing.assert_close(found[name], every_call, msg=lambda m, n=name: f"{n}: {m}")
        assert len(found["told"]) == 1 and "but not the auxiliary heads" in found["told"][0]
        assert found["refused"].startswith("shard_kernels: expected whole weights")
