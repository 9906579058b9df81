"""Song & Chai's multi-head networks, against the paper's formulas written out by hand."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel

from imcl_fast import functional
from imcl_fast.ilr import GradientRescaling, MultiHead
from imcl_fast.models import import_torchvision, resnet18

import_torchvision()
from torchvision.models import resnet, vgg  # noqa: E402

CLASSES = 5
pytestmark = pytest.mark.usefixtures("one_thread")


def small_resnet():
    return resnet18(CLASSES, width=4, channels=1)


def small_vgg():
    """torchvision's VGG on grey images, with one narrow convolution between poolings."""
    with torch.device("meta"):  # its own classifier has 100 million weights
        network = vgg.VGG(nn.Identity(), CLASSES, init_weights=False)
    network.features = vgg.make_layers([4, "M", 6, "M", 8, "M", 8, "M"], batch_norm=True)
    network.features[0] = nn.Conv2d(1, 4, 3, padding=1)
    network.avgpool = nn.AdaptiveAvgPool2d(2)
    network.classifier = nn.Sequential(nn.Linear(32, 16), nn.ReLU(True), nn.Linear(16, CLASSES))
    return network


def batch(size=16):
    generator = torch.Generator().manual_seed(4)
    x = torch.rand(6, 1, size, size, generator=generator, dtype=torch.float64)
    return x, torch.arange(6) % CLASSES


RESNET_TREES = {
    2: (["conv1", "bn1", "relu", "maxpool", "layer1", "layer2"],
        ["layer3", "layer4", "avgpool", "flatten", "fc"]),
    4: (["conv1", "bn1", "relu", "maxpool", "layer1", "layer2"],
        ["layer3"],
        ["layer4", "avgpool", "flatten", "fc"]),
}  # fmt: skip


class NaiveResNet:
    """The same tree, by recursion, of copies of a MultiHead's modules; loss as in the paper."""

    def __init__(self, objective):
        self.names = RESNET_TREES[objective.heads]
        self.twin = copy.deepcopy(objective)

    def branch(self, level, index):
        if index == 0:
            own = self.twin.model
            return [
                nn.Flatten() if name == "flatten" else getattr(own, name)
                for name in self.names[level]
            ]
        return self.twin.copies[level - 1][index - 1]

    def logits(self, h, level=0, index=0):
        for module in self.branch(level, index):
            h = module(h)
        if level == len(self.names) - 1:
            return [h]
        if h.requires_grad:
            h = h.clone()
            h.register_hook(lambda gradient: gradient / 2)
        left = self.logits(h, level + 1, 2 * index)
        return left + self.logits(h, level + 1, 2 * index + 1)

    def terms(self, x, y, t, label_smoothing):
        zs = self.logits(x)
        labels, peers, entropy = [], [], []
        for h, z in enumerate(zs):
            others = torch.stack([other for j, other in enumerate(zs) if j != h])
            q = (others.mean(0) / t).softmax(-1).detach()
            labels.append(F.cross_entropy(z, y, label_smoothing=label_smoothing))
            peers.append(-(q * (z / t).log_softmax(-1)).sum(-1).mean())
            entropy.append(-(q * q.log()).sum(-1).mean())
        return labels, peers, entropy


@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize("impl", ["auto", "torch", "reference"])
@pytest.mark.filterwarnings("ignore:imcl_fast. no fused kernel")
def test_loss_and_all_gradients_are_the_papers(heads, impl):
    torch.manual_seed(0)
    beta, t, smoothing = 0.3, 3.0, 0.1
    x, y = batch()
    objective = MultiHead(
        small_resnet().double(), heads, beta=beta, temperature=t, label_smoothing=smoothing,
        impl=impl,
    )
    naive = NaiveResNet(objective)
    out = objective(x, y)
    out.loss.backward()
    labels, peers, entropy = naive.terms(x, y, t, smoothing)
    assert len(labels) == heads
    loss = beta * sum(labels) + (1 - beta) * sum(peers)
    loss.backward()
    close = dict(rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(out.loss, loss - (1 - beta) * sum(entropy), **close)
    expected = {
        "cross_entropy": labels[0],
        "heads_cross_entropy": sum(labels) / heads,
        "consistency": (sum(peers) - sum(entropy)) / heads,
    }
    assert list(out.terms) == list(expected)
    for key, value in expected.items():
        torch.testing.assert_close(out.terms[key], value.detach(), **close)
        assert not out.terms[key].requires_grad
    twins = dict(naive.twin.named_parameters())
    for name, p in objective.named_parameters():
        torch.testing.assert_close(p.grad, twins[name].grad, rtol=1e-8, atol=1e-10, msg=name)
        assert p.grad.abs().sum() > 0, name


def test_a_split_passes_on_the_mean_of_its_branches_gradients():
    x = torch.ones(3, requires_grad=True, dtype=torch.float64)
    h = GradientRescaling.apply(x, 2)
    assert torch.equal(h, x)
    (2 * h + 4 * h).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 3.0))


@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize("make", [small_resnet, small_vgg])
def test_the_model_is_the_plain_network(make, heads):
    torch.manual_seed(0)
    network = make().double()
    plain = copy.deepcopy(network)
    x, y = batch(32)
    objective = MultiHead(network, heads)
    assert objective.model is network
    assert list(network.state_dict()) == list(plain.state_dict())
    for training in (True, False):
        objective.train(training), plain.train(training)
        logits = plain(x)
        assert torch.equal(objective(x, y).logits, logits)
        # Running statistics apart, which training twice has moved twice.
        plain.load_state_dict(network.state_dict())
        assert torch.equal(objective(x), plain(x))
    assert torch.equal(objective(x), objective.model(x))


def test_branches_are_fresh_and_of_the_networks_distribution():
    torch.manual_seed(0)
    network = resnet.resnet18(num_classes=CLASSES)
    objective = MultiHead(network, 4)
    assert [len(level) for level in objective.copies] == [1, 3]
    own = [m for m in network.layer4.modules() if isinstance(m, nn.Conv2d)]
    for branch in objective.copies[1]:
        fresh = [m for m in branch.modules() if isinstance(m, nn.Conv2d)]
        for ours, theirs in zip(own, fresh, strict=True):
            assert ours.weight.shape == theirs.weight.shape
            assert not torch.equal(ours.weight, theirs.weight)
            spread = [m.weight.detach().std().item() for m in (ours, theirs)]
            assert spread[1] == pytest.approx(spread[0], rel=0.02)
    first, second, third = (next(b.parameters()) for b in objective.copies[1])
    assert not torch.equal(first, second) and not torch.equal(second, third)


@pytest.mark.parametrize("how", ["weight_norm", "spectral_norm"])
def test_branches_of_parametrized_networks_are_fresh_too(how):
    torch.manual_seed(0)
    network = small_resnet()
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            getattr(parametrizations, how)(module)
    objective = MultiHead(network, 2, splits=["layer4"])
    kinds = nn.Conv2d | nn.Linear
    own = [m for name in ("layer4", "fc") for m in network.get_submodule(name).modules()
           if isinstance(m, kinds)]  # fmt: skip
    fresh = [m for m in objective.copies[0][0].modules() if isinstance(m, kinds)]
    assert len(own) == len(fresh) > 3
    for ours, theirs in zip(own, fresh, strict=True):
        unlike = (ours.weight - theirs.weight).norm() / ours.weight.norm()
        assert unlike > 0.5 and theirs.weight.norm() / ours.weight.norm() < 3


def test_a_branch_may_have_a_property_that_is_called_weight():
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(32, 5)

        @property
        def weight(self):
            return self.inner.weight

        def forward(self, x):
            return self.inner(x)

    network = small_resnet()
    network.fc = Head()
    network.fc.inner = nn.Linear(next(network.layer4.parameters()).shape[0], 5)
    objective = MultiHead(network, 2, splits=["layer4"])
    assert not torch.equal(objective.copies[0][0][-1].weight, network.fc.weight)


def test_branches_of_pruned_layers_are_refused():
    network = small_resnet()
    prune.l1_unstructured(network.layer4[0].conv1, "weight", 0.3)
    with pytest.raises(ValueError, match="model: weight of a Conv2d is computed from other"):
        MultiHead(network, 2, splits=["layer4"])


def test_branches_learn_where_the_network_is_frozen():
    network = small_resnet()
    network.layer4.requires_grad_(False).eval()
    objective = MultiHead(network, 2, splits=["layer4"])
    assert not any(m.training for m in network.layer4.modules())
    assert not any(p.requires_grad for p in network.layer4.parameters())
    assert all(m.training for m in objective.copies.modules())
    assert all(p.requires_grad for p in objective.copies.parameters())
    assert not any(m.training for m in MultiHead(network.eval()).copies[0][0].modules())


def test_vgg_branches_are_initialised_as_torchvisions():
    torch.manual_seed(0)
    network = small_vgg()
    network.classifier = nn.Sequential(nn.Linear(32, 512), nn.ReLU(True), nn.Linear(512, CLASSES))
    with torch.no_grad():
        for p in network.parameters():
            p.fill_(7.0)  # as trained: nothing of it may be left in the branches
    branch = MultiHead(network, 2).copies[0][0]
    linear = [m for m in branch.modules() if isinstance(m, nn.Linear)]
    assert linear[0].weight.detach().std() == pytest.approx(0.01, rel=0.05)
    conv = next(m for m in branch.modules() if isinstance(m, nn.Conv2d))
    assert conv.weight.detach().std() == pytest.approx((2 / (8 * 9)) ** 0.5, rel=0.15)
    norm = next(m for m in branch.modules() if isinstance(m, nn.BatchNorm2d))
    assert (norm.weight == 1).all()
    assert all((m.bias == 0).all() for m in (conv, norm, *linear))


@pytest.mark.parametrize(
    ("make", "heads", "splits"),
    [
        (small_resnet, 2, ["layer3"]),
        (small_resnet, 4, ["layer3", "layer4"]),
        (small_vgg, 2, ["features.8"]),  # after the second of four poolings
        (small_vgg, 4, ["features.8", "features.12"]),
        (lambda: resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1]), 2, ["layer3"]),
    ],
)
def test_where_it_splits_by_itself(make, heads, splits):
    objective = MultiHead(make(), heads)
    assert objective.splits == splits and objective.heads == heads


@pytest.mark.parametrize("splits", [["layer2.1", "fc"], ["layer4", "layer4.1"], ["bn1", "avgpool"]])
def test_splits_anywhere(splits):
    torch.manual_seed(0)
    network = small_resnet().double()
    x, y = batch()
    objective = MultiHead(network, 4, splits=splits)
    plain = copy.deepcopy(network)
    out = objective(x, y)
    assert torch.equal(out.logits, plain(x))
    out.loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in objective.parameters())


@pytest.mark.slow
def test_torch_compile_takes_it_whole():
    torch.manual_seed(0)
    x, y = batch(8)
    network = small_resnet().double()
    network.layer1, network.layer2 = network.layer1[:1], network.layer2[:1]
    objective = MultiHead(network, 2, splits=["layer4"])
    torch._dynamo.reset()
    outs, gradients = [], []
    for module in (objective, torch.compile(objective, fullgraph=True, backend="aot_eager")):
        outs.append(module(x, y))
        gradients.append(torch.autograd.grad(outs[-1].loss, list(objective.parameters())))
    torch.testing.assert_close(outs[1].loss, outs[0].loss)
    torch.testing.assert_close(outs[1].terms, outs[0].terms)
    torch.testing.assert_close(gradients[1], gradients[0])


def test_autocast_copies_and_resuming():
    torch.manual_seed(0)
    x, y = batch()
    x = x.float()
    objective = MultiHead(small_resnet(), 2)
    with torch.autocast("cpu", torch.bfloat16):
        out = objective(x, y)
    assert out.logits.dtype == torch.bfloat16 and out.loss.dtype == torch.float32
    out.loss.backward()
    assert all(p.grad.isfinite().all() for p in objective.parameters())
    average = AveragedModel(objective)
    torch.manual_seed(1)
    other = MultiHead(small_resnet(), 2)
    other.load_state_dict(objective.state_dict())
    losses = [module.eval()(x, y).loss for module in (objective, other, average)]
    assert torch.equal(losses[0], losses[1]) and torch.equal(losses[0], losses[2])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(model=3), TypeError, "model: expected an nn.Module, got int"),
        (dict(model=nn.Linear(2, 2)), ValueError, "model: .*torchvision's ResNet.*got Linear"),
        (dict(heads=3), ValueError, "heads: expected 2 or 4, got 3"),
        (dict(splits="layer3"), TypeError, "splits: expected a sequence"),
        (dict(splits=["layer3", "layer4"]), ValueError, "splits: expected 1 for 2 heads"),
        (dict(splits=["conv1"]), ValueError, "splits: .*after the first.*got 'conv1'"),
        (dict(splits=["layer9"]), ValueError, "splits: .*got 'layer9'"),
        (dict(heads=4, splits=["layer4", "layer3"]), ValueError, "splits: expected an order"),
        (dict(beta=1.1), ValueError, r"beta: expected a number in \[0, 1\], got 1.1"),
        (dict(beta=-0.1), ValueError, "beta: "),
        (dict(temperature=0), ValueError, "temperature: "),
        (dict(label_smoothing=1), ValueError, "label_smoothing: "),
        (dict(impl="fortran"), ValueError, "impl: .*auto"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    with pytest.raises(error, match=message):
        MultiHead(change.pop("model", None) or small_resnet(), **change)


def test_a_vgg_without_poolings_needs_splits():
    network = small_vgg()
    network.features = network.features[:4]
    with pytest.raises(ValueError, match="splits: expected 3 or more MaxPool2d.* found 1"):
        MultiHead(network)


def test_branches_may_begin_in_place():
    """Both get the same features: what one overwrites the other must not see."""
    network = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=4)
    x, y = torch.rand(2, 3, 32, 32), torch.tensor([0, 1])
    twin = copy.deepcopy(network)
    twin.relu = nn.ReLU()  # not in place
    torch.manual_seed(0)
    ours = MultiHead(network, heads=2, splits=["relu"])
    torch.manual_seed(0)
    theirs = MultiHead(twin, heads=2, splits=["relu"])
    found, expected = ours(x, y), theirs(x, y)
    torch.testing.assert_close(found.loss, expected.loss)
    found.loss.backward(), expected.loss.backward()
    torch.testing.assert_close(network.conv1.weight.grad, twin.conv1.weight.grad)


def test_multihead_computes_with_the_implementation_that_is_named(monkeypatch):
    asked, real = [], functional.collaborative_consistency
    monkeypatch.setattr(
        functional,
        "collaborative_consistency",
        lambda *args, **named: (asked.append(named["impl"]), real(*args, **named))[1],
    )
    network = MultiHead(resnet18(3, width=4), impl="torch")
    network(torch.randn(2, 3, 16, 16), torch.tensor([0, 1]))
    assert asked == ["torch"]


def test_two_splits_are_at_two_places():
    with pytest.raises(ValueError, match="^splits: expected an order from input to output"):
        MultiHead(small_resnet(), heads=4, splits=["layer3", "layer3"])


def test_a_resnets_linear_layers_are_drawn_as_nn_linear_draws_them():
    network = small_resnet()
    fresh = MultiHead(network).copies[0][0][-1]
    bound = network.fc.in_features**-0.5
    assert 0.5 * bound < fresh.weight.abs().max() <= bound


def test_a_part_of_a_name_is_no_split():
    with pytest.raises(ValueError, match="^splits: expected modules .* got 'layer'"):
        MultiHead(small_resnet(), splits=["layer"])
