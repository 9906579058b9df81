"""Writes small data sets in the formats that the original ones come in."""

from __future__ import annotations

import gzip
import pickle
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

CIFAR10_CLASSES = [
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
]  # fmt: skip
CIFAR100_CLASSES = [
    "apple", "aquarium_fish", "baby", "bear", "beaver", "bed", "bee", "beetle", "bicycle",
    "bottle", "bowl", "boy", "bridge", "bus", "butterfly", "camel", "can", "castle",
    "caterpillar", "cattle", "chair", "chimpanzee", "clock", "cloud", "cockroach", "couch",
    "crab", "crocodile", "cup", "dinosaur", "dolphin", "elephant", "flatfish", "forest", "fox",
    "girl", "hamster", "house", "kangaroo", "keyboard", "lamp", "lawn_mower", "leopard", "lion",
    "lizard", "lobster", "man", "maple_tree", "motorcycle", "mountain", "mouse", "mushroom",
    "oak_tree", "orange", "orchid", "otter", "palm_tree", "pear", "pickup_truck", "pine_tree",
    "plain", "plate", "poppy", "porcupine", "possum", "rabbit", "raccoon", "ray", "road",
    "rocket", "rose", "sea", "seal", "shark", "shrew", "skunk", "skyscraper", "snail", "snake",
    "spider", "squirrel", "streetcar", "sunflower", "sweet_pepper", "table", "tank",
    "telephone", "television", "tiger", "tractor", "train", "trout", "tulip", "turtle",
    "wardrobe", "whale", "willow_tree", "wolf", "woman", "worm",
]  # fmt: skip


class Written(NamedTuple):
    """What a data set holds: images (N, C, H, W) uint8, labels counted from 0."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


class Python2Pickler(pickle._Pickler):
    """Pickles as Python 2 and the numpy of its time did: text and raw data are byte strings."""

    def __init__(self, file):
        super().__init__(file, protocol=2)

    def save_string(self, value):
        content = value.encode("latin1") if isinstance(value, str) else value
        if len(content) < 256:
            self.write(pickle.SHORT_BINSTRING + bytes([len(content)]) + content)
        else:
            self.write(pickle.BINSTRING + struct.pack("<i", len(content)) + content)
        self.memoize(value)

    dispatch = {**pickle._Pickler.dispatch, str: save_string, bytes: save_string}


def write_pickle(path: Path, value: object, protocol: int | str = "python 2") -> None:
    """With the module names of numpy before version 2, as all the original files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        if protocol == "python 2":
            Python2Pickler(file).dump(value)
        else:
            pickle.dump(value, file, protocol=protocol)
    if protocol == "python 2" or protocol < 4:  # later ones count the letters of a name
        content = path.read_bytes().replace(b"numpy._core", b"numpy.core")
        path.write_bytes(content)


def random_images(count: int, channels: int, size: int, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (count, channels, size, size), dtype=np.uint8)


def random_written(train: int, test: int, channels: int, size: int, classes: int) -> Written:
    """With the first and the last class among the labels."""
    labels = np.random.default_rng(3).integers(0, classes, train + test)
    labels[0], labels[1] = 0, classes - 1
    images = random_images(train + test, channels, size, seed=4)
    return Written(images[:train], labels[:train], images[train:], labels[train:])


def write_fashion_mnist(folder: Path) -> Written:
    written = random_written(12, 5, 1, 28, 10)
    folder.mkdir(parents=True, exist_ok=True)
    for side, images, labels in (
        ("train", written.train_images, written.train_labels),
        ("t10k", written.test_images, written.test_labels),
    ):
        write_idx(folder / f"{side}-images-idx3-ubyte.gz", images[:, 0])
        write_idx(folder / f"{side}-labels-idx1-ubyte.gz", labels.astype(np.uint8))
    return written


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


def write_cifar10(root: Path) -> Written:
    written = random_written(15, 4, 3, 32, 10)
    folder = root / "cifar-10-batches-py"
    for i in range(5):
        mine = slice(3 * i, 3 * i + 3)
        _cifar10_batch(
            folder / f"data_batch_{i + 1}", written.train_images[mine],
            written.train_labels[mine], f"training batch {i + 1} of 5",
        )  # fmt: skip
    _cifar10_batch(
        folder / "test_batch", written.test_images, written.test_labels, "testing batch 1 of 1"
    )
    meta = {"num_cases_per_batch": 10000, "label_names": CIFAR10_CLASSES, "num_vis": 3072}
    write_pickle(folder / "batches.meta", meta)
    return written


def _cifar10_batch(path: Path, images: np.ndarray, labels: np.ndarray, title: str) -> None:
    write_pickle(
        path,
        {
            "batch_label": title,
            "labels": labels.tolist(),
            # Python 2 files have it column by column.
            "data": np.asfortranarray(images.reshape(len(images), -1)),
            "filenames": [f"leptodactylus_s_{i:06}.png" for i in range(len(images))],
        },
    )


def write_cifar100(root: Path) -> Written:
    written = random_written(6, 4, 3, 32, 100)
    folder = root / "cifar-100-python"
    for side, images, labels in (
        ("train", written.train_images, written.train_labels),
        ("test", written.test_images, written.test_labels),
    ):
        content = {
            "filenames": [f"bos_taurus_s_{i:06}.png" for i in range(len(images))],
            "batch_label": f"{side}ing batch 1 of 1",
            "fine_labels": labels.tolist(),
            "coarse_labels": [0] * len(images),
            "data": images.reshape(len(images), -1),
        }
        write_pickle(folder / side, content)
    meta = {"fine_label_names": CIFAR100_CLASSES, "coarse_label_names": ["aquatic_mammals"]}
    write_pickle(folder / "meta", meta)
    return written


def write_stl10(root: Path) -> Written:
    written = random_written(4, 3, 3, 96, 10)
    folder = root / "stl10_binary"
    folder.mkdir(parents=True)
    for side, images, labels in (
        ("train", written.train_images, written.train_labels),
        ("test", written.test_images, written.test_labels),
    ):
        (folder / f"{side}_X.bin").write_bytes(images.transpose(0, 1, 3, 2).tobytes())
        (folder / f"{side}_y.bin").write_bytes((labels + 1).astype(np.uint8).tobytes())
    names = ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"]
    (folder / "class_names.txt").write_text("".join(f"{name}\n" for name in names))
    return written


def write_imagenet32(root: Path) -> Written:
    written = random_written(20, 3, 3, 32, 1000)
    mean = written.train_images.reshape(20, -1).mean(0)
    for i in range(10):
        mine = slice(2 * i, 2 * i + 2)
        content = {
            "data": written.train_images[mine].reshape(2, -1),
            "labels": (written.train_labels[mine] + 1).tolist(),
            "mean": mean,
        }
        write_pickle(root / "Imagenet32_train" / f"train_data_batch_{i + 1}", content, protocol=3)
    content = {
        "data": written.test_images.reshape(3, -1), "labels": (written.test_labels + 1).tolist()
    }  # fmt: skip
    write_pickle(root / "Imagenet32_val" / "val_data", content, protocol=3)
    return written


def write_folder(root: Path, *, test: str = "test", per_class: int = 3) -> None:
    """Smooth colour images of differing sizes, classes "apple" and "pear", in PNG and JPEG."""
    generator = np.random.default_rng(5)
    for side in ("train", test):
        for name in ("apple", "pear"):
            (root / side / name).mkdir(parents=True)
            for i in range(per_class):
                corners = generator.integers(0, 256, (2, 2, 3), dtype=np.uint8)
                image = Image.fromarray(corners).resize((20 + 3 * i, 24), Image.Resampling.BILINEAR)
                image.save(root / side / name / f"{i}.{'jpg' if i == 2 else 'png'}")


# By the name of the data set.
WRITERS = {
    "fashion-mnist": write_fashion_mnist,
    "cifar10": write_cifar10,
    "cifar100": write_cifar100,
    "stl10": write_stl10,
    "imagenet32": write_imagenet32,
}
