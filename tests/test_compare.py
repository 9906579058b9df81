"""imcl-compare: groups, pairs, intervals, and what it refuses."""

import csv
import importlib.util
import math
import os
import statistics
import subprocess
import sys

import pytest
from run_folders import WAYS, add_columns, write_run

from imcl_fast.reports import compare
from imcl_fast.reports.paired import interval

PLAIN = {0: 0.70, 1: 0.72, 2: 0.71}
FOUR = {0: 0.75, 1: 0.78, 2: 0.75}


@pytest.fixture
def runs(tmp_path):
    """Two methods at three seeds, folders as arguments."""
    folders = []
    for seed in PLAIN:
        for name, ways, accuracies, seconds in (
            ("plain", [], PLAIN, 0.05),
            ("four", WAYS, FOUR, 0.06),
        ):
            folder = write_run(
                tmp_path / f"{name}-{seed}", ways=ways, seed=seed, accuracy=accuracies[seed],
                seconds_per_step=seconds + 0.001 * seed,
            )  # fmt: skip
            folders.append(str(folder))
    return folders


def table(capsys):
    """The lines of the table printed: method to cells split at two spaces and more."""
    head, rule, *lines = capsys.readouterr().out.splitlines()
    assert set(rule) == {"-"}
    return {line.split("  ")[0]: [cell.strip() for cell in line.split("  ") if cell]
            for line in lines}  # fmt: skip


def test_means_differences_and_times(runs, capsys):
    assert compare.main(runs) == 0
    lines = table(capsys)
    assert list(lines) == ["ce", "imcl"]  # the baseline first
    assert lines["ce"][1:3] == ["3", "71.00 +- 1.00"] and "baseline" in lines["ce"]
    differences = [100 * (FOUR[seed] - PLAIN[seed]) for seed in PLAIN]
    half = 4.302653 * statistics.stdev(differences) / math.sqrt(3)
    mean = statistics.mean(differences)
    assert lines["imcl"][2] == "76.00 +- 1.73"
    assert f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]" in lines["imcl"]
    assert "61.00" in lines["imcl"] and f"x {0.061 / 0.051:.3f}" in lines["imcl"]


def test_seeds_are_matched_whatever_the_order(runs, capsys):
    compare.main(runs)
    expected = capsys.readouterr().out
    compare.main(runs[::-1])
    assert capsys.readouterr().out == expected
    # Without plain CE's seed 2 there are two pairs.
    compare.main([folder for folder in runs if not folder.endswith("plain-2")])
    lines = table(capsys)
    mean, low, high, count = interval([100 * (FOUR[s] - PLAIN[s]) for s in (0, 1)])
    assert count == 2 and f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]" in lines["imcl"]
    assert lines["imcl"][1] == "3" and "2" in lines["imcl"]


def test_settings_make_groups_and_only_those_that_differ_are_named(tmp_path, capsys):
    folders = [
        str(write_run(tmp_path / f"{label_noise}-{len(ways)}-{weight}-{threads}", ways=ways,
                      label_noise=label_noise, weights=weights, accuracy=accuracy, seed=threads,
                      threads=threads))
        for label_noise, ways, weights, weight, accuracy in (
            (0.0, [], {}, 0, 0.9),
            (0.0, ["kernel"], {"kernel": 100}, 100, 0.92),
            (0.5, [], {}, 0, 0.7),
            (0.5, ["kernel"], {"kernel": 100}, 100, 0.75),
            (0.5, ["kernel"], {"kernel": 10.0}, 10, 0.71),
        )
        for threads in (1, 2)  # which don't matter for the result
    ]  # fmt: skip
    assert compare.main(folders) == 0
    lines = table(capsys)
    assert list(lines) == [
        "ce label_noise=0.0 weights=default",
        "kernel label_noise=0.0 weights=kernel=100",
        "ce label_noise=0.5 weights=default",
        "kernel label_noise=0.5 weights=kernel=100",
        "kernel label_noise=0.5 weights=kernel=10",
    ]
    # Each to the plain runs of the same noise.
    assert "+2.00 [+2.00, +2.00]" in lines["kernel label_noise=0.0 weights=kernel=100"]
    assert "+5.00 [+5.00, +5.00]" in lines["kernel label_noise=0.5 weights=kernel=100"]
    assert "+1.00 [+1.00, +1.00]" in lines["kernel label_noise=0.5 weights=kernel=10"]


def test_one_seed_has_a_difference_but_no_interval(runs, capsys):
    assert compare.main(runs[:2]) == 0
    lines = table(capsys)
    assert lines["ce"][2] == "70.00" and "+5.00" in lines["imcl"]


def test_one_seed_is_said_to_prove_nothing(runs, tmp_path, capsys):
    path = tmp_path / "out.html"
    drawn = ["--html", str(path)] if importlib.util.find_spec("matplotlib") else []
    for chosen, warned in ((runs[:2], True), (runs, False)):
        assert compare.main([*chosen, *drawn]) == 0
        texts = [capsys.readouterr().out, *([path.read_text()] if drawn else [])]
        for text in texts:
            assert ("One seed proves nothing: the difference of imcl is" in text) == warned


def test_settings_left_open_are_named_as_they_turned_out(tmp_path, capsys):
    used = {"settings": {"views": 2}, "weights": {"output": 1.0}}
    for views in (None, 3):
        folder = tmp_path / f"views-{views}"
        write_run(folder, views=views, used=used if views is None else None)
    assert compare.main([str(path) for path in sorted(tmp_path.iterdir())]) == 0
    said = capsys.readouterr().out
    assert "imcl views=2" in said and "imcl views=3" in said and "default" not in said


def test_accuracies_of_other_qualities_are_not_compared(tmp_path, capsys):
    """A qad run without --qualities is measured at two of them, plain cross entropy at none."""
    for name, method, qualities, seen in (
        ("ce", "imcl", None, []),
        ("ce-raw", "imcl", ["raw"], ["raw"]),
        ("ce-both", "imcl", ["raw", "jpeg20"], ["raw", "jpeg20"]),
        ("qad", "qad", None, ["raw", "jpeg20"]),
    ):
        folder = write_run(tmp_path / name, ways=[], method=method, qualities=qualities,
                           accuracy=0.8 if method == "qad" else 0.7,
                           seed=7 if name == "ce-raw" else 0)  # fmt: skip
        add_columns(folder, {f"test_accuracy_{quality}": 0.5 for quality in seen})
    assert compare.main([str(tmp_path / name) for name in ("ce", "qad")]) == 0
    lines = table(capsys)
    assert list(lines) == ["ce qualities=raw", "qad qualities=raw,jpeg20"]
    assert not any("+10.00" in cell for cells in lines.values() for cell in cells)
    assert compare.main([str(tmp_path / name) for name in ("ce-both", "qad")]) == 0
    assert "+10.00" in table(capsys)["qad"]  # which is right: both are measured at the same
    assert compare.main([str(tmp_path / name) for name in ("ce", "ce-raw")]) == 0
    assert table(capsys)["ce"][1] == "2"  # two seeds of one group


def test_runs_of_a_network_of_ones_own_are_not_taken_for_others(runs, tmp_path, capsys):
    own = {"own": {"dataset": "toy", "model": "Net"}, "settings": {}}
    folder = write_run(tmp_path / "own", ways=WAYS, accuracy=0.9, seed=0, used=own)
    assert compare.main([*runs, str(folder)]) == 0
    lines = table(capsys)
    assert "imcl dataset=toy model=Net" in lines
    assert lines["imcl dataset=digits model=resnet18"][1] == "3"  # seeds: that of "own" isn't one
    assert "baseline" in lines["ce dataset=digits model=resnet18"]


@pytest.mark.parametrize("what", ["data", "network"])
def test_runs_of_other_data_or_networks_of_one_name_are_not_paired(what, tmp_path, capsys):
    folders = [
        write_run(tmp_path / name, ways=ways, accuracy=accuracy, seed=0,
                  used={"settings": {}, "fingerprints": {what: fingerprint}})
        for name, ways, accuracy, fingerprint in (
            ("a", [], 0.5, "12345678"), ("b", WAYS, 0.75, "12345678"), ("c", WAYS, 0.9, "87654321"),
        )
    ]  # fmt: skip
    assert compare.main(list(map(str, folders))) == 0
    lines = table(capsys)
    assert "+25.00" in lines[f"imcl {what} fingerprint=12345678"]
    assert not any(cell.startswith("+") for cell in lines[f"imcl {what} fingerprint=87654321"])


@pytest.mark.parametrize("baseline", ["imcl", "four-1"])
def test_another_baseline(runs, baseline, capsys):
    if baseline == "four-1":
        baseline = next(folder for folder in runs if folder.endswith(baseline))
    assert compare.main([*runs, "--baseline", baseline]) == 0
    lines = table(capsys)
    assert list(lines) == ["imcl", "ce"] and any(c.startswith("-5.00 [") for c in lines["ce"])


def test_runs_that_are_going_on_or_diverged_are_left_out(runs, tmp_path, capsys):
    going = write_run(tmp_path / "going", seed=5, running=True)
    diverged = write_run(tmp_path / "diverged", seed=6, accuracy=math.nan)
    assert compare.main([*runs, str(going), str(diverged)]) == 0
    out, error = capsys.readouterr()
    assert "nan" not in out
    assert f"left out {going}: not finished, 3 of 4 epochs" in error
    assert f"left out {diverged}: no accuracy" in error


def test_csv_holds_the_numbers(runs, tmp_path, capsys):
    assert compare.main([*runs, "--csv", str(tmp_path / "out.csv")]) == 0
    with (tmp_path / "out.csv").open() as file:
        plain, four = csv.DictReader(file)
    assert plain["difference_mean"] == "" and plain["method"] == four["baseline"] == "ce"
    assert float(four["accuracy_mean"]) == pytest.approx(0.76)
    assert float(four["difference_mean"]) == pytest.approx(0.05)
    low, high = float(four["difference_low"]), float(four["difference_high"])
    assert (low, high) == pytest.approx(interval([0.05, 0.06, 0.04])[1:3])
    assert float(four["seconds_per_step"]) == pytest.approx(0.061)


def test_html_is_one_whole_page(runs, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib isn't installed")
    path = tmp_path / "out.html"
    assert compare.main([*runs, "--html", str(path)]) == 0
    text = path.read_text()
    assert "76.00 +- 1.73" in text and text.count('class="chart"') == 3
    assert "<script" not in text and "src=" not in text
    assert all(folder in text for folder in runs)


@pytest.mark.parametrize(
    "case, message",
    [
        (["nowhere"], "expected a run folder"),
        (["--baseline", "song-chai-2"], "baseline: expected one of 'ce', 'imcl'"),
        (["--csv", "no/such/folder.csv"], "there is no such folder: 'no/such'"),
        (["--csv", "/dev/full"], "no room left on the disk to write /dev/full"),
        (["twin"], "the same settings and the same seed (0); leave one of them out"),
        (["going"], "expected at least one finished run, got none"),
    ],
)
def test_errors_are_one_line(case, message, runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if case == ["twin"]:
        write_run(tmp_path / "twin")
    elif case == ["going"]:
        write_run(tmp_path / "going", running=True)
        runs = []
    assert compare.main([*runs, *case]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("imcl-compare: ") and message in error


def test_an_ambiguous_baseline_is_refused(tmp_path, capsys):
    folders = [str(write_run(tmp_path / str(s), ways=[], label_smoothing=s)) for s in (0.0, 0.1)]
    assert compare.main(folders) == 0
    assert "baseline" not in capsys.readouterr().out
    assert compare.main([*folders, "--baseline", "ce"]) == 2
    assert "'ce' is more than one of" in capsys.readouterr().err
    assert compare.main([*folders, "--baseline", "ce label_smoothing=0.1"]) == 0
    assert "ce label_smoothing=0.0" in capsys.readouterr().out


def test_no_arguments_are_one_line_too(capsys):
    with pytest.raises(SystemExit) as stop:
        compare.main([])
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_the_interval_is_student_s():
    stats = pytest.importorskip("scipy.stats", reason="scipy, the oracle, isn't installed")
    values = [0.3, 0.1, 0.45, 0.2]
    low, high = stats.t.interval(
        0.95, 3, loc=statistics.mean(values), scale=stats.sem(values)
    )
    assert interval(values) == pytest.approx((statistics.mean(values), low, high, 4))
    with pytest.raises(ValueError, match="expected at least 1"):
        interval([])


def test_a_reader_that_has_left_is_no_error(runs, tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "imcl_fast.reports.compare", *runs]
    table = tmp_path / "all.csv"
    done = subprocess.run(
        [*command, "--csv", str(table)], stdout=writer, stderr=subprocess.PIPE, text=True
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")
    assert table.exists()
