"""Details of ``QualityAgnostic``, ``Perturbation``, ``MultiHead``, ``profile`` and ``alignment``,
of which a fault went unseen by their own tests."""

import copy
import io
import warnings

import pytest
import torch
from conftest import matmul_precision
from test_imcl_details import Plain, X, Y
from torch import nn
from torch.nn.utils import parametrize
from torch.utils import _pytree

from imcl_fast import IMCL, Perturbation, QualityAgnostic
from imcl_fast.alignment import alignment
from imcl_fast.ilr import MultiHead
from imcl_fast.models import resnet18
from imcl_fast.redundancy import profile

pytestmark = pytest.mark.usefixtures("one_thread")


# Quality-agnostic training


def test_an_objective_whose_layer_was_replaced_can_be_kept():
    network = Plain()
    objective = QualityAgnostic(network, X, layers=["features.1", "features.3"])
    network.features[1] = nn.Identity()
    kept = io.BytesIO()
    torch.save(objective, kept)
    kept.seek(0)
    torch.load(kept, weights_only=False)
    copy.deepcopy(objective)


def test_an_output_taken_apart_and_put_together_has_the_terms_of_the_ways():
    network = Plain()
    out = QualityAgnostic(network, X, ways=IMCL(network, X, kernel_interval=1))([X, X], Y)
    again = _pytree.tree_unflatten(*_pytree.tree_flatten(out))
    assert again.terms.keys() == out.terms.keys() and "kernel_similarity" in again.terms


def test_without_dependence_one_view_will_do():
    objective = QualityAgnostic(Plain(), X)
    objective.alpha = 0.0
    assert "dependence" not in objective([X], Y).terms


# Perturbed weights


def test_a_move_is_no_step_of_an_optimizer_that_lacks_the_heads():
    network = Plain()
    imcl = IMCL(network, X, kernel_weight=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(5):
            with Perturbation(network, 0.1, imcl) as perturbation:
                imcl(X, Y).loss.backward()
                perturbation.move()
                imcl(X, Y).loss.backward()


def test_buffers_with_a_dimension_of_one_come_back():
    network = Plain()
    network.register_buffer("one", torch.zeros(1, 3).as_strided((1, 3), (0, 1)))
    with Perturbation(network, 0.1) as perturbation:
        network(X).sum().backward()
        perturbation.move()
        network.one.add_(1)
        network(X).sum().backward()
    assert not network.one.any()


def test_the_smallest_gradients_move_weights_in_half_precision():
    network = nn.Linear(4, 4, bias=False).half()
    before = network.weight.detach().clone()
    with Perturbation(network, 0.1) as perturbation:
        network.weight.grad = torch.full((4, 4), 6e-8, dtype=torch.float16)
        perturbation.move()
        assert network.weight.isfinite().all() and not network.weight.equal(before)


# Song and Chai's heads


class Double(nn.Module):
    def forward(self, x):
        return 2 * x


def test_a_parametrized_bias_is_refused_by_name():
    network = resnet18(5, width=4, channels=1)
    for name in ("weight", "bias"):
        parametrize.register_parametrization(network.fc, name, Double())
    expected = "^model: weight and bias of a ParametrizedLinear is computed"
    with pytest.raises(ValueError, match=expected):
        MultiHead(network)


def test_further_children_are_refused():
    network = resnet18(5, width=4, channels=1)
    network.neck = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="^model: expected a network with the modules"):
        MultiHead(network)


def test_splits_lie_in_sequences():
    class Own(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.a, self.b = inner[0], inner[1]

        def forward(self, x):
            return self.a(x) + 1

    network = resnet18(5, width=4, channels=1)
    network.layer3 = Own(network.layer3)
    with pytest.raises(ValueError, match="^splits: expected modules that the network calls"):
        MultiHead(network, splits=["layer3.b"])


# What alike layers and channels are measured on


def representations(network, x, **options):
    return [each for each in profile(network, x, **options) if each["kind"] == "representation"]


def test_a_profile_is_of_full_precision():
    network, seen = Plain(), []
    expected = profile(network, X)
    with torch.autocast("cpu", torch.bfloat16):
        assert profile(network, X) == expected
    look = torch.get_float32_matmul_precision
    network.register_forward_hook(lambda *_: seen.append(look()))
    with matmul_precision("medium"):
        profile(network, X)
        assert look() == "medium"
    assert set(seen) == {"highest"}


def test_a_profile_is_of_all_images():
    network = nn.Sequential(nn.Conv2d(1, 600, 1), nn.ReLU())
    x = torch.randn(13, 1, 2, 3)
    whole, single = (representations(network, x, **o)[0] for o in ({}, {"batch_size": 1}))
    assert whole["mean_square_cos"] == pytest.approx(single["mean_square_cos"], rel=1e-5)
    assert sum(whole["histogram"]) == 13 * 600 * 599 // 2


def test_a_profile_is_of_maps_of_numbers():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.linear = nn.Conv2d(1, 6, 4, 4), nn.Linear(6, 7)

        def forward(self, x):
            return self.linear(self.conv(x).flatten(2).mT).mean(1)

    class Codes(nn.Module):
        def forward(self, x):
            return x.round().long()

    assert [each["name"] for each in representations(Tokens(), X)] == ["conv"]
    network = nn.Sequential(nn.Conv2d(1, 6, 3), Codes())
    assert [each["name"] for each in representations(network, X)] == ["0"]


def test_logits_are_found_in_what_an_aligned_network_returns():
    class Named(Plain):
        def forward(self, x):
            return {"extra": x, "logits": super().forward(x)}

    assert alignment(Named(), [X]) == alignment(Plain(), [X])
