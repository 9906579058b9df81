"""Details of what people read of runs: comparisons, reports, charts, profiles and the demo's table,
of which a fault went unseen by their own tests."""

import base64
import csv
import io
import json
import statistics
import subprocess
import sys

import pytest
from PIL import Image
from run_folders import WAYS, write_run

from imcl_fast import demo
from imcl_fast.reports import charts, compare, html, inspect
from imcl_fast.runs.extra import needed_by
from imcl_fast.runs.folder import read_run


def test_times_and_memory_are_medians_and_a_run_counts_once(tmp_path, capsys):
    folders = [str(write_run(tmp_path / str(seed), seed=seed, seconds_per_step=seconds))
               for seed, seconds in enumerate((0.01, 0.02, 0.09))]  # fmt: skip
    again = f"{folders[0]}/../0"
    assert compare.main([*folders, again, "--csv", str(tmp_path / "out.csv")]) == 0
    assert "20.00" in capsys.readouterr().out.splitlines()[2].split()
    with (tmp_path / "out.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert (row["seeds"], row["seconds_per_step"]) == ("3", "0.02")
    assert float(row["peak_memory_bytes"]) == 300 * 2**20


@pytest.mark.parametrize(
    ("module", "command"),
    [("train", "imcl-train"), ("reports.compare", "imcl-compare"),
     ("reports.inspect", "imcl-inspect"), ("demo", "python -m imcl_fast.demo")],
)  # fmt: skip
def test_a_command_without_its_libraries_names_all_of_them_in_a_line(module, command):
    program = f"""
import runpy, sys
sys.modules.update(tabulate=None, tqdm=None, sklearn=None)
sys.argv[1:] = ["--help"]
runpy.run_module("imcl_fast.{module}", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    start, _, packages = done.stderr.partition(": pip install ")
    assert start == f"{command}: of the extra `train` not everything is installed"
    assert {"tabulate", "tqdm", "scikit-learn"} <= set(packages.split())
    assert done.stderr.count("\n") == 1


def test_what_is_missing_of_our_own_is_no_library(capsys):
    with pytest.raises(ModuleNotFoundError, match="no_such_module"), needed_by("imcl-train"):
        import imcl_fast.no_such_module  # noqa: F401
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("library", ["scipy", "sklearn"])
def test_a_library_that_is_missed_later_is_named_too(library, monkeypatch, tmp_path, capsys):
    for name in [name for name in sys.modules if name.split(".")[0] == library] + [library]:
        monkeypatch.setitem(sys.modules, name, None)
    if library == "scipy":
        folders = [str(write_run(tmp_path / f"{name}{seed}", ways=ways, seed=seed))
                   for name, ways in (("none", []), ("all", WAYS)) for seed in range(2)]
        assert compare.main(folders) == 2
        package, command = "scipy", "imcl-compare"
    else:
        assert demo.main([]) == 2
        package, command = "scikit-learn", "python -m imcl_fast.demo"
    said = capsys.readouterr().err
    assert said.startswith(f"{command}: ") and said.endswith(f": pip install {package}\n")
    assert said.count("\n") == 1


def test_charts_of_means_have_deviations_and_bars_have_shares(monkeypatch):
    axes = pytest.importorskip("matplotlib.axes").Axes
    seen = []
    monkeypatch.setattr(axes, "errorbar", lambda self, x, y, xerr, **_: seen.append((x, xerr)))
    charts.means(["a", "b"], [[1.0, 2.0, 6.0], [4.0]], "%")
    assert seen == [(3.0, pytest.approx(statistics.stdev([1.0, 2.0, 6.0]))), (4.0, 0)]
    bar = charts.shares({"a": 1.0, "b": 3.0})
    assert "width: 25.00%" in bar and "width: 75.00%" in bar


def test_the_ways_share_a_step_with_the_network(tmp_path):
    lines = html._step_time(read_run(write_run(tmp_path / "run")))["lines"]
    assert lines[:2] == [
        ["network and cross entropy", "30.00", "60.0"], ["output consistency", "2.00", "4.0"],
    ]  # fmt: skip
    assert lines[-1] == ["all", "50.00", "100.0"]


def test_what_was_before_and_after_stands_by_its_name(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    run = read_run(write_run(tmp_path / "run"))
    drawn = {}
    monkeypatch.setattr(charts, "layers", lambda panels: drawn.setdefault("layers", panels) and "")
    monkeypatch.setattr(charts, "alignments", lambda panels: drawn.setdefault("cka", panels) and "")
    html._cka(run)
    assert [(title, cells[0][1]) for title, _, cells in drawn["cka"]] == [
        ("before training", 0.25), ("after training", 0.5),
    ]  # fmt: skip
    table = html._redundancy(run)["numbers"]
    title, names, series = drawn["layers"][1]
    assert title == "kernels: mean |cos|"
    for time, layers in (("before", run.before), ("after", run.after)):
        layer = next(x for x in layers if x["kind"] == "kernel")
        cells = [line for line in table["lines"] if line[:2] == [layer["name"], "kernel"]]
        found = dict(zip(table["head"], cells[0], strict=True))
        assert found[f"|cos| {time}"] == f"{layer['mean_abs_cos']:.3f}"
        assert found[f"cos² {time}"] == f"{layer['mean_square_cos']:.4f}"
        assert found[f"dead % {time}"] == f"{100 * layer['dead_share']:.1f}"
        assert found[f"eff. rank {time}"] == f"{layer['effective_rank']:.1f}"
        assert series[f"{time} training"][names.index(layer["name"])] == layer["mean_abs_cos"]


def test_a_curve_is_the_mean_over_the_runs_that_have_the_epoch(tmp_path):
    short, long = (read_run(write_run(tmp_path / str(n), epochs=n, accuracy=x))
                   for n, x in ((2, 0.5), (3, 0.75)))  # fmt: skip
    curve = compare._mean_curve([short, long], "test_accuracy", 3)
    one, other = (run.metrics["test_accuracy"] for run in (short, long))
    assert curve == pytest.approx([50 * (one[0] + other[0]), 50 * (one[1] + other[1]), 75.0])


def test_colours_are_of_the_square_root_and_histograms_of_one_scale():
    matplotlib = pytest.importorskip("matplotlib")
    png = base64.b64decode(charts.heat_map([[0.25, 1.0]]).partition(",")[2])
    pixel = Image.open(io.BytesIO(png)).getpixel((0, 0))
    assert pixel == tuple(matplotlib.colormaps["viridis"](0.5, bytes=True)[:3])
    drawn = charts.histogram([[3, 0], [7, 0]])  # log 4 is two thirds of log 8
    assert "V30.0H50.0" in drawn and "V4.0H50.0" in drawn


def test_the_picture_of_a_profile_has_its_numbers(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(charts, "save", lambda names, series, kind: drawn.update(series) or b"")
    said = tmp_path / "all.json"
    arguments = ["resnet18", "--image-size", "32", "--images", "2", "--json", str(said)]
    assert inspect.main([*arguments, "--plot", str(tmp_path / "all.svg")]) == 0
    layers = json.loads(said.read_text())
    assert drawn["effective rank / full rank"] == [
        x["effective_rank"] / min(x["rows"], x["columns"]) for x in layers
    ]


def test_cka_is_of_512_images_and_a_profile_of_16(monkeypatch):
    counts = []
    monkeypatch.setattr(inspect, "_align", lambda found, x, options: counts.append(len(x)) or 0)
    monkeypatch.setattr(inspect, "profile", lambda network, x, **_: counts.append(len(x)) or [])
    for more in (["--cka"], ["--against", "resnet18"], []):
        assert inspect.main(["resnet18", "--image-size", "8", *more]) == 0
    assert counts == [512, 512, 16]


def test_the_demos_table_has_means_by_their_names():
    runs = [
        demo.Result({"last_test_accuracy": 0.5, "seconds_per_step": seconds},
                    {"fit_noisy": fitted, "cross_entropy": 1.0, "kernel_similarity": 0.25})
        for seconds, fitted in ((0.01, 0.2), (0.03, 0.4))
    ]  # fmt: skip
    text = demo.table({"cross entropy": [], "four ways": runs}, "cpp")
    head, _, line = (row.split("  ") for row in text.splitlines())
    found = dict(zip(*([c.strip() for c in row if c] for row in (head, line)), strict=True))
    assert found == {
        "method": "four ways", "implementation": "cpp", "test accuracy": "50.00 +- 0.00 %",
        "wrong fitted": "30.0 %", "s/step": "0.0200", "CE": "1.0000", "output": "-",
        "multi-layer": "-", "represent.": "-", "kernel": "0.2500",
    }  # fmt: skip
