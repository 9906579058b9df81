"""IMCL around networks of many kinds, taken unmodified from libraries or written by hand."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from imcl_fast import IMCL, calls, functional, reference
from imcl_fast.models import import_torchvision

import_torchvision()
from torchvision.models import convnext, mobilenet_v3_small, resnet, vgg  # noqa: E402
from torchvision.models.vision_transformer import VisionTransformer  # noqa: E402

CLASSES = 7


class HandWritten(nn.Module):
    """Blocks, tokens and a classifier of which nothing but the names is usual."""

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(10, CLASSES)
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.body = nn.ModuleDict({"a": self.block(6, 8), "b": self.block(8, 10)})

    @staticmethod
    def block(inputs, outputs):
        conv = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.SiLU())

    def forward(self, x):
        x = self.stem(x).tanh()
        for block in self.body.values():
            x = block(x)
        return self.out(x.amax((2, 3)))


def vgg16_bn():
    """torchvision's, of an eighth of the width."""
    widths = [w if w == "M" else w // 8 for w in vgg.cfgs["D"]]
    with torch.device("meta"):  # its own classifier has 100 million weights
        network = vgg.VGG(nn.Identity(), CLASSES, init_weights=False)
    network.features = vgg.make_layers(widths, batch_norm=True)
    network.avgpool = nn.AdaptiveAvgPool2d(1)
    for index, (inputs, outputs) in {0: (64, 64), 3: (64, 64), 6: (64, CLASSES)}.items():
        network.classifier[index] = nn.Linear(inputs, outputs)
    return network


def convnext_tiny():
    """torchvision's, of a twelfth of the width and a third of the depth."""
    stages = [(8, 16, 1), (16, 32, 1), (32, 64, 3), (64, None, 1)]
    return convnext.ConvNeXt([convnext.CNBlockConfig(*s) for s in stages], num_classes=CLASSES)


def vit():
    return VisionTransformer(
        image_size=32, patch_size=8, num_layers=6, num_heads=2, hidden_dim=16, mlp_dim=32,
        num_classes=CLASSES,
    )


def timm_resnet18():
    timm = pytest.importorskip("timm", reason="timm is not installed")
    return timm.create_model("resnet18", num_classes=CLASSES)


STAGES = [f"layer{i}" for i in (1, 2, 3, 4)]
NETWORKS = {
    "resnet18": (lambda: resnet.resnet18(num_classes=CLASSES), 64, STAGES, "fc"),
    "resnet50": (lambda: resnet.resnet50(num_classes=CLASSES), 48, STAGES, "fc"),
    "vgg16_bn": (vgg16_bn, 32, [f"features.{i}" for i in (5, 12, 22, 32, 42)], "classifier.6"),
    "mobilenet_v3_small": (
        lambda: mobilenet_v3_small(num_classes=CLASSES),
        64,
        [f"features.{i}" for i in (0, 1, 3, 8, 12)],
        "classifier.3",
    ),
    "convnext_tiny": (convnext_tiny, 64, [f"features.{i}" for i in (1, 3, 5, 7)], "classifier.2"),
    "vit": (vit, 32, [f"encoder.layers.encoder_layer_{i}" for i in (1, 2, 4, 5)], "heads.head"),
    "timm resnet18": (timm_resnet18, 64, STAGES, "fc"),
    "hand-written": (HandWritten, 16, ["body.a", "body.b"], "out"),
}
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", NETWORKS)
def test_imcl_attaches_to(name):
    make, size, layers, classifier = NETWORKS[name]
    torch.manual_seed(0)
    network = make()
    plain = copy.deepcopy(network)
    x, y = torch.rand(2, 3, size, size), torch.tensor([1, CLASSES - 1])
    imcl = IMCL(network, x, dropout=0.0)
    assert imcl.layers == layers
    assert imcl.classifier == classifier

    # The plain network is what it was.
    assert list(imcl.model.state_dict()) == list(plain.state_dict())
    imcl.eval(), plain.eval()
    assert torch.equal(imcl(x), plain(x))

    # Its features as they leave the layers, one more time from outside.
    features = {}
    for layer in layers:
        plain.get_submodule(layer).register_forward_hook(
            lambda module, args, output, layer=layer: features.setdefault(layer, output)
        )
    imcl.train(), plain.train()
    torch.manual_seed(1)
    logits = plain(x)
    torch.manual_seed(1)
    out = imcl(x, y)
    assert torch.equal(out.logits, logits)
    tokens = name == "vit"
    maps = [f.transpose(1, 2) if tokens else f for f in features.values()]
    expected = reference.pairwise_penalty(
        maps, penalty="square", center=True, eps=1e-12, batched=True
    )
    torch.testing.assert_close(
        out.terms["representation_similarity"], expected.detach(), rtol=1e-3, atol=1e-5
    )
    heads = [
        head.linear(f.flatten(2).mean(2)) for head, f in zip(imcl.heads, maps, strict=False)
    ]
    cross_entropy = sum(F.cross_entropy(z, y) for z in heads) / len(heads)
    heads.append(logits)
    divergence = functional.collaborative_consistency(heads, None, impl="reference")
    expected = cross_entropy + divergence / len(heads)
    torch.testing.assert_close(
        out.terms["multilayer_consistency"], expected.detach(), rtol=1e-4, atol=1e-5
    )

    # Everything learns, finitely.
    out.loss.backward()
    assert len(out.terms) == 5 and out.loss.isfinite()
    for key, p in imcl.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), key


def test_tokens_are_seen_as_pixels_without_a_copy(monkeypatch):
    network, x, y = vit(), torch.rand(2, 3, 32, 32), torch.tensor([0, 1])
    imcl = IMCL(network, x)
    seen, made = [], []
    similarity = calls.pairwise

    def spy(xs, penalty, center, eps, batched, impl):
        if batched:  # not the kernels
            seen.extend(xs)
        return similarity(xs, penalty, center, eps, batched, impl)

    monkeypatch.setattr(calls, "pairwise", spy)
    for layer in imcl.layers:
        network.get_submodule(layer).register_forward_hook(lambda m, a, output: made.append(output))
    imcl(x, y)
    assert [tuple(f.shape) for f in seen] == [(2, 16, 17)] * 4  # (B, C, T), a class token with it
    assert [f.data_ptr() for f in seen] == [f.data_ptr() for f in made]
    assert [head.linear.in_features for head in imcl.heads] == [16] * 3


def test_tokens_compile_whole():
    torch.manual_seed(0)
    network = VisionTransformer(16, 8, 4, 2, 8, 8, num_classes=CLASSES)
    x, y = torch.rand(2, 3, 16, 16), torch.tensor([0, 1])
    imcl = IMCL(network, x, dropout=0.0)
    expected = imcl(x, y)
    torch._dynamo.reset()
    out = torch.compile(imcl, fullgraph=True, backend="aot_eager")(x, y)
    torch.testing.assert_close(out.loss, expected.loss)
    out.loss.backward()
    assert all(p.grad is not None for p in imcl.parameters())


# Which of its dimensions are channels


class OneBlock(nn.Module):
    def __init__(self, block, shape):
        super().__init__()
        self.block = block
        self.fc = nn.Linear(block(torch.zeros(shape))[0].numel(), CLASSES)

    def forward(self, x):
        return self.fc(self.block(x).flatten(1))


@pytest.mark.parametrize(
    ("block", "shape", "channel_axis"),
    [
        (nn.Sequential(nn.Conv1d(3, 8, 3), nn.ReLU()), (3, 9), 1),
        (nn.Sequential(nn.Conv3d(3, 8, 3), nn.GroupNorm(2, 8)), (3, 4, 5, 6), 1),
        (nn.Sequential(nn.Linear(3, 8), nn.GELU()), (9, 3), -1),
        (nn.Sequential(nn.Linear(3, 8), nn.GELU()), (4, 5, 3), -1),
        (nn.TransformerEncoderLayer(6, 2, 8, 0.0, batch_first=True), (9, 6), -1),
        # As many rows and columns as channels, and linear layers within.
        (convnext.CNBlock(8, 1.0, 0.0), (8, 8, 8), 1),
    ],
    ids=["1d", "3d", "tokens", "rows of tokens", "encoder layer", "ambiguous"],
)
def test_channels_are_told_from_positions(block, shape, channel_axis):
    torch.manual_seed(0)
    x, y = torch.randn(2, *shape), torch.tensor([0, 1])
    network = OneBlock(block, x.shape)
    ways = dict(output_weight=0.0, multilayer_weight=0.0, kernel_weight=0.0)
    imcl = IMCL(network, x, ["block"], center=False, **ways)
    features = block(x).movedim(channel_axis, 1).detach()
    expected = reference.pairwise_penalty(
        [features], penalty="square", center=False, eps=1e-12, batched=True
    )
    torch.testing.assert_close(
        imcl(x, y).terms["representation_similarity"], expected, rtol=1e-4, atol=1e-6
    )


def test_blocks_of_one_dimension_that_end_in_a_pooling():
    def block(i, o):
        return nn.Sequential(nn.Conv1d(i, o, 3, padding=1), nn.ReLU(), nn.MaxPool1d(2))

    net = nn.Sequential(
        block(2, 5), block(5, 6), block(6, 7),
        nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(7, 3),
    )  # fmt: skip
    imcl = IMCL(net, torch.randn(2, 2, 32))
    assert imcl.layers == ["0", "1", "2"]
    assert [head.linear.in_features for head in imcl.heads] == [5, 6]


def test_a_layer_norm_of_maps_has_its_channels_first():
    net = nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1), convnext.LayerNorm2d(5), nn.GELU(), nn.MaxPool2d(2),
        nn.Conv2d(5, 6, 3, padding=1), convnext.LayerNorm2d(6), nn.GELU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4),
    )
    imcl = IMCL(net, torch.randn(2, 3, 8, 8))
    assert imcl.layers == ["2", "6"]
    assert [head.linear.in_features for head in imcl.heads] == [5]
