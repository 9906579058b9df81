"""Any loss: ``criterion=``, and ``with imcl.watch()`` around a forward pass of the user's own."""

import copy

import pytest
import torch
import torch.nn.functional as F
from test_imcl import TERMS, WAYS_ON, WEIGHTS, FlatCNN, build, only, step
from torch import nn

from imcl_fast import IMCL

X = torch.rand(6, 1, 16, 16, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 3, 4, 5])
SIMILAR = dict(output_weight=0.0, multilayer_weight=0.0, representation_weight=10.0,
               kernel_weight=50.0)  # fmt: skip


@pytest.fixture
def network():
    torch.manual_seed(0)
    return FlatCNN()


def gradients(imcl):
    return {name: p.grad.clone() for name, p in imcl.named_parameters()}


def watched(imcl, x, y, task, seed=3):
    imcl.zero_grad()
    torch.manual_seed(seed)
    with imcl.watch() as ways:
        output = imcl.model(x)
    loss = task(output) + ways.loss(y)
    loss.backward()
    return ways, loss, gradients(imcl)


@pytest.mark.parametrize("weight", [*WEIGHTS, "all"])
def test_a_watched_step_is_the_step(network, weight):
    imcl = build(network, X, **({} if weight == "all" else only(weight)))
    expected, truth = step(imcl, X, Y)
    ways, loss, found = watched(imcl, X, Y, lambda logits: F.cross_entropy(logits, Y))
    torch.testing.assert_close(loss, expected.loss)
    torch.testing.assert_close(found, truth)
    terms = dict(expected.terms)
    del terms["cross_entropy"]  # the user's own
    assert list(ways.terms) == list(terms)
    torch.testing.assert_close(ways.terms, terms)
    assert not any(term.requires_grad for term in ways.terms.values())


def test_without_a_target_the_cross_entropies_are_left_out(network):
    imcl = build(network, X, dropout=0.0)
    imcl.model(X).sum().backward()  # only so that every parameter has a gradient
    ways, loss, found = watched(imcl, X, None, lambda logits: 0.0 * logits.sum())
    expected = sum(WAYS_ON[name] * ways.terms[TERMS[name]] for name in WEIGHTS)
    torch.testing.assert_close(loss.detach(), expected)
    ways, with_target, _ = watched(imcl, X, Y, lambda logits: 0.0 * logits.sum())
    assert with_target > loss
    assert all(found[name].abs().sum() > 0 for name in found if name.startswith("heads"))


def test_no_way_adds_nothing(network):
    imcl = build(network, X, **only(None))
    ways, loss, found = watched(imcl, X, Y, lambda logits: F.cross_entropy(logits, Y))
    assert ways.terms == {} and ways.loss() == 0
    torch.testing.assert_close(loss, F.cross_entropy(network(X), Y))


def test_a_loss_of_ways_that_rest_can_be_called_backward_on(network):
    """Ways 3 and 4 alone, of which a call may compute neither."""
    weights = {**only("representation_weight"), "kernel_weight": 1.0}
    imcl = build(network, X, **weights, representation_interval=2, kernel_interval=4)
    seen = set()
    for _ in range(4):
        with imcl.watch() as ways:
            network(X)
        ways.loss(Y).backward()
        seen.add(tuple(ways.terms))
    assert () in seen and len(seen) > 1


def test_the_model_under_its_wrappers_is_watched_too(network):
    imcl = build(network, X)
    _, expected, _ = watched(imcl, X, Y, lambda logits: F.cross_entropy(logits, Y))
    for call in (imcl, network.forward.__self__):
        torch.manual_seed(3)
        with imcl.watch() as ways:
            logits = call(X)
        torch.testing.assert_close(F.cross_entropy(logits, Y) + ways.loss(Y), expected)


def test_a_schedule_goes_on_with_every_watched_loss(network):
    imcl = build(network, X, representation_interval=2, kernel_interval=2)
    seen = []
    for _ in range(4):
        with imcl.watch() as ways:
            imcl.model(X)
        first = ways.loss(Y)
        assert torch.equal(ways.loss(Y), first)  # asked for again it is the same step
        seen.append("".join(key[0] for key in ways.terms if key.endswith("similarity")))
        with imcl.watch():
            imcl.model(X)  # a block without a loss doesn't count
    assert seen == ["r", "k", "r", "k"]


def test_what_goes_wrong_in_a_block_is_said(network):
    imcl = build(network, X)
    calls = [lambda: None, lambda: [imcl.model(X), imcl.model(X)], lambda: network.features(X)]
    for call, count in zip(calls, (0, 2, 0), strict=True):
        with (
            pytest.raises(RuntimeError, match=f"watch: expected one forward pass .* got {count};"),
            imcl.watch(),
        ):
            call()
    with pytest.raises(ZeroDivisionError), imcl.watch() as ways:
        raise ZeroDivisionError
    with pytest.raises(RuntimeError, match="watch: expected loss.. after the block"):
        ways.loss(Y)
    with imcl.watch() as ways:
        imcl.model(X)
        with pytest.raises(RuntimeError, match="watch: expected loss.. after the block"):
            ways.loss(Y)
    with pytest.raises(RuntimeError, match="watch: expected terms to be read after loss"):
        _ = ways.terms
    with pytest.raises(ValueError, match="target: "):
        ways.loss(Y[:-1])
    with pytest.raises(RuntimeError, match="watch: each block needs a watch of its own"), ways:
        pass
    with imcl.watch() as ways:
        for wrong in (lambda: imcl(X, Y), lambda: imcl.watch().__enter__()):
            with pytest.raises(RuntimeError, match="IMCL: a step is under way; within a watch"):
                wrong()
        imcl.model(X)
    expected = ways.loss(None)
    assert expected.isfinite() and imcl(X, Y).loss.isfinite()
    assert sum(len(m._forward_hooks) for m in network.modules()) == 5
    assert sum(len(m._forward_pre_hooks) for m in network.modules()) == 1
    imcl.remove_hooks()
    assert sum(len(m._forward_hooks) for m in network.modules()) == 0
    assert sum(len(m._forward_pre_hooks) for m in network.modules()) == 0
    with pytest.raises(RuntimeError, match="remove_hooks"), imcl.watch():
        imcl.model(X)


@pytest.mark.parametrize("compiled", ["whole", "in place"])
def test_a_compiled_model_is_watched(network, compiled):
    imcl = build(copy.deepcopy(network), X, dropout=0.0)
    _, expected, truth = watched(imcl, X, Y, lambda logits: F.cross_entropy(logits, Y))
    torch._dynamo.reset()
    imcl = build(network, X, dropout=0.0)
    model = network
    if compiled == "whole":
        model = torch.compile(network, backend="aot_eager")
    else:
        network.compile(backend="aot_eager")
    for _ in range(2):
        imcl.zero_grad()
        with imcl.watch() as ways:
            logits = model(X)
        loss = F.cross_entropy(logits, Y) + ways.loss(Y)
        loss.backward()
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(gradients(imcl), truth)


# A criterion


def test_a_network_compiled_whole_is_trained(network):
    """The step is made outside of what is traced."""
    imcl = build(network, X, dropout=0.0, impl="torch")
    plain = build(copy.deepcopy(network), X, dropout=0.0, impl="torch")
    plain.load_state_dict(imcl.state_dict())
    torch._dynamo.reset()
    imcl.model.compile(fullgraph=True, backend="eager")
    for each in (imcl, plain):
        each.zero_grad()
        each(X, Y).loss.backward()
    for name, gradient in gradients(plain).items():
        torch.testing.assert_close(gradients(imcl)[name], gradient)


def test_a_criterion_takes_the_place_of_the_cross_entropy(network):
    def smoothed(output, target):
        return F.cross_entropy(output, target, label_smoothing=0.3)

    imcl = build(network, X, criterion=smoothed)
    out, found = step(imcl, X, Y)
    _, loss, expected = watched(imcl, X, Y, lambda logits: smoothed(logits, Y))
    torch.testing.assert_close(out.loss, loss)
    torch.testing.assert_close(found, expected)
    assert list(out.terms) == ["criterion", *TERMS.values()]
    torch.testing.assert_close(out.terms["criterion"], smoothed(out.logits, Y).detach())
    evaluated = imcl.eval()(X, labels=Y)
    torch.testing.assert_close(evaluated.loss, smoothed(imcl(X), Y))
    assert list(evaluated.terms) == ["criterion"]


def test_a_criterion_must_return_a_scalar(network):
    imcl = build(network, X, criterion=lambda output, target: F.cross_entropy(
        output, target, reduction="none"
    ))  # fmt: skip
    with pytest.raises(ValueError, match=r"criterion: .*scalar, got shape \(6,\).*mean"):
        imcl(X, Y)
    imcl.criterion = lambda output, target: 0.0
    with pytest.raises(TypeError, match="criterion: .*Tensor, got float"):
        imcl(X, Y)


class Autoencoder(nn.Module):
    """Generative: no logits anywhere, and a dict of outputs."""

    def __init__(self):
        super().__init__()
        self.down = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.ReLU()) for a, b in ((1, 8), (8, 12))
        )
        self.up = nn.Sequential(
            nn.ConvTranspose2d(12, 8, 2, 2), nn.ReLU(), nn.ConvTranspose2d(8, 1, 2, 2)
        )

    def forward(self, x):
        code = x
        for block in self.down:
            code = block(code)
        return {"image": self.up(code), "code": code}


class Detector(nn.Module):
    """Takes a list of images and their boxes, and returns its own losses, as torchvision's do."""

    def __init__(self):
        super().__init__()
        self.backbone = FlatCNN().features
        self.box = nn.Conv2d(10, 4, 1)
        self.score = nn.Conv2d(10, 2, 1)

    def forward(self, images, targets=None):
        features = self.backbone(torch.stack(images))
        boxes, scores = self.box(features), self.score(features)
        if targets is None:
            return [{"boxes": b, "scores": s} for b, s in zip(boxes, scores, strict=True)]
        box = sum(F.l1_loss(b.mean((1, 2)), t) for b, t in zip(boxes, targets, strict=True))
        return {"loss_box": box, "loss_score": scores.square().mean()}


def regressor():
    network = FlatCNN()
    network.fc = nn.Linear(10, 1)
    return network


def contrastive(embeddings):
    z = F.normalize(embeddings, dim=1)
    half = len(z) // 2
    return F.cross_entropy(z[:half] @ z[half:].T / 0.1, torch.arange(half))


TASKS = {
    "generative": (
        Autoencoder, X, lambda out, x: F.mse_loss(out["image"], x), X, ["down.0", "down.1"]
    ),
    "regression": (regressor, X, lambda out, y: F.mse_loss(out[:, 0], y), Y.float(), None),
    "multi-label": (
        FlatCNN, X, F.binary_cross_entropy_with_logits, torch.eye(10)[:6], None
    ),
    "contrastive": (FlatCNN, X, lambda out, _: contrastive(out), Y, None),
    "detection": (Detector, (list(X),), lambda out, _: sum(out.values()), None, None),
}  # fmt: skip


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("how", ["criterion", "watch"])
def test_ways_3_and_4_need_no_logits(task, how):
    make, example, criterion, target, layers = TASKS[task]
    torch.manual_seed(0)
    model = make()
    imcl = IMCL(model, example, **SIMILAR, criterion=criterion if how == "criterion" else None)
    assert imcl.layers == layers or layers is None
    given = (example, target) if task != "detection" else ((list(X), torch.rand(6, 4)), Y)
    if how == "criterion":
        out = imcl(*given)
        loss, terms = out.loss, {k: v for k, v in out.terms.items() if k != "criterion"}
        own = out.terms["criterion"]
    else:
        with imcl.watch() as ways:
            output = imcl(given[0])
        own = criterion(output, target)
        loss, terms = own + ways.loss(), ways.terms
    assert set(terms) == {"representation_similarity", "kernel_similarity"}
    ours = 10 * terms["representation_similarity"] + 50 * terms["kernel_similarity"]
    torch.testing.assert_close(loss.detach(), own.detach() + ours)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("task", ["generative", "regression", "detection"])
def test_an_output_that_is_no_logits_leaves_ways_3_and_4(task):
    make, example, criterion, _, _ = TASKS[task]
    with pytest.warns(UserWarning, match="output_weight and multilayer_weight .logits|model: "):
        imcl = IMCL(make(), example, criterion=criterion)
    assert (imcl.output_weight, imcl.multilayer_weight) == (0, 0)
    assert imcl.representation_weight and imcl.kernel_weight and not len(imcl.heads)


def test_a_block_that_ended_in_an_error_has_no_loss():
    network = FlatCNN()
    imcl = IMCL(network, torch.rand(2, 1, 16, 16))
    ways = imcl.watch()
    network.forward = lambda x: x.flatten(1)[:, :10] + network.fc.bias
    with pytest.raises(RuntimeError, match="^model: expected the layers"), ways:
        network(torch.rand(2, 1, 16, 16))
    with pytest.raises(RuntimeError, match="^watch: expected loss.. after the block"):
        ways.loss(torch.zeros(2, dtype=torch.int64))
