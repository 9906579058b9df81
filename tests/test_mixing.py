"""MixUp and CutMix in the training loader and the command."""

import pytest
import torch
import torch.nn.functional as F
from training_processes import SMALL, Command, table

from imcl_fast import objectives
from imcl_fast.data.loader import TrainLoader
from imcl_fast.data.mixing import Mixing
from imcl_fast.models import import_torchvision, resnet18

import_torchvision()
BATCH = 16


def batches(digits, mixing, epoch=0, first=0, seed=5, **options):
    loader = TrainLoader(
        digits.train, digits, batch_size=BATCH, augment=True, mixing=mixing, seed=seed,
        device="cpu", **options,
    )  # fmt: skip
    found = loader.epoch(epoch, first)
    return [next(found) for _ in range(12)]


def share(labels):
    """The larger share of two different labels in a batch."""
    return round(labels[labels < 1].max().item(), 6)


@pytest.mark.parametrize("kind", ["mixup", "cutmix", "both"])
def test_images_and_labels_are_mixed_by_the_same_shares(digits, kind):
    alphas = {"mixup": (1.0, None), "cutmix": (None, 1.0), "both": (0.5, 2.0)}[kind]
    plain = batches(digits, None)
    mixed = batches(digits, Mixing(*alphas, 10))
    pasted = blended = 0
    for (x, y), (images, labels) in zip(plain, mixed, strict=True):
        assert labels.shape == (BATCH, 10) and labels.dtype == torch.float32
        one_hot = F.one_hot(y, 10).float()
        rolled = one_hot.roll(1, 0)
        other = (one_hot != rolled).any(1)
        share = (labels * one_hot).sum(1)[other][0]
        torch.testing.assert_close(labels, share * one_hot + (1 - share) * rolled)
        if (images == x).float().mean() + (images == x.roll(1, 0)).float().mean() >= 1:
            pasted += 1
            own = (images == x).all(1).float().mean((1, 2))
            assert (own >= share - 1e-6).all()  # equal pixels of both count twice
        else:
            blended += 1
            torch.testing.assert_close(images, share * x + (1 - share) * x.roll(1, 0))
    assert (blended > 0) == (kind != "cutmix") and (pasted > 0) == (kind != "mixup")


def test_what_is_drawn_depends_on_seed_epoch_and_step_alone(digits):
    mixing = Mixing(1.0, 1.0, 10)
    first = batches(digits, mixing)
    torch.rand(3)
    state = torch.get_rng_state()
    for (x, y), (images, labels) in zip(first[3:], batches(digits, mixing, first=3), strict=False):
        assert torch.equal(x, images) and torch.equal(y, labels)
    assert torch.equal(torch.get_rng_state(), state)
    of_steps = [share(y) for _, y in first]
    assert len(set(of_steps)) > 8
    for other in (batches(digits, mixing, epoch=1), batches(digits, mixing, seed=6)):
        assert [share(y) for _, y in other] != of_steps
    # The processes draw the same shares, and mix each its own part.
    parts = [batches(digits, mixing, rank=rank, world=2) for rank in range(2)]
    for (_, a), (_, b), (_, whole) in zip(*parts, first, strict=True):
        assert share(a) == share(b) == share(whole)


# The others see images at several qualities, and the command refuses to mix them.
MIXED = [method for method in objectives.METHODS if method not in objectives.OF_QUALITIES]


@pytest.mark.parametrize("method", [*MIXED, "ce"])
def test_every_method_takes_mixed_labels(method, digits):
    torch.manual_seed(0)
    images, labels = batches(digits, Mixing(1.0, None, 10))[0]
    options = {"ways": ()} if method == "ce" else {}
    objective = objectives.build(
        "imcl" if method == "ce" else method, resnet18(10, width=2, channels=1), images,
        label_smoothing=0.1, **options,
    )  # fmt: skip
    out = objective(images, labels)
    expected = F.cross_entropy(out.logits, labels, label_smoothing=0.1)
    torch.testing.assert_close(out.terms["cross_entropy"].mean(), expected.detach(),
                               rtol=1 if "song" in method else 1e-5, atol=1e-6)  # fmt: skip
    out.loss.backward()


def test_the_command_mixes_wrong_labels_too(tmp_path):
    runs = {}
    for name, more in {"plain": [], "mixed": ["--mixup", "0.8", "--cutmix", "1"]}.items():
        command = Command([*SMALL, *more, "--run-dir", str(tmp_path / name)], tmp_path)
        assert command.wait() == 0, command.err
        runs[name] = table(tmp_path / name / "metrics.csv")
    assert "a wrong label), mixed by mixup 0.8 or cutmix 1, measured on" in command.out
    assert runs["plain"][-1]["train_loss"] != runs["mixed"][-1]["train_loss"]
    assert float(runs["mixed"][-1]["fit_noisy"]) <= 1
    command = Command([*SMALL, "--mixup", "0", "--run-dir", str(tmp_path / "no")], tmp_path)
    assert command.wait() == 2
    assert command.err.count("\n") == 1 and "--mixup: expected more than 0, got 0" in command.err


@pytest.mark.parametrize("alpha", [0.0, float("inf"), "1"])
def test_bad_numbers_are_named(alpha):
    with pytest.raises((TypeError, ValueError), match="cutmix: expected a number"):
        Mixing(None, alpha, 10)


def test_shares_are_drawn_by_the_alpha_that_is_given():
    kinds = Mixing(0.3, 0.7, classes=4)._transform.transforms
    assert [(type(kind).__name__, kind.alpha) for kind in kinds] == [
        ("MixUp", 0.3),
        ("CutMix", 0.7),
    ]
