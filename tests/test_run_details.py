"""What a run reads, writes, shows and draws: details that a wrong line would spoil, and no other
test would see."""

import errno
import io
import json
import math
import os
import random
import signal
from types import SimpleNamespace

import data_files
import numpy
import pytest
import torch
from PIL import Image
from run_folders import WAYS, write_run
from test_run_settings import rates_of
from test_training import QUIET, config, small_network
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset
from training_processes import SMALL, table

from imcl_fast import TrainConfig, Trainer, data, demo, models, objectives, train
from imcl_fast.data import folder
from imcl_fast.data.augmentation import PaddedCrop, ResizedCrop, seeded, seeded_numpy
from imcl_fast.data.own import from_torch
from imcl_fast.data.quality import Quality
from imcl_fast.kernel_choice import find_kernels, roles
from imcl_fast.plan import acted_on
from imcl_fast.redundancy import profile
from imcl_fast.reports import charts, compare, html, inspect
from imcl_fast.reports.networks import find
from imcl_fast.runs import files, flags
from imcl_fast.runs.config import SETTINGS
from imcl_fast.runs.errors import DiskFullError, NonFiniteError
from imcl_fast.runs.folder import read_run
from imcl_fast.training import distributed, loop, preparation
from imcl_fast.training.distributed import Processes
from imcl_fast.training.interruption import Interruption
from imcl_fast.training.optimization import build_optimizer, build_schedule, go_on
from imcl_fast.training.progress import Console, epoch_text
from imcl_fast.training.records import Records

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_step_on_fewer_batches_has_their_mean(digits):
    def weights(size, accumulate):
        network = small_network()
        settings = config(
            ways=(),
            train_images=50,
            batch_size=size,
            accumulate=accumulate,
            augment=False,
            schedule="constant",
            momentum=0.0,
            weight_decay=0.0,
        )
        Trainer(settings, data_set=digits, network=network, observer=QUIET).fit()
        return network[1].weight

    torch.testing.assert_close(weights(25, 3), weights(50, 1))


def test_checkpoints_come_every_so_many_minutes(digits, tmp_path, monkeypatch):
    clock = [0.0]

    def monotonic():
        clock[0] += 10
        return clock[0]

    monkeypatch.setattr(
        loop, "time", SimpleNamespace(monotonic=monotonic, perf_counter=loop.time.perf_counter)
    )
    settings = config(ways=(), run_dir=tmp_path, checkpoint_every="0.5m", keep=9, batch_size=20)
    Trainer(settings, data_set=digits, observer=QUIET).fit()
    assert len(list((tmp_path / "checkpoints").glob("step-*.pt"))) > 2


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_loss_of_views_that_is_no_number_is_told(digits, channels_last):
    class Spoilt(nn.Module):
        def forward(self, x):
            return x * (float("nan") if self.training else 1)

    network = nn.Sequential(nn.Conv2d(1, 4, 3), Spoilt(), nn.Flatten(), nn.Linear(784, 10))
    settings = config(
        method="qad", qualities=("raw", "down2"), channels_last=channels_last, ways=WAYS
    )
    with pytest.raises(NonFiniteError, match="step 1: .*first layer with features that are not: 1"):
        Trainer(settings, data_set=digits, network=network, observer=QUIET).fit()


@pytest.mark.parametrize(
    ("amp", "dtype"), [("off", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_networks_run_in_the_precision_that_is_named(digits, amp, dtype):
    network, seen = small_network(), set()
    network[1].register_forward_hook(
        lambda m, args, out: seen.add(out.dtype) if m.training else None
    )
    Trainer(config(ways=(), amp=amp), data_set=digits, network=network, observer=QUIET).fit()
    assert seen == {dtype}


@pytest.mark.parametrize("ways", [(), WAYS])
def test_all_that_an_optimizer_has_is_clipped(digits, ways, monkeypatch):
    clipped = []
    monkeypatch.setattr(loop, "clip_grad_norm_", lambda ps, norm: clipped.append(list(ps)))
    optimizers = []
    build = loop.build_optimizer
    monkeypatch.setattr(
        loop, "build_optimizer", lambda *a: optimizers.append(build(*a)) or optimizers[0]
    )
    Trainer(
        config(ways=ways, clip_norm=1.0, train_images=50), data_set=digits, observer=QUIET
    ).fit()
    has = [p for group in optimizers[0].param_groups for p in group["params"]]
    assert len(clipped) == 1 and set(map(id, clipped[0])) == set(map(id, has))


def test_a_row_of_steps_has_the_rate_it_was_taken_with(digits, tmp_path):
    settings = config(ways=(), schedule="cosine", log_every=1, run_dir=tmp_path)
    Trainer(settings, data_set=digits, observer=QUIET).fit()
    rates = [float(row["lr"]) for row in table(tmp_path / "steps.csv")]
    assert rates == pytest.approx([0.1 * (1 + math.cos(math.pi * i / 4)) / 2 for i in range(4)])


def test_loss_is_the_mean_over_the_qualities_and_the_last_epochs_accuracies_are_summed_up(digits):
    def fit(seed, *names):
        settings = config(ways=(), qualities=names, epochs=3, lr=0.9, seed=seed)
        trainer = Trainer(settings, data_set=digits, observer=QUIET)
        return trainer.fit(), trainer.rows

    # One whose last epoch isn't the best; which one that is depends on the machine's rounding.
    found = ((seed, *fit(seed, "raw", "noise1")) for seed in range(20))
    seed, summary, rows = next(each for each in found if each[1]["best_epoch"] != 3)
    losses = [fit(seed, name)[1][-1]["test_loss"] for name in ("raw", "noise1")]
    assert rows[-1]["test_loss"] == pytest.approx(sum(losses) / 2)
    assert summary["last_test_accuracy_at"] == {
        n: rows[-1][f"test_accuracy_{n}"] for n in ("raw", "noise1")
    }


def test_the_summary_is_of_all_epochs(digits):
    settings = config(ways=(), epochs=3, accumulate=2, lr=1e-9)
    trainer = Trainer(settings, data_set=digits, network=small_network(), observer=QUIET)
    summary = trainer.fit()
    rows = trainer.rows
    assert summary["seconds"] == pytest.approx(sum(row["seconds"] for row in rows))
    speeds = sorted(row["images_per_second"] for row in rows)
    assert summary["images_per_second"] == speeds[1]
    assert summary["seconds_per_step"] == pytest.approx(
        sorted(row["seconds"] for row in rows)[1] / 2
    )
    assert summary["best_epoch"] == 1 + [r["test_accuracy"] for r in rows].index(
        summary["best_test_accuracy"]
    )
    assert summary["train_images"] == summary["train_images_measured"] == 200


def test_what_was_used_are_the_images_that_are_trained_on(digits, tmp_path):
    Trainer(
        config(ways=(), run_dir=tmp_path, validation_images=100, train_images=None),
        data_set=digits,
        observer=QUIET,
    ).fit()
    assert json.loads((tmp_path / "used.json").read_text())["settings"]["train_images"] == 1200


def kernels(layers):
    return {x["name"]: x["mean_abs_cos"] for x in layers if x["kind"] == "kernel"}


def test_the_report_looks_at_the_averaged_network(digits, tmp_path):
    network = small_network()
    settings = config(ways=(), ema=0.99, run_dir=tmp_path, report=True)
    trainer = Trainer(settings, data_set=digits, network=network, observer=QUIET)
    trainer.fit()
    after = json.loads((tmp_path / "redundancy_after.json").read_text())
    images = torch.zeros(2, 1, 16, 16)
    ours = kernels(profile(trainer.network, images))
    plain = kernels(profile(network.eval(), images))
    found = kernels(after)
    assert found == pytest.approx(ours) and found != pytest.approx(plain)


def test_tensorboard_goes_on_after_the_last_step(digits, tmp_path):
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    for epochs in (1, 2):
        settings = config(
            ways=(),
            run_dir=tmp_path,
            tensorboard=True,
            epochs=epochs,
            log_every=1,
            schedule="constant",
            resume="auto",
        )
        Trainer(settings, data_set=digits, observer=QUIET).fit()
    board = event_accumulator.EventAccumulator(str(tmp_path / "tb"))
    board.Reload()
    assert [event.step for event in board.Scalars("step/loss")] == list(range(1, 9))


def test_what_cannot_be_measured_again_is_kept(tmp_path):
    records = Records(tmp_path)
    known = {"peak_memory_bytes": 5, "peak_memory_of": "tensors", "way_seconds": {"kernel": 0.1}}
    records.json("summary.json", {**known, "seconds": 3.0})
    assert records.measured_before() == known


def test_new_columns_of_steps_are_empty_in_the_rows_before(tmp_path):
    records = Records(tmp_path)
    records.step({"step": 1, "loss": 2.0})
    records.step({"step": 2, "loss": 1.0, "a": 3.0, "b": 4.0})
    records.close()
    assert (tmp_path / "steps.csv").read_text() == "step,loss,a,b\n1,2.0,,\n2,1.0,3.0,4.0\n"


def test_a_run_that_goes_on_is_not_finished(tmp_path):
    records = Records(tmp_path)
    records.json("config.json", TrainConfig(epochs=2).as_json())
    records.json("summary.json", {"epochs": 2})
    records.extend(TrainConfig(epochs=2))
    assert (tmp_path / "summary.json").exists()
    records.extend(TrainConfig(epochs=3))
    assert not (tmp_path / "summary.json").exists()


def test_tables_without_a_whole_epoch_have_no_metrics(tmp_path):
    (tmp_path / "metrics.csv").write_text("epoch\n1\n")
    assert Records(tmp_path).go_on(3, []) is None
    assert not (tmp_path / "metrics.csv").exists()


def test_onecycle_moves_a_small_momentum_no_further_than_0():
    _, seen = rates_of(epochs=5, schedule="onecycle", momentum=0.02)
    assert (min(seen), max(seen)) == pytest.approx((0.01, 0.03), abs=1e-3)


def test_learning_rates_that_go_on_are_those_of_every_group():
    settings = config(epochs=4, lr=1.0, schedule="cosine")
    optimizer = build_optimizer(small_network(), config(epochs=2))
    schedule = build_schedule(optimizer, settings, 5)
    schedule.last_epoch = 10
    assert go_on(optimizer, schedule) == pytest.approx(0.05)
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.05, 0.05])


def test_the_images_whose_labels_are_looked_at_are_of_all_and_of_the_splits_seed(
    digits, monkeypatch
):
    monkeypatch.setattr(preparation, "TRAIN_MEASURED", 300)
    one, other, elsewhere = (
        preparation.prepare_data(
            config(train_images=None, seed=seed, split_seed=split), digits
        ).measured
        for seed, split in ((1, 0), (2, 0), (1, 5))
    )
    assert torch.equal(one, other) and not torch.equal(one, elsewhere)
    assert len(one.unique()) == 300 and (one >= 1000).sum() > 30


@pytest.mark.parametrize("augment", [False, True])
def test_images_are_augmented_if_they_are_to_be(digits, augment):
    settings = config(augment=augment, train_images=None, batch_size=1300)
    material = preparation.prepare_data(settings, digits)
    ((images, _),) = material.train_loader(settings, Processes(0, 1, torch.device("cpu"))).epoch(0)
    grey = (images * digits.std[0] + digits.mean[0]).mul(255).round().to(torch.uint8)

    def rows(x):
        return set(map(bytes, x.flatten(1).numpy()))

    assert (rows(grey) == rows(digits.train.images)) != augment


def test_all_generators_start_from_the_seed_and_come_back(digits):
    class Draws(nn.Sequential):
        def forward(self, x):
            drawn.append((random.random(), numpy.random.rand(), float(torch.rand(()))))
            return super().forward(x)

    runs = []
    for seed in (5, 2**32 + 5, 5):
        drawn = []
        random.seed(), numpy.random.seed()
        before = random.getstate(), str(numpy.random.get_state())
        Trainer(
            config(ways=(), seed=seed),
            data_set=digits,
            network=Draws(*small_network()),
            observer=QUIET,
        ).fit()
        assert (random.getstate(), str(numpy.random.get_state())) == before
        runs.append(drawn)
    assert runs[0] == runs[2] != runs[1]


@pytest.mark.parametrize("deterministic", [False, True])
def test_cudnn_tries_out_kernels_unless_all_is_to_be_repeatable(digits, deterministic, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", deterministic)
    seen = []
    network = small_network()
    network.register_forward_pre_hook(
        lambda m, a: seen.append(
            (torch.backends.cudnn.benchmark, os.environ.get("CUBLAS_WORKSPACE_CONFIG"))
        )
    )
    Trainer(
        config(ways=(), deterministic=deterministic),
        data_set=digits,
        network=network,
        observer=QUIET,
    ).fit()
    assert set(seen) == {(False, ":4096:8") if deterministic else (True, None)}
    assert torch.backends.cudnn.benchmark == deterministic


def test_a_second_signal_has_its_usual_effect():
    with Interruption() as interruption:
        os.kill(os.getpid(), signal.SIGINT)
        assert interruption.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            signal.sigtimedwait([], 1)


def test_lines_name_the_numbers_they_are_of():
    row = {
        "epoch": 1,
        "train_loss": 1.0,
        "test_loss": 2.0,
        "test_accuracy": 0.25,
        "train_accuracy": 0.75,
        "seconds": 1.0,
        "images_per_second": 5.0,
    }
    assert "test accuracy 25.00%, train accuracy 75.00%" in epoch_text(row, 2)


def test_a_bar_goes_on_where_the_run_does(monkeypatch):
    out = io.StringIO()
    out.isatty = lambda: True
    console = Console(out)
    console.started(3, 12)
    assert (console._bar.n, console._bar.total) == (3, 12)
    console.finished()


@pytest.mark.parametrize("number", ["ENOSPC", "EDQUOT", "EFBIG"])
def test_every_kind_of_full_disk_is_named(number, tmp_path):
    told = "no room left on the disk to write"
    with pytest.raises(DiskFullError, match=told), files.disk_full_named(tmp_path):
        raise OSError(getattr(errno, number), "full")


FREE = {
    "data_root",
    "download",
    "workers",
    "device",
    "threads",
    "run_dir",
    "resume",
    "checkpoint_every",
    "keep",
    "log_every",
    "tensorboard",
    "report",
    "measure_ways",
}


def test_settings_that_change_results_stay_as_they_were():
    assert {name for name, setting in SETTINGS.items() if not setting.fixed} == FREE


def test_defaults_are_those_of_the_design():
    c = TrainConfig()
    assert (c.lr, c.momentum, c.weight_decay, c.batch_size, c.epochs) == (0.1, 0.9, 5e-4, 128, 10)


def test_bounds_of_rises():
    with pytest.raises(ValueError, match=r"^warmup_epochs: expected less than epochs \(3\), got 3"):
        TrainConfig(epochs=3, warmup_epochs=3)
    assert TrainConfig(epochs=3, ways_warmup_epochs=3).ways_warmup_epochs == 3
    assert TrainConfig(checkpoint_every="1.5m").checkpoint_every == "1.5m"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--weights", "kernel=1,kernel=2"], "each way once"),
        (["--epoch", "3"], "unrecognized arguments"),
        (["--run-dir", ""], "expected a folder, got ''"),
    ],
)
def test_more_bad_flags(wrong, message, capsys):
    with pytest.raises(SystemExit) as error:
        flags.parse(wrong, "imcl-train", "")
    assert error.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["fashion-mnist", "cifar10", "cifar100", "stl10"])
def test_augmentation_of_each_data_set(name, tmp_path):
    write = {
        "fashion-mnist": data_files.write_fashion_mnist,
        "cifar10": data_files.write_cifar10,
        "cifar100": data_files.write_cifar100,
        "stl10": data_files.write_stl10,
    }[name]
    write(tmp_path)
    pads = {"fashion-mnist": 2, "cifar10": 4, "cifar100": 4, "stl10": 12}
    assert data.load(name, tmp_path).augmentation == PaddedCrop(pads[name], flip=True)


def test_augmentation_of_digits(digits):
    assert digits.augmentation == PaddedCrop(2, fill="edge")  # they have no mirror images


def test_crops_of_files_are_mirrored():
    ramp = torch.arange(64, dtype=torch.uint8).expand(3, 64, 64).permute(1, 2, 0)
    image, crop = Image.fromarray(ramp.contiguous().numpy()), ResizedCrop(16)
    rising = [
        bool(x[0, 0, 0] < x[0, 0, -1]) for x in (crop(image, torch.tensor([s])) for s in range(40))
    ]
    assert 8 < sum(rising) < 32


def test_normalisation_of_folders_is_imagenets():
    assert (folder.MEAN, folder.STD) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_statistics_are_of_the_training_images(digits):
    pixels = digits.train.images.double() / 255
    assert digits.mean == pytest.approx((pixels.mean().item(),)) and digits.std == pytest.approx(
        (pixels.std(correction=0).item(),)
    )


def test_seeded_leaves_python_as_it_was():
    random.seed(3), numpy.random.seed(3)
    before = random.getstate(), str(numpy.random.get_state())
    with seeded(5), seeded_numpy(5):
        random.random(), numpy.random.rand()
    assert (random.getstate(), str(numpy.random.get_state())) == before


def test_classes_that_only_the_images_to_measure_on_have():
    x = torch.rand(6, 1, 8, 8)
    found = from_torch(
        TensorDataset(x, torch.tensor([0, 1] * 3)), TensorDataset(x, torch.tensor([0, 1, 3] * 2))
    )
    assert found.classes == ("0", "1", "2", "3")


def test_down_halves_odd_sizes_to_the_nearest():
    x = torch.randint(0, 256, (2, 3, 11, 11), dtype=torch.uint8)
    small = functional.interpolate(x.float(), (3, 3), mode="area")
    expected = functional.interpolate(small, (11, 11), mode="bilinear").round().clamp(0, 255)
    assert torch.equal(
        Quality.named("down4")(x, torch.zeros(2, dtype=torch.int64)).float(), expected
    )


def test_csv_and_page_tell_best_from_last(tmp_path, capsys):
    folders = [
        str(
            write_run(
                tmp_path / f"{name}-{seed}", ways=ways, seed=seed, accuracy=accuracy, best=best
            )
        )
        for name, ways, seed, accuracy, best in (
            ("ce", [], 0, 0.5, 0.9),
            ("ce", [], 1, 0.6, 0.7),
            ("imcl", WAYS, 0, 0.7, 0.8),
        )
    ]
    assert (
        compare.main(
            [*folders, "--csv", str(tmp_path / "out.csv"), "--html", str(tmp_path / "out.html")]
        )
        == 0
    )
    plain, four = table(tmp_path / "out.csv")
    numbers = {
        name: float(value)
        for name, value in plain.items()
        if name.endswith(("mean", "sd")) and value
    }
    assert numbers == pytest.approx(
        {
            "accuracy_mean": 0.55,
            "accuracy_sd": 0.5**0.5 / 10,
            "best_accuracy_mean": 0.8,
            "best_accuracy_sd": 0.02**0.5,
            "fit_noisy_mean": numbers["fit_noisy_mean"],
        }
    )
    assert (
        four["pairs"] == "1"
        and plain["pairs"] == "0"
        and float(plain["fit_noisy_mean"]) == pytest.approx(0.1 * (1 - math.exp(-3)))
    )
    out = capsys.readouterr().out
    assert "80.00 +- 14.14" in out
    text = (tmp_path / "out.html").read_text()
    assert text.count("90.00") == 1


def test_charts_have_last_accuracies_in_percent(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(
        charts, "means", lambda names, points, label: drawn.setdefault("means", points) and ""
    )
    monkeypatch.setattr(
        charts, "curves", lambda panels, epochs: drawn.setdefault("curves", panels) and ""
    )
    folder = write_run(tmp_path / "run", accuracy=0.5, best=0.9)
    assert compare.main([str(folder), "--html", str(tmp_path / "out.html")]) == 0
    assert drawn["means"] == [[50.0]]
    assert drawn["curves"][0][1]["imcl"][-2:] == pytest.approx([90.0, 50.0])


def test_flags_of_inspect_reach_the_profile(capsys):
    def said(*more):
        assert (
            inspect.main(
                ["resnet18", "--classes", "3", "--image-size", "32", "--images", "2", *more]
            )
            == 0
        )
        return capsys.readouterr().out

    plain = said()
    assert said() == plain != said("--no-center") and said("--seed", "1") != plain


def test_an_unknown_entry_of_weights_is_named(tmp_path, capsys):
    network = models.import_torchvision().models.resnet18(num_classes=3)
    torch.save({**network.state_dict(), "more": torch.zeros(2)}, tmp_path / "w.pt")
    assert inspect.main([str(tmp_path / "w.pt"), "--model", "resnet18", "--classes", "3"]) == 2
    assert "1 entries differ, the first is more, expected none, got (2,)" in capsys.readouterr().err


def test_a_run_folder_is_its_last_network_and_data_are_those_named(tmp_path, capsys):
    run = tmp_path / "run"
    assert train.main([*SMALL, "--ways", "none", "--image-size", "8", "--run-dir", str(run)]) == 0
    best = torch.load(run / "checkpoints" / "best.pt", weights_only=True)
    best["content"]["objective"] = {k: v * 0 for k, v in best["content"]["objective"].items()}
    torch.save(best, run / "checkpoints" / "best.pt")
    found = find(str(run), None, None)
    assert found.network.fc.weight.abs().sum() > 0 and found.data_set.shape == (1, 8, 8)
    capsys.readouterr()

    def said(*more):
        assert inspect.main([str(run), "--images", "4", *more]) == 0
        return capsys.readouterr().out

    assert said() != said("--data", "random")


def test_the_one_before_is_the_one_before(tmp_path, capsys):
    said = tmp_path / "cka.json"
    assert (
        inspect.main(
            ["resnet18", "--cka", "--image-size", "32", "--images", "8", "--json", str(said)]
        )
        == 0
    )
    cka = json.loads(said.read_text())["cka"]
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if " " in line][1:]
    body = [line for line in lines if line[0] in json.loads(said.read_text())["rows"]]
    assert [line[3] for line in body[1:6]] == [f"{cka[i][i - 1]:.4f}" for i in range(1, 6)]


def test_numbers_of_the_report_stand_by_their_names(tmp_path):
    run = read_run(write_run(tmp_path / "run", best=0.9))
    results = dict(html._results(run))
    last = math.exp(-3)
    assert (
        results["training loss"] == f"{2.3 * last + 0.2:.4f}"
        and results["test loss"] == f"{2.3 * last + 0.3:.4f}"
    )
    assert results["training accuracy"] == f"{80 - 20 * last:.2f} %"
    assert results["test accuracy, best epoch"] == "90.00 % (epoch 3)"


def test_curves_of_the_report_stand_by_their_names(tmp_path, monkeypatch):
    run = read_run(write_run(tmp_path / "run"))
    monkeypatch.setattr(charts, "curves", lambda panels, epochs: dict(panels))
    losses = html._curves(run)["loss"]
    assert (
        losses["training"] == run.metrics["train_loss"]
        and losses["test"] == run.metrics["test_loss"]
    )


def test_runs_of_other_ways_or_seeds_have_other_folders():
    folders = {
        str(train.default_folder(TrainConfig(ways=ways, seed=seed)))
        for ways in ((), ("kernel",), WAYS)
        for seed in (0, 1)
    }
    assert folders == {
        f"runs/digits-resnet18-{label}-s{seed}"
        for label in ("ce", "kernel", "imcl")
        for seed in (0, 1)
    }


def test_no_report_is_written_where_none_is_wanted(tmp_path, capsys):
    assert (
        train.main([*SMALL, "--ways", "none", "--epochs", "1", "--run-dir", str(tmp_path / "run")])
        == 0
    )
    assert (
        not (tmp_path / "run" / "report.html").exists() and "report:" not in capsys.readouterr().out
    )


def test_the_demo_does_what_its_flags_say(monkeypatch, capsys):
    configs = []

    class Fit:
        rows = [{"fit_noisy": 0.5}]

        def __init__(self, config, data_set, observer):
            self.config = config

        def fit(self):
            configs.append(self.config)
            low = 0.5 if self.config.ways else 0.25
            return {"last_test_accuracy": low, "best_test_accuracy": 0.9, "seconds_per_step": 0.1}

    monkeypatch.setattr(demo, "Trainer", Fit)
    assert (
        demo.main(
            [
                "--seeds",
                "2",
                "--epochs",
                "7",
                "--label-noise",
                "0.3",
                "--width",
                "4",
                "--threads",
                "3",
                "--impl",
                "reference",
            ]
        )
        == 0
    )
    assert [(c.seed, c.epochs, c.label_noise, c.width, c.threads, c.impl) for c in configs] == [
        (seed, 7, 0.3, 4, 3, "reference") for seed in (0, 0, 1, 1)
    ]
    out = capsys.readouterr().out
    assert "25.00 +- 0.00 %" in out and "50.00 +- 0.00 %" in out and "mean +25.0" in out


def test_weights_start_as_torchvisions():
    torch.manual_seed(0)
    network = models.build("vgg16_bn", 100, width=64, image_size=32)
    assert network.classifier.weight.std().item() == pytest.approx(0.01, rel=0.05)
    torch.manual_seed(0)
    resnet = models.build("resnet18", 10)
    w = resnet.layer2[0].conv1.weight  # (128, 64, 3, 3)
    assert w.std().item() == pytest.approx((2 / (9 * 128)) ** 0.5, rel=0.05)


def test_roles_need_equal_thirds_and_known_names():
    block = nn.ModuleDict({"Wqkv": nn.Linear(8, 24), "qkv": nn.Linear(8, 16)})
    assert roles(block, "Wqkv") == 3 and roles(block, "qkv") == 1


def test_what_has_no_rows_to_compare_is_left_out():
    attention = nn.MultiheadAttention(8, 2, kdim=4, vdim=4)
    assert find_kernels(nn.Sequential(attention)) == ["0.out_proj"]
    assert find_kernels(nn.Sequential(nn.ConvTranspose2d(4, 8, 3), nn.Conv2d(8, 8, 3))) == ["1"]


def test_the_last_layer_has_no_head(digits):
    imcl = objectives.build(
        "imcl", models.resnet18(10, width=2, channels=1), torch.zeros(2, 1, 16, 16)
    )
    assert acted_on(imcl)["multilayer"] == imcl.layers[:-1]


def test_processes_agree_on_the_largest_wish(monkeypatch):
    done = SimpleNamespace(wait=lambda: None)

    def all_reduce(flags, op, async_op):  # of two processes that wish for the same
        if op == distributed.dist.ReduceOp.SUM:
            flags *= 2
        return done

    monkeypatch.setattr(distributed.dist, "all_reduce", all_reduce)
    both = distributed.Processes(0, 2, torch.device("cpu"))
    assert both.agree(15, 1) == [0, 0] and both.agree(0, 0) == [15, 1]
