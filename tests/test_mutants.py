"""``python -m bench.mutants``: its lists fit the sources, and it tells what the tests see."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.mutants import mutant
from bench.mutants.__main__ import main
from bench.mutants.results import Results, explained
from bench.mutants.tree import KILLED, SURVIVED, Outcome, Tree

ROOT = Path(__file__).resolve().parents[1]
LIST = """
[tests.sums]
arguments = ["test_sums.py"]

[[mutants]]
file = "sums.py"
breaks = "what is added is taken away"
old = "a + b"
new = "a - b"
tests = ["sums"]

[[mutants]]
file = "sums.py"
breaks = "nobody is told"
old = "more than 9"
new = "more than 8"
tests = ["sums"]
"""


@pytest.fixture
def toy(tmp_path):
    """A tree of one function with one test, and a folder with a list of two mutants."""
    root, lists = tmp_path / "root", tmp_path / "lists"
    root.mkdir()
    lists.mkdir()
    (root / "sums.py").write_text('def add(a, b):\n    """Not more than 9."""\n    return a + b\n')
    (root / "test_sums.py").write_text(
        "from sums import add\n\n\ndef test_add():\n    assert add(1, 2) == 3\n"
    )
    (lists / "toy.toml").write_text(LIST)
    return root, lists


def run(toy, *more):
    root, lists = toy
    return main(["--root", str(root), "--lists", str(lists), "--jobs", "1", *more])


def test_every_line_stands_once_in_the_sources() -> None:
    mutants = mutant.load()
    assert len(mutants) >= 60
    for each in mutants:
        each.applied_to((ROOT / each.file).read_text(encoding="utf-8"))
        for tests in each.tests:
            assert all((ROOT / a).exists() for a in tests.arguments if a.endswith(".py")), tests


def test_a_copy_has_all_of_the_package_and_no_run(tmp_path) -> None:
    for name in ("runs/one.py", "package/runs/two.py", "package/build/three.py"):
        (tmp_path / "root" / name).parent.mkdir(parents=True)
        (tmp_path / "root" / name).touch()
    Tree(tmp_path / "root", tmp_path / "copy", "avx2")
    found = {str(path.relative_to(tmp_path / "copy")) for path in (tmp_path / "copy").rglob("*.py")}
    assert found == {"package/runs/two.py"}
    assert (tmp_path / "copy/build").is_dir()  # pytest makes no parents of --basetemp


def test_no_mutant_is_tested_on_what_another_one_compiled(tmp_path, monkeypatch) -> None:
    root = tmp_path / "root"
    for name in ("csrc/cpu/a.h", "package/b.py"):
        (root / name).parent.mkdir(parents=True)
        (root / name).write_text("old")
    tree = Tree(root, tmp_path / "copy", "avx2")
    ran = []

    def record(command, *_):
        ran.append("build" if "bench.mutants.build" in command else "test")
        if ran[-1] == "build":
            ran[-1] += f" of {(tree.folder / 'csrc/cpu/a.h').read_text()}"
        return 0, ""

    monkeypatch.setattr(tree, "_run", record)
    tests = mutant.Tests("one", (), ())
    compiled, python = (
        mutant.Mutant(file, "all", "old", "new", (tests,), "")
        for file in ("csrc/cpu/a.h", "package/b.py")
    )
    for each in (python, compiled, compiled, python, python, compiled):
        assert tree.try_out(each, {tests: None}).verdict == SURVIVED
    assert ran == [
        "test", "build of new", "test", "build of new", "test", "build of old", "test", "test",
        "build of new", "test",
    ]  # fmt: skip


@pytest.mark.slow
def test_a_survivor_is_told_from_the_killed(toy, capsys) -> None:
    root, lists = toy
    before = (root / "sums.py").read_text()
    assert run(toy) == 1
    out = capsys.readouterr().out
    assert "what is added is taken away: killed by test_add" in out
    assert "not as it should be: sums.py: nobody is told: survives" in out
    assert (root / "sums.py").read_text() == before
    # A survivor that the list explains is one as it should be, and no other is.
    assert run(toy, "--only", "*taken away") == 0
    text = LIST + 'equivalent = "it is a comment"\n'
    (lists / "toy.toml").write_text(text)
    assert run(toy) == 0
    assert "no test can see it: it is a comment" in capsys.readouterr().out
    (lists / "toy.toml").write_text(text.replace("more than 9", "a + b").replace("8", "-"))
    assert run(toy) == 1


@pytest.mark.slow
def test_mutants_that_do_not_run_are_not_killed(toy, capsys) -> None:
    root, lists = toy
    (lists / "toy.toml").write_text(LIST.replace("a - b", "a +"))
    assert run(toy, "--only", "*taken away") == 1
    assert "taken away: **does not run**" in capsys.readouterr().out


def test_tests_that_are_red_without_a_mutant_stop_it(toy, capsys) -> None:
    root, lists = toy
    (root / "test_sums.py").write_text("def test_add():\n    assert False\n")
    assert run(toy) == 2
    assert "the tests sums fail without a mutant: test_add" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('old = "a + b"', 'old = "a"', "taken away: expected 'a' once in the file, found 4"),
        ('old = "a + b"', 'old = "c"', "taken away: expected 'c' once in the file, found 0"),
        ('old = "a + b"', 'old = "a\\nb"', "old: expected part of a line"),
        ('new = "a - b"', 'new = "a + b"', "new to differ"),
        ('new = "a - b"', "", "got ['breaks', 'file', 'old', 'tests']"),
        ('tests = ["sums"]', 'tests = ["others"]', "expected some of ['sums'], got ['others']"),
        ("nobody is told", "what is added is taken away", "stands there twice"),
    ],
)
def test_lists_that_do_not_fit_are_named(toy, capsys, old, new, message) -> None:
    _, lists = toy
    (lists / "toy.toml").write_text(LIST.replace(old, new))
    assert run(toy) == 2
    assert message in capsys.readouterr().err


def test_results_are_those_of_the_lists_as_they_are(toy, tmp_path) -> None:
    _, lists = toy
    path, document = tmp_path / "results.json", tmp_path / "document.md"
    document.write_text(
        "<!-- mutants:summary -->\n<!-- /mutants:summary -->\n"
        "<!-- mutants:table -->\n<!-- /mutants:table -->\n"
    )
    killed, survivor = mutant.load(lists)
    Results(path, [killed, survivor]).add(killed, Outcome(KILLED, "test_add", 1.0))
    Results(path, [killed, survivor]).add(survivor, Outcome(SURVIVED, "", 1.0))
    assert list(json.loads(path.read_text())) == [killed.name, survivor.name]
    assert explained(killed, KILLED) and not explained(survivor, SURVIVED)
    Results(path, [killed, survivor]).publish(document)
    text = document.read_text()
    assert "Of 2 mutants 1 are killed, 0 can't be seen by any test, 1 survive" in text
    assert "| `sums.py` | what is added is taken away | killed by test_add |\n" in text
    assert "| `sums.py` | nobody is told | **survives** |\n" in text
    changed = survivor._replace(new="more than 7")
    Results(path, [killed, changed]).publish(document)
    text = document.read_text()
    assert "| `sums.py` | nobody is told | not run |\n" in text
    assert "0 survive or don't run, 1 have not been tried out" in text
