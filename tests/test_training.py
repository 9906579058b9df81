"""The data, the networks, the training loop and the demo, on the real digits."""

import re
import subprocess
import sys

import pytest
import torch
from torch import nn

from imcl_fast import IMCL, demo, implementations
from imcl_fast.data import load_digits, random_shift, symmetric_label_noise
from imcl_fast.models import import_torchvision, resnet18
from imcl_fast.trainer import accuracy, fit, parameter_groups

TERMS = [
    "cross_entropy",
    "output_consistency",
    "multilayer_consistency",
    "representation_similarity",
    "kernel_similarity",
]
pytestmark = pytest.mark.filterwarnings("ignore:imcl_fast. no fused kernel")


@pytest.fixture(scope="module")
def digits():
    return load_digits()


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Networks this small gain nothing from a second one, and lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def narrow(seed=0, width=4):
    torch.manual_seed(seed)
    return resnet18(10, width=width, channels=1)


# Data


def test_digits_are_split_once_and_for_all(digits):
    assert digits.train_images.shape == (1300, 1, 16, 16)
    assert digits.test_images.shape == (497, 1, 16, 16)
    assert digits.train_labels.dtype == digits.test_labels.dtype == torch.int64
    every = torch.cat([digits.train_images, digits.test_images]).flatten(1)
    assert len(every.unique(dim=0)) == 1797  # no image on both sides, none lost
    train, test = (digits.train_labels.bincount() / 1300, digits.test_labels.bincount() / 497)
    torch.testing.assert_close(train, test, rtol=0, atol=0.003)
    again = load_digits()
    assert torch.equal(again.train_images, digits.train_images)
    assert torch.equal(again.test_labels, digits.test_labels)


def test_digits_are_normalised_and_scaled(digits):
    assert digits.train_images.mean().abs() < 1e-5
    assert (digits.train_images.std() - 1).abs() < 1e-5
    assert load_digits(8).train_images.shape == (1300, 1, 8, 8)
    with pytest.raises(ValueError, match="size: expected an int of at least 8 pixels, got 7"):
        load_digits(7)


@pytest.mark.parametrize("probability", [0.0, 0.2, 0.5, 1.0])
def test_label_noise_is_symmetric(probability):
    labels = torch.arange(10).repeat(4000)
    noisy = symmetric_label_noise(labels, 10, probability, seed=1)
    wrong = noisy != labels
    assert abs(wrong.double().mean() - probability) < 0.015  # six standard deviations
    confusion = torch.zeros(10, 10).index_put_((labels, noisy), torch.tensor(1.0), accumulate=True)
    others = confusion[~torch.eye(10, dtype=torch.bool)] / 4000
    assert (others - probability / 9).abs().max() < 0.03  # every other class alike
    assert torch.equal(noisy, symmetric_label_noise(labels, 10, probability, seed=1))
    if 0 < probability < 1:
        assert not torch.equal(noisy, symmetric_label_noise(labels, 10, probability, seed=2))


def test_label_noise_touches_training_labels_only(digits):
    before = digits.train_labels.clone()
    noisy = digits.with_label_noise(0.5, seed=0)
    assert 0.4 < (noisy.train_labels != digits.train_labels).double().mean() < 0.6
    assert torch.equal(digits.train_labels, before)
    assert torch.equal(noisy.test_labels, digits.test_labels)
    assert torch.equal(noisy.train_images, digits.train_images)


@pytest.mark.parametrize("probability", [-0.1, 1.1, float("nan")])
def test_label_noise_out_of_range_is_named(digits, probability):
    with pytest.raises(ValueError, match="probability: expected a number in"):
        digits.with_label_noise(probability, seed=0)


def test_random_shift_moves_whole_images():
    images = torch.zeros(200, 2, 9, 9)
    images[:, :, 4, 4] = torch.tensor([1.0, 2.0])
    shifted = random_shift(images, 2, torch.Generator().manual_seed(0))
    assert shifted.shape == images.shape
    places = {tuple(place) for place in shifted[:, 0].nonzero()[:, 1:].tolist()}
    assert places == {(row, column) for row in range(2, 7) for column in range(2, 7)}
    assert torch.equal(shifted[:, 1], 2 * shifted[:, 0])
    assert torch.equal(shifted[:, 0].sum((1, 2)), torch.ones(200))


# Networks


def test_resnet18_is_torchvisions_but_for_its_stem_and_width():
    theirs = import_torchvision().models.resnet18(num_classes=10).state_dict()
    ours = resnet18(10, width=64).state_dict()
    assert list(ours) == list(theirs)
    differing = [key for key in ours if ours[key].shape != theirs[key].shape]
    assert differing == ["conv1.weight"]
    for key in ("conv1.weight", "layer3.0.conv2.weight"):  # kaiming normal, fan out
        fan_out = ours[key].shape[0] * 9
        assert ours[key].std() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)
    shapes = []
    network = narrow()
    for name in ("layer1", "layer2", "layer3", "layer4"):
        hook = lambda module, args, output: shapes.append(tuple(output.shape[1:]))  # noqa: E731
        network.get_submodule(name).register_forward_hook(hook)
    assert network(torch.zeros(1, 1, 16, 16)).shape == (1, 10)
    assert shapes == [(4, 16, 16), (8, 8, 8), (16, 4, 4), (32, 2, 2)]


@pytest.mark.parametrize("name", ["classes", "width", "channels"])
def test_resnet18_names_a_bad_number(name):
    with pytest.raises(ValueError, match=f"{name}: expected an int of at least 1, got 0"):
        resnet18(**{"classes": 10, name: 0})


# Training


@pytest.mark.parametrize("ways", [False, True])
def test_training_learns_the_digits(digits, ways):
    network = narrow()
    if ways:
        network = IMCL(network, digits.train_images)
    losses = []
    result = fit(
        network, digits, epochs=3, lr=0.1, progress=lambda step: losses.append(step.loss.item())
    )
    assert len(losses) == 3 * 21
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    assert result.test_accuracy > 0.5  # chance is 0.1
    state = {key: value.clone() for key, value in network.state_dict().items()}
    network.train()  # accuracy must be that of eval mode, whatever the mode
    assert accuracy(network, digits.test_images, digits.test_labels) == result.test_accuracy
    assert network.training
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    correct = network.eval()(digits.test_images).argmax(1) == digits.test_labels
    assert result.test_accuracy == correct.double().mean()
    assert list(result.terms) == (TERMS if ways else TERMS[:1])
    assert result.terms["cross_entropy"] < 1.5  # ln 10 = 2.3 before training
    assert result.seconds_per_step > 0
    expected = implementations.choose("auto", torch.device("cpu")) if ways else None
    assert result.implementation == expected


def test_the_same_seed_gives_the_same_network(digits):
    def train(seed, drawn=0):
        network = narrow()
        imcl = IMCL(network, digits.train_images, impl="torch")
        torch.rand(drawn)  # what else is drawn from torch's generator doesn't matter
        fit(imcl, digits, epochs=1, batch_size=130, lr=0.1, shift=2, seed=seed)
        return torch.cat([p.flatten() for p in network.parameters()])

    first = train(seed=5)
    assert torch.equal(train(seed=5, drawn=7), first)
    assert not torch.equal(train(seed=6), first)


def test_training_leaves_torchs_generator_alone(digits):
    network = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(256, 10)).eval()
    state = torch.get_rng_state()
    fit(network, digits, epochs=1, shift=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert not network.training


def test_methods_see_the_same_batches(digits):
    def labels_seen(network):
        seen = []
        network.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        fit(network, digits, epochs=1, batch_size=650, shift=2, seed=4)
        return torch.cat(seen[:2])

    network = narrow()
    plain = labels_seen(network)
    imcl = IMCL(narrow(), digits.train_images, impl="torch")
    assert torch.equal(labels_seen(imcl), plain)
    assert not torch.equal(plain[:650].sort(0)[0], digits.train_images[:650].sort(0)[0])


def test_weight_decay_spares_biases_and_normalisation():
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(2, 2))
    network[0].bias.requires_grad_(False)
    decayed, spared = parameter_groups(network, 0.1)
    assert decayed["weight_decay"] == 0.1 and spared["weight_decay"] == 0
    assert decayed["params"] == [network[0].weight, network[2].weight]
    assert [id(p) for p in spared["params"]] == [
        id(p) for p in (network[1].weight, network[1].bias, network[2].bias)
    ]


@pytest.mark.parametrize("name", ["epochs", "batch_size"])
def test_fit_names_a_bad_number(digits, name):
    with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
        fit(narrow(), digits, **{"epochs": 1, name: 0})


# The demo


def test_demo_ends_in_a_table(capsys):
    assert demo.main(["--seeds", "2", "--epochs", "1", "--width", "2"]) == 0
    captured = capsys.readouterr()
    assert "1300 training images, a random 50% of them with a wrong label" in captured.out
    assert "44/44" in captured.err  # the progress bar
    head, rule, plain, ways = re.search(
        r"^method .*\n-+\n.*\n.*$", captured.out, re.MULTILINE
    ).group().split("\n")
    assert re.split(r"  +", head) == [
        "method", "test accuracy", "s/step", "CE", "output", "multi-layer", "represent.",
        "kernel", "implementation",
    ]  # fmt: skip
    number = r"\d+\.\d+"
    assert re.fullmatch(
        rf"cross entropy +{number} \+- {number} % +{number} +{number}( +-){{4}}  plain torch", plain
    )
    used = implementations.choose("auto", torch.device("cpu"))
    assert re.fullmatch(rf"four ways +{number} \+- {number} %( +{number}){{6}}  {used}", ways)
    assert len(rule) == max(map(len, (head, plain, ways)))
    numbers = re.search(r"seed by seed: ([^ ]+), ([^ ]+) points.*mean ([^)]+)\)", captured.out)
    first, second, mean = map(float, numbers.groups())
    assert mean == pytest.approx((first + second) / 2, abs=0.11)


def test_demo_is_interrupted_in_peace(capsys, monkeypatch):
    runs = []

    def interrupted(*args, **kwargs):
        runs.append(args)
        if len(runs) == 3:
            raise KeyboardInterrupt
        return fit(*args, **kwargs)

    monkeypatch.setattr(demo, "fit", interrupted)
    assert demo.main(["--epochs", "1", "--width", "2"]) == 130
    out = capsys.readouterr().out
    assert "Interrupted" in out and "four ways " in out and "+-" not in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seeds", "0"], "argument --seeds: expected at least 1, got 0"),
        (["--epochs", "many"], "argument --epochs: invalid integer value: 'many'"),
        (["--label-noise", "1"], "argument --label-noise: expected a share in"),
    ],
)
def test_demo_names_bad_flags(flags, message):
    command = [sys.executable, "-m", "imcl_fast.demo", *flags]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert message in result.stderr and "Traceback" not in result.stderr
