"""Run folders as they are read, and the HTML report as a browser would get it."""

import html.parser
import importlib.util
import json
import os
import re
import sys
import xml.etree.ElementTree

import pytest
from run_folders import WAYS, profiles, write_run

from imcl_fast import train
from imcl_fast.reports import charts, compare, inspect
from imcl_fast.reports.html import write_report
from imcl_fast.runs.folder import UnreadableRun, read_run

drawn = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None,
    reason="matplotlib, which draws the charts, isn't installed",
)

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(html.parser.HTMLParser):
    """What a page refers to and says; it asserts that its elements are nested well."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.words = [], [], []
        self.references, self.handlers = [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self._look(attributes)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self._look(attributes)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    def _look(self, attributes):
        self.handlers += [name for name, _ in attributes if name.startswith("on")]
        self.references += [
            value
            for name, value in attributes
            if name in ("src", "href", "xlink:href", "action", "data", "srcset")
        ]

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def report(folder):
    path = write_report(folder)
    assert path == folder / "report.html"
    return Page(path.read_text(encoding="utf-8")), path.read_text(encoding="utf-8")


# Reading


def test_a_run_is_read(tmp_path):
    run = read_run(write_run(tmp_path / "run", accuracy=0.75, best=0.9))
    assert run.finished and run.epochs == 4 and run.label == "imcl"
    assert run.accuracy == 0.75 and run.best_accuracy == 0.9
    assert run.terms == ["cross_entropy", "output_consistency", "multilayer_consistency",
                         "representation_similarity", "kernel_similarity"]  # fmt: skip
    assert run.setting("dataset") == "digits" and run.setting("nothing", 3) == 3
    assert run.before and run.after and run.held_out == "test"


@pytest.mark.parametrize(
    "settings, label",
    [
        ({"ways": []}, "ce"),
        ({"ways": WAYS[::-1]}, "imcl"),
        ({"ways": ["output", "kernel"]}, "output+kernel"),
        ({"method": "song-chai-2"}, "song-chai-2"),
    ],
)
def test_labels(settings, label, tmp_path):
    assert read_run(write_run(tmp_path / "run", **settings)).label == label


def test_a_run_that_is_going_on_is_read(tmp_path):
    folder = write_run(tmp_path / "run", running=True)
    assert not read_run(folder).finished and read_run(folder).epochs == 3
    with (folder / "metrics.csv").open("a") as file:
        file.write("4,0.3")  # the rest isn't written yet
    assert read_run(folder).epochs == 3
    (folder / "metrics.csv").write_text("epoch,test_accuracy\n")
    assert read_run(folder).epochs == 0 and read_run(folder).accuracy is None
    for name in ("metrics.csv", "redundancy_before.json"):
        (folder / name).unlink()
    run = read_run(folder)
    assert (run.epochs, run.accuracy, run.best_accuracy, run.before) == (0, None, None, [])


def test_the_last_row_of_a_repeated_epoch_counts(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "metrics.csv").write_text("epoch,test_accuracy\n1,0.1\n2,0.2\n2,0.3\n3,nan\n")
    run = read_run(folder)
    assert run.metrics["epoch"] == [1, 2, 3] and run.metrics["test_accuracy"][:2] == [0.1, 0.3]
    assert run.best_accuracy == 0.3


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("config.json", None, "it has no config.json"),
        ("config.json", "{", "config.json: expected JSON"),
        ("config.json", "[]", "config.json: expected an object, got list"),
        ("summary.json", '"x"', "summary.json: expected an object, got str"),
        ("metrics.csv", "epoch,a\n1,2,3\n2,2\n", "line 2: expected 2 columns, got 3"),
        ("metrics.csv", "epoch,a\n1,x\n2,2\n", "column a: could not convert string to float"),
        ("metrics.csv", b"\xff\xfe\x00", "metrics.csv: expected CSV"),
        ("metrics.csv", "\n\n", "expected CSV whose first column is epoch, got ''"),
        ("metrics.csv", "train_loss,lr\n1,2\n", "column is epoch, got 'train_loss,lr'"),
        ("redundancy_after.json", '[{"name": "a"}]', "expected layers with columns, kind, rows"),
        ("redundancy_after.json", "{}", "expected a list, got dict"),
        ("cka_after.json", '{"rows": ["a"]}', "cka_after.json: expected rows, columns and as many"),
        ("cka_before.json", '{"rows": [], "columns": ["a"], "cka": [[1.0, 0.5]]}', "as many cells"),
        ("cka_before.json", "[]", "expected an object, got list"),
    ],
)
def test_broken_files_are_named(file, content, message, tmp_path):
    folder = write_run(tmp_path / "run")
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UnreadableRun) as error:
        read_run(folder)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert str(folder) in str(error.value)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(UnreadableRun, match="nowhere: expected a run folder"):
        read_run(tmp_path / "nowhere")


# The report


@drawn
def test_the_report_says_what_the_run_did(tmp_path):
    folder = write_run(tmp_path / "run-7", accuracy=0.8123, best=0.9, seed=7, lr=0.0625)
    page, text = report(folder)
    for words in (
        "digits · resnet18 · imcl",
        "Run run-7, seed 7; 4 of 4 epochs, finished.",
        "test accuracy, last epoch 81.23 %",
        "test accuracy, best epoch 90.00 % (epoch 3)",
        "time per step 50.00 ms",
        "peak memory 300 MiB",
        "representation similarity 6.00 12.0",  # of the step's 50 ms
        "network and cross entropy 30.00 60.0",
        "lr 0.0625",
        "ways output, multilayer, representation, kernel",
        "torch 2.13.0",
        "a processor",
        "accelerator -",
    ):
        assert words in page.text
    before, after = profiles()
    for old, new in zip(before, after, strict=True):
        cosines = f"{old['mean_abs_cos']:.3f} {new['mean_abs_cos']:.3f}"
        assert old["name"] in page.text and cosines in page.text
        assert f"after {new['mean_abs_cos']:.3f}" in page.text
    # Two heat maps and a histogram per layer, and the scale of the colours.
    assert sum(tag == "img" for tag in page.tags) == 2 * len(before) + 2  # and two scales
    assert text.count('class="histogram"') == len(before)


@drawn
def test_the_report_needs_nothing_beside_it(tmp_path):
    page, text = report(write_run(tmp_path / "run"))
    assert page.references
    assert all(value.startswith(("data:image/png;base64,", "#")) for value in page.references)
    assert not {"script", "link", "iframe", "object"} & set(page.tags) and page.handlers == []
    assert "@import" not in text and "url(http" not in text
    assert set(re.findall(r"https?://[^\"' ]*", text)) <= {
        "http://www.w3.org/2000/svg",  # names, which no browser fetches
        "http://www.w3.org/1999/xlink",
    }
    # What is referred to inside a chart is there, once.
    names = re.findall(r'\bid="([^"]*)"', text)
    assert len(names) == len(set(names))
    for name in re.findall(r'(?:url\(|xlink:href=")#([^)"]*)', text):
        assert name in names


@drawn
def test_the_report_s_charts_take_the_page_s_colours(tmp_path):
    _, text = report(write_run(tmp_path / "run"))
    assert "prefers-color-scheme: dark" in text and "@media print" in text
    charts = re.findall(r'<svg [^>]*class="chart".*?</svg>', text, re.DOTALL)
    assert len(charts) == 3 + 5 + 2 + 2  # curves, terms, layers of both kinds, CKA
    for chart in charts:
        xml.etree.ElementTree.fromstring(chart)
        assert "currentColor" in chart and "#010203" not in chart
        assert not re.search(r"(fill|stroke): (#000000|#ffffff|black|white)", chart)


@drawn
def test_charts_can_be_read_on_a_phone(tmp_path):
    folder = write_run(tmp_path / "run")
    names = [f"features.{i}.block.conv1" for i in range(40)]
    many = {"rows": names, "columns": names, "cka": [[0.5] * 40] * 40}
    (folder / "cka_after.json").write_text(json.dumps(many))
    _, text = report(folder)
    room = 360 - 2 * 24  # pixels, less the page's margins
    widths = [float(width) for width in re.findall(r'viewBox="0 0 ([\d.]+) [\d.]+"[^>]*>', text)]
    assert len(widths) > 10 and len(re.findall("conv1</text>", text)) == 40
    for width in widths:
        scale = room / width
        assert charts.STYLE["font.size"] * scale >= 10, f"{width} points"
    # Nothing asks for more room than there is, but for tables, which scroll.
    for least in re.findall(r"minmax\(([^,]*(?:\([^)]*\))?),", text):
        assert least.startswith("min("), least


USED = {
    "settings": {"layers": ["1", "3"], "views": 2, "device": "cpu", "train_images": 1300},
    "weights": {"multilayer": 3.0, "representation": 10.0, "kernel": 100.0},
    "paths": {"multilayer": ["1"], "representation": ["1", "3"], "kernel": ["0", "2.weight"]},
}


@drawn
def test_the_report_marks_the_layers_that_each_way_acted_on(tmp_path):
    page, text = report(write_run(tmp_path / "run", used=USED))
    assert "What each way acted on 2 multi-layer consistency , weight 3: 1 3 representation " \
        "similarity , weight 10: 1, 3 4 kernel similarity , weight 100: 0, 2.weight" in page.text
    marks = {}
    for card in re.findall(r'<figure class="card">.*?</figure>', text, re.DOTALL):
        name = re.search(r'class="name">([^<]*)', card)[1]
        kind = "kernel" if name in ("0", "2", "5") else "representation"
        marks[name, kind] = re.findall(r'class="mark">way (\d)', card)
    kinds = {(layer["name"], layer["kind"]) for layer in profiles()[0]}
    assert set(marks) == kinds
    assert {key: found for key, found in marks.items() if found} == {
        ("0", "kernel"): ["4"],
        ("1", "representation"): ["2", "3"],
        ("2", "kernel"): ["4"],
        ("3", "representation"): ["3"],
    }


@drawn
def test_the_report_shows_settings_as_they_turned_out(tmp_path):
    config = {"views": None, "train_images": None, "clip_norm": None}
    page, _ = report(write_run(tmp_path / "new", used=USED, **config))
    for words in ("layers 1, 3", "views 2", "device cpu", "train images 1300", "clip norm -",
                  "weights multilayer 3.0, representation 10.0, kernel 100.0"):  # fmt: skip
        assert words in page.text
    assert "default" not in page.text
    page, _ = report(write_run(tmp_path / "old", **config))
    assert "views the method's own" in page.text and "acted on" not in page.text


@drawn
def test_a_curve_leads_through_the_epochs_that_were_measured():
    every = charts.curves([("accuracy", {"test": [0.5, 0.75, 0.7]})], [2, 4, 5])
    some = charts.curves([("accuracy", {"test": [None, 0.5, None, 0.75, 0.7]})], range(1, 6))
    assert some == every


@drawn
def test_what_users_write_is_text(tmp_path):
    nasty = '<script>alert("&x")</script>'
    folder = write_run(tmp_path / "<b>run", dataset=nasty, model="$a_b$ & <i>", layers=[nasty])
    after = json.loads((folder / "redundancy_after.json").read_text())
    before = json.loads((folder / "redundancy_before.json").read_text())
    after[0]["name"] = before[0]["name"] = nasty
    (folder / "redundancy_after.json").write_text(json.dumps(after))
    (folder / "redundancy_before.json").write_text(json.dumps(before))
    metrics = (folder / "metrics.csv").read_text().replace("kernel_similarity", "<u>$x^2$")
    (folder / "metrics.csv").write_text(metrics)
    page, _ = report(folder)
    assert not {"script", "b", "i", "u"} & set(page.tags)
    assert page.text.count(nasty) >= 5  # title, heading, configuration, card, table
    assert "<u>$x^2$" in page.text and "$a_b$ & <i>" in page.text and "Run <b>run" in page.text


@drawn
def test_the_report_of_an_unfinished_run(tmp_path):
    folder = write_run(tmp_path / "run", running=True)
    page, text = report(folder)
    assert report(folder)[1] == text  # nothing in it depends on when it is made
    assert "3 of 4 epochs, not finished" in page.text
    assert "before training" in page.text and "after training" not in page.text
    assert "Which layers see the same" in page.text
    assert "Time of a step" not in page.text
    (folder / "metrics.csv").unlink()
    (folder / "redundancy_before.json").unlink()
    (folder / "cka_before.json").unlink()  # as of older versions
    page, _ = report(folder)
    assert "No epoch has been finished yet." in page.text and "Redundancy" not in page.text
    assert "Which layers see the same" not in page.text


@drawn
def test_the_report_of_a_diverged_run(tmp_path):
    folder = write_run(tmp_path / "run", ways=[], label_noise=0.0, validation_images=100)
    after = json.loads((folder / "redundancy_after.json").read_text())
    for key in ("mean_abs_cos", "mean_square_cos", "effective_rank", "histogram", "heatmap",
                "dead_share"):  # fmt: skip
        after[0][key] = None
    (folder / "redundancy_after.json").write_text(json.dumps(after))
    rows = (folder / "metrics.csv").read_text().splitlines()
    rows[-1] = ",".join(["4", *["nan"] * (rows[0].count(","))])
    (folder / "metrics.csv").write_text("\n".join(rows))
    page, _ = report(folder)
    assert "digits · resnet18 · ce" in page.text
    assert "validation accuracy, last epoch nan %" in page.text


@drawn
def test_the_report_takes_the_old_one_s_place_only_when_it_is_whole(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "run")
    (folder / "report.html").write_text("old")
    monkeypatch.setattr(os, "replace", _no_room)
    with pytest.raises(OSError):
        write_report(folder)
    assert (folder / "report.html").read_text() == "old"
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]


def _no_room(*_):
    raise OSError("no room")


def test_without_matplotlib_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        write_report(write_run(tmp_path / "run"))


# A real run


@drawn
@pytest.mark.filterwarnings("ignore:imcl_fast. no fused kernel")
def test_imcl_train_s_run_is_reported_inspected_and_compared(tmp_path, capsys):
    folder = tmp_path / "run"
    flags = ["--width", "2", "--epochs", "1", "--image-size", "8", "--label-noise", "0.5"]
    flags += ["--ema", "0.9", "--threads", "1", "--no-measure-ways", "--no-tensorboard"]
    assert train.main([*flags, "--run-dir", str(folder)]) == 0
    run = read_run(folder)
    assert run.finished and run.label == "imcl" and len(run.terms) == 5
    assert len(run.before) == len(run.after) > 30
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    assert "default" not in page.text and "the method's own" not in page.text
    assert run.used["paths"]["output"] == ["fc"] and len(run.used["paths"]["kernel"]) > 10
    marked = [name for name in run.used["paths"]["kernel"] if name not in page.text]
    assert run.used["settings"]["views"] == 2 and not marked
    assert f"test accuracy, last epoch {100 * run.accuracy:.2f} %" in page.text
    # What the report draws of the trained network is what imcl-inspect says of it.
    assert run.cka_before["rows"] == run.cka_after["rows"] != []
    assert run.cka_before["cka"] != run.cka_after["cka"]
    said = tmp_path / "cka.json"
    assert inspect.main([str(folder), "--cka", "--images", "256", "--json", str(said)]) == 0
    found, drawn = json.loads(said.read_text()), run.cka_after
    assert (found["rows"], found["columns"]) == (drawn["rows"], drawn["columns"])
    # Not to the bit: the command takes another number of threads.
    for row, other in zip(found["cka"], drawn["cka"], strict=True):
        assert row == pytest.approx(other, abs=1e-4)
    assert all(name in page.text for name in run.cka_after["rows"])
    capsys.readouterr()
    tables = []
    for path in (folder, folder / "network.pt", folder / "checkpoints" / "best.pt"):
        assert inspect.main([str(path), "--images", "64"]) == 0
        tables.append(capsys.readouterr().out)
    # All three are the moving average, which is what was measured.
    assert tables[0] == tables[1] == tables[2]
    kernel = next(layer for layer in run.after if layer["name"] == "layer4.1.conv2")
    line = next(line for line in tables[0].splitlines() if line.startswith("layer4.1.conv2"))
    assert f"{kernel['mean_abs_cos']:.4f}" in line.split()
    assert compare.main([str(folder)]) == 0
    assert f"{100 * run.accuracy:.2f}" in capsys.readouterr().out
