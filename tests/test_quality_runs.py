"""Images at several qualities, and runs that train and are measured on them."""

from __future__ import annotations

import copy
import csv
import dataclasses
import json
import signal
from pathlib import Path

import pytest
import torch
from conftest import assert_same_bits
from torch import Tensor
from training_processes import (
    SMALL,
    Command,
    assert_identical,
    checkpoints,
    config,
    wait_for,
)

from imcl_fast import Trainer, objectives
from imcl_fast.data.augmentation import PaddedCrop
from imcl_fast.data.dataset import DataError, DataSet, Split
from imcl_fast.data.loader import TestLoader, TrainLoader
from imcl_fast.data.own import from_torch
from imcl_fast.data.quality import Quality
from imcl_fast.imcl import IMCL
from imcl_fast.models import resnet18
from imcl_fast.quality_agnostic import QualityAgnostic
from imcl_fast.reports.html import write_report
from imcl_fast.runs.config import TrainConfig
from imcl_fast.runs.folder import read_run
from imcl_fast.training.distributed import Processes
from imcl_fast.training.preparation import prepare_data

NAMES = ("raw", "jpeg20", "noise0.1", "down2", "blur1.5")
SEEDS = torch.arange(4)


def photos(channels: int = 3, size: int = 16, count: int = 4) -> Tensor:
    """Smooth images with an edge."""
    generator = torch.Generator().manual_seed(0)
    small = torch.rand(count, channels, 4, 4, generator=generator)
    images = torch.nn.functional.interpolate(small, (size, size), mode="bilinear")
    images[..., size // 2 :] *= 0.5
    return (255 * images).to(torch.uint8)


# --- what becomes of an image ---


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_quality_keeps_shape_and_dtype_and_its_input(name: str, channels: int) -> None:
    images = photos(channels)
    before = images.clone()
    seen = Quality.named(name)(images, SEEDS)
    assert seen.shape == images.shape and seen.dtype == torch.uint8
    assert_same_bits([images], [before])
    assert torch.equal(seen, images) == (name == "raw")
    assert (seen.float() - images.float()).abs().mean() < 30


@pytest.mark.parametrize("name", NAMES)
def test_an_image_is_the_same_in_any_batch(name: str) -> None:
    images = photos()
    quality = Quality.named(name)
    together = quality(images, SEEDS)
    for i in range(4):
        assert_same_bits([quality(images[i : i + 1], SEEDS[i : i + 1])[0]], [together[i]])


def test_a_jpeg_is_pillows(tmp_path: Path) -> None:
    from PIL import Image

    image = photos()[0]
    Image.fromarray(image.movedim(0, -1).numpy()).save(tmp_path / "x.jpg", quality=20)
    with Image.open(tmp_path / "x.jpg") as file:
        expected = torch.tensor(list(file.tobytes()), dtype=torch.uint8).view(16, 16, 3)
    seen = Quality.named("jpeg20")(image[None], SEEDS[:1])[0]
    assert_same_bits([seen], [expected.movedim(-1, 0)])


def test_lower_numbers_lose_more() -> None:
    images = photos().float()

    def lost(name: str) -> float:
        seen = Quality.named(name)(images.to(torch.uint8), SEEDS)
        return (seen.float() - images.floor()).square().mean().item()

    assert lost("jpeg5") > lost("jpeg50") > 0
    assert lost("down4") > lost("down2") > 0
    assert lost("blur3") > lost("blur0.5") > 0
    assert lost("noise0.2") > lost("noise0.02") > 0


def test_noise_has_its_deviation_and_blur_and_down_keep_a_flat_image() -> None:
    flat = torch.full((1, 1, 100, 100), 128, dtype=torch.uint8)
    noisy = Quality.named("noise0.1")(flat, SEEDS[:1]).double()
    assert abs(noisy.mean() - 128) < 1 and abs(noisy.std() - 25.5) < 1
    for name in ("blur1", "down2", "down3"):
        assert torch.equal(Quality.named(name)(flat, SEEDS[:1]), flat)


@pytest.mark.parametrize(
    "name", ["", "jpeg", "jpeg0", "jpeg101", "jpeg20.5", "down1", "down1.5", "noise2", "blur0",
             "grey", "Raw", "raw1", "jpeg-1", "webp20"],
)  # fmt: skip
def test_an_unknown_quality_is_named(name: str) -> None:
    with pytest.raises(ValueError, match="^qualities: expected"):
        Quality.named(name)


def test_what_can_have_no_quality_is_named() -> None:
    with pytest.raises(DataError, match="^qualities: expected images of uint8"):
        Quality.named("blur1")(photos().float(), SEEDS)
    with pytest.raises(DataError, match="^qualities: expected images of 1 or 3 channels"):
        Quality.named("jpeg20")(photos(2), SEEDS)


# --- loaders ---


def loader(digits: DataSet, **options) -> TrainLoader:
    settings = {"batch_size": 16, "augment": True, "seed": 3, "device": "cpu", **options}
    return TrainLoader(digits.train, digits, **settings)


def test_views_are_the_augmented_images_at_each_quality(digits: DataSet) -> None:
    qualities = [Quality.named(name) for name in NAMES]
    plain = loader(digits).epoch(2, 1)
    seen = loader(digits, qualities=qualities).epoch(2, 1)
    (images, labels), (views, targets) = next(plain), next(seen)
    assert views.shape == (len(NAMES), *images.shape)
    assert_same_bits([views[0], targets], [images, labels])
    assert len({tuple(view.flatten().tolist()) for view in views}) == len(NAMES)


def test_noise_depends_on_seed_epoch_step_and_sample_alone(digits: DataSet) -> None:
    qualities = [Quality.named("noise0.1"), Quality.named("raw"), Quality.named("noise0.1")]

    # Of images without any difference, or the noise would differ by where it is cut off.
    grey = Split(torch.full_like(digits.train.images, 128), digits.train.labels)
    digits = dataclasses.replace(digits, train=grey, augmentation=PaddedCrop(0))

    def noise(epoch: int, step: int, **options) -> Tensor:
        views, _ = next(loader(digits, qualities=qualities, **options).epoch(epoch, step))
        return views[0] - views[1]

    first = noise(0, 2)
    batches = loader(digits, qualities=qualities).epoch(0, 0)
    for _ in range(2):
        next(batches)
    views, _ = next(batches)
    assert_same_bits([views[0] - views[1]], [first])
    assert not torch.equal(views[0], views[2])  # two noises
    assert not torch.equal(first[0], first[1])
    for other in (noise(1, 2), noise(0, 3), noise(0, 2, seed=4)):
        assert not torch.equal(other, first)
    halves = [noise(0, 2, rank=rank, world=2) for rank in range(2)]
    assert_same_bits([torch.cat(halves)], [first])


@pytest.mark.parametrize("workers", [0, 2])
def test_images_of_files_have_the_same_qualities(workers: int) -> None:
    images = photos(count=12)
    own = [(image, i % 3) for i, image in enumerate(images)]
    qualities = [Quality.named(name) for name in NAMES]
    files = from_torch(own, own)
    options = {"batch_size": 4, "augment": True, "seed": 3, "device": "cpu"}
    memory = Split(images, files.train.labels)
    options_of_memory = {**options, "augment": False}
    of_files = TrainLoader(files.train, files, qualities=qualities, workers=workers, **options)
    of_memory = TrainLoader(memory, files, qualities=qualities, **options_of_memory)
    for ours, theirs in zip(of_files.epoch(0), of_memory.epoch(0), strict=True):
        assert_same_bits(ours, theirs)


def test_measured_images_are_always_the_same(digits: DataSet) -> None:
    quality = Quality.named("noise0.1")
    whole = [
        torch.cat([x for x, _ in TestLoader(digits.test, digits, batch_size=size, quality=quality,
                                            device="cpu")])
        for size in (50, 64)
    ]  # fmt: skip
    assert_same_bits(whole[:1], whole[1:])


# --- objectives and settings ---


def test_the_methods_build_what_they_say() -> None:
    x = torch.zeros(4, 1, 16, 16)

    def build(method: str, **options):
        return objectives.build(method, resnet18(10, channels=1, width=2), x, **options)

    qad = build("qad", alpha=0.5, reduction="mean", kernel="linear", normalize=False)
    assert isinstance(qad, QualityAgnostic) and qad.ways is None
    assert (qad.alpha, qad.reduction) == (0.5, "mean")
    assert (qad.dependence.kernel, qad.dependence.normalize) == ("linear", False)
    both = build("qad-imcl", ways=["kernel"], weights={"kernel": 7.0}, label_smoothing=0.1)
    assert isinstance(both.ways, IMCL) and both.ways.kernel_weight == 7
    assert both.ways.output_weight == 0 and both.label_smoothing == both.ways.label_smoothing == 0.1
    assert build("qad-imcl", ways=[]).ways is None
    layers = ["layer1", "layer4"]
    both = build("qad-imcl", layers=layers)
    assert both.layers == both.ways.layers == layers
    with pytest.raises(TypeError, match="^views: method qad has no such setting"):
        build("qad", views=2)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"method": "qad", "qualities": ("raw",)}, "qualities: expected at least 2"),
        ({"method": "qad", "qualities": ("raw", "jpg")}, "qualities: expected some of"),
        ({"method": "qad", "qualities": ("raw", "raw")}, "qualities: expected each once"),
        ({"method": "qad", "mixup": 1.0}, "mixup: expected none"),
        ({"method": "qad", "ways": ("kernel",)}, "ways: they belong to"),
        ({"method": "imcl", "awp": 0.1}, "awp: it belongs to"),
        ({"method": "qad", "awp": 0.0}, "awp: expected more than 0"),
        ({"method": "qad-imcl", "ways": ("kernel",), "weights": {"output": 1.0}}, "weights: "),
    ],
)
def test_settings_that_do_not_fit_are_named(settings: dict, told: str) -> None:
    with pytest.raises(ValueError, match=f"^{told}"):
        TrainConfig(**settings)


def test_settings_say_what_is_seen() -> None:
    def names(qualities) -> list[str]:
        return [quality.name for quality in qualities]

    plain = TrainConfig(qualities=("raw", "jpeg5"))
    assert names(plain.measured_on) == ["raw", "jpeg5"] and not plain.trained_on
    assert not TrainConfig().measured_on
    qad = TrainConfig(method="qad")
    assert names(qad.trained_on) == names(qad.measured_on) == ["raw", "jpeg20"]
    assert qad.label == "qad" and not qad.has_ways
    both = TrainConfig(method="qad-imcl", ways=("kernel",))
    assert both.label == "qad+kernel" and both.has_ways
    assert TrainConfig(method="qad", alpha=0.0, qualities=("raw",)).trained_on


# --- runs ---


def test_accuracy_is_measured_at_each_quality_and_their_mean(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    trainer = Trainer(config(qualities=("raw", "noise1", "down2"), run_dir=folder, epochs=2))
    summary = trainer.fit()
    for row in trainer.rows:
        at = [row[f"test_accuracy_{name}"] for name in ("raw", "noise1", "down2")]
        assert row["test_accuracy"] == pytest.approx(sum(at) / 3) and len(set(at)) > 1
    assert summary["last_test_accuracy_at"].keys() == {"raw", "noise1", "down2"}
    run = read_run(folder)
    assert not [name for name in run.terms if "accuracy" in name]
    assert list(run.qualities.values()) == ["raw", "noise1", "down2"]
    plain = Trainer(config(epochs=2))
    plain.fit()
    for ours, theirs in zip(trainer.rows, plain.rows, strict=True):
        assert ours["test_accuracy_raw"] == theirs["test_accuracy"]  # and training was the same


@pytest.mark.parametrize(
    "options",
    [pytest.param({}, marks=pytest.mark.slow), {"channels_last": True, "width": 8},
     pytest.param({"accumulate": 2}, marks=pytest.mark.slow)],
)  # fmt: skip
def test_qad_trains_and_reports(options: dict, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    settings = config(
        method="qad", qualities=NAMES[:3], awp=0.01, run_dir=folder, epochs=2, lr=0.01, **options
    )
    trainer = Trainer(settings)
    trainer.fit()
    assert {"cross_entropy", "dependence"} <= trainer.rows[-1].keys()
    assert trainer.rows[-1]["train_loss"] < trainer.rows[0]["train_loss"]
    with (folder / "metrics.csv").open() as file:
        row = list(csv.DictReader(file))[-1]
    assert float(row["test_accuracy_jpeg20"]) == trainer.rows[-1]["test_accuracy_jpeg20"]
    write_report(folder)
    assert "accuracy by quality" in (folder / "report.html").read_text()


def test_perturbed_steps_differ_and_repeat() -> None:
    def trained(**options) -> list[Tensor]:
        trainer = Trainer(config(method="qad", **options))
        trainer.fit()
        return [p.detach() for p in trainer.network.parameters()]

    plain = trained()
    perturbed = trained(awp=0.1)
    assert not all(map(torch.equal, plain, perturbed))
    assert all(map(torch.equal, perturbed, trained(awp=0.1)))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_perturbed_step_is_the_definitions(accumulate: int) -> None:
    settings = config(
        method="qad", qualities=("raw", "jpeg20"), awp=0.2, accumulate=accumulate,
        train_images=48, batch_size=48 // accumulate, lr=0.01, weight_decay=0.0, augment=False,
        schedule="constant", width=4,
    )  # fmt: skip
    torch.manual_seed(0)
    network = resnet18(10, channels=1, width=4)
    before, moved = copy.deepcopy(network), copy.deepcopy(network)
    processes = Processes(0, 1, torch.device("cpu"))
    batches = list(prepare_data(settings).train_loader(settings, processes).epoch(0))
    assert len(batches) == accumulate
    Trainer(settings, network=network).fit()

    def gradients(of: torch.nn.Module) -> list[Tensor]:
        qa = QualityAgnostic(of, batches[0][0][0])
        loss = sum(qa(views, labels).loss / accumulate for views, labels in batches)
        return list(torch.autograd.grad(loss, list(of.parameters())))

    ways = gradients(copy.deepcopy(before))
    with torch.no_grad():
        for p, g in zip(moved.parameters(), ways, strict=True):
            if p.dim() > 1:
                p += 0.2 * p.norm() * g / g.norm()
    for p, was, g in zip(network.parameters(), before.parameters(), gradients(moved), strict=True):
        # Of Nesterov's momentum the first step is 1.9 times the gradient.
        torch.testing.assert_close(was - p, 0.019 * g, rtol=1e-2, atol=2e-5)


def test_qad_of_one_quality_without_alpha_is_cross_entropy() -> None:
    rows = []
    for settings in ({"method": "qad", "alpha": 0.0, "qualities": ("raw",)}, {"ways": ()}):
        trainer = Trainer(config(epochs=2, **settings))
        trainer.fit()
        rows.append([[row["train_loss"], row["test_accuracy"]] for row in trainer.rows])
    assert rows[0] == rows[1]


def test_the_ways_rise_in_a_qad_run_too() -> None:
    settings = config(
        method="qad-imcl", ways=("output",), ways_warmup_epochs=1.0, epochs=2, lr=0.01
    )
    trainer = Trainer(settings)
    trainer.fit()
    first, second = trainer.rows
    assert "output_consistency" in first and "dependence" in first
    # Less of it is in the loss while its weight rises.
    parts = [row["train_loss"] - row["cross_entropy"] + 0.1 * row["dependence"]
             for row in (first, second)]  # fmt: skip
    shares = [part / row["output_consistency"] for part, row in
              zip(parts, (first, second), strict=True)]  # fmt: skip
    assert shares[0] < 0.8 < 0.99 < shares[1] < 1.01


@pytest.mark.parametrize("method", [pytest.param("qad", marks=pytest.mark.slow), "qad-imcl"])
def test_a_killed_run_goes_on_bit_by_bit(method: str, tmp_path: Path) -> None:
    flags = [*SMALL, "--method", method, "--qualities", "raw,jpeg20,noise0.1", "--awp", "0.01",
             "--label-noise", "0", "--checkpoint-every", "1", "--resume", "auto"]  # fmt: skip

    def command(name: str) -> Command:
        return Command([*flags, "--run-dir", str(tmp_path / name / "run")], tmp_path / name)

    whole, cut = command("whole"), command("cut")
    wait_for(lambda: len(checkpoints(tmp_path / "cut" / "run")) > 1)
    cut.kill()
    assert cut.wait() == -signal.SIGKILL
    assert whole.wait() == 0, whole.err
    cut = command("cut")
    assert cut.wait() == 0, cut.err
    assert "resumed after step" in cut.out + cut.err
    assert_identical(tmp_path / "whole" / "run", tmp_path / "cut" / "run")
    summary = json.loads((tmp_path / "cut" / "run" / "summary.json").read_text())
    assert summary["last_test_accuracy_at"].keys() == {"raw", "jpeg20", "noise0.1"}


def test_a_point_is_blurred_to_a_gaussian_of_the_deviation():
    image = torch.zeros(1, 1, 41, 41, dtype=torch.uint8)
    image[..., 20, 20] = 255
    seen = Quality.named("blur1.5")(image, SEEDS[:1])[0, 0].double()
    x = torch.arange(-20, 21, dtype=torch.float64)
    profile = torch.exp(-x.square() / (2 * 1.5**2))
    profile /= profile.sum()
    expected = 255 * torch.outer(profile, profile)
    assert (seen - expected).abs().max() <= 0.75


def test_a_blurred_edge_is_as_if_the_border_went_on():
    image = photos(1)
    wide = torch.nn.functional.pad(image.float(), [12] * 4, mode="replicate").to(torch.uint8)
    seen, outer = (Quality.named("blur1.5")(x, SEEDS) for x in (image, wide))
    assert (seen.int() - outer[..., 12:-12, 12:-12].int()).abs().max() <= 1


def test_down_takes_means_of_squares():
    image = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    image[..., ::2, ::2] = 200  # one of four pixels of each square
    assert torch.equal(Quality.named("down2")(image, SEEDS[:1]), torch.full_like(image, 50))


def test_values_are_rounded_to_the_nearest():
    flat = torch.full((1, 1, 300, 300), 128, dtype=torch.uint8)
    noisy = Quality.named("noise0.1")(flat, SEEDS[:1]).double()
    assert abs(noisy.mean() - 128) < 0.3  # 25.5 / 300 is the deviation of this mean


def test_noise_is_that_of_each_seed_in_units_of_white():
    images = photos()
    drawn = torch.stack(
        [
            torch.empty(3, 16, 16).normal_(generator=torch.Generator().manual_seed(i))
            for i in range(4)
        ]
    )
    expected = (images + 25.5 * drawn).round().clamp(0, 255)
    assert (Quality.named("noise0.1")(images, SEEDS) - expected).abs().max() == 0
