"""imcl-train as a user runs it, on the real digits."""

import json
import os
import re
import subprocess
import sys
import tomllib
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from training_processes import SMALL, TERMS, table

from imcl_fast import models, objectives, operators, train
from imcl_fast.runs import flags
from imcl_fast.runs.config import SETTINGS, TrainConfig
from imcl_fast.runs.errors import Interrupted, NonFiniteError, UsageError
from imcl_fast.training.records import Records

MEASURES = [
    "epoch", "train_loss", "test_loss", "test_accuracy", "train_accuracy", "seconds",
    "images_per_second", "data_seconds", "lr",
]  # fmt: skip
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:imcl_fast. no fused kernel"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What the command of the design leaves, and what it prints."""
    folder = tmp_path_factory.mktemp("run")
    command = (
        "--dataset digits --model resnet18 --width 4 --epochs 2 --batch-size 128 --lr 0.1 "
        f"--ways all --label-noise 0.5 --seed 0 --data-root {folder} --run-dir {folder}/run "
        "--resume auto --threads 1 --log-every 4 --representation-interval 1 --kernel-interval 1"
    )
    result = subprocess.run(
        [sys.executable, "-m", "imcl_fast.train", *command.split()],
        capture_output=True,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert result.returncode == 0, result.stderr
    return folder / "run", result.stdout


def test_it_says_what_it_does_line_by_line(run):
    folder, out = run
    lines = out.splitlines()
    assert re.match(
        r"imcl on digits: 1300 training images \(\d+ with a wrong label\), measured on 497 test "
        r"images; train accuracy is that of 1300 training images without augmentation; 10 steps "
        r"per epoch on cpu",
        lines[0],
    )
    assert [line[:9] for line in lines[1:3]] == ["epoch 1/2", "epoch 2/2"]
    assert "\r" not in out  # no bar, for this is no terminal
    log = (folder / "log.txt").read_text().splitlines()
    assert [line[20:] for line in log[:3]] == lines[:3]
    accuracy = table(folder / "metrics.csv")[-1]["test_accuracy"]
    assert re.search(rf"^last test accuracy +{100 * float(accuracy):.2f}%$", out, re.MULTILINE)
    assert re.search(r"^wrong labels fitted +\d", out, re.MULTILINE)


def test_the_folder_holds_everything(run):
    folder, _ = run
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "config.json", "metrics.csv", "steps.csv", "summary.json", "noise.pt", "network.pt",
        "redundancy_before.json", "redundancy_after.json", "cka_before.json", "cka_after.json",
        "checkpoints", "log.txt", "report.html", "tb", "used.json",
    }  # fmt: skip
    checkpoints = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert checkpoints == ["best.pt", "step-00000010.pt", "step-00000020.pt"]


def test_the_tables_have_a_row_per_epoch_and_per_so_many_steps(run):
    folder, _ = run
    rows = table(folder / "metrics.csv")
    assert list(rows[0]) == [*MEASURES, *TERMS, "fit_noisy"]
    assert [row["epoch"] for row in rows] == ["1", "2"]
    values = [{name: float(value) for name, value in row.items()} for row in rows]
    assert values[1]["train_loss"] < values[0]["train_loss"]
    assert values[1]["cross_entropy"] < values[0]["cross_entropy"]
    assert values[1]["lr"] < values[0]["lr"] < 0.1
    for row in values:
        total = row["cross_entropy"] + row["output_consistency"]
        total += 3 * row["multilayer_consistency"]
        total += 10 * row["representation_similarity"] + 100 * row["kernel_similarity"]
        assert row["train_loss"] == pytest.approx(total, rel=1e-5)
        assert row["images_per_second"] == pytest.approx(1280 / row["seconds"])
        assert 0 < row["data_seconds"] < row["seconds"]
    steps = table(folder / "steps.csv")
    assert list(steps[0]) == ["step", "epoch", "loss", *TERMS, "lr"]
    assert [row["step"] for row in steps] == ["1", "4", "8", "12", "16", "20"]
    assert [row["epoch"] for row in steps] == ["1", "1", "1", "2", "2", "2"]
    assert float(steps[0]["lr"]) == 0.1


def test_the_network_is_the_plain_one_and_as_good_as_it_says(run):
    from imcl_fast import data
    from imcl_fast.data.loader import TestLoader
    from imcl_fast.data.noise import label_noise

    folder, _ = run
    network = models.build("resnet18", 10, channels=1, image_size=16, width=4)
    network.load_state_dict(torch.load(folder / "network.pt", weights_only=True))
    network.eval()
    digits = data.load("digits")
    with torch.no_grad():
        hits = [
            network(images).argmax(1) == labels
            for images, labels in TestLoader(digits.test, digits, batch_size=100, device="cpu")
        ]
    accuracy = torch.cat(hits).double().mean().item()
    assert accuracy == float(table(folder / "metrics.csv")[-1]["test_accuracy"])
    noise = torch.load(folder / "noise.pt", weights_only=True)
    assert torch.equal(noise["original"], digits.train.labels)
    assert torch.equal(noise["noisy"], label_noise(digits.train.labels, 10, 0.5, seed=0))


def test_the_summary_and_the_configuration(run):
    folder, _ = run
    summary = json.loads((folder / "summary.json").read_text())
    rows = table(folder / "metrics.csv")
    accuracies = [float(row["test_accuracy"]) for row in rows]
    assert summary["best_test_accuracy"] == max(accuracies)
    assert summary["last_test_accuracy"] == accuracies[-1]
    assert summary["fit_noisy"] == float(rows[-1]["fit_noisy"])
    assert (summary["epochs"], summary["steps"], summary["measured_on"]) == (2, 20, "test")
    assert (summary["train_images"], summary["train_images_measured"]) == (1300, 1300)
    assert summary["peak_memory_bytes"] > 2**26 and summary["seconds_per_step"] > 0
    if "way_seconds" in summary:  # or the machine was too slow to tell
        assert list(summary["way_seconds"]) == list(objectives.WAYS)
    config = TrainConfig.read(folder / "config.json")
    assert (config.width, config.label_noise, config.ways) == (4, 0.5, objectives.WAYS)
    content = json.loads((folder / "config.json").read_text())
    assert content["versions"]["torch"] == torch.__version__
    assert content["machine"]["cores"] == os.cpu_count()


def test_the_reports_can_read_it(run):
    from imcl_fast.runs.folder import read_run

    read = read_run(run[0])
    assert read.finished and read.epochs == 2 and read.label == "imcl"
    assert read.terms == TERMS
    assert read.before and read.after and read.before != read.after
    assert "<html" in (run[0] / "report.html").read_text().lower()


def test_few_labels_and_held_out_images(tmp_path, capsys):
    arguments = [*SMALL, "--epochs", "1", "--ways", "none", "--validation-images", "100"]
    assert train.main([*arguments, "--run-dir", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "plain cross entropy on digits: 160 training images" in out
    assert "measured on 100 held-out training images, NOT test images" in out
    assert "last validation accuracy" in out and "test accuracy  " not in out
    rows = table(tmp_path / "run" / "metrics.csv")
    assert list(rows[0]) == [*MEASURES, "cross_entropy", "fit_noisy"]


@pytest.mark.parametrize(
    "more",
    [
        ["--method", "song-chai-2", "--optimizer", "adamw", "--lr", "0.001", "--amp", "bf16",
         "--beta", "0.3", "--multilayer-temperature", "3"],
        ["--method", "mutual-exits", "--schedule", "step", "--channels-last", "--no-augment",
         "--amp", "fp16"],
        ["--method", "song-chai-4", "--schedule", "onecycle", "--warmup-epochs", "0.5"],
        ["--ways", "kernel,output", "--weights", "kernel=5", "--teacher", "mean", "--ema", "0.9",
         "--noise-type", "asymmetric", "--label-smoothing", "0.1", "--model", "vgg16_bn",
         "--deterministic", "--schedule", "constant", "--stem-stride", "2"],
    ],
    ids=["song-chai-2", "mutual-exits", "song-chai-4", "options"],
)  # fmt: skip
def test_other_methods_and_options_train(tmp_path, more):
    assert train.main([*SMALL, *more, "--epochs", "1", "--run-dir", str(tmp_path / "run")]) == 0
    rows = table(tmp_path / "run" / "metrics.csv")
    assert len(rows) == 1 and float(rows[0]["train_loss"]) > 0
    assert not torch.are_deterministic_algorithms_enabled()


# Errors


def fails(capsys, *arguments):
    """The exit code and the one line on standard error."""
    try:
        code = train.main(list(arguments))
    except SystemExit as error:
        code = error.code
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("imcl-train: ")
    return code, err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--epochs many", "argument --epochs: invalid int value: 'many'"),
        ("--lr -1", "argument --lr: expected more than 0, got -1.0"),
        ("--lr nan", "argument --lr: expected more than 0, got nan"),
        ("--lr 1e39", r"argument --lr: expected a number that float32 can hold, up to 3.4e\+38"),
        ("--weights output=1e39", "weights: expected a number that float32 can hold"),
        ("--label-noise 2", r"argument --label-noise: expected a number in \[0, 1\], got 2.0"),
        ("--ways output,foo", "argument --ways: expected one of output, .*, got 'foo'"),
        ("--ways kernel,kernel --weights kernel=1,kernel=2", "each way once"),
        ("--ways kernel --weights output=1", "argument --weights: output is not among the ways"),
        ("--method song-chai-2 --ways kernel", "argument --ways: they belong to methods imcl and"),
        ("--checkpoint-every 0", "argument --checkpoint-every: expected a number of steps"),
        ("--warmup-epochs 10", r"argument --warmup-epochs: expected less than epochs \(10\)"),
        ("--stem-stride 3", r"argument --stem-stride: expected a number in \[1, 2\], got 3"),
        ("--beta 1.5", r"argument --beta: expected a number in \[0, 1\], got 1.5"),
        ("--ways none --ways-warmup-epochs 1",
         "argument --ways-warmup-epochs: expected 0 for ce, which has no ways, got 1"),
        ("--method song-chai-4 --ways-warmup-epochs 1",
         "argument --ways-warmup-epochs: expected 0 for song-chai-4, which has no ways, got 1"),
        ("--ways-warmup-epochs 1 --compile",
         "argument --ways-warmup-epochs: expected 0 with compile, .* got 1"),
        ("--ways-warmup-epochs 10.5",
         r"argument --ways-warmup-epochs: expected at most epochs \(10\), got 10.5"),
        ("--threads 9999999", r"argument --threads: expected a number in \[1, 4096\], got 9999999"),
        ("--run-dir=", "argument --run-dir: expected a folder, got ''"),
        ("--evaluate-every 0", "argument --evaluate-every: expected at least 1, got 0"),
        ("--epoch 1", "unrecognized arguments: --epoch 1"),
        ("--dataset mnist", "argument --dataset: invalid choice: 'mnist'"),
    ],
)  # fmt: skip
def test_bad_flags_are_named(capsys, arguments, message):
    code, err = fails(capsys, *arguments.split())
    assert code == 2 and re.search(message, err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--dataset cifar10 --data-root /nowhere", "cifar10: data_batch_1 .*not found in /nowhere"),
        ("--train-images 5", r"train_images: expected at least one image per class \(10\)"),
        ("--train-images 1200 --validation-images 200", "train_images: .*at most all 1100"),
        ("--method song-chai-2 --views 3", "views: method song-chai-2 has no such setting"),
        ("--beta 0.3", "beta: method imcl has no such setting"),
        ("--ways none --beta 0.3", "beta: .*cross entropy alone"),
        ("--image-size 64 --stem-stride 2", "stem_stride: expected 1 for a ResNet"),
        ("--layers layer9", "layers: the network has no module 'layer9'"),
        ("--kernels conv9", "kernels: the network has no module 'conv9'"),
        ("--width 1000000", r"width: can't make the network \(.*\); make it smaller"),
        ("--device tpu9", "device: expected one that is there, got 'tpu9'"),
    ],
)
def test_what_the_data_or_the_network_do_not_allow_is_named(capsys, tmp_path, arguments, message):
    flags = ["--width", "2", *arguments.split(), "--run-dir", str(tmp_path / "run")]
    code, err = fails(capsys, *flags)
    assert code == 2 and re.search(message, err)


def test_a_run_folder_that_is_a_file_is_named(capsys, tmp_path):
    (tmp_path / "run").write_text("")
    code, err = fails(capsys, *SMALL, "--run-dir", str(tmp_path / "run"))
    assert code == 2 and "run_dir: can't use" in err


@pytest.mark.parametrize("name", ["metrics.csv", "steps.csv", "summary.json", "noise.pt"])
def test_files_of_other_programs_are_left_alone(capsys, tmp_path, name):
    (tmp_path / name).write_text("mine")
    (tmp_path / ".notes.tmp").write_text("mine")
    code, err = fails(capsys, *SMALL, "--run-dir", str(tmp_path))
    assert code == 2 and f"{tmp_path} has {name} but no config.json, so no run made them" in err
    (tmp_path / name).rename(tmp_path / "results.csv")
    assert train.main([*SMALL, "--epochs", "1", "--ways", "none", "--run-dir", str(tmp_path)]) == 0
    assert (tmp_path / ".notes.tmp").read_text() == "mine"


@pytest.mark.parametrize(
    ("kind", "told", "said"),
    [(UsageError, False, True), (UsageError, True, False), (NonFiniteError, False, True),
     (partial(Interrupted, 15), False, False)],
)  # fmt: skip
def test_a_process_that_stops_alone_says_why(capsys, monkeypatch, kind, told, said):
    """The second of two; what the first has said, and a signal, need be told once."""
    error = kind("data_root: no such folder here")
    error.told = told

    def fit(trainer):
        raise error

    monkeypatch.setattr(train.Trainer, "fit", fit)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert train.main([]) == error.exit_code
    assert capsys.readouterr().err == "imcl-train: data_root: no such folder here\n" * said


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE: expected the number, at least 1, .*, got 'two'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE: expected the number, at least 1, .*, got '0'"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK: expected the number, at least 0, .*, got 'x'"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE: 2 processes .* can't find each other .*RANK"),
        ({"WORLD_SIZE": "2", "RANK": "x"}, "RANK: expected the number, .*, got 'x'"),
        ({"WORLD_SIZE": "2", "RANK": "-1"}, "RANK: expected the number, .*, got '-1'"),
        ({"WORLD_SIZE": "2", "RANK": "7"}, r"RANK: expected less than WORLD_SIZE \(2\), got 7"),
        ({"RANK": "3", "LOCAL_RANK": "x"}, "LOCAL_RANK: "),  # alone, whatever is left in RANK
    ],
)
def test_bad_variables_are_named(capsys, tmp_path, monkeypatch, variables, message):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    code, err = fails(capsys, *SMALL, "--run-dir", str(tmp_path / "run"))
    assert code == 2 and re.search(message, err)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(operators.build_info is None, reason=operators.LOAD_ERROR or "it is there")
def test_a_bad_instruction_set_is_named(tmp_path):
    """In a process of its own, for it is chosen once."""
    code = (
        "from imcl_fast import demo, env, train\n"
        f"print(train.main(['--run-dir', {str(tmp_path / 'run')!r}]), demo.main([]))\n"
        "print(env.report())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "IMCL_FAST_ISA": "mmx"},
    )
    assert done.returncode == 0, done.stderr
    message = r'IMCL_FAST_ISA: expected one of .*baseline, got "mmx"'
    assert re.search(rf"^imcl-train: {message}$", done.stderr, re.MULTILINE)
    assert re.search(rf"^python -m imcl_fast.demo: {message}$", done.stderr, re.MULTILINE)
    assert "2 2" in done.stdout and re.search(rf"ISA chosen +{message}", done.stdout)
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_no_number_stops_the_run(capsys, tmp_path):
    run = tmp_path / "run"
    flags = [*SMALL, "--lr", "1e30", "--checkpoint-every", "1", "--run-dir", str(run)]
    code, err = fails(capsys, *flags)
    assert code == 1
    assert re.search(r"step \d+: .*cross_entropy is (nan|inf)", err) or "weights" in err
    for path in (run / "checkpoints").glob("*.pt"):
        state = torch.load(path, weights_only=True)["content"]["objective"]
        assert all(value.isfinite().all() for value in state.values())


# The configuration and its flags


def test_every_setting_is_a_flag_that_help_explains(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")  # lines are broken at the hyphens of a word too
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, setting in SETTINGS.items():
        flag = f"--{name.replace('_', '-')}"
        assert f"{flag} " in text or f"{flag}," in text
        assert " ".join(setting.help.replace("%%", "%").split()) in text
    assert "(default: the method's own, 0.3 in IMCL)" in text
    assert "(default: the method's own, 0.5 in MultiHead)" in text
    assert text.count("default") >= len(SETTINGS) - 1


def test_a_configuration_is_the_same_after_json_and_after_flags():
    config = TrainConfig(
        ways=("output", "kernel"), weights={"kernel": 5.0}, width=8, train_images=100, ema=0.5,
        layers=("layer1", "layer2"), center=False, augment=False, run_dir=Path("a b"),
        deterministic=True, dropout=0.25, lr=1, beta=0.5, stem_stride=2, ways_warmup_epochs=1.5,
        evaluate_every=3, kernels=("conv1", "fc"), clip_norm=2, representation_interval=4,
        kernel_interval=8,
    )  # fmt: skip
    assert TrainConfig.from_json(json.loads(json.dumps(config.as_json()))) == config
    assert flags.parse(flags.command(config), "imcl-train", "") == config
    assert flags.parse([], "imcl-train", "") == TrainConfig()
    assert flags.command(TrainConfig()) == []
    assert config.label == "output+kernel" and TrainConfig(ways=()).label == "ce"


def test_settings_may_be_numpys():
    given = TrainConfig(
        views=np.int64(2), lr=np.float32(0.5), center=np.False_, dataset=np.str_("digits"),
        weights={"kernel": np.float16(5)}, warmup_epochs=np.int8(1),
    )  # fmt: skip
    plain = TrainConfig(
        views=2, lr=0.5, center=False, dataset="digits", weights={"kernel": 5.0}, warmup_epochs=1.0
    )
    assert given == plain and json.dumps(given.as_json()) == json.dumps(plain.as_json())


def test_runs_of_versions_with_fewer_settings_can_be_read_and_gone_on_with(tmp_path):
    config = TrainConfig(width=8, seed=3)
    content = config.as_json()
    del content["kernels"], content["ways_warmup_epochs"]
    assert TrainConfig.from_json(content) == config
    (tmp_path / "config.json").write_text(json.dumps({**content, "versions": {}, "machine": {}}))
    with Records.claim(tmp_path, replace(config, resume="auto")):
        pass
    other = replace(config, resume="auto", kernels=("fc",))
    with (
        pytest.raises(UsageError, match=r"kernels \(was left out, is \('fc',\)\)"),
        Records.claim(tmp_path, other),
    ):
        pass


def test_damaged_rows_of_steps_are_left_out(tmp_path):
    path = tmp_path / "steps.csv"
    whole = b"step,epoch,loss,lr\n1,1,2.5,0.1\n2,1,nan,0.1\n3,1,2.25,0.1\n"
    path.write_bytes(whole + b"4,1,2.2,0.1\n5,1,2.")
    (tmp_path / "metrics.csv").write_text("epoch\n9\n")
    assert Records(tmp_path).go_on(3, []) is None  # what comes after step 3 will come again
    assert path.read_bytes() == whole and [p.name for p in tmp_path.iterdir()] == ["steps.csv"]
    damaged = whole.replace(b"2,1,nan", b"\xff\xfe,1,") + b"\n3,1\n3,1,2.2,0.1,7\n2.5,1,2.0,0.1\n"
    path.write_bytes(damaged)
    line = Records(tmp_path).go_on(3, [])
    assert line.startswith(f"{path}: 5 damaged lines are left out; ") and "\n" not in line
    assert path.read_bytes() == b"step,epoch,loss,lr\n1,1,2.5,0.1\n3,1,2.25,0.1\n"
    assert (tmp_path / "steps.csv.damaged").read_bytes() == damaged
    path.write_bytes(whole[3:])
    records = Records(tmp_path)
    assert "3 damaged lines" in records.go_on(3, []) and path.read_bytes() == b""
    records.step({"step": 4, "epoch": 1, "loss": 2.0, "lr": 0.1})  # it goes on
    records.close()
    assert path.read_bytes() == b"step,epoch,loss,lr\n4,1,2.0,0.1\n"
    path.write_bytes(whole.replace(b"loss", b"lo\xffs"))  # a header that is no text
    records = Records(tmp_path)
    assert "3 damaged lines" in records.go_on(3, []) and path.read_bytes() == b""
    records.step({"step": 4, "epoch": 1, "loss": 2.0, "lr": 0.1})
    records.close()
    assert path.read_bytes() == b"step,epoch,loss,lr\n4,1,2.0,0.1\n"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.clear(), "config: expected the settings of a run, got none"),
        (lambda c: c.update(sede=1), "config: unknown settings sede"),
        (lambda c: c.update(seed="1"), r"seed: expected int, got '1' \(str\)"),
        (lambda c: c.update(seed=True), r"seed: expected int, got True \(bool\)"),
        (lambda c: c.update(seed=2**70), "seed: expected an int of 64 bits, got one of 71"),
        (lambda c: c.update(lr=10**400), "lr: expected more than 0, got inf"),
        (lambda c: c.update(ways=[1]), r"ways: expected str, got 1 \(int\)"),
    ],
)
def test_a_configuration_that_is_none_is_refused(change, message):
    content = TrainConfig().as_json()
    change(content)
    with pytest.raises((TypeError, ValueError), match=message):
        TrainConfig.from_json(content)


def test_the_command_is_installed_under_its_name():
    project = Path(__file__).parents[1] / "pyproject.toml"
    scripts = tomllib.loads(project.read_text())["project"]["scripts"]
    assert scripts["imcl-train"] == "imcl_fast.train:main"
    assert callable(train.main)
