"""IMCL around networks that know nothing of it, against the objective written out by hand."""

import copy
import io
import warnings
import weakref
from contextlib import nullcontext
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from imcl_fast import IMCL, calls, functional, reference
from imcl_fast.heads import average
from imcl_fast.imcl import NO_CHANCE
from imcl_fast.models import import_torchvision, resnet18

WEIGHTS = ("output_weight", "multilayer_weight", "representation_weight", "kernel_weight")
TERMS = dict(
    zip(
        WEIGHTS,
        (
            "output_consistency",
            "multilayer_consistency",
            "representation_similarity",
            "kernel_similarity",
        ),
        strict=True,
    )
)
pytestmark = pytest.mark.usefixtures("one_thread")
WAYS_ON = {
    "output_weight": 0.7,
    "multilayer_weight": 1.3,
    "representation_weight": 10.0,
    "kernel_weight": 50.0,
}


class FlatCNN(nn.Module):
    """Three resolutions, one layer after another; normalisation and activation as asked."""

    def __init__(self, norm=nn.BatchNorm2d, inplace=True):
        super().__init__()
        stages, channels = [], 1
        for width in (6, 8, 10):
            stages += [nn.Conv2d(channels, width, 3, padding=1), norm(width)]
            stages += [nn.ReLU(inplace=inplace), nn.MaxPool2d(2)]
            channels = width
        self.features = nn.Sequential(*stages)
        self.fc = nn.Linear(10, 10)

    def forward(self, x):
        return self.fc(self.features(x).mean((2, 3)))


@pytest.fixture
def batch(digits):
    return digits.train.images[:24] / 255, digits.train.labels[:24]


@pytest.fixture
def network():
    torch.manual_seed(0)
    return FlatCNN()


def build(network, x, **kwargs):
    torch.manual_seed(1)
    return IMCL(network, x, **{**WAYS_ON, "impl": "torch", **kwargs})


def only(weight):
    return {name: WAYS_ON[name] if name == weight else 0.0 for name in WEIGHTS}


def hooks(network):
    return sum(len(module._forward_hooks) for module in network.modules())


def step(imcl, x, y, seed=3):
    """One forward and backward; the output and the gradients by parameter name."""
    imcl.zero_grad()
    torch.manual_seed(seed)
    out = imcl(x, y)
    out.loss.backward()
    return out, {name: p.grad.clone() for name, p in imcl.named_parameters()}


# The network itself


@pytest.mark.parametrize("training", [True, False])
def test_without_target_imcl_is_the_model(network, batch, training):
    x, _ = batch
    plain = copy.deepcopy(network).train(training)
    imcl = build(network, x).train(training)
    assert torch.equal(imcl(x), plain(x))
    assert torch.equal(imcl.model(x), plain(x))
    assert imcl.model is network


def test_building_leaves_no_trace(network, batch):
    network.features[1].eval()  # one frozen normalisation, as in fine-tuning
    modes = [module.training for module in network.modules()]
    state = copy.deepcopy(network.state_dict())
    build(network, batch[0], multilayer_weight=0.0)
    assert [module.training for module in network.modules()] == modes
    assert list(network.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())


def test_training_step_gives_the_models_own_logits(network, batch):
    x, y = batch
    plain = copy.deepcopy(network)
    imcl = build(network, x)
    out = imcl(x, y)
    assert torch.equal(out.logits, plain(x))
    assert list(imcl.model.state_dict()) == list(plain.state_dict())


def test_remove_hooks_gives_the_plain_network_back(network, batch):
    x, y = batch
    imcl = build(network, x)
    assert hooks(network) == 4
    assert imcl.remove_hooks() is network
    assert hooks(network) == 0
    scripted = torch.jit.script(copy.deepcopy(network).eval())  # it takes no hooks but functions
    torch.testing.assert_close(scripted(x), network.eval()(x))
    with pytest.raises(RuntimeError, match="remove_hooks"):
        imcl.train()(x, y)


# The objective


def naive_objective(imcl, x, y, center):
    """The objective as its definition states it, for FlatCNN and WAYS_ON."""
    net, features = imcl.model, []
    h = x
    for i, layer in enumerate(net.features):
        h = layer(h)
        if i % 4 == 2:
            features.append(h)
    last = h.mean((2, 3))
    final = net.fc(last)

    masked = torch.dropout(last.expand(2, *last.shape), 0.3, True)
    views = [net.fc(masked[0]), net.fc(masked[1])]

    def kl(teacher, student, t):
        p, q = (teacher.detach() / t).softmax(-1), (student / t).softmax(-1)
        return t * t * (p * (p.log() - q.log())).sum(-1).mean()

    output = sum(F.cross_entropy(z, y) for z in views) / 2
    output = output + (kl(views[0], views[1], 1.0) + kl(views[1], views[0], 1.0)) / 2
    heads = [h.linear(f.mean((2, 3))) for h, f in zip(imcl.heads, features, strict=False)]
    multilayer = sum(F.cross_entropy(z, y) for z in heads) / len(heads)
    heads.append(final)
    for h, z in enumerate(heads):
        others = sum(other for j, other in enumerate(heads) if j != h) / (len(heads) - 1)
        multilayer = multilayer + kl(others, z, 2.0) / len(heads)
    penalty = dict(penalty="square", eps=1e-12)
    representation = reference.pairwise_penalty(features, center=center, batched=True, **penalty)
    weights = [layer.weight for layer in net.features if isinstance(layer, nn.Conv2d)]
    kernel = reference.pairwise_penalty(weights, center=False, batched=False, **penalty)
    terms = {
        "cross_entropy": F.cross_entropy(final, y),
        "output_consistency": output,
        "multilayer_consistency": multilayer,
        "representation_similarity": representation,
        "kernel_similarity": kernel,
    }
    loss = terms["cross_entropy"] + sum(WAYS_ON[name] * terms[TERMS[name]] for name in WEIGHTS)
    return loss, terms


@pytest.mark.parametrize("impl", ["auto", "torch", "reference"])
@pytest.mark.parametrize("center", [True, False])
@pytest.mark.filterwarnings("ignore:imcl_fast. no fused kernel")
def test_objective_is_its_definition(network, batch, impl, center):
    x, y = batch[0].double(), batch[1]
    imcl = build(network.double(), x, impl=impl, center=center)
    out, gradients = step(imcl, x, y)
    imcl.zero_grad()
    torch.manual_seed(3)
    loss, terms = naive_objective(imcl, x, y, center)
    loss.backward()
    torch.testing.assert_close(out.loss, loss, rtol=1e-10, atol=1e-12)
    assert list(out.terms) == list(terms)
    for key, value in terms.items():
        torch.testing.assert_close(out.terms[key], value.detach(), rtol=1e-10, atol=1e-12)
    for name, p in imcl.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, rtol=1e-8, atol=1e-10, msg=name)


def test_views_have_masks_of_their_own_and_none_in_eval(network, batch):
    x, y = batch
    imcl = build(network, x, **only("output_weight"), views=3)
    distinct = step(imcl, x, y)[0].terms["output_consistency"]
    imcl.eval()
    out = imcl(x, y)
    # Equal views have no divergence and the network's own cross entropy.
    torch.testing.assert_close(out.terms["output_consistency"], out.terms["cross_entropy"])
    assert distinct > out.terms["cross_entropy"]


@pytest.mark.parametrize("weight", WEIGHTS)
def test_each_way_alone(network, batch, weight):
    x, y = batch
    imcl = build(network, x, **only(weight))
    out, gradients = step(imcl, x, y)
    assert set(out.terms) == {"cross_entropy", TERMS[weight]}
    expected = out.terms["cross_entropy"] + WAYS_ON[weight] * out.terms[TERMS[weight]]
    torch.testing.assert_close(out.loss.detach(), expected)
    torch.testing.assert_close(out.terms["cross_entropy"], F.cross_entropy(out.logits, y).detach())
    assert not any(value.requires_grad for value in out.terms.values())
    plain, _ = step(build(network, x, **only(None)), x, y)
    assert out.terms[TERMS[weight]] > 0 and out.loss > plain.loss
    assert all(g.isfinite().all() for g in gradients.values())


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        ("output_weight", {"consistency": 1, "hooks": 1, "heads": 0}),
        ("multilayer_weight", {"consistency": 1, "hooks": 2, "heads": 2}),
        ("representation_weight", {"consistency": 1, "layers": 3, "hooks": 3, "heads": 0}),
        ("kernel_weight", {"consistency": 1, "kernel": 1, "hooks": 0, "heads": 0}),
        (None, {"consistency": 1, "hooks": 0, "heads": 0}),
        ("all", {"consistency": 1, "kernel": 1, "layers": 3, "hooks": 4, "heads": 2}),
    ],
)
def test_a_weight_of_0_costs_nothing(network, batch, monkeypatch, weight, expected):
    x, y = batch
    spies = {}
    for name in ("consistency", "pairwise"):
        spies[name] = Mock(wraps=getattr(calls, name))
        monkeypatch.setattr(calls, name, spies[name])
    imcl = build(network, x, **({} if weight == "all" else only(weight)))
    imcl(x, y)
    of_layers = [call.args[4] for call in spies["pairwise"].call_args_list]  # batched
    ran = {
        "consistency": spies["consistency"].call_count,
        "kernel": of_layers.count(False),
        "layers": of_layers.count(True),
    }
    found = {**ran, "hooks": hooks(network), "heads": len(imcl.heads)}
    assert found == {"kernel": 0, "layers": 0, **expected}


def test_label_smoothing_is_that_of_every_cross_entropy(network, batch):
    x, y = batch
    out = build(network, x, **only("multilayer_weight"), label_smoothing=0.2)(x, y)
    expected = F.cross_entropy(out.logits, y, label_smoothing=0.2).detach()
    torch.testing.assert_close(out.terms["cross_entropy"], expected)


def test_weights_may_change_between_steps_but_not_switch_a_way_on(network, batch):
    x, y = batch
    imcl = build(network, x, dropout=0.0, output_weight=0.0)
    before, after = {}, {}
    for weights in (before, after):
        out = imcl(x, y)
        weights.update(loss=out.loss.item(), kernel=out.terms["kernel_similarity"].item())
        imcl.kernel_weight = 2 * WAYS_ON["kernel_weight"]
    gained = WAYS_ON["kernel_weight"] * before["kernel"]
    assert after["loss"] - before["loss"] == pytest.approx(gained, rel=1e-4)
    imcl.output_weight = 1.0
    with pytest.raises(RuntimeError, match="output_weight.*switched off"):
        imcl(x, y)


# Where the work is done


def test_penalty_gradients_are_made_where_they_are_due(network, batch):
    x, y = batch
    imcl = build(network, x)
    out = imcl(x, y)
    order, seen, nodes = [], set(), [out.loss.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]
        for kind in ("PairwisePenalty", "Convolution"):
            if node.name().startswith(kind):
                node.register_prehook(lambda _, kind=kind: order.append(kind))
    out.loss.backward()
    # Each layer's penalty before its own convolution, that of the kernels after all.
    assert order == ["PairwisePenalty", "Convolution"] * 3 + ["PairwisePenalty"]


def test_nothing_is_kept_after_the_step(network, batch):
    x, y = batch
    imcl = build(network, x)
    kept = []
    network.features[6].register_forward_hook(lambda m, a, output: kept.append(weakref.ref(output)))
    out = imcl(x, y)
    out.loss.backward()
    del out
    assert [reference() for reference in kept] == [None]


def test_an_exception_leaves_nothing_behind(network, batch):
    x, y = batch
    imcl = build(network, x, dropout=0.0)
    expected = imcl(x, y).loss

    def fail(*_):
        raise OSError("out of paper")

    handle = network.fc.register_forward_pre_hook(fail)
    with pytest.raises(OSError, match="out of paper"):
        imcl(x, y)
    handle.remove()
    with pytest.raises(ValueError, match="target"):
        imcl(x, y[:-1])
    network(x[:3])  # would be taken for the step's features if the step were still open
    torch.testing.assert_close(imcl(x, y).loss, expected)


# What is done with modules


def test_autocast_step(network, batch):
    x, y = batch
    imcl = build(network, x, dropout=0.0)
    full = imcl(x, y)
    with torch.autocast("cpu", torch.bfloat16):
        out = imcl(x, y)
    out.loss.backward()
    assert out.logits.dtype == torch.bfloat16 and out.loss.dtype == torch.float32
    for key, value in full.terms.items():
        torch.testing.assert_close(out.terms[key], value, rtol=0.05, atol=0.005)
    assert all(p.grad.dtype == torch.float32 for p in imcl.parameters())
    assert all(p.grad.isfinite().all() for p in imcl.parameters())


def test_building_under_autocast_keeps_float32_heads(network, batch):
    with torch.autocast("cpu", torch.bfloat16):
        imcl = build(network, batch[0])
    assert {p.dtype for p in imcl.parameters()} == {torch.float32}


@pytest.mark.parametrize("stem", [torch.float32, torch.bfloat16])
def test_parts_of_a_network_may_have_dtypes_of_their_own(network, batch, stem):
    """Each head has its layer's, and the loss is near that of a float32 network."""
    x, y = batch
    rest = torch.bfloat16 if stem == torch.float32 else torch.float32
    expected, _ = step(build(copy.deepcopy(network), x, dropout=0.0), x, y)
    network.to(rest)
    network.features[:4].to(stem)
    network.forward = lambda x: network.fc(
        network.features[4:](network.features[:4](x.to(stem)).to(rest)).mean((2, 3))
    )
    imcl = build(network, x, dropout=0.0)
    out, gradients = step(imcl, x, y)
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    for name, head in zip(imcl.layers, imcl.heads, strict=False):
        assert head.linear.weight.dtype == (stem if int(name.split(".")[1]) < 4 else rest)
    torch.testing.assert_close(out.loss, expected.loss, rtol=0.05, atol=0.05)


def test_grad_scaler_scales_what_it_takes_back(network, batch):
    x, y = batch
    imcl = build(network, x, dropout=0.0)
    _, expected = step(imcl, x, y)
    imcl.zero_grad()
    optimizer = torch.optim.SGD(imcl.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    scaler.scale(imcl(x, y).loss).backward()
    weight = network.features[0].weight
    # A power of two changes no digit.
    assert torch.equal(weight.grad, expected["model.features.0.weight"] * 2**12)
    scaler.unscale_(optimizer)
    for name, p in imcl.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], msg=name)
    before = weight.detach().clone()
    scaler.step(optimizer)
    assert not torch.equal(weight, before)


def test_accumulated_gradients_are_those_of_the_whole_batch(batch):
    x, y = batch[0].double(), batch[1]
    imcl = build(FlatCNN(norm=lambda width: nn.GroupNorm(2, width)).double(), x, dropout=0.0)
    _, whole = step(imcl, x, y)
    imcl.zero_grad()
    for part in range(3):
        (imcl(x[part::3], y[part::3]).loss / 3).backward()
    for name, p in imcl.named_parameters():
        torch.testing.assert_close(p.grad, whole[name], msg=name)


class Checkpointed(FlatCNN):
    """Its stages are segments under gradient checkpointing, cut at the layers or elsewhere."""

    def __init__(self, use_reentrant=False, segment=4, on=True):
        # Without running statistics, which the second run would update again, and
        # without writing to what a segment is to be run again from.
        super().__init__(norm=lambda width: nn.GroupNorm(2, width), inplace=False)
        self.use_reentrant, self.segment, self.on = use_reentrant, segment, on
        self.runs = 0
        self.features[4].register_forward_pre_hook(self.count)

    def count(self, *_):
        self.runs += 1

    def forward(self, x):
        for i in range(0, len(self.features), self.segment):
            stage = self.features[i : i + self.segment]
            x = checkpoint(stage, x, use_reentrant=self.use_reentrant) if self.on else stage(x)
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize("segment", [4, 3, 12])
@pytest.mark.parametrize("steps", [1, 2])
def test_gradient_checkpointing_changes_nothing(batch, segment, steps):
    x, y = batch
    found = {}
    for on in (False, True):
        torch.manual_seed(0)
        imcl = build(Checkpointed(segment=segment, on=on), x)
        imcl.model.runs = 0
        torch.manual_seed(3)
        # With two steps, the first is run again when the second's features are there too.
        outs = [imcl(x[i::steps], y[i::steps]) for i in range(steps)]
        sum(out.loss for out in outs).backward()
        assert imcl.model.runs == (2 if on else 1) * steps
        found[on] = [outs[0].terms, {name: p.grad for name, p in imcl.named_parameters()}]
    torch.testing.assert_close(found[True], found[False])


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpointing_of_a_layer_works_and_within_one_is_an_error(batch):
    x, y = batch
    x = x.clone().requires_grad_()  # or reentrant checkpointing has no gradient at all
    found = {}
    for on in (False, True):
        torch.manual_seed(0)
        network = Checkpointed(use_reentrant=True, segment=3, on=on)
        # The first segment ends with this layer; the third begins with the next.
        imcl = build(network, x, layers=["features.2"], multilayer_weight=0.0)
        found[on] = step(imcl, x, y)[1]
    torch.testing.assert_close(found[True], found[False])
    imcl = build(network, x, layers=["features.2", "features.6"])
    with pytest.raises(RuntimeError, match="of a ReLU .* use_reentrant=False"):
        imcl(x, y)
    with torch.no_grad():
        assert imcl(x, y).loss.isfinite()  # there is no gradient to lose


class PartlyFrozen(FlatCNN):
    """Fine-tuning: the first two of the three stages learn nothing, for one reason or another."""

    def __init__(self, how):
        super().__init__(norm=lambda width: nn.GroupNorm(2, width), inplace=False)
        self.how = how
        if how != "under no_grad":
            self.features[:8].requires_grad_(False)

    def forward(self, x):
        if self.how == "in a checkpoint":
            return self.fc(checkpoint(self.features, x, use_reentrant=False).mean((2, 3)))
        with torch.set_grad_enabled(self.how != "under no_grad"):
            x = self.features[:8](x)
        return self.fc(self.features[8:](x).mean((2, 3)))


def test_features_without_gradient_contribute_their_value(batch):
    x, y = batch
    found = {}
    for how in ("frozen", "in a checkpoint", "under no_grad"):
        torch.manual_seed(0)
        imcl = build(PartlyFrozen(how), x, kernels=["features.8"])
        torch.manual_seed(3)
        out = imcl(x, y)
        out.loss.backward()
        found[how] = [out.terms, {name: p.grad for name, p in imcl.named_parameters()}]
    gradients = found["frozen"][1]
    learning = [name for name, gradient in gradients.items() if gradient is not None]
    stages = [f"model.features.{i}." for i in range(8)]
    assert learning == [name for name in gradients if not name.startswith(tuple(stages))]
    for how in ("in a checkpoint", "under no_grad"):
        torch.testing.assert_close(found[how], found["frozen"])


def test_what_no_grad_freezes_and_way_4_moves_is_told(batch):
    x, y = batch
    imcl = build(PartlyFrozen("under no_grad"), x)
    before = imcl.model.features[0].weight.clone()
    with pytest.warns(UserWarning, match=r"runs \['features.2', .* under no_grad.*way 4"):
        imcl(x, y).loss.backward()
    assert imcl.model.features[0].weight.grad is not None and torch.equal(
        before, imcl.model.features[0].weight
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        imcl(x, y)  # once
        build(PartlyFrozen("frozen"), x)(x, y)
        build(PartlyFrozen("in a checkpoint"), x)(x, y)
        build(PartlyFrozen("under no_grad"), x, kernels=["features.8"])(x, y)
        build(PartlyFrozen("under no_grad"), x, kernel_weight=0.0)(x, y)


@pytest.mark.parametrize("segment", [12, 4])
def test_a_classifier_alone_learns_on_a_frozen_network(batch, segment):
    x, y = batch
    network = Checkpointed(segment=segment)
    network.features.requires_grad_(False)
    imcl = build(network, x)
    imcl(x, y).loss.backward()
    learning = {name.partition(".")[0] for name, p in imcl.named_parameters() if p.grad is not None}
    assert learning == {"heads", "model"}
    assert all(p.grad.abs().sum() > 0 for p in imcl.parameters() if p.requires_grad)


class DropConnect(nn.Module):
    """A parametrization with other weights dropped whenever the weight is read."""

    def forward(self, weight):
        return torch.dropout(weight, 0.5, self.training)


MADE_ANEW = {
    "prune": lambda module: prune.l1_unstructured(module, "weight", 0.3),
    "weight_norm": weight_norm,
    "spectral_norm": spectral_norm,
    "parametrized weight_norm": parametrizations.weight_norm,
    "parametrized spectral_norm": parametrizations.spectral_norm,
    "drop connect": lambda module: parametrize.register_parametrization(
        module, "weight", DropConnect()
    ),
}
MADE_ANEW_FILTER = pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")


def made_anew(kind, **options):
    """A network whose second convolution makes its weight of other parameters."""
    torch.manual_seed(0)
    network = Checkpointed(**options)
    MADE_ANEW[kind](network.features[4])
    return network


def naive_kernel_step(network, x, y):
    """Cross entropy and kernel similarity of the weights that the forward pass computes with."""
    network.zero_grad()
    torch.manual_seed(3)
    with parametrize.cached():  # every weight is made once
        logits = network(x)
        weights = [m.weight for m in network.features if isinstance(m, nn.Conv2d)]
    similarity = reference.pairwise_penalty(
        weights, center=False, batched=False, penalty="square", eps=1e-12
    )
    (F.cross_entropy(logits, y) + WAYS_ON["kernel_weight"] * similarity).backward()
    return logits, similarity, {name: p.grad.clone() for name, p in network.named_parameters()}


@MADE_ANEW_FILTER
@pytest.mark.parametrize("kind", list(MADE_ANEW))
@pytest.mark.parametrize("late", [False, True])
def test_kernels_are_those_that_the_forward_pass_computes_with(batch, kind, late):
    x, y = batch[0].double(), batch[1]
    plain = made_anew(kind, on=False).double()
    if late:
        torch.manual_seed(0)
        imcl = build(Checkpointed(on=False).double(), x, **only("kernel_weight"))
        MADE_ANEW[kind](imcl.model.features[4])
    else:
        imcl = build(made_anew(kind, on=False).double(), x, **only("kernel_weight"))
    imcl.model.load_state_dict(plain.state_dict())
    for _ in range(3):
        out, gradients = step(imcl, x, y)
        logits, similarity, expected = naive_kernel_step(plain, x, y)
        torch.testing.assert_close(out.logits, logits)
        torch.testing.assert_close(out.terms["kernel_similarity"], similarity.detach())
        assert len(gradients) == len(expected)
        for name, gradient in expected.items():
            torch.testing.assert_close(gradients[f"model.{name}"], gradient, msg=name)
            assert gradient.abs().sum() > 0
        if kind == "prune":
            pruned = plain.features[4].weight_mask == 0
            assert pruned.any() and not gradients["model.features.4.weight_orig"][pruned].any()
        for network in (imcl.model, plain):
            torch.optim.SGD(network.parameters(), lr=0.01).step()
    for name, value in plain.state_dict().items():  # that of spectral norm, too
        torch.testing.assert_close(imcl.model.state_dict()[name], value, msg=name)


class Attentive(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(6, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        h = self.embed(x)
        return self.fc((h + self.attention(h, h, h, need_weights=False)[0]).mean(1))


@MADE_ANEW_FILTER
@pytest.mark.parametrize("how", ["prune", "weight_norm", "parametrized weight_norm"])
@pytest.mark.parametrize("path", ["attention.in_proj_weight", "fc.weight"])
@pytest.mark.parametrize("late", [False, True])
def test_a_weight_of_a_path_may_be_made_anew(path, how, late):
    """Named by itself, as those of nn.MultiheadAttention are by default; before or after the
    IMCL is built."""
    torch.manual_seed(0)
    x, y, network = torch.randn(8, 5, 6), torch.randint(0, 5, (8,)), Attentive()
    parent, _, name = path.rpartition(".")
    module = network.get_submodule(parent)
    imcl = build(network, x, kernels=[path], **only("kernel_weight")) if late else None
    if how == "prune":
        prune.l1_unstructured(module, name, 0.3)
    elif how == "weight_norm":
        weight_norm(module, name)
    else:
        parametrizations.weight_norm(module, name)
    imcl = imcl or build(network, x, kernels=[path], **only("kernel_weight"))
    out = imcl(x, y)
    out.loss.backward()
    rows = list(getattr(module, name).detach().chunk(3 if "attention" in path else 1))
    expected = reference.pairwise_penalty(
        rows, center=False, batched=False, penalty="square", eps=1e-12
    )
    torch.testing.assert_close(out.terms["kernel_similarity"], expected)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@MADE_ANEW_FILTER
@pytest.mark.parametrize("kind", ["prune", "weight_norm", "parametrized weight_norm"])
def test_kernels_made_in_a_checkpointed_segment(batch, kind):
    x, y = batch
    _, _, expected = naive_kernel_step(made_anew(kind, on=False), x, y)
    imcl = build(made_anew(kind), x, **only("kernel_weight"))
    for _ in range(2):
        for name, gradient in step(imcl, x, y)[1].items():
            torch.testing.assert_close(gradient, expected[name.removeprefix("model.")], msg=name)
    x = x.clone().requires_grad_()
    imcl = build(made_anew(kind, use_reentrant=True), x, **only("kernel_weight"))
    if kind == "parametrized weight_norm":  # which can be made again outside
        for name, gradient in step(imcl, x, y)[1].items():
            torch.testing.assert_close(gradient, expected[name.removeprefix("model.")], msg=name)
    else:
        with pytest.raises(RuntimeError, match="kernels: .*'features.4' .*use_reentrant=False"):
            imcl(x, y)
    imcl.model.features[4].requires_grad_(False)  # nothing to lose
    imcl(x, y).loss.backward()


@MADE_ANEW_FILTER
@pytest.mark.parametrize(
    "kind",
    ["prune", *(pytest.param(kind, marks=pytest.mark.slow)
                for kind in ("spectral_norm", "parametrized spectral_norm"))],
)  # fmt: skip
def test_torch_compile_takes_kernels_made_anew(batch, kind):
    x, y = batch
    _, _, expected = naive_kernel_step(made_anew(kind, on=False), x, y)
    imcl = build(made_anew(kind, on=False), x, **only("kernel_weight"))
    torch._dynamo.reset()
    found = step(torch.compile(imcl, fullgraph=True, backend="aot_eager"), x, y)[1]
    for name, gradient in expected.items():
        torch.testing.assert_close(found[f"_orig_mod.model.{name}"], gradient, msg=name)


@pytest.mark.parametrize("kind", ["parametrized spectral_norm", "drop connect"])
def test_building_reads_no_weight_that_a_reading_changes(batch, kind):
    network = made_anew(kind, on=False)
    state, generator = copy.deepcopy(network.state_dict()), torch.get_rng_state()
    imcl = IMCL(network, batch[0], **only("kernel_weight"), kernels=["features.0", "features.4"])
    network.train()
    assert "features.4 (" in imcl.plan() and str(imcl)
    assert network.training
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)


def test_a_replica_of_data_parallel_is_an_error(network, batch):
    x, y = batch
    replica = build(network, x)._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match="nn.DataParallel.*DistributedDataParallel"):
        replica(x, y)


def test_copies_are_independent(network, batch):
    x, y = batch
    imcl = build(network, x)
    twin = copy.deepcopy(imcl)
    ours, gradients = step(imcl, x, y)
    theirs, their_gradients = step(twin, x, y)
    assert torch.equal(ours.loss, theirs.loss)
    assert all(torch.equal(g, their_gradients[name]) for name, g in gradients.items())
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert torch.equal(step(imcl, x, y)[0].loss, ours.loss)
    alone = copy.deepcopy(imcl.model).eval()  # as an exponential moving average is kept
    assert torch.equal(alone(x), imcl.eval()(x))


def test_moving_averages_of_the_whole_and_of_the_network(network, batch):
    x, y = batch
    imcl = build(network, x, dropout=0.0)
    average = get_ema_multi_avg_fn(0.5)
    whole = AveragedModel(imcl, multi_avg_fn=average, use_buffers=True)
    alone = AveragedModel(imcl.model, multi_avg_fn=average, use_buffers=True)
    optimizer = torch.optim.SGD(imcl.parameters(), lr=0.1)
    for _ in range(2):
        step(imcl, x, y)
        optimizer.step()
        whole.update_parameters(imcl)
        alone.update_parameters(imcl.model)
    assert list(alone.module.state_dict()) == list(network.state_dict())
    assert torch.equal(whole.eval()(x), alone.eval()(x))
    assert not torch.equal(alone(x), imcl.eval()(x))
    assert whole(x, y).terms.keys() == imcl(x, y).terms.keys()
    assert not torch.equal(whole(x, y).loss, imcl(x, y).loss)


def test_state_dict_and_whole_module_round_trip(network, batch):
    x, y = batch
    imcl = build(network, x)
    torch.manual_seed(9)
    other = IMCL(FlatCNN(), x, **WAYS_ON, impl="torch")
    other.load_state_dict(imcl.state_dict())
    file = io.BytesIO()
    torch.save(imcl, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    expected = step(imcl, x, y)[0].loss
    assert torch.equal(step(other, x, y)[0].loss, expected)
    assert torch.equal(step(loaded, x, y)[0].loss, expected)
    assert {key.split(".")[0] for key in imcl.state_dict()} == {"model", "heads", "_extra_state"}


def test_to_moves_the_heads(network, batch):
    x, y = batch
    imcl = build(network, x).to(torch.float64)
    assert imcl(x.double(), y).loss.dtype == torch.float64
    assert {p.dtype for p in imcl.heads.parameters()} == {torch.float64}


def test_torch_compile_takes_it_whole(network, batch):
    x, y = batch
    imcl = build(network, x, dropout=0.0)
    expected, gradients = step(imcl, x, y)
    torch._dynamo.reset()
    compiled = torch.compile(imcl, fullgraph=True, backend="aot_eager")
    out, found = step(compiled, x, y)
    torch.testing.assert_close(out.loss, expected.loss)
    assert list(out.terms) == list(expected.terms)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[f"_orig_mod.{name}"], gradient, msg=name)
    torch.testing.assert_close(compiled(x), imcl(x))


# What is found in a network


class Staged(nn.Module):
    """A stem, blocks in a list, gates of one pixel, and its linear layer not the last module."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(12, 5)
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.stages = nn.ModuleList(Gated(a, b) for a, b in ((4, 8), (8, 8), (8, 12)))
        self.strides = (1, 2, 2)

    def forward(self, x):
        x = self.stem(x).relu_()
        for stage, stride in zip(self.stages, self.strides, strict=True):
            x = stage(x[..., ::stride, ::stride])
        return self.head(x.amax((2, 3)))


class Gated(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.gate = nn.Conv2d(outputs, outputs, 1)

    def forward(self, x):
        x = self.conv(x)
        return torch.relu(x * self.gate(self.pool(x)).sigmoid())


VGG_LAYERS = [f"features.{i}" for i in (5, 12, 22, 32, 42)]


@pytest.mark.parametrize(
    ("make", "size", "layers", "classifier"),
    [
        ("resnet18", 64, ["layer1", "layer2", "layer3", "layer4"], "fc"),
        ("resnet18", 32, ["layer1", "layer2", "layer3"], "fc"),  # layer4 has one pixel
        ("resnet50", 64, ["layer1", "layer2", "layer3", "layer4"], "fc"),
        ("vgg16_bn", 32, VGG_LAYERS, "classifier.6"),
        ("mobilenet_v3_large", 64, [f"features.{i}" for i in (1, 3, 6, 12, 16)], "classifier.3"),
        (lambda: resnet18(10, width=4), 16, ["layer1", "layer2", "layer3", "layer4"], "fc"),
        (FlatCNN, 16, ["features.2", "features.6", "features.10"], "fc"),
        (Staged, 16, ["stages.0", "stages.1", "stages.2"], "head"),
    ],
)
def test_layers_and_classifier_are_found(make, size, layers, classifier):
    if isinstance(make, str):
        with torch.device("meta"):  # their names and shapes are all that counts here
            network = getattr(import_torchvision().models, make)()
            x = torch.empty(2, 3, size, size)
    else:
        network = make()
        x = torch.empty(2, 3 if size != 16 or make not in (FlatCNN, Staged) else 1, size, size)
    imcl = IMCL(network, x)
    assert imcl.layers == layers
    assert imcl.classifier == classifier
    widths = [head.linear.in_features for head in imcl.heads]
    assert len(widths) == len(layers) - 1 and all(widths)


@pytest.mark.parametrize(
    ("make", "left_out", "others"),
    [
        ("resnet18", [], []),  # 64 kernels of 147 weights in the first
        ("vgg16_bn", [], ["classifier.0", "classifier.3"]),  # 64 of 27
        # Depthwise; and of the 1x1 convolutions those that widen.
        (
            "mobilenet_v2",
            [f"features.{i}.conv.{int(i > 1)}.0" for i in range(1, 18)],
            ["features.1.conv.1", *(f"features.{i}.conv.2" for i in range(2, 18))],
        ),
    ],
)
def test_kernels_that_can_become_unlike_are_found(make, left_out, others):
    with torch.device("meta"):
        network = getattr(import_torchvision().models, make)()
        imcl = IMCL(network, torch.empty(2, 3, 224, 224), **only("kernel_weight"))
    larger = [
        path for path, m in network.named_modules()
        if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1)
    ]  # fmt: skip
    assert set(left_out) <= set(larger)
    taken = {*larger, *others} - {*left_out}
    assert imcl.kernels == [path for path, _ in network.named_modules() if path in taken]


def test_layers_by_path_run_in_the_networks_order(network, batch):
    x, y = batch
    imcl = build(network, x, layers=["features.10", "features.3"], kernels=["features.4", "fc"])
    assert imcl.layers == ["features.3", "features.10"]
    assert [head.linear.in_features for head in imcl.heads] == [6]
    weights = [network.features[4].weight, network.fc.weight]
    expected = functional.kernel_similarity(weights, impl="torch").detach()
    torch.testing.assert_close(imcl(x, y).terms["kernel_similarity"], expected)


def test_modules_may_be_called_with_keyword_arguments(network, batch):
    x, y = batch
    expected = step(build(copy.deepcopy(network), x, dropout=0.0), x, y)

    def forward(x):
        for layer in network.features:
            x = layer(input=x)
        return network.fc(input=x.mean((2, 3)))

    network.forward = forward
    imcl = build(network, x, dropout=0.0)
    assert imcl.classifier == "fc"
    found = step(imcl, x, y)
    assert torch.equal(found[0].loss, expected[0].loss)
    torch.testing.assert_close(found[1], expected[1])


def infer_trunk(network):
    """Have the first two stages run in inference mode."""
    trunk, network.features = network.features[:8], network.features[8:]

    def forward(x):
        with torch.inference_mode():
            x = trunk(x)
        return network.fc(network.features(x.clone()).mean((2, 3)))

    network.trunk, network.forward = trunk, forward


def test_a_trunk_in_inference_mode_can_be_there(network, batch):
    x, y = batch
    infer_trunk(network)
    imcl = build(network, x, layers=["features.10", "features.11"], kernels=["features.8"])
    imcl(x, y).loss.backward()
    assert network.features[0].weight.grad.abs().sum() > 0  # the third stage


def test_outputs_that_the_network_overwrites_are_passed_over(batch):
    class Overwriting(FlatCNN):
        def forward(self, x):
            for layer in self.features:
                x = layer(x)
                if isinstance(layer, nn.BatchNorm2d):
                    x = x.relu_()
            return self.fc(x.mean((2, 3)))

    network = Overwriting()
    for i in (2, 6, 10):
        network.features[i] = nn.Identity()
    x, y = batch
    imcl = build(network, x)
    assert imcl.layers == ["features.0", "features.4", "features.8"]
    imcl(x, y).loss.backward()


# What can be wrong


def with_softmax_gone(network):
    network.fc = nn.Sequential(nn.Linear(10, 10), nn.ReLU())
    return network


def without_linear(network):
    network.fc = nn.Bilinear(10, 1, 10)
    network.forward = lambda x: network.fc(
        network.features(x).mean((2, 3)), torch.ones(len(x), 1)
    )
    return network


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(example_input=[1]), TypeError, "example_input: expected a Tensor, a tuple.*got list"),
        (dict(example_input=torch.ones(3)), ValueError, "example_input: expected a batch"),
        (dict(layers="features.2"), TypeError, "layers: expected a sequence"),
        (dict(layers=["features.99"]), ValueError, "layers: .*'features.99'; did you mean"),
        (dict(layers=["features.2", "features.2"]), ValueError, "layers: expected every module"),
        (dict(layers=["features.2", "fc"]), ValueError, r"layers: .*'fc' returns \(1, 10\)"),
        (dict(layers=["features.1", "features.6"]), ValueError, "layers: .*'features.1'.*in place"),
        (dict(layers=["features.2"]), ValueError, "layers: expected at least 2.*multilayer_weight"),
        (dict(layers=[], multilayer_weight=0), ValueError, "layers: .*representation_weight=0"),
        (dict(classifier="features.0"), ValueError, "classifier: expected an nn.Linear"),
        (dict(classifier="head"), ValueError, "classifier: the network has no module 'head'"),
        (dict(kernels=["features.2"]), ValueError, "kernels: .*'features.2' is ReLU"),
        (dict(kernels=["nowhere"]), ValueError, "kernels: the network has no module"),
        (dict(kernels=["fc.in_features"]), ValueError, "kernels: the network has no module"),
        (dict(kernels=[]), ValueError, "kernels: expected at least one"),
        (dict(output_weight=-1), ValueError, "output_weight: "),
        (dict(multilayer_weight="1"), TypeError, "multilayer_weight: "),
        (dict(representation_weight=float("nan")), ValueError, "representation_weight: "),
        (dict(kernel_weight=float("inf")), ValueError, "kernel_weight: "),
        (dict(views=1), ValueError, "views: "),
        (dict(views=np.float32(2)), ValueError, "views: "),
        (dict(dropout=torch.tensor(0.5)), TypeError, r"dropout: .*\.tolist\(\)"),
        (dict(dropout=1.0), ValueError, "dropout: "),
        (dict(output_temperature=0), ValueError, "output_temperature: "),
        (dict(multilayer_temperature=-2), ValueError, "multilayer_temperature: "),
        (dict(multilayer_teacher="teacher"), ValueError, "multilayer_teacher: .*others"),
        (dict(representation_penalty="cube"), ValueError, "representation_penalty: .*square"),
        (dict(kernel_penalty="cube"), ValueError, "kernel_penalty: .*square"),
        (dict(center=1), TypeError, "center: "),
        (dict(label_smoothing=1), ValueError, "label_smoothing: "),
        (dict(shard_kernels=1), TypeError, "shard_kernels: "),
        (dict(shard_kernels=True), RuntimeError, "shard_kernels: .*init_process_group"),
        (dict(impl="fortran"), ValueError, "impl: .*auto"),
    ],
)
def test_bad_arguments_are_named(network, batch, change, error, message):
    with pytest.raises(error, match=message):
        IMCL(network, change.pop("example_input", batch[0]), **change)
    assert hooks(network) == 0


def test_numbers_may_be_numpys(network, batch):
    x, y = batch
    given = dict(views=np.int64(3), dropout=np.float32(0.5), kernel_weight=np.float16(2),
                 output_temperature=np.int8(2), center=np.False_)  # fmt: skip
    plain = dict(views=3, dropout=0.5, kernel_weight=2.0, output_temperature=2.0, center=False)
    losses = [step(build(network, x, **options), x, y)[0].loss for options in (given, plain)]
    assert torch.equal(*losses)


def test_bad_networks_are_named(network, batch):
    x, _ = batch
    with pytest.raises(TypeError, match="model: expected an nn.Module, got function"):
        IMCL(lambda x: x, x)
    with pytest.raises(ValueError, match="kernels: .*kernel_weight=0"):
        IMCL(network, x, **only("kernel_weight"), kernels=[])


def with_one_class(network):
    return nn.Sequential(network.features, nn.Conv2d(10, 1, 1))


def flat():
    return nn.Sequential(nn.Flatten(), nn.Linear(256, 10))


def of_many_kernels():
    wide = nn.Sequential(nn.Conv2d(1, 20, 1), nn.Conv2d(20, 20, 3, groups=20), nn.Flatten())
    return nn.Sequential(wide, nn.Linear(3920, 10))


@pytest.mark.parametrize(
    ("change", "off", "message"),
    [
        (with_one_class, WEIGHTS[:2], r"model: .*logits of at least 2 .* got \(1, 1, 2, 2\)"),
        (with_softmax_gone, WEIGHTS[:1], "classifier: .*not the output of an nn.Linear"),
        (without_linear, WEIGHTS[:1], "classifier: .*output_weight=0"),
        (lambda n: flat(), WEIGHTS[1:], "layers: .*2, .*1"),
        (lambda n: of_many_kernels(), WEIGHTS[3:], "kernels: .*more can't become unlike"),
    ],
)
def test_a_way_without_anything_to_act_on_is_switched_off_with_one_warning(
    network, batch, change, off, message
):
    x, y = batch
    weights = WAYS_ON if off != WEIGHTS[3:] else only("kernel_weight")
    with pytest.warns(UserWarning, match=message) as told:
        imcl = IMCL(change(network), x, **weights)
    assert len(told) == 1 and told[0].filename == __file__
    assert all(name in str(told[0].message) for name in off)
    assert {name: getattr(imcl, name) for name in WEIGHTS} == {
        **weights, **dict.fromkeys(off, 0.0)
    }  # fmt: skip
    with imcl.watch() as ways:
        imcl.model(x)
    assert ways.loss(y if WEIGHTS[0] not in off else None).isfinite()
    assert set(ways.terms) == {TERMS[name] for name in WEIGHTS if getattr(imcl, name)}
    imcl.output_weight = imcl.kernel_weight = 1.0
    with pytest.raises(RuntimeError, match="weight: this way was switched off"):
        imcl(x, y)


def test_a_network_that_takes_another_course_is_an_error(network, batch):
    x, y = batch
    imcl = build(network, x)
    network.forward = lambda x: network.fc(network.features(network.features[:0](x)).mean((2, 3)))
    imcl(x, y)
    network.forward = lambda x: x.mean((2, 3)).expand(-1, 10)
    told = "model: expected the layers .* got 0 runs for 4 hooks"
    with pytest.raises(RuntimeError, match=told):
        imcl(x, y)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "every second pixel", "one row"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_an_auxiliary_heads_average_and_its_gradient_are_those_of_the_mean(dtype, layout):
    features = torch.randn(2, 3, 4, 5).to(dtype)
    if layout != "contiguous":
        features = features.contiguous(memory_format=torch.channels_last)
    if layout == "every second pixel":
        features = features[..., ::2]
    if layout == "one row":
        features = features[:, :, 0]  # [B, C, W]
    positions = tuple(range(2, features.dim()))
    features.requires_grad_()
    averaged = average(features)
    wide = features.detach().double().requires_grad_()
    mean = wide.mean(positions)
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(averaged.double(), mean, rtol=2 * unit, atol=2 * unit)
    grad = torch.randn(2, 3).to(dtype)
    (got,) = torch.autograd.grad(averaged, features, grad)
    (truth,) = torch.autograd.grad(mean, wide, grad.double())
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), truth, rtol=2 * unit, atol=0)


@pytest.mark.parametrize("channels", [3, 24, 64])
def test_an_average_of_bfloat16_is_cheap(channels):
    """No float32 copy of all features is made for it, and what is added to their gradient lies in
    pieces that fill a vector: a row of pixels, or the channels of one."""
    features = torch.randn(2, channels, 3, 32).to(torch.bfloat16)
    features = features.contiguous(memory_format=torch.channels_last).requires_grad_()
    with torch.profiler.profile(record_shapes=True) as profile:
        averaged = average(features)
    copies = [event for event in profile.events() if event.name == "aten::copy_"]
    assert not [event for event in copies if event.input_shapes[0] == list(features.shape)]
    (gradient,) = torch.autograd.grad(averaged.sum(), features)
    row = channels if channels % 64 else 0
    assert gradient.stride() == (row * 32 or channels, 1, 0, row)


def made_to_change(**options):
    torch.manual_seed(0)
    x, y = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 3])
    return IMCL(resnet18(5, width=4), x, **{**WAYS_ON, **options}), x, y


CHANGES = {
    "output_weight": 0.3,
    "multilayer_weight": 0.7,
    "views": 3,
    "output_temperature": 3.0,
    "multilayer_temperature": 5.0,
    "multilayer_teacher": "final",
    "label_smoothing": 0.2,
    "ignore_index": 1,
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_setting_may_be_changed_between_steps(name):
    imcl, x, y = made_to_change()
    torch.manual_seed(1)
    before = imcl(x, y).loss
    setattr(imcl, name, CHANGES[name])
    torch.manual_seed(1)
    after = imcl(x, y).loss
    other, _, _ = made_to_change(**{name: CHANGES[name]})
    torch.manual_seed(1)
    torch.testing.assert_close(after, other(x, y).loss)
    assert after != before


def test_labels_are_smoothed_in_eval_mode_too():
    imcl, x, y = made_to_change(label_smoothing=0.2)
    imcl.eval()
    torch.testing.assert_close(
        imcl(x, labels=y).loss, F.cross_entropy(imcl(x), y, label_smoothing=0.2)
    )


def test_terms_keep_no_graph():
    imcl, x, y = made_to_change(criterion=lambda output, target: F.cross_entropy(output, target))
    out = imcl(x, y)
    assert out.loss.requires_grad and not any(term.requires_grad for term in out.terms.values())


def test_all_layers_but_the_last_have_a_head():
    imcl = IMCL(resnet18(5, width=4), torch.randn(2, 3, 32, 32))
    assert len(imcl.heads) == len(imcl.layers) - 1 and sorted(imcl._head_of) == list(
        range(len(imcl.layers) - 1)
    )


class Dropping(nn.Module):
    """Residual blocks of which each is left out at random, as layerdrop does."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(6, 16)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(4))
        self.fc = nn.Linear(16, 5)
        self.without = ()

    def forward(self, x):
        h = self.embed(x)
        for i, block in enumerate(self.blocks):
            if i not in self.without:
                h = h + block(h)
        return self.fc(h.mean(1))


LEFT_OUT = [(), (1,), (3,), (0, 3), (0, 1, 2), (0, 1, 2, 3)]


def dropping(**options):
    torch.manual_seed(0)
    paths = [f"blocks.{i}" for i in range(4)]
    x, y = torch.randn(8, 7, 6), torch.randint(0, 5, (8,))
    return build(Dropping(), x, layers=paths, **{**WAYS_ON, **options}), x, y


@pytest.mark.filterwarnings("ignore:IMCL. in this call the network left out")
@pytest.mark.parametrize("without", LEFT_OUT)
def test_a_layer_that_a_call_leaves_out_is_left_out_of_its_ways(without):
    imcl, x, y = dropping()
    imcl.model.without = without
    torch.manual_seed(1)
    out = imcl(x, y)
    out.loss.backward()

    there = [i for i in range(4) if i not in without]
    features = {}
    for i in there:
        imcl.model.blocks[i].register_forward_hook(
            lambda module, args, output, i=i: features.__setitem__(i, output.movedim(-1, 1))
        )
    torch.manual_seed(1)
    logits = imcl.model(x)
    heads = [imcl.heads[i](features[i]) for i in there if i < 3]
    expected = out.terms["cross_entropy"] + WAYS_ON["output_weight"] * out.terms[
        "output_consistency"
    ] + WAYS_ON["kernel_weight"] * out.terms["kernel_similarity"]  # fmt: skip
    if heads:
        ce, n = 1 / len(heads), len(heads)
        _, terms = functional.collaborative_consistency(
            [*heads, logits], y, ce_weight=[ce] * n + [0], kl_weight=1 / (n + 1),
            return_terms=True, impl="reference",
        )  # fmt: skip
        multilayer = terms["cross_entropy"][:-1].mean() + terms["kl"].mean()
        torch.testing.assert_close(out.terms["multilayer_consistency"], multilayer)
        expected = expected + WAYS_ON["multilayer_weight"] * multilayer
    else:
        assert "multilayer_consistency" not in out.terms
    if there:
        similarity = functional.representation_similarity(
            [features[i] for i in there], center=True, impl="reference"
        )
        torch.testing.assert_close(out.terms["representation_similarity"], similarity.detach())
        expected = expected + WAYS_ON["representation_weight"] * similarity.detach()
    else:
        assert "representation_similarity" not in out.terms
    torch.testing.assert_close(out.loss.detach(), expected.detach())
    learnt = [any(p.grad.any() for p in head.parameters() if p.grad is not None)
              for head in imcl.heads]  # fmt: skip
    assert learnt == [i in there for i in range(3)]


def test_layers_that_are_left_out_are_told_of_once():
    imcl, x, y = dropping()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        imcl(x, y)
        imcl.model.without = (1, 2)
        with pytest.raises(UserWarning, match=r"left out \['blocks.1', 'blocks.2'\], as layerdrop"):
            imcl(x, y)
        imcl.model.without = (0,)
        imcl(x, y)
    imcl.remove_hooks()
    with pytest.raises(RuntimeError, match="0 after remove_hooks"):
        imcl(x, y)


@pytest.mark.filterwarnings("ignore:IMCL. in this call the network left out")
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_a_network_that_never_runs_its_layers_has_taken_another_course(weight):
    """At random it could have left out all of them, but not time and again."""
    imcl, x, y = dropping(representation_weight=weight)
    for without in ((0, 1, 2, 3), (0, 1, 2)):
        imcl.model.without = (0, 1, 2, 3)
        for _ in range(NO_CHANCE - 1):
            imcl(x, y)
        imcl.model.without = without[:2]
        imcl(x, y)
    imcl.model.without = (0, 1, 2, 3)
    for _ in range(NO_CHANCE - 1):
        imcl(x, y)
    with pytest.raises(RuntimeError, match="got 1 runs for"):
        imcl(x, y)


@pytest.mark.parametrize("without", [(1,), (0, 1, 2, 3)])
def test_a_compiled_call_may_leave_out_layers(without):
    imcl, x, y = dropping(impl="torch", output_weight=0.0, kernel_weight=0.0)
    imcl.model.without = without
    torch.compiler.reset()
    compiled = torch.compile(imcl, fullgraph=True, backend="aot_eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(compiled(x, y).loss, imcl(x, y).loss)


def test_a_layer_that_runs_twice_has_not_left_another_out():
    imcl, x, y = dropping()
    imcl.model.blocks = nn.ModuleList([*imcl.model.blocks[:3], imcl.model.blocks[0]])
    with pytest.raises(RuntimeError, match="got 4 runs for 5 hooks|got 5 runs for 5 hooks"):
        imcl(x, y)


# Copies, and what has become of the network's modules


@pytest.mark.parametrize("how", ["deepcopy", "average", "save"])
def test_a_copy_of_a_compiled_imcl_is_none_of_the_original(batch, how):
    x, y = batch
    imcl = build(FlatCNN(), x)
    imcl.compile(backend="eager")
    expected = imcl.eval()(x)
    if how == "deepcopy":
        twin = copy.deepcopy(imcl)
    elif how == "average":
        twin = AveragedModel(imcl).module
    else:
        file = io.BytesIO()
        torch.save(imcl, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    torch.testing.assert_close(twin.eval()(x), expected)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert not twin(x).any() and imcl(x).any()
    twin.train()(x, y).loss.backward()
    assert all(p.grad is None for p in imcl.parameters())
    assert any(p.grad is not None for p in twin.parameters())


def test_an_imcl_can_be_copied_whatever_has_become_of_its_modules(batch):
    x, y = batch
    network = FlatCNN()
    parametrizations.weight_norm(network.features[4])
    imcl = build(network, x)
    imcl(x, y)
    parametrize.remove_parametrizations(network.features[4], "weight")
    twin = copy.deepcopy(imcl)
    torch.manual_seed(0)
    expected = imcl(x, y).loss
    torch.manual_seed(0)
    torch.testing.assert_close(twin(x, y).loss, expected)
    imcl = build(FlatCNN(), x)
    imcl.model.fc = nn.Linear(10, 10)
    file = io.BytesIO()
    torch.save(imcl, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    torch.testing.assert_close(loaded.eval()(x), imcl.eval()(x))
    for each in (imcl, loaded):  # the new classifier has no hook
        with pytest.raises(RuntimeError, match="got 3 runs for 4 hooks"):
            each.train()(x, y)


@pytest.mark.parametrize("grad", ["autograd", "functorch"])
def test_weights_of_a_functional_call_are_not_kept(batch, grad):
    x, y = batch
    imcl = build(FlatCNN(norm=nn.Identity), x, impl="auto")
    weights = {name: p.detach() for name, p in imcl.named_parameters()}
    if grad == "functorch":
        torch.func.grad(lambda w: torch.func.functional_call(imcl, w, (x, y)).loss)(weights)
    else:
        fast = {name: p * 1 for name, p in imcl.named_parameters()}
        torch.func.functional_call(imcl, fast, (x, y)).loss.backward()
    imcl(x, y).loss.backward()
    torch.save(copy.deepcopy(imcl), io.BytesIO())


def test_a_copy_in_the_middle_of_a_step_has_none_under_way(batch):
    x, y = batch
    imcl, file = build(FlatCNN(norm=nn.Identity), x, impl="auto"), io.BytesIO()
    with imcl.watch() as ways:
        imcl.model(x)
        copied, alone = copy.deepcopy(imcl), copy.deepcopy(imcl.model)
        torch.save(imcl, file)
    file.seek(0)
    for each in (copied, torch.load(file, weights_only=False), imcl):
        each(x, y).loss.backward()
    torch.testing.assert_close(alone(x), imcl.model(x))
    ways.loss(y).backward()


def test_a_functional_call_is_watched_with_its_own_weights(batch):
    """Also by way 4, whose weights are compared before the network runs."""
    x, _ = batch
    imcl = build(FlatCNN(norm=nn.Identity), x, impl="auto")
    fast = {
        name: (p + 0.1 * torch.randn_like(p)).detach().requires_grad_()
        for name, p in imcl.model.named_parameters()
    }
    with imcl.watch() as ways:
        torch.func.functional_call(imcl.model, fast, (x,))
    ways.loss().backward()
    kernels = [fast[f"{path}.weight"] for path in imcl.kernels]
    expected = functional.kernel_similarity(kernels, impl="reference")
    torch.testing.assert_close(ways.terms["kernel_similarity"], expected.detach())
    assert all(p.grad is None for p in imcl.model.parameters())
    assert all(kernel.grad is not None for kernel in kernels)


@pytest.mark.parametrize("where", ["checkpointed", "no_grad", "watch"])
def test_layers_under_an_autocast_of_the_networks_own(batch, where):
    """Whose features wait for the end of the network, when it is over."""

    class Own(FlatCNN):
        waits = False

        def forward(self, x):
            own = nullcontext() if where == "watch" else torch.autocast("cpu", torch.bfloat16)
            with own, torch.set_grad_enabled(not (self.waits and where == "no_grad")):
                if self.waits and where != "no_grad":
                    h = checkpoint(self.features, x, use_reentrant=False)
                else:
                    h = self.features(x)
            return self.fc(h.float().mean((2, 3)))

    x, y = batch
    torch.manual_seed(0)
    imcl = build(Own(norm=nn.Identity, inplace=False), x, dropout=0.0)
    found = []
    for imcl.model.waits in (False, True):
        if where == "watch":
            with imcl.watch() as ways, torch.autocast("cpu", torch.bfloat16):
                imcl.model(x)
            ways.loss(y).backward()
            found.append(ways.terms)
        else:
            out = imcl(x, y)
            out.loss.backward()
            found.append(out.terms)
    assert len(found[0]) >= 3
    torch.testing.assert_close(found[1], found[0])


def test_a_trunk_in_inference_mode(batch):
    """Whose features autograd may not keep; the heads learn all the same."""

    class Frozen(FlatCNN):
        def __init__(self):
            super().__init__(inplace=False)
            self.fc = nn.Conv2d(10, 10, 1)

        def forward(self, x):
            with torch.inference_mode():
                h = self.features(x)
            return self.fc(h.clone())

    x, _ = batch
    imcl = build(Frozen(), x, class_dim=1)
    imcl(x, torch.zeros(len(x), *imcl.model(x).shape[2:], dtype=torch.int64)).loss.backward()
    assert all(p.grad.any() for p in imcl.heads.parameters())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_network_with_idle_hooks_can_be_quantized(batch):
    x, _ = batch
    imcl = build(FlatCNN(), x)
    imcl.eval()
    quantized = torch.ao.quantization.quantize_dynamic(imcl.model, {nn.Linear})
    assert not isinstance(quantized.fc, nn.Linear)
    torch.testing.assert_close(quantized(x), imcl(x), rtol=0.1, atol=0.1)


def test_the_classifier_may_be_called_by_any_name(batch):
    class Named(nn.Linear):
        def forward(self, features):
            return super().forward(features)

    class ByName(FlatCNN):
        def forward(self, x):
            return self.fc(features=self.features(x).mean((2, 3)))

    x, y = batch
    network = ByName()
    network.fc = Named(10, 10)
    imcl = build(network, x, dropout=0.0)
    terms = imcl(x, y).terms
    torch.testing.assert_close(terms["output_consistency"], terms["cross_entropy"])


def test_terms_are_those_of_the_ways_that_are_on_in_the_call():
    imcl, x, y = made_to_change()
    for name, term in TERMS.items():
        weight = getattr(imcl, name)
        assert term in imcl(x, y).terms
        setattr(imcl, name, 0.0)
        assert term not in imcl(x, y).terms
        setattr(imcl, name, weight)


def test_probabilities_where_the_last_layers_alone_are_float64(network, batch):
    x, y = batch
    y = F.one_hot(y, 10).double() * (1 - 1e-9) + 1e-10
    network.fc.double()
    network.forward = lambda x: network.fc(network.features(x).mean((2, 3)).double())
    out = build(network, x, dropout=0.0)(x, y)
    assert out.loss.dtype == torch.float64
    torch.testing.assert_close(
        out.terms["cross_entropy"], F.cross_entropy(out.logits, y), rtol=1e-13, atol=0
    )


def test_the_activation_may_be_changed_between_steps():
    imcl, x, y = made_to_change()
    y = F.one_hot(y, 5).to(x)
    before = imcl(x, y).terms["cross_entropy"]
    imcl.activation = "sigmoid"
    out = imcl(x, y)
    expected = 5 * F.binary_cross_entropy_with_logits(out.logits, y)
    torch.testing.assert_close(out.terms["cross_entropy"], expected)
    assert before != expected


def test_no_hook_stays_on_a_weight_that_is_made_anew(network, batch):
    parametrizations.weight_norm(network.features[4])
    imcl = build(network, batch[0])
    made = network.features[4].parametrizations.weight
    assert made._forward_hooks
    imcl.remove_hooks()
    assert not made._forward_hooks


@pytest.mark.parametrize("training", [True, False])
def test_a_criterion_is_a_scalar_in_eval_mode_too(training):
    def each(output, target):
        return F.cross_entropy(output, target, reduction="none")

    imcl, x, y = made_to_change(criterion=each)
    imcl.train(training)
    with pytest.raises(ValueError, match="^criterion: expected it to return a scalar"):
        imcl(x, labels=y)


def test_layers_of_a_trunk_in_inference_mode_contribute_their_value(network, batch):
    infer_trunk(network)
    imcl = build(network, batch[0], layers=["trunk.6", "features.11"], multilayer_weight=0,
                 kernel_weight=0)
    assert imcl(*batch).terms["representation_similarity"] > 0
