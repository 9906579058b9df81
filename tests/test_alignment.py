"""Linear CKA of layers against its definition, and what imcl-inspect makes of it."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from conftest import assert_same_bits
from torch import Tensor, nn

from imcl_fast.alignment import alignment
from imcl_fast.models import import_torchvision, resnet18
from imcl_fast.reports import charts, inspect


class Network(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.one = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Tanh())
        self.two = nn.Conv2d(3, 4, 3)
        self.classifier = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.two(self.one(x)).mean((2, 3)))

    def features(self, x: Tensor) -> list[Tensor]:
        one = self.one(x)
        return [one, self.two(one), self(x)]


def batches(count: int = 3, size: int = 9) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 1, 6, 6, generator=generator) for _ in range(count)]


def hsic(x: Tensor, y: Tensor) -> float:
    """The unbiased estimate with linear kernels, as Song et al. write it."""
    n = len(x)
    k, m = (z.flatten(1).double() @ z.flatten(1).double().T for z in (x, y))
    k.fill_diagonal_(0)
    m.fill_diagonal_(0)
    total = (k @ m).trace() + k.sum() * m.sum() / ((n - 1) * (n - 2))
    return float(total - 2 / (n - 2) * (k @ m).sum()) / (n * (n - 3))


def written_out(xs: list[list[Tensor]], ys: list[list[Tensor]]) -> Tensor:
    """Ratios of sums over batches; xs and ys have by batch the features of each layer."""
    def summed(a: list[list[Tensor]], i: int, b: list[list[Tensor]], j: int) -> float:
        return sum(hsic(x[i], y[j]) for x, y in zip(a, b, strict=True))

    return torch.tensor([
        [
            summed(xs, i, ys, j) / (summed(xs, i, xs, i) * summed(ys, j, ys, j)) ** 0.5
            for j in range(len(ys[0]))
        ]
        for i in range(len(xs[0]))
    ])


@pytest.mark.parametrize("two", [False, True])
def test_it_is_the_ratio_of_sums_over_batches(two: bool) -> None:
    first, second = Network(), Network(1)
    found = alignment(first, batches(), second if two else None)
    with torch.no_grad():
        xs = [copy.deepcopy(first).eval().features(batch) for batch in batches()]
        ys = [copy.deepcopy(second).eval().features(batch) for batch in batches()] if two else xs
    assert found.rows == found.columns == ["one", "two", "output"]
    torch.testing.assert_close(torch.tensor(found.cka), written_out(xs, ys), rtol=1e-4, atol=1e-5)


def test_a_layer_is_like_itself_turned_and_scaled() -> None:
    first, second = Network(), Network()
    turn, _ = torch.linalg.qr(torch.randn(4, 4))
    with torch.no_grad():
        second.two.weight.copy_(3 * (turn @ second.two.weight.flatten(1)).view(4, 3, 3, 3))
        second.two.bias.copy_(torch.randn(4))
    cells = alignment(first, batches(), second).cka
    assert cells[0][0] == pytest.approx(1) and cells[1][1] == pytest.approx(1)
    assert cells[2][2] < 0.99
    own = torch.tensor(alignment(first, batches()).cka)
    torch.testing.assert_close(own.diagonal(), torch.ones(3))
    torch.testing.assert_close(own, own.T)


def test_small_batches_are_left_out_and_constant_features_are_like_nothing() -> None:
    network = Network()
    whole = alignment(network, batches())
    assert alignment(network, [*batches(), torch.randn(3, 1, 6, 6)]) == whole
    with pytest.raises(ValueError, match="^batches: expected one of at least 4 images"):
        alignment(network, batches(size=3))
    nn.init.zeros_(network.two.weight)
    for size in (9, 7, 25, 50, 100):  # of some, rounding leaves a variance above 0
        for bias in (0.0, 0.1):
            nn.init.constant_(network.two.bias, bias)
            cells = alignment(network, batches(size=size)).cka
            assert cells[1] == [0.0, 0.0, 0.0] and cells[0][0] == pytest.approx(1)


def test_the_network_is_left_as_it_was() -> None:
    network = Network().train()
    network.one.eval()
    before = copy.deepcopy(network.state_dict())
    random = torch.get_rng_state()
    alignment(network, batches())
    assert network.training and not network.one[0].training
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(module._forward_hooks for module in network.modules())
    assert_same_bits(list(before.values())[:-1], list(network.state_dict().values())[:-1])


def test_blocks_count_and_what_is_the_same_counts_once() -> None:
    found = alignment(resnet18(10, channels=1, width=2), [torch.randn(6, 1, 16, 16)])
    assert {"layer1", "layer1.0", "layer4", "output"} <= set(found.rows)
    assert "layer1.1" not in found.rows  # whose output is layer1's
    cells = torch.tensor(found.cka)
    off = cells - torch.diag(cells.diagonal())
    assert off.max() < 0.99999


def test_blocks_of_a_transformer_count() -> None:
    models = import_torchvision().models
    network = models.VisionTransformer(16, 4, 3, 2, 8, 16, num_classes=5)
    found = alignment(network, [torch.randn(6, 3, 16, 16)])
    assert [name for name in found.rows if name.endswith("encoder_layer_1")]


def run(*arguments: str) -> int:
    return inspect.main([str(argument) for argument in arguments])


def test_the_command_prints_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib isn't installed")
    network = "test_alignment:Network"
    shared = (network, "--image-size", 8, "--images", 20)
    assert run(*shared, "--cka", "--plot", tmp_path / "a.svg", "--json", tmp_path / "a.json") == 0
    out = capsys.readouterr().out
    assert "CKA with the one before" in out and charts.READ_CKA in out
    known = json.loads((tmp_path / "a.json").read_text())
    assert known["rows"] == known["columns"] == ["one", "two", "output"]
    svg = (tmp_path / "a.svg").read_text()
    assert svg.count(">two<") == 2 and "How to read it" in svg and "CKA" in svg
    assert run(*shared, "--against", network, "--plot", tmp_path / "b.png") == 0
    assert "most alike of test_alignment:Network" in capsys.readouterr().out
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")


def test_networks_that_take_other_images_are_named(capsys: pytest.CaptureFixture) -> None:
    shared = ("test_alignment:Network", "--image-size", 8, "--against")
    assert run(*shared, "resnet18") == 2
    assert "or resnet18 can't" in capsys.readouterr().err
    assert run(*shared, "nothing") == 2
    assert "nothing: neither a file nor a network" in capsys.readouterr().err


def test_of_outputs_in_a_tuple_the_first_is_compared():
    class Two(Network):
        def forward(self, x):
            logits = super().forward(x)
            return logits, logits.tanh() ** 2

    assert alignment(Two(), batches()).cka == alignment(Network(), batches()).cka


def test_compiled_networks_are_compared_as_they_are() -> None:
    network = Network()
    compiled = torch.compile(network, backend="eager")
    for batch in batches():
        compiled(batch)
    assert alignment(compiled, batches()) == alignment(network, batches())
