"""The networks are torchvision's, but for their width, their stem and VGG's classifier."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from imcl_fast import IMCL
from imcl_fast.models import NAMES, build, import_torchvision, resnet18

pytestmark = pytest.mark.usefixtures("one_thread")
RESNETS = [name for name in NAMES if name.startswith("resnet")]


def resolutions(network: nn.Module, names: list[str], size: int) -> list[tuple[int, ...]]:
    """Channels and size of what the modules return for an image."""
    shapes = []
    for name in names:
        network.get_submodule(name).register_forward_hook(
            lambda module, args, output: shapes.append(tuple(output.shape[1:]))
        )
    network.eval()(torch.zeros(1, 1, size, size))
    return shapes


def test_resnet18_is_torchvisions_but_for_its_stem_and_width():
    theirs = import_torchvision().models.resnet18(num_classes=10).state_dict()
    ours = resnet18(10, width=64).state_dict()
    assert list(ours) == list(theirs)
    differing = [key for key in ours if ours[key].shape != theirs[key].shape]
    assert differing == ["conv1.weight"]
    for key in ("conv1.weight", "layer3.0.conv2.weight"):  # kaiming normal, fan out
        fan_out = ours[key].shape[0] * 9
        assert ours[key].std() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)


@pytest.mark.parametrize("name", RESNETS)
def test_large_images_get_torchvisions_resnet(name):
    torch.manual_seed(0)
    theirs = getattr(import_torchvision().models, name)(num_classes=10)
    ours = build(name, 10, image_size=64)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(ours.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize("name", RESNETS)
def test_small_images_keep_their_resolution_up_to_the_second_stage(name):
    stages = [f"layer{i}" for i in range(1, 5)]
    expansion = 4 if name == "resnet50" else 1
    network = build(name, 10, channels=1, width=4, image_size=16)
    assert resolutions(network, stages, 16) == [
        (4 * 2**i * expansion, 16 >> i, 16 >> i) for i in range(4)
    ]
    assert resolutions(build(name, 10, channels=1, width=4, image_size=96), stages, 96) == [
        (4 * 2**i * expansion, 24 >> i, 24 >> i) for i in range(4)
    ]


def test_vgg_has_torchvisions_features():
    torch.manual_seed(0)
    theirs = import_torchvision().models.vgg16_bn(init_weights=False).features
    ours = build("vgg16_bn", 10)
    ours.features.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(ours.features.eval()(x), theirs.eval()(x))
    assert ours.eval()(x).shape == (1, 10)


@pytest.mark.parametrize(
    ("size", "expected"),
    [(8, [4, 2, 2, 2, 1]), (16, [8, 4, 2, 2, 1]), (28, [14, 7, 3, 3, 1]), (32, [16, 8, 4, 2, 1]),
     (96, [48, 24, 12, 6, 3])],
)  # fmt: skip
def test_vgg_leaves_no_stage_a_single_pixel(size, expected):
    network = build("vgg16_bn", 10, channels=1, width=2, image_size=size)
    ends = [6, 13, 23, 33, 43]  # where torchvision has its pools
    shapes = resolutions(network, [f"features.{i}" for i in ends], size)
    channels = [2, 4, 8, 16, 16]
    assert shapes == [(c, pixels, pixels) for c, pixels in zip(channels, expected, strict=True)]
    # The weights fit every size.
    other = build("vgg16_bn", 10, channels=1, width=2, image_size=64)
    assert list(other.state_dict()) == list(network.state_dict())


@pytest.mark.parametrize("name", RESNETS)
@pytest.mark.parametrize(("size", "expected"), [(32, [16, 8, 4, 2]), (27, [14, 7, 4, 2])])
def test_a_resnet_s_stem_can_halve_the_resolution(name, size, expected):
    stages = [f"layer{i}" for i in range(1, 5)]
    network = build(name, 10, channels=1, width=2, image_size=size, stem_stride=2)
    assert [shape[1] for shape in resolutions(network, stages, size)] == expected
    shapes = {key: value.shape for key, value in network.state_dict().items()}
    full = build(name, 10, channels=1, width=2, image_size=size).state_dict()
    assert shapes == {key: value.shape for key, value in full.items()}  # weights fit both


@pytest.mark.parametrize(
    ("size", "expected"),
    [(16, [4, 2, 2, 2, 1]), (28, [7, 3, 3, 3, 1]), (31, [8, 4, 2, 2, 1]), (64, [16, 8, 4, 2, 1])],
)
def test_vgg_s_poolings_reckon_with_a_halving_stem(size, expected):
    network = build("vgg16_bn", 10, channels=1, width=2, image_size=size, stem_stride=2)
    shapes = resolutions(network, [f"features.{i}" for i in (6, 13, 23, 33, 43)], size)
    assert [shape[1] for shape in shapes] == expected


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("size", "stride"), [(8, 1), (16, 1), (28, 1), (64, 1), (28, 2)])
def test_every_network_learns_with_all_ways(name, size, stride):
    torch.manual_seed(0)
    x, y = torch.randn(4, 1, size, size), torch.tensor([0, 1, 2, 0])
    network = build(name, 3, channels=1, width=4, image_size=size, stem_stride=stride)
    imcl = IMCL(network, x, impl="torch")
    output = imcl(x, y)
    output.loss.backward()
    assert len(output.terms) == 5 and torch.isfinite(output.loss)
    missing = [key for key, p in imcl.model.named_parameters() if p.grad is None]
    assert missing == []


def test_the_seed_decides_the_weights():
    def weights(seed):
        torch.manual_seed(seed)
        return torch.cat([p.flatten() for p in build("vgg16_bn", 3, width=2).parameters()])

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


@pytest.mark.parametrize(("argument", "low"), [("classes", 1), ("width", 1), ("channels", 1),
                                               ("image_size", 8)])  # fmt: skip
@pytest.mark.parametrize("name", NAMES)
def test_bad_numbers_are_named(name, argument, low):
    for value in (low - 1, 2.0, True):
        message = f"{argument}: expected an int of at least {low}, got {value}"
        with pytest.raises(ValueError, match=message):
            build(name, **{"classes": 10, argument: value})


@pytest.mark.parametrize(
    ("size", "stride", "message"),
    [
        (32, 3, "expected 1 or 2, got 3"),
        (32, True, "expected 1 or 2, got True"),
        (32, 2.0, "expected 1 or 2, got 2.0"),
        (15, 2, "expected 1 for images of less than 16 pixels, got 2 for 15"),
        (64, 2, "expected 1 for a ResNet and images of 64 pixels or more, .* got 2 for 64"),
    ],
)
def test_strides_of_the_stem_that_do_not_fit_are_named(size, stride, message):
    with pytest.raises(ValueError, match=f"^stem_stride: {message}"):
        build("resnet18", 10, width=2, image_size=size, stem_stride=stride)


def test_an_unknown_network_is_refused():
    with pytest.raises(ValueError, match="name: expected one of resnet18, .*, got 'resnet19'"):
        build("resnet19", 10)
