"""Quality-agnostic training against its objective and its perturbation written out."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as torch_F
from conftest import assert_same_bits
from process_group import in_group
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree

import imcl_fast
from imcl_fast import IMCL, Perturbation, QualityAgnostic
from imcl_fast import perturbation as perturbation_module
from imcl_fast.quality_agnostic import QualityAgnosticOutput

BATCH, CLASSES = 6, 5


class Network(nn.Module):
    """Three stages of a convolution, batch normalisation among them, and a linear layer."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh())
        self.two = nn.Sequential(nn.Conv2d(4, 5, 3, 2, padding=1), nn.BatchNorm2d(5), nn.Tanh())
        self.three = nn.Sequential(nn.Conv2d(5, 6, 3, 2, padding=1), nn.Tanh())
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        features = self.three(self.two(self.one(x)))
        return self.classifier(self.dropout(features.mean((2, 3))))

    def stages(self, x: Tensor) -> list[Tensor]:
        first = self.one(x)
        second = self.two(first)
        return [first, second, self.three(second)]


def data(views: int, batch: int = BATCH, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, batch, 2, 8, 8, generator=generator, dtype=torch.float64)
    noise = torch.randn(views, batch, 2, 8, 8, generator=generator, dtype=torch.float64)
    return x + 0.5 * noise, torch.randint(0, CLASSES, (batch,), generator=generator)


def hsic(x: Tensor, y: Tensor, sigma: float) -> Tensor:
    """The unbiased estimate, sample by sample."""
    n = len(x)

    def kernel(z: Tensor) -> Tensor:
        z = z.flatten(1)
        rows = [
            torch.stack([
                torch.zeros((), dtype=z.dtype) if i == j
                else torch.exp(-(z[i] - z[j]).square().mean() / (2 * sigma**2))
                for j in range(n)
            ])
            for i in range(n)
        ]  # fmt: skip
        return torch.stack(rows)

    k, m = kernel(x), kernel(y)
    total = (k @ m).trace() + k.sum() * m.sum() / ((n - 1) * (n - 2))
    return (total - 2 / (n - 2) * (k @ m).sum()) / (n * (n - 3))


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.parametrize("normalize", [True, False])
def test_the_loss_is_the_objective_written_out(reduction: str, views: int, normalize: bool) -> None:
    network = Network().double()
    twin = copy.deepcopy(network)
    x, y = data(views)
    qa = QualityAgnostic(
        network, x[0], alpha=0.7, reduction=reduction, bandwidth=0.9, normalize=normalize,
        label_smoothing=0.1,
    )  # fmt: skip
    assert qa.layers == ["one", "two", "three"] and qa.dependence.layer_weight == [0.1, 0.25, 0.5]
    output = qa(x if normalize else list(x), y)
    output.loss.backward()

    stages = [features.chunk(views) for features in twin.stages(torch.cat(list(x)))]
    logits = [twin.classifier(each.mean((2, 3))) for each in stages[-1]]
    tasks = [torch_F.cross_entropy(each, y, label_smoothing=0.1) for each in logits]
    pairs = list(itertools.combinations(range(views), 2))

    def alike_at(f: tuple[Tensor, ...], v: int, u: int) -> Tensor:
        own = [hsic(f[i], f[i], 0.9) for i in (v, u)]
        return hsic(f[v], f[u], 0.9) / ((own[0] * own[1]).sqrt() if normalize else 1)

    alike = [
        sum(w * alike_at(f, v, u) for w, f in zip((0.1, 0.25, 0.5), stages, strict=True))
        for v, u in pairs
    ]
    scale = (1, 1) if reduction == "sum" else (1 / views, 1 / len(pairs))
    task, dependence = sum(tasks) * scale[0], sum(alike) * scale[1]
    (task - 0.7 * dependence).backward()

    torch.testing.assert_close(output.loss, task - 0.7 * dependence, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(output.terms["cross_entropy"], task.detach())
    torch.testing.assert_close(output.terms["dependence"], dependence.detach())
    assert output.terms.keys() == {"cross_entropy", "dependence"}
    assert output.logits.shape == (views, BATCH, CLASSES)
    torch.testing.assert_close(output.logits, torch.stack(logits))
    for ours, theirs in zip(network.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-8, atol=1e-10)
    # All views together are one batch to batch normalisation.
    assert_same_bits(network.one[1].running_mean, twin.one[1].running_mean)


def test_weights_go_with_layers_in_the_order_they_are_named() -> None:
    x, y = data(2)
    orders = [(["one", "three"], [0.2, 3.0]), (["three", "one"], [3.0, 0.2])]
    losses = [
        QualityAgnostic(Network().double(), x[0], layers, 1.0, weights)(x, y).loss
        for layers, weights in orders
    ]
    torch.testing.assert_close(*losses)


def test_probabilities_are_a_target_as_class_indices_are() -> None:
    x, y = data(2)
    of_indices = QualityAgnostic(Network().double(), x[0])(x, y)
    one_hot = torch_F.one_hot(y, CLASSES).double()
    of_shares = QualityAgnostic(Network().double(), x[0])(x, one_hot)
    torch.testing.assert_close(of_indices.loss, of_shares.loss)


def test_a_single_batch_is_the_networks_own_output() -> None:
    network = Network().double().eval()
    x, _ = data(2)
    qa = QualityAgnostic(network, x[0])
    assert_same_bits(qa(x[0]), network(x[0]))
    assert qa.model is network
    assert qa.remove_hooks() is network
    assert not any(module._forward_hooks for module in network.modules())


def test_in_eval_mode_the_loss_is_the_cross_entropy_also_of_one_batch() -> None:
    x, y = data(2)
    network = Network().double()
    ways = IMCL(network, x[0])
    qa = QualityAgnostic(network, x[0], ways=ways).eval()
    logits = network(x[0])
    one = qa(x[0], y)
    assert one.terms.keys() == {"cross_entropy"}
    torch.testing.assert_close(one.loss, torch_F.cross_entropy(logits, y))
    torch.testing.assert_close(one.logits, logits[None])
    both = qa(x, y)
    torch.testing.assert_close(both.loss, one.loss + torch_F.cross_entropy(network(x[1]), y))


def test_without_alpha_nothing_is_hooked_and_one_view_is_enough() -> None:
    x, y = data(1)
    network = Network().double()
    qa = QualityAgnostic(network, x[0], alpha=0)
    assert not any(module._forward_hooks for module in network.modules())
    output = qa(x, y)
    torch.testing.assert_close(output.loss, torch_F.cross_entropy(network(x[0]), y))
    assert output.terms.keys() == {"cross_entropy"}


def test_the_ways_are_added_over_the_views_in_one_batch() -> None:
    x, y = data(3)
    network = Network().double()
    twin = copy.deepcopy(network)
    intervals = {"representation_interval": 1, "kernel_interval": 1, "dropout": 0.0}
    torch.manual_seed(2)
    ways = IMCL(network, x[0], **intervals)
    torch.manual_seed(2)
    own = IMCL(twin, x[0], **intervals)
    output = QualityAgnostic(network, x[0], ways=ways)(x, y)
    output.loss.backward()
    plain = QualityAgnostic(copy.deepcopy(twin), x[0])(x, y)
    with own.watch() as watch:
        twin(torch.cat(list(x)))
    added = watch.loss(y.repeat(3))
    torch.testing.assert_close(output.loss, plain.loss + added)
    assert output.terms.keys() == plain.terms.keys() | watch.terms.keys()
    assert all(head.linear.weight.grad is not None for head in ways.heads)


def test_the_output_is_a_tuple_of_two_and_a_tree() -> None:
    x, y = data(2)
    output = QualityAgnostic(Network().double(), x[0])(x, y)
    loss, logits = output[:]
    assert loss is output.loss and logits is output.logits
    again = pytree.tree_map(lambda leaf: leaf, output)
    assert isinstance(again, QualityAgnosticOutput)
    assert again.loss is output.loss and again.terms == output.terms


def test_a_copy_has_hooks_of_its_own() -> None:
    x, y = data(2)
    qa = QualityAgnostic(Network().double(), x[0])
    twin = copy.deepcopy(qa)
    assert_same_bits([twin(x, y).loss], [qa(x, y).loss])


@pytest.mark.parametrize("with_ways", [pytest.param(False, marks=pytest.mark.slow), True])
def test_it_trains_under_compile(with_ways: bool) -> None:
    x, y = data(2)
    network = Network().double()
    ways = IMCL(network, x[0], dropout=0.0) if with_ways else None
    qa = QualityAgnostic(network, x[0], alpha=0.5, ways=ways)
    compiled = torch.compile(copy.deepcopy(qa), backend="aot_eager", fullgraph=True)
    expected, output = qa(x, y), compiled(x, y)
    torch.testing.assert_close(output.loss, expected.loss)
    expected.loss.backward()
    output.loss.backward()
    for ours, theirs in zip(compiled.parameters(), qa.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"alpha": -1}, "alpha: "),
        ({"layers": ["four"]}, "layers: "),
        ({"layers": []}, "layers: "),
        ({"layer_weight": [1.0]}, "layer_weight: "),
        ({"reduction": "none"}, "reduction: "),
        ({"kernel": "cosine"}, "kernel: "),
        ({"bandwidth": 0}, "bandwidth: "),
        ({"bandwidth": "mean"}, "bandwidth: "),
        ({"estimator": "exact"}, "estimator: "),
        ({"normalize": 1}, "normalize: "),
        ({"label_smoothing": 1}, "label_smoothing: "),
        ({"logits": 1}, "logits: "),
        ({"ways": 1}, "ways: "),
        ({"impl": "fast"}, "impl: "),
        ({"example_input": (torch.zeros(1),)}, "example_input: "),
        ({"model": 1}, "model: "),
    ],
)
def test_wrong_arguments_are_named(arguments: dict, named: str) -> None:
    x, _ = data(2)
    with pytest.raises((TypeError, ValueError), match=f"^{named}"):
        QualityAgnostic(**{"model": Network().double(), "example_input": x[0], **arguments})


@pytest.mark.parametrize(
    ("name", "bad", "good"),
    [("alpha", -1, 2.0), ("reduction", "none", "mean"), ("label_smoothing", 1, 0.5)],
)
def test_settings_are_checked_whenever_they_are_set(name: str, bad: object, good: object) -> None:
    x, _ = data(2)
    qa = QualityAgnostic(Network().double(), x[0])
    with pytest.raises(ValueError, match=f"^{name}: expected "):
        setattr(qa, name, bad)
    setattr(qa, name, good)
    assert getattr(qa, name) == good


def test_the_ways_must_be_of_the_same_network() -> None:
    x, _ = data(2)
    with pytest.raises(ValueError, match="^ways: expected an IMCL around this very model"):
        QualityAgnostic(Network().double(), x[0], ways=IMCL(Network().double(), x[0]))
    network = Network().double()
    many = IMCL(network, x[0], activation="sigmoid")
    with pytest.raises(ValueError, match="^ways: expected an IMCL of softmax logits"):
        QualityAgnostic(network, x[0], ways=many)


@pytest.mark.parametrize(
    ("views", "told"),
    [
        (lambda x: x[0], "views: expected batches of 4 dimensions"),
        (lambda x: x[:1], "views: expected at least 2 qualities"),
        (lambda x: [x[0], x[1][:4]], "views: expected the same samples"),
        (lambda x: [x[0], 1], "views: expected the same samples"),
        (lambda x: [], "views: expected the same samples"),
        (lambda x: 1, "views: expected a sequence"),
        (lambda x: x[:, :3], "expected at least 4 samples"),
    ],
)
def test_wrong_views_are_named(views: Callable, told: str) -> None:
    x, y = data(2)
    qa = QualityAgnostic(Network().double(), x[0])
    with pytest.raises((TypeError, ValueError), match=told):
        qa(views(x), y[:3] if "samples" in told else y)


# --- adversarial weight perturbation ---


def task(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return torch_F.cross_entropy(network(x), y)


def written_out(network: nn.Module, x: Tensor, y: Tensor, gamma: float) -> list[Tensor]:
    """The gradients of the definition, by a network whose weights are made anew."""
    own = dict(network.named_parameters())
    gradients = torch.autograd.grad(task(network, x, y), list(own.values()))
    moved = copy.deepcopy(network)
    with torch.no_grad():
        for p, w, g in zip(moved.parameters(), own.values(), gradients, strict=True):
            if w.dim() > 1:
                p.copy_(w + gamma * w.norm() * g / g.norm())
    return list(torch.autograd.grad(task(moved, x, y), list(moved.parameters())))


@pytest.mark.parametrize("gamma", [0.004, 0.5])
def test_gradients_are_those_at_the_perturbed_weights(gamma: float) -> None:
    network = Network().double()
    (x,), y = data(1)
    expected = written_out(copy.deepcopy(network), x, y, gamma)
    before = copy.deepcopy(network.state_dict())
    once = copy.deepcopy(network)
    task(once, x, y)  # what one pass makes of the statistics
    with Perturbation(network, gamma) as perturbation:
        task(network, x, y).backward()
        perturbation.move()
        task(network, x, y).backward()
    for p, g in zip(network.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-10, atol=1e-12)
    for name, p in network.named_parameters():
        assert_same_bits([p.detach()], [before[name]])
    for name, buffer in network.named_buffers():
        assert_same_bits([buffer], [once.get_buffer(name)])


def test_the_loss_rises_along_the_way() -> None:
    network = Network().double()
    (x,), y = data(1)
    with Perturbation(network, 0.05) as perturbation:
        loss = task(network, x, y)
        loss.backward()
        perturbation.move()
        assert task(network, x, y) > loss


def test_parts_of_a_batch_accumulate_before_and_after() -> None:
    (x,), y = data(1, batch=8)
    network = Network().double().eval()  # whose batch normalisation doesn't know of parts
    whole = copy.deepcopy(network)
    with Perturbation(whole, 0.1) as perturbation:
        task(whole, x, y).backward()
        perturbation.move()
        task(whole, x, y).backward()
    with Perturbation(network, 0.1) as perturbation:
        for _ in range(2):
            for part in (slice(0, 4), slice(4, 8)):
                (task(network, x[part], y[part]) / 2).backward()
            if not perturbation._moved:
                perturbation.move()
    for p, q in zip(network.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_gradients_of_before_are_added_to_and_show_no_way() -> None:
    (x,), y = data(1)
    network, alone = Network().double(), Network().double()
    before = [torch.randn_like(p) for p in network.parameters()]
    for p, g in zip(network.parameters(), before, strict=True):
        p.grad = g.clone()
    for each in (network, alone):
        with Perturbation(each, 0.1) as perturbation:
            task(each, x, y).backward()
            perturbation.move()
            task(each, x, y).backward()
    for p, q, g in zip(network.parameters(), alone.parameters(), before, strict=True):
        torch.testing.assert_close(p.grad, q.grad + g)


@pytest.mark.parametrize("views", [False, True])
def test_gradients_of_before_are_added_to_in_ddps_buckets_too(views: bool, tmp_path: Path) -> None:
    (x,), y = data(1)
    torch.manual_seed(0)
    alone = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 3)).double()
    parallel = copy.deepcopy(alone)
    y = y % 3

    def work() -> None:
        wrapped = DistributedDataParallel(parallel, gradient_as_bucket_view=views)
        for step in range(3):  # the buckets are there from the second on
            for each, called in ((alone, alone), (parallel, wrapped)):
                if step != 1:
                    each.zero_grad(set_to_none=False)
                for _ in range(2):  # two blocks are accumulated
                    with Perturbation(each, 0.1) as perturbation:
                        task(called, x, y).backward()
                        perturbation.move()
                        task(called, x, y).backward()
            for p, q in zip(parallel.parameters(), alone.parameters(), strict=True):
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=0)

    in_group(tmp_path, work)


def test_gradients_stay_in_the_memory_they_are_in() -> None:
    """As of an optimizer that has them all in one flat Tensor."""
    network, flat = nn.Linear(3, 2, bias=False), torch.ones(6)
    network.weight.grad = flat.view(2, 3)
    x = torch.ones(1, 3)
    for expected in (2.0, 3.0):
        with Perturbation(network, 0.1) as perturbation:
            network(x).sum().backward()
            perturbation.move()
            network(x).sum().backward()
        assert torch.equal(flat, torch.full((6,), expected))
        assert network.weight.grad.data_ptr() == flat.data_ptr()


def test_expanded_buffers_and_sparse_gradients() -> None:
    class Embedded(nn.Module):
        def __init__(self, sparse: bool) -> None:
            super().__init__()
            self.embed = nn.Embedding(10, 4, sparse=sparse)
            self.fc = nn.Linear(4, 3)
            self.register_buffer("share", torch.tensor([0.5]).expand(3))

        def forward(self, ids: Tensor) -> Tensor:
            return self.fc(self.embed(ids)) - self.share

    ids, found = torch.randint(0, 10, (4,), generator=torch.Generator().manual_seed(0)), []
    for sparse in (True, False):
        torch.manual_seed(0)
        network = Embedded(sparse)
        before = [p.detach().clone() for p in network.parameters()]
        with Perturbation(network, 0.1) as perturbation:
            network(ids).square().sum().backward()
            perturbation.move()
            network(ids).square().sum().backward()
        assert_same_bits(list(network.parameters()), before)
        found.append([p.grad.to_dense() for p in network.parameters()])
    torch.testing.assert_close(found[0], found[1])


def test_a_buffer_that_is_put_in_place_of_another_comes_back() -> None:
    class Averaging(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)
            self.register_buffer("ema", torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            z = self.linear(x)
            self.ema = 0.9 * self.ema + 0.1 * z.detach().mean(0)
            return z

    network, x = Averaging(), torch.randn(5, 4)
    with Perturbation(network, 0.5) as perturbation:
        network(x).sum().backward()
        was = network.ema
        value = was.clone()
        perturbation.move()
        network(x).sum().backward()
    assert network.ema is was and torch.equal(was, value)


def test_autocast_sees_the_perturbed_weights_and_those_of_before() -> None:
    torch.manual_seed(0)
    network = nn.Linear(3, 2, bias=False)
    x = torch.randn(4, 3)
    with torch.autocast("cpu", torch.bfloat16), Perturbation(network, 0.5) as perturbation:
        before = network(x)
        before.sum().backward()
        perturbation.move()
        moved = network(x)
        assert not torch.equal(moved, before)
        moved.sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_bits(network(x), before)
        with Perturbation(network, 0.5) as perturbation:
            network(x).sum().backward()
            perturbation.move()
            assert_same_bits(network(x), moved)
        assert_same_bits(network(x), before)


def test_weights_without_a_way_stay() -> None:
    network = nn.ModuleDict({name: nn.Linear(2, 2) for name in ("zero", "none", "inf", "frozen")})
    network["frozen"].requires_grad_(False)
    before = copy.deepcopy(network.state_dict())
    with Perturbation(network, 0.5) as perturbation:
        network["zero"].weight.grad = torch.zeros(2, 2)
        network["inf"].weight.grad = torch.tensor([[torch.inf, 1], [1, 1]])
        perturbation.move()
        for name, value in network.state_dict().items():
            assert_same_bits([value], [before[name]])


def test_an_exception_leaves_the_weights_as_they_were() -> None:
    network = Network().double()
    (x,), y = data(1)
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(KeyboardInterrupt), Perturbation(network, 0.5) as perturbation:
        task(network.eval(), x, y).backward()
        perturbation.move()
        assert not torch.equal(network.classifier.weight, before["classifier.weight"])
        raise KeyboardInterrupt
    for name, value in network.state_dict().items():
        assert_same_bits([value], [before[name]])


@pytest.mark.parametrize("accumulated", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_an_exception_on_the_way_up_leaves_the_gradients_as_they_were(
    accumulated: bool, inside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As out of memory, after which a loop goes on; in ``move`` too, which copies the weights."""
    network = Network().double().eval()
    (x,), y = data(1)
    if accumulated:
        task(network, x, y).backward()
    before = {
        name: None if p.grad is None else p.grad.clone() for name, p in network.named_parameters()
    }

    def out_of_memory(*_: object) -> Tensor:
        raise MemoryError

    if inside:
        monkeypatch.setattr(perturbation_module, "_step", out_of_memory)
    with pytest.raises(MemoryError), Perturbation(network, 0.5) as perturbation:
        task(network, x, y).backward()
        if inside:
            perturbation.move()
        raise MemoryError
    for name, parameter in network.named_parameters():
        if before[name] is None:
            assert parameter.grad is None
        else:
            assert_same_bits([parameter.grad], [before[name]])


def test_half_weights_are_perturbed_by_norms_beyond_their_range() -> None:
    layer = nn.Linear(1000, 1000, bias=False).half()
    with torch.no_grad():
        layer.weight.fill_(1.0)
    with Perturbation(layer, 0.01) as perturbation:
        layer.weight.grad = torch.full_like(layer.weight, 100)  # whose norm is 100,000
        perturbation.move()
        torch.testing.assert_close(layer.weight, torch.full_like(layer.weight, 1.01))


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_ways_in_what_is_perturbed_have_their_turns(wrapped: bool) -> None:
    """Two calls to a step: without that, all turns would be in those that are thrown away."""
    (x,), y = data(1)
    imcl = IMCL(
        Network().double(), x, representation_interval=8, kernel_interval=16, impl="torch"
    )
    model = nn.ModuleDict({"a": imcl}) if wrapped else imcl
    seen = []
    for _ in range(16):
        with Perturbation(model, 0.01) as perturbation:
            first = imcl(x, y)
            first.loss.backward()
            perturbation.move()
            second = imcl(x, y)
            second.loss.backward()
        assert first.terms.keys() == second.terms.keys()
        seen.append(second.terms.keys() & {"representation_similarity", "kernel_similarity"})
    assert [len(ways) for ways in seen] == [i % 8 == 0 or i == 4 for i in range(16)]


def test_no_replica_is_trained() -> None:
    (x,), y = data(1)
    replica = QualityAgnostic(Network().double(), x, impl="torch")._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match="nn.DataParallel.*DistributedDataParallel"):
        replica([x, x], y)


def test_a_block_has_one_move() -> None:
    network = nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match="got none"), Perturbation(network, 0.1):
        pass
    with pytest.raises(RuntimeError, match="a second"), Perturbation(network, 0.1) as perturbation:
        perturbation.move()
        perturbation.move()
    with pytest.raises(ValueError, match="^gamma: "):
        Perturbation(network, -1)
    with pytest.raises(TypeError, match="^model: "):
        Perturbation(1, 0.1)


@pytest.mark.filterwarnings("error")  # the heads move, if later than the weights do
def test_both_passes_are_of_one_turn_of_the_schedule() -> None:
    x, y = data(2)
    network = Network().double()
    ways = IMCL(network, x[0], representation_interval=2, kernel_interval=3)
    qa = QualityAgnostic(network, x[0], ways=ways)
    own = IMCL(Network().double(), x[0], representation_interval=2, kernel_interval=3)
    optimizer = torch.optim.SGD(qa.parameters(), lr=0.01)
    for _ in range(7):
        expected = own(x[0], y).terms.keys()
        seen = []
        with qa.perturbed(0.01) as perturbation:
            for again in range(2):
                output = qa(x, y)
                output.loss.backward()
                seen.append(output.terms.keys() - {"dependence"})
                if not again:
                    perturbation.move()
        assert seen == [expected, expected]
        optimizer.step()
        optimizer.zero_grad()
        assert int(ways.get_extra_state()) == int(own.get_extra_state())


def test_the_names_are_public() -> None:
    assert {"Perturbation", "QualityAgnostic"} <= set(imcl_fast.__all__)


@pytest.mark.parametrize(
    "name, value",
    [
        ("kernel", "linear"),
        ("bandwidth", 0.7),
        ("estimator", "biased"),
        ("normalize", False),
        ("impl", "torch"),
    ],
)
def test_options_of_the_dependence_reach_it(name, value):
    x, _ = data(2)
    assert (
        getattr(QualityAgnostic(Network().double(), x[0], **{name: value}).dependence, name)
        == value
    )


def test_of_many_layers_the_last_three_take_part_with_the_last_weights():
    network = Network().double()
    network.three = nn.Sequential(
        network.three, nn.Sequential(nn.Conv2d(6, 6, 1, 2).double(), nn.Tanh())
    )
    x = torch.randn(2, BATCH, 2, 32, 32, dtype=torch.float64)
    qa = QualityAgnostic(network, x[0])
    assert qa.layers == ["two", "three.0", "three.1"], qa.layers
    two = QualityAgnostic(network, x[0], layers=["two", "three.1"])
    assert two.dependence.layer_weight == [0.25, 0.5]


def test_hooks_of_the_ways_go_too():
    network, (x, _) = Network().double(), data(2)
    qa = QualityAgnostic(network, x[0], ways=IMCL(network, x[0]))
    qa.remove_hooks()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


def test_gradients_of_the_heads_too_are_those_after_move_alone():
    x, y = data(2)
    network = Network().double()
    qa = QualityAgnostic(network, x[0], alpha=0, ways=IMCL(network, x[0], output_weight=0))
    heads = list(qa.ways.heads.parameters())
    qa(x, y).loss.backward()
    expected = [p.grad.clone() for p in heads]
    with qa.perturbed(0.0) as perturbation:  # no weight moves
        for p in heads:
            assert p.grad is None
        qa(x, y).loss.backward()
        perturbation.move()
        qa(x, y).loss.backward()
    for p, gradient in zip(heads, expected, strict=True):
        torch.testing.assert_close(p.grad, 2 * gradient)  # with what it held before


def test_gradients_of_before_come_back_whatever_was_written_to_their_memory():
    network, (x, y) = Network().double(), data(1)
    torch_F.cross_entropy(network(x[0]), y).backward()
    memory = [p.grad for p in network.parameters()]
    held = [g.clone() for g in memory]
    with pytest.raises(KeyError), Perturbation(network, 0.1):
        for bucket in memory:  # as DistributedDataParallel's, in a backward pass
            bucket.fill_(7)
        raise KeyError
    for p, gradient in zip(network.parameters(), held, strict=True):
        assert torch.equal(p.grad, gradient)


def test_an_exception_in_the_network_leaves_nothing_under_way():
    network, (views, y) = Network().double(), data(2)
    qa = QualityAgnostic(network, views[0], ways=IMCL(network, views[0]))
    expected = qa(views, y).loss
    with pytest.raises(RuntimeError):
        qa(views[:, :, :1], y)  # images of one channel
    assert qa._tape.step is None and qa.ways._tape.step is None
    assert qa(views, y).loss.isfinite() and expected.isfinite()


def test_layers_in_checkpointed_segments_take_part():
    from torch.utils.checkpoint import checkpoint
    network, (views, y) = Network().double(), data(2)
    qa = QualityAgnostic(network, views[0])
    expected = qa(views, y).terms["dependence"]
    run = type(network.one).forward
    for part in (network.one, network.two):
        part.forward = lambda x, part=part: checkpoint(run, part, x, use_reentrant=False)
    network.forward = lambda x: checkpoint(Network.forward, network, x, use_reentrant=False)
    torch.testing.assert_close(qa(views, y).terms["dependence"], expected)


def test_a_layer_that_runs_twice_is_an_error():
    network, (views, y) = Network().double(), data(2)
    qa = QualityAgnostic(network, views[0])
    network.forward = lambda x: (network.one(x), Network.forward(network, x))[1]
    with pytest.raises(RuntimeError, match="to run once each, as on example_input, got 4 runs"):
        qa(views, y)
