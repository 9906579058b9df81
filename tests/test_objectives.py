"""What a trainer trains: every method by its name, and the plain baseline."""

import copy

import pytest
import torch
import torch.nn.functional as F
from test_imcl import FlatCNN
from torch import nn
from torch.nn.utils import parameters_to_vector
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from imcl_fast import IMCL, data, objectives
from imcl_fast.ilr import MultiHead
from imcl_fast.models import resnet18
from imcl_fast.objectives import METHODS, OF_QUALITIES, WAYS, CrossEntropy, build

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def batch():
    digits = data.load("digits")
    return digits.train.images[:32] / 255, digits.train.labels[:32]


@pytest.fixture
def network():
    torch.manual_seed(0)
    return resnet18(10, width=4, channels=1)


def seen(method, x):
    """A batch as the method trains on it: of qad two views, of which one is darker."""
    return torch.stack([x, 0.5 * x]) if method in OF_QUALITIES else x


@pytest.mark.parametrize("method", [*METHODS, "cross entropy"])
def test_every_objective_keeps_the_contract_and_learns(network, batch, method):
    x, y = batch
    plain = copy.deepcopy(network)
    ways = () if method == "cross entropy" else WAYS
    o = build("imcl" if method == "cross entropy" else method, network, x, ways=ways)
    assert o.model is network
    assert list(o.model.state_dict()) == list(plain.state_dict())
    assert torch.equal(o.eval()(x), plain.eval()(x))
    o.train()
    optimizer = torch.optim.SGD(o.parameters(), lr=0.02, momentum=0.9)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        out = o(seen(method, x), y)
        out.loss.backward()
        optimizer.step()
        losses.append(out.terms["cross_entropy"].item())
    assert out.loss.shape == () and out.logits.shape == (*seen(method, x).shape[:-3], 10)
    assert all(v.shape == () and not v.requires_grad for v in out.terms.values())
    assert losses[-1] < 0.8 * losses[0]
    assert torch.equal(o.eval()(x), o.model(x))


@pytest.mark.parametrize("method", [*METHODS, "cross entropy"])
def test_wrappers_find_every_tensor_in_an_output(network, batch, method):
    x, y = batch
    ways = () if method == "cross entropy" else WAYS
    o = build("imcl" if method == "cross entropy" else method, network, x, ways=ways)
    out = o(seen(method, x), y)
    leaves, spec = tree_flatten(out)
    assert leaves[0] is out.loss and leaves[1] is out.logits
    assert all(isinstance(leaf, torch.Tensor) for leaf in leaves)
    assert not any(leaf.requires_grad for leaf in leaves[2:])
    back, doubled = tree_unflatten(leaves, spec), tree_map(lambda tensor: 2 * tensor, out)
    assert type(back) is type(out)
    assert back.loss is out.loss and back.logits is out.logits
    assert back.terms == out.terms
    assert doubled.terms == {key: 2 * value for key, value in out.terms.items()}
    assert tree_flatten(out)[1] == spec  # also with the terms worked out
    back.loss.backward()
    assert all(p.grad is not None for p in o.parameters())


def test_methods_by_name(network, batch):
    x, _ = batch
    assert isinstance(build("imcl", network, x), IMCL)
    for heads in (2, 4):
        o = build(f"song-chai-{heads}", copy.deepcopy(network), x, beta=0.25, label_smoothing=0.1)
        assert isinstance(o, MultiHead)
        assert (o.heads, o.beta, o.label_smoothing) == (heads, 0.25, 0.1)
    # The settings of a command line have one name for the temperature of the heads.
    assert build("song-chai-2", network, x, multilayer_temperature=3.0).temperature == 3
    exits = build("mutual-exits", network, x, weights={"multilayer": 0.5})
    assert exits.multilayer_teacher == "pairwise" and exits.multilayer_weight == 0.5
    assert exits.output_weight == exits.representation_weight == exits.kernel_weight == 0
    plain = build("imcl", network, x, ways=(), label_smoothing=0.1)
    assert isinstance(plain, CrossEntropy) and plain.label_smoothing == 0.1
    off = {way: 0.0 for way in WAYS}
    assert isinstance(build("imcl", network, x, weights=off), CrossEntropy)


def test_ways_and_weights(network, batch):
    x, _ = batch
    default = IMCL(copy.deepcopy(network), x)
    o = build("imcl", network, x, ways=["kernel", "output"], weights={"output": 0.5}, views=3)
    assert (o.output_weight, o.views) == (0.5, 3)
    assert o.kernel_weight == default.kernel_weight
    assert o.multilayer_weight == o.representation_weight == 0


def test_cross_entropy_is_torchs(network, batch):
    x, y = batch
    o = CrossEntropy(network, label_smoothing=0.2)
    plain = copy.deepcopy(network)
    out = o(x, y)
    out.loss.backward()
    expected = F.cross_entropy(plain(x), y, label_smoothing=0.2)
    expected.backward()
    assert torch.equal(out.loss, expected)
    assert out.terms == {"cross_entropy": out.loss.detach()}
    gradients = [parameters_to_vector([p.grad for p in m.parameters()]) for m in (o, plain)]
    assert torch.equal(*gradients)


def test_sharding_needs_no_processes_where_there_are_no_kernels(network, batch):
    x, _ = batch
    build("mutual-exits", network, x, shard_kernels=True)
    build("imcl", network, x, weights={"kernel": 0}, shard_kernels=True)
    with pytest.raises(RuntimeError, match="shard_kernels: "):
        build("imcl", network, x, shard_kernels=True)


@pytest.mark.parametrize(
    ("method", "options", "error", "message"),
    [
        ("song-chai", {}, ValueError, "method: expected one of imcl, song-chai-2"),
        ("imcl", dict(ways="output"), TypeError, "ways: expected a sequence"),
        ("imcl", dict(ways=["outputs"]), ValueError, "ways: expected one of output, "),
        ("imcl", dict(weights={"kernels": 1}), ValueError, "weights: expected one of output, "),
        ("imcl", dict(ways=["output"], weights={"kernel": 1}), ValueError, "weights: .*'kernel'"),
        ("imcl", dict(weights={"kernel": -1}), ValueError, "kernel_weight: "),
        ("imcl", dict(ways=(), views=3), TypeError, "views: .*cross entropy alone"),
        ("mutual-exits", dict(weights={"output": 1}), ValueError, "weights: .*'output'"),
        ("song-chai-2", dict(weights={"output": 1}), ValueError, "weights: .*'song-chai-2'"),
        ("song-chai-2", dict(beta=1.5), ValueError, "beta: "),
        ("song-chai-2", dict(temperature=1.0, multilayer_temperature=2.0), TypeError,
         "multiple values for keyword argument 'temperature'"),
        ("imcl", dict(beta=0.5), TypeError, "'beta'"),
        ("imcl", dict(ways=(), label_smoothing=1), ValueError, "label_smoothing: "),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(network, batch, method, options, error, message):
    with pytest.raises(error, match=message):
        objectives.build(method, network, batch[0], **options)
    with pytest.raises(TypeError, match="model: expected an nn.Module, got list"):
        CrossEntropy([])


@pytest.mark.parametrize("method", ["imcl", "qad"])
@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        ([0, 1, 2, 3], TypeError, "target: expected a Tensor, got list"),
        (torch.tensor([0, 1, 2, 10]), ValueError, "target: expected classes .* got 10"),
        (torch.tensor([0, 1]), ValueError, r"target: .*got shape \(2,\)"),
        (torch.zeros(4, dtype=torch.bool), TypeError, "target: .*got torch.bool"),
    ],
)
def test_a_target_that_is_none_is_named(method, target, error, message):
    """Of the objectives that compute the task's loss with PyTorch's own function."""
    x = torch.randn(4, 1, 16, 16)
    objective = objectives.build(method, FlatCNN(), x, ways=())
    given = (x, x.flip(-1)) if method == "qad" else x
    with pytest.raises(error, match=message):
        objective(given, target)
    for dtype in (torch.int32, torch.uint8):
        labels = torch.tensor([0, 1, 2, 9])
        torch.testing.assert_close(
            objective(given, labels.to(dtype)).loss, objective(given, labels).loss
        )
    soft = torch.rand(4, 10).requires_grad_()
    objective(given, soft.softmax(1)).loss.backward()
    assert soft.grad.any()


@pytest.mark.parametrize("method", ["imcl", "qad"])
def test_targets_may_be_dense(method):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 10, 1))
    x, y = torch.randn(4, 1, 6, 6), torch.randint(0, 10, (4, 6, 6))
    more = {"layers": ["1"]} if method == "qad" else {}
    objective = objectives.build(method, network, x, ways=(), **more)
    given = (x, x.flip(0)) if method == "qad" else x
    for target in (y, F.one_hot(y, 10).float().movedim(-1, 1)):
        ce = objective(given, target).terms["cross_entropy"]
        logits = [network(each) for each in (given if method == "qad" else [given])]
        expected = sum(F.cross_entropy(z, y) for z in logits)
        assert ce.item() == pytest.approx(expected.item(), rel=1e-5)
    with pytest.raises(ValueError, match=r"target: .*got shape \(4, 5, 6\)"):
        objective(given, y[:, :5])


@pytest.mark.parametrize("method", ["qad", "qad-imcl"])
def test_the_implementation_reaches_the_dependence(network, batch, method):
    qad = build(method, network, batch[0], impl="torch")
    assert qad.dependence.impl == "torch"
    assert qad.ways is None or qad.ways.impl == "torch"


@pytest.mark.parametrize("method", ["imcl", "qad-imcl"])
def test_sharing_the_kernels_out_is_handed_on(network, batch, method):
    with pytest.raises(RuntimeError, match="^shard_kernels: expected torch.distributed"):
        build(method, network, batch[0], shard_kernels=True)


@pytest.mark.parametrize("method", ["imcl", "song-chai-4", "mutual-exits"])
def test_the_implementation_reaches_every_method(network, batch, method):
    assert build(method, network, batch[0], impl="torch").impl == "torch"


def test_mutual_exits_have_the_teacher_that_is_named(network, batch):
    teachers = {"pairwise": {}, "final": {"multilayer_teacher": "final"}}
    for teacher, options in teachers.items():
        built = build("mutual-exits", network, batch[0], **options)
        assert built.multilayer_teacher == teacher


def test_a_setting_that_qad_does_not_have_is_named(network, batch):
    with pytest.raises(TypeError, match="^views: method qad has no such setting"):
        build("qad", network, batch[0], views=3)
