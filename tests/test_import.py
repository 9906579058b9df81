"""What ``import imcl_fast`` brings along, that no import in the package goes upwards, and that
every source file has tests that are said to be for it."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).parents[1]
SLOW = ("torch._dynamo", "triton", "torchvision", "sklearn", "matplotlib", "PIL", "sympy")

# From the commands down to what needs nothing. A module or folder imports what stands on a line
# below its own, and within a folder no two modules import each other, however indirectly.
LAYERS = [
    "train demo env",
    "training reports",
    "runs alignment",
    "redundancy",
    "data objectives",
    "quality_agnostic",
    "perturbation",
    "models imcl ilr",
    "modules choice watch plan",
    "imcl_consistency",
    "imcl_step",
    "imcl_state",
    "sharding",
    "kernel_choice classifier",
    "heads kernel_weights unlearnt",
    "layers",
    "functional",
    "calls",
    "dependence independent",
    "implementations autograd",
    "operators",
    "kernels",
    "algebra padding checked",
    "reference validation",
    "schedule taps modes tracing outputs residual dense dense_outputs build_facts schemas "
    "imcl_output machine dtypes",
]


def imported_by(statement: str) -> set[str]:
    program = f"import sys\n{statement}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_the_losses_import_neither_the_compiler_nor_the_trainer() -> None:
    own = imported_by("import imcl_fast") - imported_by("import torch")
    assert "imcl_fast.functional" in own
    assert not [name for name in SLOW if name in own]
    above = tuple(f"imcl_fast.{name}" for name in ("training", "data", "runs", "reports"))
    assert not [name for name in own if name.startswith(above)]


def test_the_first_loss_imports_no_compiler_either() -> None:
    call = "import torch; from imcl_fast import functional as F; " \
        "F.kernel_similarity(torch.ones(2, 3))"
    assert "torch._dynamo" not in imported_by(call)


def imports() -> dict[str, set[str]]:
    """By module of the package, those of it that it imports anywhere, for type checkers too."""
    paths = [*ROOT.glob("imcl_fast/**/*.py"), *ROOT.glob("imcl_fast/kernels/*.py")]
    texts = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path.read_text() for path in paths
    }

    def defining(name: str) -> str:
        """The module of this name, or what else it is defined in."""
        while name and not {name, f"{name}.__init__"} & texts.keys():
            name = name.rpartition(".")[0]
        return name if name in texts else f"{name}.__init__"

    found: dict[str, set[str]] = {}
    for module, text in texts.items():
        package = module.split(".")[:-1]
        names = []
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom):
                above = package[: len(package) - node.level + 1] if node.level else []
                base = ".".join([*above, *filter(None, [node.module])])
                names += [f"{base}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names += [alias.name for alias in node.names]
        # What the package itself has is there for users.
        found[module] = set(map(defining, names)) & texts.keys() - {"imcl_fast.__init__"}
    return found


def test_no_import_goes_upwards() -> None:
    line_of = {name: i for i, line in enumerate(LAYERS) for name in line.split()}
    graph = imports()
    del graph["imcl_fast.__init__"]
    assert len(graph) > 50
    parts = {module.split(".")[1] for module in graph}
    assert parts <= line_of.keys(), f"expected in LAYERS too: {parts - line_of.keys()}"
    for module, names in graph.items():
        part = module.split(".")[1]
        for name in names:
            other = name.split(".")[1]
            assert other == part or line_of[other] > line_of[part], f"{module} imports {name}"
    graphlib.TopologicalSorter(graph).prepare()  # or there is a cycle, which it names


def test_no_function_of_a_kernel_has_more_than_ten_parameters() -> None:
    found = {
        f"{path.name}: {node.name}": sum(map(len, (a.posonlyargs, a.args, a.kwonlyargs)))
        for path in (ROOT / "kernels").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
        for a in [node.args]
    }
    assert len(found) > 100
    del found["consistency.py: forward"]  # which has those of the operator
    assert not {name: count for name, count in found.items() if count > 10}


def test_every_source_file_has_tests_and_every_test_a_source() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text().partition("## Which tests are for what")[2]
    rows = re.findall(r"^\| (`.*`) \| (.*) \|$", text, re.MULTILINE)
    patterns = [pattern for row in rows for pattern in row[0].strip("`").split("` `")]
    sources = ["setup.py"]
    for folder, endings in (("imcl_fast", "py"), ("kernels", "py"), ("bench", "py"),
                            ("csrc", "cpp cu h")):  # fmt: skip
        for ending in endings.split():
            found = (ROOT / folder).rglob(f"*.{ending}")
            sources += [str(path.relative_to(ROOT)) for path in found]
    for source in sources:
        assert any(fnmatch(source, pattern) for pattern in patterns), f"{source} has no tests"
    for pattern in patterns:
        assert any(fnmatch(source, pattern) for source in sources), f"there is no {pattern}"
    named = {name for row in rows for name in row[1].split(", ")}
    assert {f"test_{name}.py" for name in named} == {
        path.name for path in (ROOT / "tests").glob("test_*.py")
    }
