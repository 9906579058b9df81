"""Two torch Datasets of a user's own, given to the Trainer."""

import random

import numpy
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset
from training_processes import config

from imcl_fast import Trainer
from imcl_fast.data import DataError, load
from imcl_fast.data.loader import TestLoader, TrainLoader
from imcl_fast.data.own import from_torch
from imcl_fast.models import import_torchvision
from imcl_fast.runs.errors import UsageError
from imcl_fast.training.progress import Observer

import_torchvision()
DIGITS = load("digits")
QUIET = Observer()


class Own(Dataset):
    """Digits through transforms of one's own, which draw from three generators."""

    def __init__(self, split, count, kind="float", jitter=False):
        self.images, self.digits = split.images[:count], split.labels[:count].tolist()
        self.kind, self.jitter, self.read = kind, jitter, 0

    def __len__(self):
        return len(self.digits)

    def __getitem__(self, index):
        self.read += 1
        image = self.images[index]
        if self.kind == "PIL":
            return Image.fromarray(image[0].numpy()), self.digits[index]
        if self.kind == "uint8":
            return image, self.digits[index]
        image = image / 255
        if self.jitter:
            drawn = torch.rand(1) + random.random() + numpy.random.random()
            image = image + 0.1 * drawn
        return image, self.digits[index]


def pair(kind="float", jitter=False):
    return Own(DIGITS.train, 200, kind, jitter), Own(DIGITS.test, 100, kind)


@pytest.mark.parametrize(
    "kind", [pytest.param("float", marks=pytest.mark.slow), "uint8", "PIL"]
)
def test_a_trainer_takes_them(kind):
    train, test = pair(kind)
    trainer = Trainer(config(train_images=None, epochs=8, width=4, label_noise=0.1),
                      data_set=(train, test), observer=QUIET)  # fmt: skip
    summary = trainer.fit()
    assert (summary["dataset"], summary["train_images"]) == ("own", 200)
    assert summary["last_test_accuracy"] > 0.3  # chance is 0.1


@pytest.mark.parametrize("kind", ["float", "uint8", "PIL"])
def test_images_come_as_they_are_or_normalised(kind):
    found = from_torch(*pair(kind))
    images, labels = next(iter(TestLoader(found.test, found, batch_size=100, device="cpu")))
    raw = DIGITS.test.images[:100] / 255
    if kind == "float":
        torch.testing.assert_close(images, raw)
    else:
        torch.testing.assert_close(images, (raw - found.mean[0]) / found.std[0])
        some = DIGITS.train.images[:200] / 255
        assert found.mean[0] == pytest.approx(some.mean().item(), rel=1e-5)
    assert torch.equal(labels, DIGITS.test.labels[:100])
    assert found.shape == (1, 16, 16) and found.classes == tuple("0123456789")


def batches(found, epoch=0, first=0, workers=0):
    loader = TrainLoader(
        found.train, found, batch_size=40, augment=True, seed=3, device="cpu", workers=workers
    )
    return [tuple(batch) for batch in loader.epoch(epoch, first)]


def test_what_the_transforms_draw_depends_on_seed_epoch_and_step_alone():
    found = from_torch(*pair(jitter=True))
    whole = batches(found)
    torch.rand(5), random.random(), numpy.random.random()
    states = torch.get_rng_state(), random.getstate(), str(numpy.random.get_state())
    for again in (batches(found), batches(found, workers=2)):
        for (x, y), (images, labels) in zip(whole, again, strict=True):
            assert torch.equal(x, images) and torch.equal(y, labels)
    for (x, _), (images, _) in zip(whole[2:], batches(found, first=2), strict=True):
        assert torch.equal(x, images)
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert str(numpy.random.get_state()) == states[2]
    drawn = torch.cat([(x - x.amin((1, 2, 3), True)).flatten() for x, _ in whole])
    assert drawn.isfinite().all()
    lowest = torch.cat([x.amin((1, 2, 3)) for x, _ in whole])
    assert len(lowest.unique()) > 150  # each sample has a draw of its own
    other = torch.cat([x.amin((1, 2, 3)) for x, _ in batches(found, epoch=1)])
    assert not torch.equal(lowest, other)


def test_labels_are_read_from_lists_where_these_are_the_items():
    train, test = pair()
    train.targets = train.digits
    found = from_torch(Subset(train, range(0, 200, 2)), test)
    assert train.read <= 150  # those that were measured, and the first of all
    assert torch.equal(found.train.labels, DIGITS.train.labels[:200:2])
    train.targets = [9 - label for label in train.digits]  # and not what its items say
    found = from_torch(train, TensorDataset(torch.rand(8, 1, 16, 16), torch.arange(8)))
    assert torch.equal(found.train.labels, DIGITS.train.labels[:200])
    assert torch.equal(found.test.labels, torch.arange(8))


class InFives(Dataset):
    """Labels of its items are those of its list modulo 5; it may say so."""

    def __init__(self, labels, says_so):
        self.targets = labels
        if says_so:
            self.target_transform = lambda label: label % 5

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        return torch.zeros(1, 8, 8), self.targets[index] % 5


@pytest.mark.parametrize("says_so", [False, True])
def test_labels_are_those_of_the_items_wherever_the_lists_differ(says_so):
    train, test = InFives([6, 1, 7, 9], says_so), InFives([3, 2, 6, 8], says_so)
    found = from_torch(train, Subset(test, [0, 3, 2]))  # whose first label is the list's
    assert found.train.labels.tolist() == [1, 1, 2, 4]
    assert found.test.labels.tolist() == [3, 3, 1]
    assert len(found.classes) == 5


class Series:
    """A column of a table that has been split: its index isn't by place."""

    def __init__(self, values):
        self.values = list(values)

    def __len__(self):
        return len(self.values)

    def __getitem__(self, index):
        raise KeyError(index)

    def __array__(self, dtype=None, copy=None):
        return numpy.array(self.values, dtype)

    def tolist(self):
        return self.values


@pytest.mark.parametrize(
    ("listed", "reads"),
    [(lambda y: Series(y), False), (lambda y: numpy.array(y), False), (torch.tensor, False),
     (lambda y: [str(x) for x in y], True), (lambda y: 10, True), (lambda y: y.__len__, True),
     (lambda y: dict.fromkeys(range(len(y)), 0), True), (lambda y: [x + 0.5 for x in y], True)],
)  # fmt: skip
def test_whatever_is_called_labels(listed, reads):
    train, test = pair("uint8")
    train.labels = listed(train.digits)
    data = from_torch(train, test)
    assert data.train.labels.tolist() == train.digits
    measured = 200 + 1  # images that mean and deviation are taken of, and one's size
    assert (train.read - measured > 100) is reads


def test_a_target_transform_is_heeded_where_few_labels_differ():
    labels = [4] * 2000
    labels[777] = 9  # not among the items that are looked at
    found = from_torch(InFives(labels, True), InFives([0, 1], True))
    assert found.train.labels.unique().tolist() == [4]


class Streamed(IterableDataset):
    def __iter__(self):
        return iter(())


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (Streamed(), TypeError, "data_set: expected a DataSet, or two torch Datasets.*Streamed"),
        ((Streamed(), pair()[1]), TypeError, "data_set: expected a map-style Dataset as train"),
        ((pair()[0], Subset(pair()[1], [])), UsageError, "data_set: expected images in test"),
        ((TensorDataset(torch.rand(4, 16, 16), torch.arange(4)), pair()[1]), UsageError,
         r"data_set: expected images \(C, H, W\) of one size, got \(16, 16\)"),
        ((TensorDataset(torch.zeros(4, 1, 2, 2).long(), torch.arange(4)), pair()[1]), UsageError,
         "data_set: expected images of uint8 or a floating dtype, got torch.int64"),
        ((TensorDataset(torch.rand(4, 1, 2, 2), torch.arange(4) - 1), pair()[1]), UsageError,
         "data_set: expected labels of 2 classes or more, from 0 on, got labels from -1"),
        (([(torch.rand(1, 8, 8), "cat")], pair()[1]), UsageError,
         "data_set: expected int labels in train, got str"),
        (([(torch.rand(1, 8, 8), y) for y in (0, 1.7)], pair()[1]), UsageError,
         "data_set: expected int labels in train, got float at 1"),
        ((TensorDataset(torch.rand(9, 1, 8, 8), torch.rand(9)), pair()[1]), UsageError,
         "data_set: expected int labels in train, got torch.float32 at 0"),
        (([{"image": torch.rand(1, 8, 8), "label": 0}], pair()[1]), UsageError,
         r"data_set: expected items \(image, label\) in train, got dict"),
        ((pair("uint8")[0], pair("float")[1]), UsageError,
         r"data_set: expected images of one size and kind .*uint8 and .* floating"),
        ((pair()[0], TensorDataset(torch.rand(9, 1, 8, 8), torch.arange(9))), UsageError,
         r"data_set: expected images of one size and kind .*\(1, 16, 16\).*\(1, 8, 8\)"),
    ],
)  # fmt: skip
def test_other_data_is_refused(given, error, message):
    with pytest.raises(error, match=message):
        Trainer(config(train_images=None), data_set=given, observer=QUIET).fit()


def test_an_image_size_is_for_the_transform():
    with pytest.raises(UsageError, match="image_size: expected None with Datasets of your own"):
        Trainer(config(image_size=8), data_set=pair(), observer=QUIET).fit()
    assert issubclass(DataError, ValueError)
