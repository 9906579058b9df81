"""What the ways act on in networks of many architectures, built without weights; and the plan."""

import math
import warnings

import pytest
import torch
from test_imcl import FlatCNN, only
from torch import nn

from imcl_fast import IMCL, functional, models
from imcl_fast.kernel_choice import check_kernels, find_kernels, roles
from imcl_fast.layers import trace
from imcl_fast.models import import_torchvision
from imcl_fast.reports.inspect import main

torchvision = import_torchvision()
LAYERS = [f"layer{i}" for i in (1, 2, 3, 4)]
STAGES = [f"stages.{i}" for i in (0, 1, 2, 3)]
OF_12 = [f"blocks.{i}" for i in (2, 5, 8, 11)]
OF_24 = [f"blocks.{i}" for i in (5, 11, 17, 23)]
OF_8 = [f"blocks.{i}" for i in (1, 3, 5, 7)]


def features(*indices):
    return [f"features.{i}" for i in indices]


# Architecture: layers, classifier, layers of way 4, their share of the network's weights in %.
FOUND = {
    "timm:resnet18": (LAYERS, "fc", 17, 94.1),
    "timm:resnet50": (LAYERS, "fc", 33, 61.3),
    "timm:vit_tiny_patch16_224": (OF_12, "head", 37, 64.5),
    # The logits of two heads, averaged: there is no one classifier.
    "timm:deit_tiny_distilled_patch16_224": (OF_12, None, 37, 62.4),
    "timm:beit_base_patch16_224": (OF_12, "head", 37, 66.1),
    "timm:cait_xxs24_224": (OF_24, "head", 131, 65.4),
    "timm:mixer_s32_224": (OF_8, "head", 17, 52.7),
    "timm:swin_tiny_patch4_window7_224": ([f"layers.{i}" for i in range(4)], "head.fc", 40, 66.5),
    "timm:maxvit_tiny_tf_224": (["stem", *STAGES], "head.fc", 91, 61.6),
    "timm:davit_tiny": (STAGES, "head.fc", 40, 66.3),
    "timm:pvt_v2_b0": (STAGES, "head", 34, 58.6),
    "timm:edgenext_small": (STAGES, "head.fc", 29, 53.0),
    # Its one attention has queries, keys and values of each head side by side.
    "timm:efficientformer_l1": (STAGES, None, 21, 49.8),
    "timm:convnext_tiny": (STAGES, "head.fc", 25, 50.7),
    "timm:efficientnet_b0": ([f"blocks.{i}" for i in (0, 1, 2, 4, 6)], "classifier", 33, 34.0),
    "timm:mobilenetv3_large_100": (
        [f"blocks.{i}" for i in (0, 1, 2, 4, 6)], "classifier", 26, 47.6,
    ),
    "timm:regnety_008": (["stem", *(f"s{i}" for i in range(1, 5))], "head.fc", 43, 61.7),
    "timm:densenet121": (
        [f"features.denseblock{i}" for i in range(1, 5)], "classifier", 119, 86.0,
    ),
    "torchvision:resnet18": (LAYERS, "fc", 17, 94.1),
    "torchvision:swin_t": (features(1, 3, 5, 7), "head", 40, 66.5),
    "torchvision:maxvit_t": (
        ["stem", *(f"blocks.{i}" for i in range(4))], "classifier.5", 70, 44.3,
    ),
    "torchvision:vit_b_16": (
        [f"encoder.layers.encoder_layer_{i}" for i in (2, 5, 8, 11)], "heads.head", 37, 66.1,
    ),
    "torchvision:mobilenet_v2": (features(1, 3, 6, 13, 18), "classifier.1", 18, 27.5),
    "torchvision:convnext_tiny": (features(1, 3, 5, 7), "classifier.2", 25, 50.7),
    "torchvision:squeezenet1_0": (features(5, 10, 12), None, 18, 94.8),
}  # fmt: skip


def without_weights(architecture):
    library, _, name = architecture.partition(":")
    with torch.device("meta"):
        if library == "timm":
            timm = pytest.importorskip("timm", reason="timm is not installed")
            network = timm.create_model(name)
        else:
            network = torchvision.models.get_model(name, weights=None)
        return network, torch.empty(2, 3, 224, 224)


@pytest.mark.parametrize("architecture", FOUND)
def test_the_choice_in(architecture):
    layers, classifier, kernels, percent = FOUND[architecture]
    network, x = without_weights(architecture)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        imcl = IMCL(network, x)
    assert imcl.layers == layers
    assert imcl.classifier == classifier
    # Whatever has nothing to act on says so, and nothing else does.
    assert [str(w.message) for w in told if "nothing to act on" in str(w.message)] == (
        [] if classifier else [str(told[-1].message)]
    )
    assert len(imcl.kernels) == kernels
    assert f"({percent}% of the weights)" in repr(imcl)
    assert f"{kernels} layers with {percent}% of the network's weights" in imcl.plan()
    for path in [*layers, *imcl.kernels]:
        assert path in imcl.plan()


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "vgg16_bn"])
@pytest.mark.parametrize("width", [16, 32, 64])
@pytest.mark.parametrize("channels", [1, 3])
def test_of_the_studies_networks_it_is_the_larger_convolutions(name, width, channels):
    """Stored rows depend on it."""
    with torch.device("meta"):
        network = models.build(name, 10, channels=channels, width=width)
    assert find_kernels(network) == [
        path for path, m in network.named_modules()
        if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1)
    ]  # fmt: skip


def test_a_stem_can_be_made_less_alike_and_a_depthwise_convolution_cannot():
    """Both have 64 kernels of 9 weights."""
    stem, depthwise = nn.Conv2d(1, 64, 3), nn.Conv2d(64, 64, 3, groups=64)
    network = nn.Sequential(stem, depthwise, nn.Conv2d(64, 9, 3))
    assert find_kernels(network) == ["0", "2"]


class Attending(nn.Module):
    """A token classifier of fused, of torch's own and of recurrent projections."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.qkv = nn.Linear(8, 24)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.lstm = nn.LSTM(8, 6, batch_first=True)
        self.widen = nn.Linear(6, 24)
        self.narrow = nn.Linear(24, 6)
        self.fc = nn.Linear(6, 3)

    def forward(self, ids):
        q, k, v = self.qkv(self.embed(ids)).chunk(3, -1)
        x = self.attention(q, k, v, need_weights=False)[0]
        x = self.lstm(x)[0]
        return self.fc((x + self.narrow(self.widen(x).relu())).mean(1))


def test_kernels_of_several_roles_are_compared_within_them():
    torch.manual_seed(0)
    network, ids, y = Attending(), torch.randint(0, 11, (4, 5)), torch.tensor([0, 1, 2, 0])
    found = find_kernels(network, ["fc"])
    assert found == ["qkv", "attention.in_proj_weight", "attention.out_proj", "narrow"]
    named = [*found, "lstm.weight_ih_l0"]
    assert [roles(network, name) for name in named] == [3, 3, 1, 1, 4]
    imcl = IMCL(network, ids, **only("kernel_weight"), kernels=named, impl="torch")
    out = imcl(ids, y)
    parts = [*network.qkv.weight.chunk(3), *network.attention.in_proj_weight.chunk(3)]
    parts += [network.attention.out_proj.weight, network.narrow.weight]
    parts += network.lstm.weight_ih_l0.chunk(4)
    expected = functional.kernel_similarity(parts, impl="reference")
    torch.testing.assert_close(out.terms["kernel_similarity"], expected.detach())
    (gradient,) = torch.autograd.grad(expected, [network.qkv.weight])
    out.loss.backward()
    plain = torch.autograd.grad(
        nn.functional.cross_entropy(network(ids), y), [network.qkv.weight]
    )[0]
    torch.testing.assert_close(network.qkv.weight.grad, plain + 50 * gradient)
    assert "qkv (24, 8), 3 roles" in imcl.plan()
    with pytest.raises(ValueError, match="kernels: .*'lstm.bias_ih_l0' has shape"):
        IMCL(network, ids, **only("kernel_weight"), kernels=["lstm.bias_ih_l0"])


def test_rows_without_roles_are_compared_with_one_another():
    """Of heads' queries, keys and values side by side, of fewer keys than queries, and of a
    projection that has no gates."""

    class Others(nn.Module):
        def __init__(self):
            super().__init__()
            self.query_key_value = nn.Linear(8, 24)
            self.qkv_proj = nn.Linear(8, 12)
            self.lstm = nn.LSTM(3, 16, proj_size=4)

    network = Others()
    paths = ["query_key_value", "qkv_proj", "lstm.weight_hr_l0", "lstm.weight_hh_l0"]
    assert [roles(network, path) for path in paths] == [1, 1, 1, 4]
    assert check_kernels(network, paths) == paths
    gates = nn.ModuleDict({"lstm": nn.LSTM(3, 1)})
    with pytest.raises(ValueError, match=r"2 rows for each of the 4 roles.*shape \(4, 3\)"):
        check_kernels(gates, ["lstm.weight_ih_l0"])


@pytest.mark.parametrize("groups", [None, nn.ModuleList([nn.Linear(8, 5)])], ids=["None", "list"])
def test_any_attribute_may_be_called_groups(groups):
    pool = nn.AdaptiveAvgPool2d(1)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), pool, nn.Flatten(), nn.Linear(8, 5))
    network.groups = groups
    assert find_kernels(network) == ["0"]


def test_codes_of_a_quantized_layer_are_no_kernels():
    network = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    codes = torch.zeros(8, 8, dtype=torch.int8)
    network[1].weight = nn.Parameter(codes, requires_grad=False)
    assert find_kernels(network) == ["0", "2"]
    with pytest.raises(ValueError, match=r"kernels: .*floating-point.*'1' is torch.int8"):
        check_kernels(network, ["0", "1"])


def test_what_makes_the_output_is_no_kernel():
    network = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 5, 1)
    )
    imcl = IMCL(network, torch.rand(2, 3, 6, 6), **only("kernel_weight"))
    assert imcl.kernels == ["2"]  # of the first 8 kernels of 3 weights can't become unlike


class Residual(nn.Module):
    """Blocks whose branches see the image in windows and with other widths."""

    def __init__(self, width, down):
        super().__init__()
        self.down = nn.Conv2d(width // 2, width, 2, 2) if down else nn.Identity()
        self.branch = nn.Sequential(nn.Linear(width, 2 * width), nn.Linear(2 * width, width))
        self.mlp = nn.Sequential(nn.Linear(width, 3 * width), nn.Linear(3 * width, width))

    def forward(self, x):
        x = self.down(x)
        b, c, h, w = x.shape
        windows = x.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 3, 5, 1)
        windows = self.branch(windows.reshape(-1, 4, c)).reshape(b, h // 2, w // 2, 2, 2, c)
        x = x + windows.permute(0, 5, 1, 3, 2, 4).reshape(b, c, h, w)
        return x + self.mlp(x.movedim(1, -1)).movedim(-1, 1)


class Windowed(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, 1, 1)
        self.stages = nn.ModuleList(
            nn.Sequential(Residual(8 * 2**i, i > 0), Residual(8 * 2**i, False)) for i in range(3)
        )
        self.fc = nn.Linear(32, 3)

    def forward(self, x):
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.fc(x.mean((2, 3)))


class Scored(nn.Module):
    """A class for each token, of which the last one's counts; and a head that doesn't run."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(6, 16)
        self.fc = nn.Linear(16, 16)
        self.score = nn.Linear(16, 5, bias=False)
        self.auxiliary = nn.Linear(16, 5)

    def forward(self, x):
        return self.score(torch.relu(self.fc(self.embed(x))))[:, -1]


def pooled_last():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 5, 3, 2), nn.ReLU(), nn.Conv2d(5, 8, 3),
        nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 5, 1), nn.Flatten(),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("make", "shape", "kernels"),
    [(Scored, (4, 7, 6), ["fc"]), (pooled_last, (2, 3, 32, 32), ["0", "2", "4"])],
)
def test_a_classifier_before_pooling_is_no_kernel(make, shape, kernels):
    """Nor is a layer one because it has as many outputs as there are classes."""
    imcl = IMCL(make(), torch.randn(shape), **only("kernel_weight"))
    assert imcl.kernels == kernels


class Rows(nn.Module):
    """As HGNet: rows of layers in each stage, and one residual block in the last."""

    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList(
            nn.ModuleList(
                nn.Sequential(nn.Conv2d(8, 8, 3, 1 + (i == 0), 1), nn.ReLU()) for i in range(5)
            )
            for _ in range(3)
        )
        self.last = Residual8()
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        for stage in self.stages:
            for layer in stage:
                x = layer(x)
        return self.fc(self.last(x).mean((2, 3)))


class Residual8(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.relu = nn.ReLU()

    def forward(self, x):
        return x + self.relu(self.conv(x))


def test_a_residual_block_elsewhere_makes_no_row_the_choice():
    network = Rows()
    assert trace(network, torch.randn(1, 8, 32, 32)).residual == {"last"}
    assert IMCL(network, torch.randn(1, 8, 32, 32)).layers == ["stages.0.4", "stages.1.4", "last"]


def test_a_residual_stream_comes_before_what_is_in_its_branches():
    torch.manual_seed(0)
    x, y = torch.rand(4, 1, 16, 16), torch.tensor([0, 1, 2, 0])
    imcl = IMCL(Windowed(), x)
    assert imcl.layers == [f"stages.{i}" for i in range(3)]
    imcl(x, y).loss.backward()
    assert all(p.grad is not None for p in imcl.heads.parameters())


@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
@pytest.mark.parametrize("how", ["whole", "in place", "by stage"])
def test_a_compiled_network_is_seen_as_it_is(backend, how):
    torch.manual_seed(0)
    network, x = FlatCNN(), torch.rand(4, 1, 16, 16)
    expected = IMCL(network, x)
    torch.manual_seed(0)
    network = FlatCNN()
    torch._dynamo.reset()
    compiled = network
    if how == "whole":
        compiled = torch.compile(network, backend=backend)
    elif how == "in place":
        network.compile(backend=backend)
    else:
        network.features.compile(backend=backend)
    imcl = IMCL(compiled, x)  # nothing has been compiled by then
    assert (imcl.layers, imcl.classifier) == (expected.layers, expected.classifier)
    assert imcl.kernels == expected.kernels


def test_a_compiled_network_trains_in_imcl():
    x, y = torch.rand(4, 1, 16, 16), torch.tensor([0, 1, 2, 0])
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        network = FlatCNN()
        if compiled:
            torch._dynamo.reset()
            network = torch.compile(network, backend="aot_eager")
        imcl = IMCL(network, x, dropout=0.0)
        for _ in range(2):
            imcl.zero_grad()
            out = imcl(x, y)
            out.loss.backward()
        found.append([out.terms, [p.grad for p in imcl.parameters()]])
    torch.testing.assert_close(found[1], found[0])


def test_inspect_prints_the_plan(capsys):
    assert main(["mobilenet_v3_small", "--plan", "--images", "2"]) == 0
    told = capsys.readouterr().out
    for line in ("1 output consistency, weight 1: 2 dropout views through classifier.3",
                 "2 multi-layer consistency, weight 3: 4 heads", "    features.3\n",
                 "% of the network's weights"):  # fmt: skip
        assert line in told
    assert main(["squeezenet1_1", "--plan", "--images", "2"]) == 0
    assert "1 output consistency: off (classifier: the network's output" in capsys.readouterr().out
    assert main(["alexnet", "--plan", "--images", "2", "--image-size", "16"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("imcl-inspect: alexnet: can't run on images (3, 16, 16); try another")
    assert told.count("\n") == 1


def test_the_share_counts_what_is_pruned():
    network = FlatCNN()
    nn.utils.prune.l1_unstructured(network.features[4], "weight", 0.3)
    imcl = IMCL(network, torch.rand(2, 1, 16, 16), **only("kernel_weight"))
    weights = sum(math.prod(network.features[i].weight.shape) for i in (0, 4, 8))
    assert f"({weights / sum(p.numel() for p in network.parameters()):.1%} of" in repr(imcl)


class Writing(nn.Module):
    """Convolutions whose outputs and logits are changed in place, as ``how`` says."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.one = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU())
        self.two = nn.Sequential(nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.SiLU())
        self.drop = nn.Dropout2d(0.0 if how == "never" else 0.2, inplace=True)
        self.fc = nn.Linear(12, 5)

    def dropped(self, x):
        if self.how == "function":
            return nn.functional.dropout(x, 0.2, self.training, True)
        return self.drop(x) if self.how in ("module", "never") else x

    def forward(self, x):
        x = self.dropped(self.two(self.dropped(self.one(x))))
        logits = self.fc(x.mean((2, 3)))
        if self.how == "logits":
            logits *= 16
        return logits


@pytest.mark.parametrize("how", ["module", "function", "never", "not"])
def test_what_is_overwritten_in_training_alone_is_no_layer(how):
    network, x = Writing(how), torch.rand(4, 3, 8, 8)
    kept = how in ("never", "not")
    if kept:
        imcl = IMCL(network, x, impl="torch")
    else:
        with pytest.warns(UserWarning, match="layers"):
            imcl = IMCL(network, x, impl="torch")
        with pytest.raises(ValueError, match="'one' is overwritten in place"):
            IMCL(network, x, layers=["one", "fc"], impl="torch")
    assert imcl.layers == (["one", "two"] if kept else [])
    imcl(x, torch.arange(4)).loss.backward()


def test_a_layer_whose_output_is_changed_in_place_is_no_classifier():
    """Its views would be what the logits were before."""
    x = torch.rand(4, 3, 8, 8)
    assert IMCL(Writing("not"), x, impl="torch").classifier == "fc"
    with pytest.warns(UserWarning, match="classifier"):
        imcl = IMCL(Writing("logits"), x, impl="torch")
    assert imcl.classifier is None and "output_consistency" not in imcl(x, torch.arange(4)).terms


def test_a_loss_type_may_be_anything():
    network, x = Writing("not"), torch.rand(4, 3, 8, 8)
    network.loss_type = int
    assert IMCL(network, x, impl="torch")(x, labels=torch.arange(4)).loss.isfinite()


class Recurrent(nn.Module):
    """A convolution and its activation that run twice."""

    def __init__(self):
        super().__init__()
        self.stem, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
        self.pool, self.fc = nn.MaxPool2d(2), nn.Linear(8, 4)

    def forward(self, x):
        x = self.block(self.block(self.stem(x)))
        return self.fc(self.last(self.pool(x)).mean((2, 3)))


def test_a_module_that_runs_twice_is_no_layer():
    imcl = IMCL(Recurrent(), torch.randn(2, 3, 8, 8))
    assert imcl.layers == ["stem", "last"]
    imcl(torch.randn(2, 3, 8, 8), torch.tensor([0, 1])).loss.backward()


class Block(nn.Module):
    def __init__(self, depth=1):
        super().__init__()
        self.mlp = nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(depth)))

    def forward(self, x):
        return x + self.mlp(x)


class Tokens(nn.Module):
    def __init__(self, windowed, depth):
        super().__init__()
        self.windows = nn.ModuleList(Block() for _ in range(windowed))
        self.blocks = nn.ModuleList(Block(depth) for _ in range(4))
        self.fc = nn.Linear(6, 3)

    def forward(self, x):
        shape = x.shape
        x = x.reshape(-1, 4, 6)
        for block in self.windows:
            x = block(x)
        x = x.reshape(shape)
        for block in self.blocks:
            x = block(x)
        return self.fc(x.mean(1))


@pytest.mark.parametrize(("windowed", "depth"), [(6, 1), (0, 5)])
def test_rows_of_windows_and_of_what_is_in_a_branch_are_passed_over(windowed, depth):
    imcl = IMCL(Tokens(windowed, depth), torch.randn(2, 16, 6))
    assert imcl.layers == [f"blocks.{i}" for i in range(4)]


class Stepping(nn.Module):
    """A stage of residual blocks that ends with the step to the next one's resolution, as those of
    transformers' Swin do, whose blocks see windows of (B, H, W, C)."""

    def __init__(self, width, depth, down):
        super().__init__()
        self.blocks = nn.Sequential(*[Windows(width) for _ in range(depth)])
        self.down = nn.Linear(4 * width, 2 * width) if down else None

    def forward(self, x):
        x = self.blocks(x)
        if self.down is None:
            return x
        parts = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).permute(0, 1, 3, 2, 4, 5)
        return self.down(parts.flatten(3))


class Windows(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.drop_path = nn.Identity()  # sees the map before anything tells how it lies
        self.attention, self.mlp = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        windows = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).transpose(2, 3)
        seen = self.attention(windows.flatten(3, 4).flatten(0, 2))
        x = x + self.drop_path(seen.reshape(windows.shape).transpose(2, 3).reshape(x.shape))
        return x + self.mlp(x.flatten(1, 2)).view(x.shape)


class Pyramid(nn.Module):
    def __init__(self, *depths):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 2, 2)
        last = len(depths) - 1
        self.stages = nn.ModuleList(
            Stepping(8 * 2**i, depth, i < last) for i, depth in enumerate(depths)
        )
        self.fc = nn.Linear(8 * 2**last, 5)

    def forward(self, x):
        x = self.stem(x).permute(0, 2, 3, 1)
        for stage in self.stages:
            x = stage(x)
        return self.fc(x.mean((1, 2)))


def test_a_stage_that_ends_with_a_step_teaches_before_it():
    imcl = IMCL(Pyramid(2, 3, 2), torch.randn(2, 3, 32, 32))
    assert imcl.layers == ["stages.0.blocks", "stages.1.blocks", "stages.2"]
    assert [head.linear.in_features for head in imcl.heads] == [8, 16]


def test_blocks_that_see_windows_are_channels_last():
    """Which only the linear layers inside tell, that have the positions in another order."""
    network = Pyramid(2, 2)
    seen = trace(network, torch.randn(1, 3, 32, 32))
    assert {"stages.0.blocks.0", "stages.0.blocks", "stages.1"} <= seen.channels_last
    assert seen.resolution("stages.0.blocks.1") == (16, 16)


@pytest.mark.parametrize("kind", ["plain", "subclass", "weight norm"])
def test_gates_are_those_of_any_recurrent_layer(kind):
    class Own(nn.LSTMCell):
        pass

    cell = (Own if kind == "subclass" else nn.LSTMCell)(6, 8)
    if kind == "weight norm":
        nn.utils.parametrizations.weight_norm(cell, "weight_hh")
    assert roles(nn.ModuleDict({"cell": cell}), "cell.weight_hh") == 4
