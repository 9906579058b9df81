"""Data sets in their original formats, wrong labels, parts of splits, and loaders."""

from __future__ import annotations

import functools
import gzip
import hashlib
import http.server
import io
import os
import pickle
import tarfile
import threading
from dataclasses import replace

import data_files
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from imcl_fast.data import NAMES, DataError, MissingData, Split, fashion_mnist, load
from imcl_fast.data.augmentation import PaddedCrop
from imcl_fast.data.dataset import DataSet, in_memory, resize
from imcl_fast.data.loader import TestLoader, TrainLoader
from imcl_fast.data.noise import label_noise
from imcl_fast.data.pickles import read_pickle
from imcl_fast.data.split import subset, validation_split
from imcl_fast.models import import_torchvision

INSTALLED = fashion_mnist.DEBIAN
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def no_debian_package(monkeypatch, tmp_path):
    """Fashion-MNIST may be installed on one machine and not on another."""
    monkeypatch.setattr(fashion_mnist, "DEBIAN", tmp_path / "no" / "package")


FASHION_IMAGES = "train-images-idx3-ubyte.gz"
SHAPES = {
    "fashion-mnist": ((1, 28, 28), 10, PaddedCrop(2, flip=True)),
    "cifar10": ((3, 32, 32), 10, PaddedCrop(4, flip=True)),
    "cifar100": ((3, 32, 32), 100, PaddedCrop(4, flip=True)),
    "stl10": ((3, 96, 96), 10, PaddedCrop(12, flip=True)),
    "imagenet32": ((3, 32, 32), 1000, PaddedCrop(4, flip=True)),
}


def one_line(raised) -> str:
    message = str(raised.value)
    assert "\n" not in message
    return message


# Data sets


@pytest.mark.parametrize("name", data_files.WRITERS)
def test_original_files_are_read(name, tmp_path):
    written = data_files.WRITERS[name](tmp_path)
    data = load(name, tmp_path)
    shape, classes, augmentation = SHAPES[name]
    assert (data.name, data.shape, data.augmentation) == (name, shape, augmentation)
    assert len(data.classes) == len(set(data.classes)) == classes
    for split, images, labels in (
        (data.train, written.train_images, written.train_labels),
        (data.test, written.test_images, written.test_labels),
    ):
        assert split.images.dtype == torch.uint8 and split.images.is_contiguous()
        assert np.array_equal(split.images, images)
        assert split.labels.dtype == torch.int64
        assert split.labels.tolist() == labels.tolist()
    pixels = written.train_images / 255
    np.testing.assert_allclose(data.mean, pixels.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(data.std, pixels.std((0, 2, 3)), rtol=1e-9)


def test_digits_are_split_once_and_for_all():
    digits = load("digits")
    assert digits.train.images.shape == (1300, 1, 16, 16)
    assert digits.test.images.shape == (497, 1, 16, 16)
    assert digits.train.labels.dtype == digits.test.labels.dtype == torch.int64
    every = torch.cat([digits.train.images, digits.test.images]).flatten(1)
    assert len(every.unique(dim=0)) == 1797  # no image on both sides, none lost
    train, test = (split.labels.bincount() / len(split) for split in (digits.train, digits.test))
    torch.testing.assert_close(train, test, rtol=0, atol=0.003)
    again = load("digits")
    assert torch.equal(again.train.images, digits.train.images)
    assert torch.equal(again.test.labels, digits.test.labels)
    assert digits.augmentation == PaddedCrop(2, fill="edge")  # one pixel of the original 8x8


@pytest.mark.parametrize(("name", "size"), [("digits", 8), ("digits", 24), ("stl10", 48)])
def test_images_are_scaled_on_request(name, size, tmp_path):
    if name == "stl10":
        data_files.write_stl10(tmp_path)
    data = load(name, tmp_path, image_size=size)
    native = load(name, tmp_path, image_size=8 if name == "digits" else None)
    assert data.shape[1:] == data.train.images.shape[2:] == data.test.images.shape[2:]
    assert data.shape[1:] == (size, size)
    assert data.augmentation.pad == native.augmentation.pad * size / native.shape[1]
    for image, scaled in zip(native.test.images[:3], data.test.images[:3], strict=True):
        for channel, result in zip(image, scaled, strict=True):
            exact = Image.fromarray(channel.numpy()).resize((size, size), Image.Resampling.BILINEAR)
            assert np.abs(np.asarray(exact).astype(int) - result.numpy()).max() <= 1  # rounding


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"digits"}))
@pytest.mark.parametrize("given_root", [True, False])
def test_missing_data_is_said_in_one_sentence(name, given_root, tmp_path):
    with pytest.raises(MissingData) as raised:
        load(name, tmp_path / "nothing" if given_root else None)
    message = one_line(raised)
    assert message.startswith(f"{name}: ")
    if given_root:
        assert str(tmp_path / "nothing") in message
    elif name != "fashion-mnist":
        assert "--data-root" in message
    source = {"folder": "a folder of image files per class", "imagenet32": "image-net.org"}
    assert source.get(name, "download=True") in message
    if name == "fashion-mnist":
        assert "dataset-fashion-mnist" in message and str(fashion_mnist.DEBIAN) in message


def test_missing_files_are_named(tmp_path):
    data_files.write_cifar10(tmp_path)
    folder = tmp_path / "cifar-10-batches-py"
    (folder / "data_batch_3").unlink()
    with pytest.raises(MissingData, match=f"cifar10: data_batch_3 not found in {folder} or"):
        load("cifar10", tmp_path)


def test_fashion_mnist_is_found_in_torchvisions_and_debians_place(tmp_path, monkeypatch):
    written = data_files.write_fashion_mnist(tmp_path / "FashionMNIST" / "raw")
    assert np.array_equal(load("fashion-mnist", tmp_path).test.images, written.test_images)
    monkeypatch.setattr(fashion_mnist, "DEBIAN", tmp_path / "FashionMNIST" / "raw")
    assert np.array_equal(load("fashion-mnist").test.images, written.test_images)


def test_the_real_fashion_mnist_is_read(monkeypatch):
    if not (INSTALLED / FASHION_IMAGES).is_file():
        pytest.skip(f"Debian's package dataset-fashion-mnist isn't installed in {INSTALLED}")
    monkeypatch.setattr(fashion_mnist, "DEBIAN", INSTALLED)
    data = load("fashion-mnist")
    assert data.train.labels.bincount().tolist() == [6000] * 10
    assert data.test.labels.bincount().tolist() == [1000] * 10
    # The mean image of each class is the most alike on both sides.
    means = torch.stack([
        split.images[split.labels == label].double().mean(0).flatten()
        for split in (data.train, data.test) for label in range(10)
    ])  # fmt: skip
    assert torch.cdist(means[:10], means[10:]).argmin(1).tolist() == list(range(10))


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="name: expected one of digits, fashion-mnist, .* 'mnist'"):
        load("mnist")


@pytest.mark.parametrize("size", [7, -1])
def test_a_bad_image_size_is_named(size, tmp_path):
    data_files.write_folder(tmp_path)
    for name in ("digits", "folder"):
        with pytest.raises(ValueError, match="image_size: expected at least 8 pixels, got"):
            load(name, tmp_path, image_size=size)


# Damage

TEST_BATCH = "cifar-10-batches-py/test_batch"


def truncated(path):
    path.write_bytes(path.read_bytes()[:-5])


def emptied(path):
    path.write_bytes(b"")


def shortened_inside(path):
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-7]))


def one_image_less(path):
    path.write_bytes(path.read_bytes()[: -3 * 96 * 96])


def label_too_high(path):
    path.write_bytes(bytes([11]) + path.read_bytes()[1:])


def label_zero(path):
    path.write_bytes(bytes([0]) + path.read_bytes()[1:])


def a_name_less(path):
    path.write_text("\n".join(path.read_text().split()[1:]))


def other_content(content):
    return lambda path: data_files.write_pickle(path, content)


def batch(**changes):
    content = {"data": np.zeros((2, 3072), np.uint8), "labels": [0, 1]} | changes
    return other_content({key: value for key, value in content.items() if value is not None})


@pytest.mark.parametrize(
    ("name", "file", "damage", "message"),
    [
        ("fashion-mnist", FASHION_IMAGES, truncated, "can't be unpacked"),
        ("fashion-mnist", FASHION_IMAGES, emptied, "expected an IDX file"),
        ("fashion-mnist", FASHION_IMAGES, shortened_inside, "expected 9408 bytes .* got 9401"),
        ("fashion-mnist", FASHION_IMAGES,
         lambda path: data_files.write_idx(path, np.zeros((3, 28, 28), np.uint8)),
         "expected 3 labels, as train-images-idx3-ubyte.gz has images, got 12"),
        ("fashion-mnist", FASHION_IMAGES,
         lambda path: data_files.write_idx(path, np.zeros(12, np.uint8)), "3-dimensional"),
        ("cifar10", TEST_BATCH, truncated, "can't be read as a pickle"),
        ("cifar10", TEST_BATCH, emptied, "can't be read as a pickle"),
        ("cifar10", TEST_BATCH, other_content([1]), "expected a pickled dict, got list"),
        ("cifar10", TEST_BATCH, batch(data=None), "expected 'data' to be .* got None"),
        ("cifar10", TEST_BATCH, batch(data=np.zeros((2, 3071), np.uint8)), r"got \(2, 3071\)"),
        ("cifar10", TEST_BATCH, batch(data=np.zeros((2, 3072), np.int32)), "got .* torch.int32"),
        ("cifar10", TEST_BATCH, batch(labels=None), "expected 'labels' to be a list of classes"),
        ("cifar10", TEST_BATCH, batch(labels=["cat", "dog"]), "expected 'labels' to be a list"),
        ("cifar10", TEST_BATCH, batch(labels=[1, 2, 3]), "expected 'labels' to be 2 ints"),
        ("cifar10", TEST_BATCH, batch(labels=[1.0, 2.0]), "expected 'labels' to be 2 ints"),
        ("cifar10", TEST_BATCH, batch(labels=[3, 10]), "the test labels go from 3 to 10"),
        ("cifar10", TEST_BATCH, batch(data=np.zeros((0, 3072), np.uint8), labels=[]), "hold none"),
        ("cifar10", "cifar-10-batches-py/batches.meta",
         other_content({"label_names": ["cat"]}), "expected 'label_names' to be the 10 names"),
        ("cifar100", "cifar-100-python/meta", other_content({}), "the 100 names .* got None"),
        ("stl10", "stl10_binary/train_X.bin", truncated, "expected a multiple of 27648 bytes"),
        ("stl10", "stl10_binary/train_X.bin", emptied, "expected a multiple of 27648 bytes"),
        ("stl10", "stl10_binary/train_X.bin", one_image_less, "expected 3 labels, .* got 4"),
        ("stl10", "stl10_binary/train_y.bin", label_too_high, "the training labels go from"),
        ("stl10", "stl10_binary/train_y.bin", label_zero, "the training labels go from -1"),
        ("stl10", "stl10_binary/class_names.txt", a_name_less, "expected 10 names .* got 9"),
        ("imagenet32", "Imagenet32_val/val_data", batch(labels=[1, 1001]), "go from 0 to 1000"),
        ("imagenet32", "Imagenet32_val/val_data", batch(labels=[0, 1]), "go from -1 to 0"),
    ],
)  # fmt: skip
def test_damage_is_named(name, file, damage, message, tmp_path):
    data_files.WRITERS[name](tmp_path)
    damage(tmp_path / file)
    with pytest.raises(DataError, match=message) as raised:
        load(name, tmp_path)
    # The file, or where the fault lies between files, the data set.
    assert one_line(raised).startswith((str(tmp_path), f"{name}: "))


def test_images_of_two_sizes_are_refused(tmp_path):
    data_files.write_fashion_mnist(tmp_path)
    data_files.write_idx(tmp_path / "t10k-images-idx3-ubyte.gz", np.zeros((5, 20, 20), np.uint8))
    with pytest.raises(DataError, match="fashion-mnist: expected images of one size"):
        load("fashion-mnist", tmp_path)


# Pickles


class Evil:
    """Leaves a mark where its pickle is executed."""

    def __init__(self, function, *args):
        self.reduced = (function, args)

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("name", ["cifar10", "imagenet32"])
def test_pickles_run_no_code(name, protocol, tmp_path):
    data_files.WRITERS[name](tmp_path)
    mark = tmp_path / "mark"
    files = {"cifar10": TEST_BATCH, "imagenet32": "Imagenet32_train/train_data_batch_10"}
    path = tmp_path / files[name]
    content = {"data": Evil(os.mkdir, str(mark)), "labels": [0]}
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    with pytest.raises(DataError, match=rf"refused, .* it names {os.mkdir.__module__}\.mkdir"):
        load(name, tmp_path)
    assert not mark.exists()
    pickle.loads(path.read_bytes())  # it would have worked
    assert mark.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"(S'1'\nibuiltins\neval\n.",  # the old way to call
        b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93\x8c\x011\x85R.",
        b"cnumpy\nload\n(S'file'\ntR.",
        b"cnumpy.core.multiarray\n_reconstruct.__globals__\n.",
        b"ctorch\nload\n.",
        b"c_codecs\ndecode\n(S'a'\nS'latin1'\ntR.",
        b"c_codecs\nencode\n(Va\nVrot13\ntR.",
        pickle.dumps({"data": np.array([object], dtype=object)}),
        pickle.dumps({"data": np.zeros(1, [("a", "O")])}),
        pickle.dumps({"data": np.zeros(2, ">i4")}, protocol=2),
    ],
)
def test_pickles_may_name_nothing_but_plain_arrays(content, tmp_path):
    (tmp_path / "batch").write_bytes(content)
    with pytest.raises(DataError, match="refused, since it is no mere data: it ") as raised:
        read_pickle(tmp_path / "batch")
    assert one_line(raised).startswith(str(tmp_path / "batch"))


def test_a_pickle_cannot_change_the_reader(tmp_path):
    # BUILD sets attributes of whatever lies on the stack, also of a function it has named.
    reduced = b"c_codecs\nencode\n(N(dV__defaults__\n(Vutf8\ntstb0c_codecs\nencode\n(Va\ntR."
    (tmp_path / "batch").write_bytes(reduced)
    with pytest.raises(DataError):
        read_pickle(tmp_path / "batch")


@given(
    array=st.sampled_from(["u1", "i8", "<i4", "f8", "f4", "?"]).flatmap(
        lambda code: st.lists(st.integers(0, 3), max_size=3).map(
            lambda shape: np.random.default_rng(0).integers(0, 200, shape).astype(code)
        )
    ),
    fortran=st.booleans(),
    protocol=st.sampled_from(["python 2", 0, 1, 2, 3, 4, 5]),
)
def test_arrays_survive_every_kind_of_pickle(array, fortran, protocol, tmp_path_factory):
    array = np.asfortranarray(array) if fortran else array
    path = tmp_path_factory.mktemp("pickle") / "batch"
    content = {"data": array, "labels": [1, np.int64(2)], "name": b"grey" * 100}
    data_files.write_pickle(path, content, protocol)
    read = read_pickle(path)
    assert list(read) == ["data", "labels", "name"]
    assert read["labels"] == [1, 2] and read["name"] == "grey" * 100
    assert read["data"].numpy().dtype == array.dtype
    assert np.array_equal(read["data"].numpy(), array)


# Downloads, from a server on this machine


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Address of a server of what is in tmp_path / "server"."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Quiet, directory=tmp_path / "server")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}/"
        running.shutdown()


def archive_of(folder, path):
    with tarfile.open(path, "w:gz") as archive:
        archive.add(folder, arcname=folder.name)
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("name", "theirs", "folder"),
    [("cifar10", "CIFAR10", "cifar-10-batches-py"), ("cifar100", "CIFAR100", "cifar-100-python"),
     ("stl10", "STL10", "stl10_binary")],
)  # fmt: skip
def test_archives_are_downloaded_and_checked(
    name, theirs, folder, tmp_path, server, monkeypatch
):
    written = data_files.WRITERS[name](tmp_path / "server")
    md5 = archive_of(tmp_path / "server" / folder, tmp_path / "server" / "set.tar.gz")
    theirs = getattr(import_torchvision().datasets, theirs)
    monkeypatch.setattr(theirs, "url", f"{server}set.tar.gz")
    monkeypatch.setattr(theirs, "tgz_md5", "0" * 32)
    with pytest.raises(DataError, match=f"{name}: downloading http://.* failed") as raised:
        load(name, tmp_path / "wrong", download=True)
    one_line(raised)
    monkeypatch.setattr(theirs, "tgz_md5", md5)
    data = load(name, tmp_path / "root", download=True)
    assert np.array_equal(data.train.images, written.train_images)
    monkeypatch.setattr(theirs, "url", f"{server}nowhere.tar.gz")
    load(name, tmp_path / "root", download=True)  # what is there isn't fetched again
    with pytest.raises(DataError, match="failed: HTTP Error 404") as raised:
        load(name, tmp_path / "other", download=True)
    one_line(raised)


def test_fashion_mnist_is_downloaded_where_torchvision_looks(tmp_path, server, monkeypatch):
    written = data_files.write_fashion_mnist(tmp_path / "server")
    theirs = import_torchvision().datasets.FashionMNIST
    md5 = [
        (file, hashlib.md5((tmp_path / "server" / file).read_bytes()).hexdigest())
        for file, _ in theirs.resources
    ]
    monkeypatch.setattr(theirs, "mirrors", [server])
    monkeypatch.setattr(theirs, "resources", md5)
    with pytest.raises(MissingData):
        load("fashion-mnist", tmp_path / "root")
    data = load("fashion-mnist", tmp_path / "root", download=True)
    assert np.array_equal(data.train.images, written.train_images)
    assert (tmp_path / "root" / "FashionMNIST" / "raw" / FASHION_IMAGES).is_file()


# Label noise


@pytest.mark.parametrize("probability", [0.0, 0.2, 0.5, 1.0])
def test_symmetric_noise_gives_every_other_class_alike(probability):
    labels = torch.arange(10).repeat(4000)
    before = labels.clone()
    noisy = label_noise(labels, 10, probability, "symmetric", seed=1)
    assert torch.equal(labels, before)
    wrong = noisy != labels
    assert abs(wrong.double().mean() - probability) < 0.015  # six standard deviations
    confusion = torch.zeros(10, 10).index_put_((labels, noisy), torch.tensor(1.0), accumulate=True)
    others = confusion[~torch.eye(10, dtype=torch.bool)] / 4000
    assert (others - probability / 9).abs().max() < 0.03
    assert torch.equal(noisy, label_noise(labels, 10, probability, "symmetric", seed=1))
    if 0 < probability < 1:
        assert not torch.equal(noisy, label_noise(labels, 10, probability, "symmetric", seed=2))


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_asymmetric_noise_follows_the_pairs(probability):
    labels = torch.arange(5).repeat(4000)
    noisy = label_noise(labels, 5, probability, "asymmetric", seed=1, pairs={0: 3, 3: 0, 4: 1})
    for true, other in {0: 3, 3: 0, 4: 1}.items():
        of_class = noisy[labels == true]
        assert set(of_class.tolist()) <= {true, other}
        assert abs((of_class == other).double().mean() - probability) < 0.045
    assert noisy[labels == 1].eq(1).all() and noisy[labels == 2].eq(2).all()
    cycle = label_noise(labels, 5, 1.0, "asymmetric", seed=1)
    assert torch.equal(cycle, (labels + 1) % 5)


def test_published_pairs_come_with_the_data(tmp_path):
    data_files.write_cifar10(tmp_path)
    cifar10 = load("cifar10", tmp_path)
    named = {cifar10.classes[a]: cifar10.classes[b] for a, b in cifar10.noise_pairs.items()}
    assert named == {
        "truck": "automobile", "bird": "airplane", "deer": "horse", "cat": "dog", "dog": "cat"
    }  # fmt: skip
    data_files.write_cifar100(tmp_path)
    cifar100 = load("cifar100", tmp_path)
    pairs = cifar100.noise_pairs
    assert sorted(pairs) == sorted(pairs.values()) == list(range(100))
    for start in range(100):  # twenty circles of five, each once up and then back
        circle = [start]
        for _ in range(4):
            circle.append(pairs[circle[-1]])
        assert len(set(circle)) == 5 and pairs[circle[-1]] == start
        assert sum(b < a for a, b in zip(circle, circle[1:] + circle[:1], strict=True)) == 1
    named = {cifar100.classes[a]: cifar100.classes[b] for a, b in pairs.items()}
    assert named["maple_tree"] == "oak_tree" and named["willow_tree"] == "maple_tree"
    assert load("digits").noise_pairs is None


def test_one_class_alone_has_no_wrong_labels():
    with pytest.raises(ValueError, match="classes: expected at least 2, got 1"):
        label_noise(torch.zeros(10, dtype=torch.int64), 1, 0.5)


# Parts of splits


@st.composite
def unequal_splits(draw):
    labels = draw(st.lists(st.integers(0, 4), min_size=2, max_size=60))
    present = len(set(labels))
    n = draw(st.integers(present, len(labels)))
    images = torch.arange(len(labels)).to(torch.uint8).view(-1, 1, 1, 1)
    return Split(images, torch.tensor(labels)), n, draw(st.integers(0, 100))


@given(unequal_splits())
def test_subsets_keep_the_shares_of_the_classes(case):
    split, n, seed = case
    part = subset(split, n, seed)
    assert len(part) == len(part.images) == n
    places = part.images.flatten().long()
    assert len(places.unique()) == n and torch.equal(split.labels[places], part.labels)
    exact = split.labels.bincount() * n / len(split)
    assert (part.labels.bincount(minlength=len(exact)) - exact).abs().max() < 1
    assert torch.equal(subset(split, n, seed).images, part.images)
    if n < len(split):
        rest, aside = validation_split(split, n, seed)
        assert torch.equal(aside.images, part.images)
        both = torch.cat([rest.images, aside.images]).flatten()
        assert torch.equal(both.sort().values, split.images.flatten())


def test_other_seeds_take_other_samples():
    split = load("digits").train
    first, second = subset(split, 100, 0), subset(split, 100, 1)
    assert first.labels.bincount().tolist() == second.labels.bincount().tolist()
    assert not torch.equal(first.images, second.images)


@pytest.mark.parametrize("n", [0, 9, 1301])
def test_a_bad_size_of_a_part_is_named(n):
    split = load("digits").train
    with pytest.raises(ValueError, match=r"n: expected at least one image per class \(10\)"):
        subset(split, n, 0)
    with pytest.raises(ValueError, match="n: expected fewer than all 1300 images"):
        validation_split(split, 1300, 0)


# Augmentation


@given(
    st.integers(1, 4), st.integers(1, 3), st.integers(1, 6), st.integers(1, 6), st.integers(0, 4),
    st.booleans(), st.sampled_from(["black", "edge"]), st.integers(0, 99),
)  # fmt: skip
def test_padded_crops_are_crops_of_padded_images(
    count, channels, height, width, pad, flip, fill, seed
):
    augmentation = PaddedCrop(pad, flip, fill)
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, channels, height, width), generator=generator)
    images = images.to(torch.uint8)
    draw = augmentation.draw(count, generator)
    assert draw.shape == (count, 3) and draw[:, :2].abs().max() <= pad
    result = augmentation(images, draw)
    assert result.dtype == torch.uint8
    mode = {"black": "constant", "edge": "replicate"}[fill]
    padded = torch.nn.functional.pad(images.double(), [pad] * 4, mode=mode)
    for i, (rows, columns, mirrored) in enumerate(draw.tolist()):
        crop = padded[i, :, pad + rows :, pad + columns :][:, :height, :width]
        assert torch.equal(result[i], (crop.flip(2) if mirrored else crop).to(torch.uint8))


def test_crops_reach_every_place():
    draw = PaddedCrop(2, flip=True).draw(1000, torch.Generator().manual_seed(0))
    assert len(draw.unique(dim=0)) == 5 * 5 * 2
    assert PaddedCrop(2).draw(1000, torch.Generator())[:, 2].eq(0).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"pad": -1}, "pad: expected at least 0 pixels, got -1"),
     ({"pad": 1, "fill": "white"}, "fill: expected one of black, edge, got 'white'")],
)  # fmt: skip
def test_bad_augmentation_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        PaddedCrop(**changes)


# Loaders


def numbered(count: int, augmentation: PaddedCrop) -> DataSet:
    """Images that differ, with labels that tell which is which."""
    generator = torch.Generator().manual_seed(count)
    images = torch.randint(0, 256, (count, 2, 4, 4), generator=generator).to(torch.uint8)
    split = Split(images, torch.arange(count))
    names = [str(i) for i in range(count)]
    return in_memory("numbered", split, split, names, augmentation, image_size=None)


def batches_of(loader: TrainLoader, epoch: int, first_step: int = 0):
    return [(images.clone(), labels.clone()) for images, labels in loader.epoch(epoch, first_step)]


def assert_same(some, others):
    assert len(some) == len(others)
    for (images, labels), (other_images, other_labels) in zip(some, others, strict=True):
        assert torch.equal(images, other_images) and torch.equal(labels, other_labels)


@settings(max_examples=60)
@given(
    count=st.integers(1, 40),
    share=st.integers(1, 6),
    world=st.integers(1, 4),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 1000),
    augmentation=st.builds(
        PaddedCrop, st.integers(0, 2), st.booleans(), st.sampled_from(["black", "edge"])
    ),
    data=st.data(),
)
def test_batches_depend_on_seed_epoch_and_step_alone(
    count, share, world, seed, epoch, augmentation, data
):
    data_set = numbered(count, augmentation)
    common = {"batch_size": share * world, "augment": True, "seed": seed, "device": "cpu"}
    if count < world:
        with pytest.raises(ValueError, match=f"at least one image for each of {world} processes"):
            TrainLoader(data_set.train, data_set, rank=0, world=world, **common)
        return
    ranks = [
        TrainLoader(data_set.train, data_set, rank=rank, world=world, **common)
        for rank in range(world)
    ]
    parts = [batches_of(loader, epoch) for loader in ranks]
    steps = len(ranks[0])
    assert {len(loader) for loader in ranks} == {len(part) for part in parts} == {steps}
    together = [tuple(map(torch.cat, zip(*step, strict=True))) for step in zip(*parts, strict=True)]
    # The only batch may be smaller, all others have their full size.
    size = min(share * world, count - count % world)
    assert steps == (count // (share * world) or 1)
    assert all(len(labels) == size for _, labels in together)
    seen = torch.cat([labels for _, labels in together])
    assert len(seen.unique()) == len(seen)  # no image twice in an epoch

    if count >= share * world or count % world == 0:
        alone = TrainLoader(data_set.train, data_set, **common)
        assert_same(batches_of(alone, epoch), together)
    step = data.draw(st.integers(0, steps))
    torch.rand(3)  # what else is drawn from torch's generator doesn't matter
    state = torch.get_rng_state()
    assert_same(batches_of(ranks[-1], epoch, step), parts[-1][step:])
    assert torch.equal(torch.get_rng_state(), state)


def test_other_seeds_and_epochs_give_other_batches():
    data_set = numbered(40, PaddedCrop(2, flip=True))

    def batches(seed, epoch, augment=True):
        loader = TrainLoader(
            data_set.train, data_set, batch_size=40, augment=augment, seed=seed, device="cpu"
        )
        (images, labels), = batches_of(loader, epoch)
        assert torch.equal(labels.sort().values, torch.arange(40))
        return labels, images[labels.argsort()]  # the order, and the images without it

    labels, images = batches(0, 0)
    for other_labels, other_images in (batches(0, 1), batches(1, 0)):
        assert not torch.equal(labels, other_labels)
        assert not torch.equal(images, other_images)
    plain_labels, plain = batches(0, 0, augment=False)
    assert torch.equal(plain_labels, labels)  # the order doesn't depend on augmentation
    assert torch.equal(plain, batches(3, 5, augment=False)[1])


def test_steps_of_an_epoch_draw_differently():
    image = torch.arange(256).to(torch.uint8).view(1, 1, 16, 16)
    split = Split(image.expand(64, 1, 16, 16), torch.zeros(64, dtype=torch.int64))
    data_set = in_memory("same", split, split, ["a", "b"], PaddedCrop(4), image_size=None)
    loader = TrainLoader(split, data_set, batch_size=16, augment=True, seed=0, device="cpu")
    batches = [images for images, _ in loader.epoch(0)]
    assert len(batches) == 4
    assert not any(torch.equal(batches[0], other) for other in batches[1:])


def test_images_come_normalised():
    digits = load("digits")
    loader = TestLoader(digits.train, digits, batch_size=500, device="cpu")
    images = torch.cat([images for images, _ in loader])
    assert images.dtype == torch.float32
    assert images.mean().abs() < 1e-5 and (images.std() - 1).abs() < 1e-3
    pixels = digits.train.images.double() / 255
    exact = (pixels - digits.mean[0]) / digits.std[0]
    torch.testing.assert_close(images.double(), exact, rtol=0, atol=1e-6)


def test_constant_images_stay_finite():
    split = Split(torch.full((4, 1, 8, 8), 7, dtype=torch.uint8), torch.tensor([0, 1, 0, 1]))
    data_set = in_memory("grey", split, split, ["a", "b"], PaddedCrop(0), image_size=None)
    (images, _), = TestLoader(split, data_set, batch_size=4, device="cpu")
    assert torch.equal(images, torch.zeros(4, 1, 8, 8))


@given(count=st.integers(1, 30), size=st.integers(1, 9), world=st.integers(1, 5))
def test_every_image_is_tested_once_and_in_order(count, size, world):
    data_set = numbered(count, PaddedCrop(1))
    whole = list(TestLoader(data_set.test, data_set, batch_size=count, device="cpu"))
    seen, images = [], []
    for rank in range(world):
        loader = TestLoader(
            data_set.test, data_set, batch_size=size, device="cpu", rank=rank, world=world
        )
        batches = list(loader)
        assert len(batches) == len(loader)
        assert all(len(labels) == size for _, labels in batches[:-1])
        part = [label for _, labels in batches for label in labels.tolist()]
        assert len(part) in (count // world, -(-count // world))
        seen += part
        images += [x for x, _ in batches]
    assert seen == list(range(count))
    assert torch.equal(torch.cat(images), whole[0][0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 3, "world": 2}, "batch_size: expected a multiple of the 2 processes"),
        ({"batch_size": 9, "world": 9}, "split: expected at least one image for each of 9"),
    ],
)
def test_bad_loaders_are_named(changes, message):
    data_set = numbered(8, PaddedCrop(1))
    good = {"batch_size": 4, "augment": True, "seed": 0, "device": "cpu"}
    with pytest.raises(ValueError, match=message):
        TrainLoader(data_set.train, data_set, **{**good, **changes})


# Folders of images


@pytest.fixture
def folder(tmp_path):
    data_files.write_folder(tmp_path)
    return tmp_path


@pytest.mark.parametrize("test", ["test", "val"])
def test_folders_are_read(test, tmp_path):
    data_files.write_folder(tmp_path, test=test)
    data = load("folder", tmp_path, image_size=16)
    assert data.classes == ("apple", "pear") and data.shape == (3, 16, 16)
    assert len(data.train) == len(data.test) == 6
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert load("folder", tmp_path).shape == (3, 224, 224)
    (images, labels), = TestLoader(data.test, data, batch_size=6, device="cpu")
    assert images.shape == (6, 3, 16, 16) and labels.tolist() == data.test.labels.tolist()
    # The central 16 of 18 pixels, which the shorter side is scaled to.
    image = Image.open(tmp_path / test / "apple" / "0.png").convert("RGB").resize(
        (18, 21), Image.Resampling.BILINEAR
    )
    exact = np.asarray(image)[2:18, 1:17].transpose(2, 0, 1) / 255
    exact = (exact - np.reshape(data.mean, (3, 1, 1))) / np.reshape(data.std, (3, 1, 1))
    assert np.abs(images[0].numpy() - exact).max() < 0.02  # a grey level


def test_a_folder_s_images_are_of_all_kinds_and_other_files_are_left_out(folder):
    apples = folder / "train" / "apple"
    image = Image.open(apples / "0.png").convert("RGB")
    kinds = {"GIF": "gif", "JPEG": "jfif", "TGA": "TGA", "PPM": "pnm", "WEBP": "webp"}
    for kind, ending in kinds.items():
        image.save(apples / f"of_{kind}.{ending}", format=kind)
    (apples / "notes.txt").write_text("no image")
    data = load("folder", folder, image_size=8)
    assert data.train.labels.tolist() == [0] * (3 + len(kinds)) + [1] * 3
    for images, _ in TestLoader(data.train, data, batch_size=4, device="cpu"):
        assert images.isfinite().all()


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_folders_depend_on_seed_epoch_and_step_alone(folder, workers):
    data = load("folder", folder, image_size=8)

    def loader(**options):
        return TrainLoader(
            data.train, data, augment=True, device="cpu", **{"batch_size": 2, "seed": 7, **options}
        )

    state = torch.get_rng_state()
    whole = batches_of(loader(), 3)
    assert [images.shape for images, _ in whole] == [(2, 3, 8, 8)] * 3
    rest = batches_of(loader(workers=workers), 3, first_step=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert_same(rest, whole[1:])
    parts = [batches_of(loader(rank=r, world=2, workers=workers), 3) for r in (0, 1)]
    together = [tuple(map(torch.cat, zip(*step, strict=True))) for step in zip(*parts, strict=True)]
    assert_same(together, whole)
    other, = batches_of(loader(batch_size=6), 4)
    same, = batches_of(loader(batch_size=6), 5)
    assert not torch.equal(other[0].sum((1, 2, 3)).sort()[0], same[0].sum((1, 2, 3)).sort()[0])


def test_decoding_leaves_the_generators_of_devices_alone(folder, monkeypatch):
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    data = load("folder", folder, image_size=8)
    loader = TrainLoader(data.train, data, batch_size=6, augment=True, seed=0, device="cpu")
    list(loader.epoch(0))
    assert seeded == []


def test_images_of_folders_can_be_sent_to_spawned_workers(folder):
    # Where processes are spawned, not forked, what they work on is pickled.
    data = load("folder", folder, image_size=8)
    part = subset(data.train, 4, seed=0)
    copies, augmentation = pickle.loads(pickle.dumps((part.images, data.augmentation)))
    draw = augmentation.draw(1, torch.Generator())[0]
    assert torch.equal(augmentation(copies[2], draw), data.augmentation(part.images[2], draw))


def test_parts_and_wrong_labels_of_folders(folder):
    data = load("folder", folder, image_size=8)
    rest, aside = validation_split(data.train, 2, seed=0)
    assert aside.labels.tolist() == [0, 1] and len(rest) == len(rest.images) == 4
    noisy = replace(aside, labels=label_noise(aside.labels, 2, 1.0))
    (_, labels), = TestLoader(noisy, data, batch_size=2, device="cpu")
    assert labels.tolist() == [1, 0]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("damage", ["truncated", "text", "gone"])
def test_an_unreadable_image_is_named(folder, workers, damage):
    data = load("folder", folder, image_size=8)
    path = folder / "train" / "pear" / "1.png"
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:60] if damage == "truncated" else b"no image")
    loader = TrainLoader(
        data.train, data, batch_size=2, augment=True, seed=0, device="cpu", workers=workers
    )
    with pytest.raises(DataError) as raised:
        list(loader.epoch(0))
    assert one_line(raised).startswith(f"{path}: can't be read as an image (")


def test_numbers_may_be_numpys(folder):
    data = load("folder", folder, image_size=np.int64(8))
    assert data.shape == (3, 8, 8)
    crop = PaddedCrop(np.int64(1), flip=np.True_)
    assert crop == PaddedCrop(1, flip=True) and type(crop.pad) is int


def test_bad_folders_are_named(folder):
    (folder / "test" / "pear").rename(folder / "test" / "plum")
    with pytest.raises(DataError, match="same classes in train and test, .* has pear, plum"):
        load("folder", folder)
    (folder / "test" / "plum").rename(folder / "test" / "pear")
    (folder / "train" / "quince").mkdir()
    with pytest.raises(DataError, match=f"{folder / 'train'}: .*quince") as raised:
        load("folder", folder)
    one_line(raised)
    (folder / "train" / "quince").rmdir()
    (folder / "train" / "pear").rename(folder / "pear")
    with pytest.raises(DataError, match="train: expected folders of at least 2 classes, got 1"):
        load("folder", folder)
    (folder / "train").rename(folder / "training")
    with pytest.raises(MissingData, match=f"folder: no folder train in {folder}; expected"):
        load("folder", folder)


def test_grey_and_transparent_images_become_colour(folder):
    Image.new("L", (9, 9), 100).save(folder / "train" / "apple" / "0.png")
    Image.new("RGBA", (9, 9), (1, 2, 3, 4)).save(folder / "train" / "apple" / "1.png")
    data = load("folder", folder, image_size=8)
    (images, _), = TestLoader(data.train, data, batch_size=6, device="cpu")
    assert images.shape == (6, 3, 8, 8)


def test_image_bytes_are_what_was_stored(tmp_path):
    data_files.write_folder(tmp_path, per_class=1)
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), 200, np.uint8)).save(buffer, "PNG")
    (tmp_path / "train" / "apple" / "0.png").write_bytes(buffer.getvalue())
    data = load("folder", tmp_path, image_size=8)
    loader = TrainLoader(data.train, data, batch_size=2, augment=True, seed=0, device="cpu")
    (images, labels), = loader.epoch(0)
    grey = images[labels == 0] * torch.tensor(data.std).view(3, 1, 1)
    grey = grey + torch.tensor(data.mean).view(3, 1, 1)
    torch.testing.assert_close(grey, torch.full_like(grey, 200 / 255), rtol=0, atol=1e-6)


def test_some_shift_remains_of_a_crop_that_is_scaled():
    assert [PaddedCrop(pad).scaled(0.1).pad for pad in (0, 2)] == [0, 1]


def test_scaled_values_are_rounded_to_the_nearest():
    images = torch.tensor([[1, 1], [1, 0]], dtype=torch.uint8).view(1, 1, 2, 2)
    assert resize(images, 1).item() == 1  # of 0.75


def test_the_same_labels_are_wrong_with_either_kind():
    labels = torch.arange(1000) % 10
    kinds = [
        label_noise(labels, 10, 0.3, kind, seed=4) != labels for kind in ("symmetric", "asymmetric")
    ]
    assert torch.equal(*kinds)
