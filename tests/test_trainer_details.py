"""Details of data, flags and the trainer, of which a fault went unseen by their own tests."""

import dataclasses
import shutil
import subprocess
from types import SimpleNamespace

import data_files
import pytest
import torch
from test_own_data import InFives
from test_training import QUIET, config, small_network
from torch.utils.data import Subset, TensorDataset

from imcl_fast import Trainer
from imcl_fast.data import Split, fashion_mnist, load
from imcl_fast.data.own import from_torch
from imcl_fast.runs.flags import parse
from imcl_fast.runs.network import named
from imcl_fast.training import loop, records, trainer
from imcl_fast.training.distributed import Processes
from imcl_fast.training.fingerprints import fingerprints
from imcl_fast.training.preparation import prepare_data
from imcl_fast.training.progress import Observer

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_scale_of_images_is_that_of_all_not_of_the_first():
    images = torch.tensor([0, 200], dtype=torch.uint8).repeat_interleave(300)
    side = TensorDataset(images.view(-1, 1, 1, 1).expand(-1, 1, 8, 8), torch.arange(600) % 2)
    assert from_torch(side, side).mean == pytest.approx((100 / 255,), rel=0.05)


def test_few_labels_are_all_compared_with_the_list():
    side = InFives([0, 6], False)
    assert from_torch(side, side).train.labels.tolist() == [0, 1]


def test_names_of_too_few_classes_are_none():
    side = InFives([0, 1, 2], False)
    side.classes = ["a", "b"]
    assert from_torch(side, side).classes == ("0", "1", "2")


def test_a_target_transform_is_heeded_in_a_subset():
    labels = [4] * 2000
    labels[777] = 9
    side = Subset(InFives(labels, True), range(2000))
    assert from_torch(side, InFives([0, 1], True)).train.labels.unique().tolist() == [4]


def test_fingerprints_tell_apart_whatever_differs(digits):
    def of(network=None, **changes):
        material = SimpleNamespace(data_set=dataclasses.replace(digits, **changes))
        return fingerprints(material, network or small_network(), ("dataset", "model"))

    test = Split(digits.test.images, digits.test.labels.flip(0))
    others = [of(test=test), of(classes=digits.classes[::-1]), of(shape=(1, 8, 8))]
    assert len({each["data"] for each in (of(), *others)}) == 4
    assert of(small_network().double())["network"] != of()["network"]


def test_labels_as_they_were_and_as_they_are_stand_by_their_names(digits, tmp_path):
    settings = config(ways=(), run_dir=tmp_path, label_noise=0.5, train_images=None, epochs=1)
    Trainer(settings, data_set=digits, network=small_network(), observer=QUIET).fit()
    kept = torch.load(tmp_path / "noise.pt", weights_only=True)
    assert torch.equal(kept["original"], digits.train.labels)
    assert 400 < (kept["noisy"] != digits.train.labels).sum() < 900


def test_the_report_looks_at_32_images_that_are_measured_on(digits, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(trainer, "profile", lambda network, images: seen.append(images) or [])
    settings = config(ways=(), run_dir=tmp_path, report=True, epochs=1)
    Trainer(settings, data_set=digits, network=small_network(), observer=QUIET).fit()
    material = prepare_data(settings, digits)
    alone = Processes(0, 1, torch.device("cpu"))
    images, _ = next(iter(material.test_loader(material.test, settings, alone)))
    assert len(seen) == 2 and all(torch.equal(x, images[:32]) for x in seen)


def test_a_wish_only_to_be_warned_is_kept(digits):
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        Trainer(config(ways=()), data_set=digits, network=small_network(), observer=QUIET).fit()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_share_of_waiting_is_of_all_the_time(digits, monkeypatch):
    class Shares(Observer):
        def stepped(self, values):
            shares.append(values["data_share"])

    shares, clock = [], iter(range(10**6))
    time = SimpleNamespace(monotonic=loop.time.monotonic, perf_counter=lambda: next(clock))
    monkeypatch.setattr(loop, "time", time)  # a second to wait, a second to compute
    settings = config(ways=(), log_every=1, epochs=1)
    Trainer(settings, data_set=digits, network=small_network(), observer=Shares()).fit()
    assert set(shares) == {0.5}


def test_a_commit_of_another_repository_says_nothing(tmp_path, monkeypatch):
    def git(*words):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True)

    folder = tmp_path / "site" / "imcl_fast" / "training"
    folder.mkdir(parents=True)
    git("init"), git("commit", "--allow-empty", "-m", "a")
    monkeypatch.setattr(records, "__file__", str(folder / "records.py"))
    assert records.versions()["commit"] is None
    (tmp_path / "imcl_fast").symlink_to(tmp_path / "site" / "imcl_fast")
    assert len(records.versions()["commit"]) == 40


def test_a_factory_may_take_the_number_as_classes():
    assert named("imcl_fast.models:resnet18", 7).fc.out_features == 7


def test_where_there_are_test_and_val_it_is_measured_on_test(tmp_path):
    data_files.write_folder(tmp_path)
    shutil.copytree(tmp_path / "train" / "pear", tmp_path / "val" / "pear")
    assert load("folder", tmp_path).classes == ("apple", "pear")  # val, of one class, is not read


def test_a_folder_that_is_named_comes_before_debians(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir(), (tmp_path / "debian").mkdir()
    data_files.write_fashion_mnist(tmp_path / "mine")
    for file in (tmp_path / "mine").rglob("*.gz"):
        (tmp_path / "debian" / file.name).write_bytes(b"no data")
    monkeypatch.setattr(fashion_mnist, "DEBIAN", tmp_path / "debian")
    assert len(load("fashion-mnist", tmp_path / "mine").train) > 0


def test_the_order_in_which_ways_are_named_means_nothing():
    one, other = (
        parse(["--ways", ways], "imcl-train", "") for ways in ("kernel,output", "output,kernel")
    )
    assert one == other and one.label == "output+kernel"
