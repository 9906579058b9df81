"""Details of ``IMCL`` and of what finds its layers, heads, classifier and kernels, of which a fault
went unseen by the tests of the whole."""

import warnings

import pytest
import test_any_network
import torch
import torch.nn.functional as TF
from torch import nn
from torch.nn.utils import parametrize
from torch.utils import _pytree

from imcl_fast import IMCL, calls, dense_outputs, functional, heads, padding, sharding
from imcl_fast.kernel_choice import check_kernels, find_kernels

pytestmark = pytest.mark.usefixtures("one_thread")

X = torch.rand(6, 1, 12, 12, generator=torch.Generator().manual_seed(0))
Y = torch.arange(6) % 5
IDS = torch.arange(24).view(6, 4) % 9


class Plain(test_any_network.Plain):
    def __init__(self):
        super().__init__(classes=5)


class Named(Plain):
    def forward(self, x):
        return {"x": x, "logits": super().forward(x)}


class Leaving(Plain):
    skip = False

    def forward(self, x):
        h = torch.zeros(len(x), 8, 3, 3) if self.skip else self.features(x)
        return self.fc(h.mean((2, 3)))


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.emb = nn.Embedding(9, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(4))
        self.fc = nn.Linear(8, 5)

    def forward(self, ids, attention_mask=None):
        h = self.emb(ids)
        for block in self.blocks:
            h = block(h) + h
        return self.fc(h.mean(1))


class Residual(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.f = nn.Sequential(nn.Linear(channels, channels), nn.GELU())

    def forward(self, x):
        return x + self.f(x)


class Pixels(nn.Module):
    """Classifies each, perhaps at half the resolution, and resizes that."""

    def __init__(self, channels=1, stride=1, resize=None):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(channels, 8, 3, stride, 1), nn.ReLU())
        self.out, self.resize = nn.Conv2d(8, 3, 1), resize

    def forward(self, x):
        logits = self.out(self.body(x.float()))
        return logits if self.resize is None else self.resize(logits, x.shape[2:])


class Noisy(nn.Module):
    def forward(self, weight):
        return weight + torch.randn_like(weight)


def built(network=None, x=X, **options):
    return IMCL(network or Plain(), x, **options)


# What a call returns, says and hands on


@pytest.mark.parametrize("criterion", [None, lambda o, y: TF.cross_entropy(o["logits"], y)])
def test_in_eval_mode_the_networks_own_output_is_kept(criterion):
    out = built(Named(), criterion=criterion).eval()(X, labels=Y)
    assert out.output["x"] is X


def test_an_output_without_logits_is_a_tuple_of_its_loss():
    class Other(Plain):
        def forward(self, x):
            return {"z": super().forward(x)}

    imcl = built(Other(), criterion=lambda o, y: o["z"].square().mean(), output_weight=0,
                 multilayer_weight=0)  # fmt: skip
    out = imcl(X, Y)
    assert out[:] == (out.loss,) and out.logits is None


def test_an_output_taken_apart_and_put_together_has_the_same_terms():
    """As DistributedDataParallel does with a static graph."""
    for options in ({"views": 3}, {"output_weight": 0}):
        out = built(**options)(X, Y)
        again = _pytree.tree_unflatten(*_pytree.tree_flatten(out))
        assert again._views == out._views and again.terms.keys() == out.terms.keys()


def test_the_plain_call_within_a_watch_block_is_no_plain_training():
    imcl = built()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with imcl.watch() as ways:
            imcl(X)
    assert ways.loss(Y).isfinite()


@pytest.mark.parametrize("function", ["consistency", "pairwise"])
def test_every_way_is_computed_by_the_implementation_asked_for(function, monkeypatch):
    seen, found = [], getattr(calls, function)

    def called(*args, **options):
        seen.append(args[3] if function == "consistency" else args[-1])
        return found(*args, **options)

    monkeypatch.setattr(calls, function, called)
    built(impl="torch")(X, Y).loss.backward()
    assert len(seen) == (1 if function == "consistency" else 3) and set(seen) == {"torch"}


def test_a_state_from_the_start_sets_the_schedule_back():
    imcl = built(representation_interval=2, kernel_interval=4)
    state = imcl.state_dict()
    for _ in range(3):
        imcl(X, Y)
    imcl.load_state_dict(state)
    assert int(imcl.get_extra_state()) == 0


def test_calls_without_layers_count_in_a_row_only():
    network = Leaving()
    imcl = built(network, kernel_weight=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(20):
            for network.skip in (True, False):
                assert imcl(X, Y).loss.isfinite()


def test_a_mask_that_does_not_fit_is_told_of_once():
    imcl = built(Tokens(), {"ids": IDS})
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(3):
            imcl({"ids": IDS, "attention_mask": torch.ones(6, 1, 1, 4)}, Y)
    assert len([each for each in told if "its padding counts" in str(each.message)]) == 1


def test_an_attention_mask_may_be_anything():
    """transformers takes a dict of masks."""
    imcl = built(Tokens(), {"ids": IDS})
    out = imcl({"ids": IDS, "attention_mask": {"full": torch.ones(6, 4)}}, Y)
    assert out.loss.isfinite()


# Way 4


def test_shares_are_those_of_the_process_that_trains(monkeypatch):
    """Not of that in which the objective was saved."""
    imcl = built(kernels=["features.0", "features.2"])
    imcl._shard_kernels = True
    monkeypatch.setattr(sharding, "place", lambda: (1, 2))
    monkeypatch.setattr(sharding, "initialised", lambda: True)
    monkeypatch.setattr(sharding, "world_size", lambda: 2)
    monkeypatch.setattr(sharding.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(sharding.distributed, "get_world_size", lambda: 2)
    imcl(X, Y)
    assert len(imcl._kernel_share.kernels) == 1


def test_without_way_4_there_is_nothing_to_share():
    assert built(kernel_weight=0, shard_kernels=True).kernels == []


ONE_LAYER = "ignore:IMCL. these have nothing to act on"


@pytest.mark.filterwarnings(ONE_LAYER)
def test_a_second_imcl_sees_the_weights_of_its_own_run():
    network = Plain()
    parametrize.register_parametrization(network.features[2], "weight", Noisy())
    built(network, kernels=["features.2"])
    imcl, used = built(network, kernels=["features.2"]), []
    made = network.features[2].parametrizations.weight
    made.register_forward_hook(lambda module, args, output: used.append(output))
    out = imcl(X, Y)
    (weight,) = used
    expected = functional.kernel_similarity(weight).detach()
    torch.testing.assert_close(out.terms["kernel_similarity"], expected)


@pytest.mark.filterwarnings(ONE_LAYER)
def test_frozen_weights_that_are_made_of_others_contribute_their_value():
    network = Plain()
    parametrize.register_parametrization(network.features[2], "weight", Noisy())
    network.features[2].requires_grad_(False)
    assert built(network, kernels=["features.2"])(X, Y).loss.isfinite()


def test_kernels_that_may_be_named():
    network = nn.Sequential(nn.LSTM(4, 1))
    with pytest.raises(ValueError, match="at least 2 rows for each of the 4 roles"):
        check_kernels(network, ["0.weight_ih_l0"])
    network.register_buffer("table", torch.randn(4, 3))
    with pytest.raises(ValueError, match="^kernels: the network has no module 'table'"):
        check_kernels(network, ["table"])
    assert "in_proj_weight" in find_kernels(nn.MultiheadAttention(8, 2))


def test_where_all_maps_are_of_one_size_only_1x1_convolutions_can_be_classifiers():
    body = [nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()]
    network = nn.Sequential(*body, nn.Conv2d(4, 4, 1))
    ways = {"output_weight": 0, "multilayer_weight": 0, "representation_weight": 0}
    assert IMCL(network, torch.rand(2, 4, 8, 8), class_dim=1, **ways).kernels == ["0", "2"]


def test_a_convolution_that_has_not_run_is_no_classifier():
    network = Plain()
    network.extra = nn.Conv2d(6, 5, 3)
    assert "extra" in built(network).kernels


# Classifiers and dense outputs


def test_images_of_bytes_are_no_logits():
    x = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
    imcl = IMCL(Pixels(3), x, multilayer_weight=0)
    assert imcl.class_dim == 1 and imcl.classifier == "out"


def test_a_part_of_an_output_is_another_output():
    x = torch.rand(2, 4, 4)
    part = x[:, :2]
    assert not dense_outputs.is_same(x, part) and dense_outputs.is_same(part, x[:, :2])


def test_what_has_other_dimensions_is_no_rival():
    outputs = {"out": torch.rand(2, 4, 3, 3), "side": torch.rand(2, 4)}
    assert dense_outputs.rivals(outputs["out"], outputs, ["out", "side"], [], 1) == {"out"}


def test_logits_may_be_resized_in_another_dtype():
    def resize(logits, size):
        return TF.interpolate(logits.double(), size, mode="bilinear").float()

    network = Pixels(stride=2, resize=resize)
    assert IMCL(network, torch.rand(2, 1, 16, 16), multilayer_weight=0).classifier == "out"


# Layers and heads


def test_a_layer_may_return_a_list():
    class Listing(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return [self.inner(x), x]

    network = Plain()
    network.features[0] = Listing(network.features[0])
    network.features[1].forward = lambda x: torch.relu(x[0])
    assert built(network, layers=["features.0", "features.3"])(X, Y).loss.isfinite()


def test_channels_of_an_embedding_come_last():
    class Text(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.conv = nn.Embedding(9, 8), nn.Conv1d(8, 6, 3, padding=1)
            self.fc = nn.Linear(6, 5)

        def forward(self, ids):
            return self.fc(self.conv(self.emb(ids).mT).mean(2))

    imcl = built(Text(), {"ids": IDS}, layers=["emb", "conv"])
    assert imcl.heads[0].linear.in_features == 8


def test_a_sequence_may_have_one_token():
    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.fc = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, 5)

        def forward(self, x):
            return self.fc(self.b(self.a(x)).mean(1))

    imcl = IMCL(One(), torch.rand(3, 1, 4), layers=["a", "b"])
    assert [head.linear.in_features for head in imcl.heads] == [8]


def test_maps_need_no_convolution():
    class Maps(nn.Module):
        def __init__(self):
            super().__init__()
            self.act, self.fc = nn.Tanh(), nn.Linear(4, 5)

        def forward(self, x):
            return self.fc(self.act(x).mean((2, 3)))

    imcl = IMCL(Maps(), torch.rand(2, 4, 3, 3), layers=["act"], multilayer_weight=0,
                kernel_weight=0)  # fmt: skip
    assert imcl.layers == ["act"]


def test_blocks_after_pooling_are_no_layers():
    class Vit(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.stem = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU())
            self.patch = nn.Conv2d(4, 8, 2, 2)
            self.blocks = nn.ModuleList(Residual(8) for _ in range(4))
            self.blocks.post, self.fc = Residual(8), nn.Linear(8, 5)

        def forward(self, x):
            h = self.patch(self.stem(x)).flatten(2).mT
            for block in [*self.blocks][:4]:
                h = block(h)
            return self.fc(self.blocks.post(h.mean(1, keepdim=True))[:, 0])

    assert built(Vit()).layers == [f"blocks.{i}" for i in range(4)]


def test_quarters_of_the_depth_are_of_blocks_of_one_class():
    class First(nn.Sequential):
        pass

    class Second(nn.Sequential):
        pass

    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            kinds = [First] * 5 + [Second] * 3
            self.rows = nn.ModuleList(kind(nn.Linear(8, 8), nn.GELU()) for kind in kinds)
            self.fc = nn.Linear(8, 5)

        def forward(self, x):
            for row in self.rows:
                x = row(x)
            return self.fc(x.mean(1))

    assert IMCL(Rows(), torch.rand(2, 6, 8)).layers == [f"rows.{i}" for i in (1, 2, 3, 4)]


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16])
def test_heads_that_are_built_under_autocast_have_the_parameters_dtype(dtype):
    network = Plain()
    if dtype == torch.int8:  # the first of all parameters
        network.table = nn.Parameter(torch.zeros(3, dtype=dtype), requires_grad=False)
    else:
        network.spare = nn.Linear(2, 2, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        imcl = built(network)
    assert {p.dtype for p in imcl.heads.parameters()} == {torch.float32}


def test_what_half_precision_can_hold_can_be_averaged():
    assert heads.average(torch.ones(1, 1, 400, 400, dtype=torch.float16)) == 1


def test_a_constant_channel_beside_a_mask_is_dead_in_half_precision_too():
    x = torch.full((1, 1, 66003), 333.25, dtype=torch.float16)
    mask = torch.ones(1, 1, 66003, dtype=torch.bool)
    mask[..., -2:] = False
    assert torch.linalg.vector_norm(x).isinf() and not padding.neutral(x, mask, True).any()


@pytest.mark.parametrize(
    ("name", "bad", "good"),
    [
        ("output_weight", -1, 2), ("kernel_weight", float("nan"), 0.5), ("views", 1, 3),
        ("representation_weight", "10", 0), ("dropout", 1.0, 0.0), ("output_temperature", 0, 3),
        ("multilayer_temperature", -2.0, 1), ("multilayer_teacher", "all", "mean"),
        ("representation_penalty", None, "abs"), ("center", 1, False),
        ("kernel_penalty", "cube", "signed"), ("label_smoothing", 1, 0.1),
        ("ignore_index", 1.5, 3), ("activation", "tanh", "sigmoid"), ("criterion", 3, None),
        ("impl", "numpy", "torch"),
    ],
)  # fmt: skip
def test_settings_are_checked_whenever_they_are_set(name, bad, good):
    imcl = IMCL(Plain(), X)
    before = getattr(imcl, name)
    with pytest.raises((TypeError, ValueError), match=f"^{name}: expected "):
        setattr(imcl, name, bad)
    assert getattr(imcl, name) == before
    setattr(imcl, name, good)
    assert getattr(imcl, name) == good
    with pytest.raises((TypeError, ValueError), match=f"^{name}: expected "):
        IMCL(Plain(), X, **{name: bad})


def test_warnings_of_a_call_say_where_it_is():
    """Of layers that are left out, and of such as run under no_grad."""

    class Probe(Plain):
        def forward(self, x):
            with torch.no_grad():
                h = self.features(x)
            return self.fc(h.mean((2, 3)))

    leaving = Leaving()
    for model, skips in ((leaving, True), (Probe(), False)):
        imcl = IMCL(model, X)
        leaving.skip = skips
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            imcl(X, Y)
        assert [each.filename for each in told] == [__file__]
