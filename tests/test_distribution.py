"""What people install: the source distribution has all that git has, what is built of it works, and
wheels for others need no Python version, and no glibc later than torch's own."""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path, PurePosixPath
from types import ModuleType
from zipfile import ZipFile

import pytest
from test_sanitizers import compile_all, driver_jobs, kernel_jobs

from imcl_fast import __version__, operators
from imcl_fast.build_facts import BuildFacts

ROOT = Path(__file__).resolve().parents[1]
NAME = f"imcl_fast-{__version__}"
ONLY_IN_GIT = (".ci/", ".gitignore")
GENERATED = ("PKG-INFO", "setup.cfg", "imcl_fast.egg-info/")
# Prints where the operators come from, and a loss of the fused kernels.
PROGRAM = """
import torch, imcl_fast
from imcl_fast import functional as F, operators
import imcl_fast.kernels.plan
print(operators.LIBRARY, operators.build_info.isa_chosen())
print(F.kernel_similarity(torch.eye(4), impl="cpp").item())
"""


def run(*command: str | Path, **variables: str) -> str:
    environment = {**os.environ, "IMCL_FAST_BUILD": "cpu", **variables}
    done = subprocess.run(
        list(map(str, command)), cwd=variables.get("PWD"), env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout[-8000:]}"
    return done.stdout


def needs_checkout() -> None:
    if not (ROOT / "setup.py").exists():
        pytest.skip("setup.py is not beside the tests")


@pytest.fixture(scope="module")
def build() -> ModuleType:
    needs_checkout()
    spec = importlib.util.spec_from_file_location("imcl_fast_setup", ROOT / "setup.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    needs_checkout()
    folder = tmp_path_factory.mktemp("sdist")
    # Made where nothing is written into the checkout: egg-info goes to a folder of its own.
    run(sys.executable, "setup.py", "-q", "egg_info", "-e", folder, "sdist", "-d", folder,
        PWD=str(ROOT))  # fmt: skip
    return folder / f"{NAME}.tar.gz"


def test_the_source_distribution_has_what_git_has(archive: Path) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("no checkout of git to compare with")
    listed = set(run("git", "-C", ROOT, "ls-files", "-co", "--exclude-standard").splitlines())
    there = {name for name in listed if (ROOT / name).exists()}
    wanted = {name for name in there if not name.startswith(ONLY_IN_GIT)}
    with tarfile.open(archive) as tar:
        members = {str(PurePosixPath(m.name).relative_to(NAME)): m for m in tar.getmembers()}
    found = {name for name, member in members.items() if not member.isdir()}
    assert found - wanted <= {name for name in found if name.startswith(GENERATED)}
    assert wanted - found == set()
    kernels = members["imcl_fast/kernels"]
    assert kernels.issym() and kernels.linkname == "../kernels"


@pytest.mark.slow
def test_what_is_built_of_the_source_distribution_works(archive: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", tmp_path,
        archive)  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    with ZipFile(wheel) as content:
        names = set(content.namelist())
    sources = {*ROOT.glob("imcl_fast/**/*.py"), *ROOT.glob("imcl_fast/kernels/*.py")}
    assert {str(path.relative_to(ROOT)) for path in sources} <= names
    assert any(re.fullmatch(r"imcl_fast/_build_info\..*\.so", name) for name in names)
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--target", tmp_path / "lib", wheel)
    said = run(sys.executable, "-c", PROGRAM, PWD=str(tmp_path), PYTHONPATH=str(tmp_path / "lib"))
    assert said.splitlines()[0].startswith(str(tmp_path / "lib"))
    assert said.splitlines()[1] == "0.0"


def test_a_zip_of_github_s_is_installed(tmp_path: Path) -> None:
    """What unpacks it with Python's zipfile, as pip does, makes a file of a link."""
    needs_checkout()
    tree, lib = tmp_path / "imcl_fast-main", tmp_path / "lib"
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("imcl_fast", "kernels"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, tree)
    link = tree / "imcl_fast/kernels"
    assert str(link.readlink()) == "../kernels"
    link.unlink()
    link.write_text("../kernels")
    without = {"PWD": str(tree), "IMCL_FAST_BUILD": "0"}
    run(sys.executable, "setup.py", "-q", "build", "-b", lib, **without)
    kernels = {path.name for path in (ROOT / "kernels").glob("*.py")}
    assert {path.name for path in lib.glob("lib*/imcl_fast/kernels/*.py")} == kernels
    run(sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--target",
        lib, "-e", tree, **without)  # fmt: skip
    (finder,) = lib.glob("__editable__*_finder.py")
    assert f"'imcl_fast.kernels': {str(tree / 'kernels')!r}" in finder.read_text()
    run(sys.executable, "setup.py", "-q", "sdist", "-d", tmp_path, **without)
    with tarfile.open(tmp_path / f"{NAME}.tar.gz") as tar:
        assert tar.getmember(f"{NAME}/imcl_fast/kernels").linkname == "../kernels"


@pytest.mark.slow
def test_a_wheel_for_others_serves_every_python_and_old_systems(tmp_path: Path) -> None:
    needs_checkout()
    if sys.platform != "linux":
        pytest.skip("manylinux is for Linux")
    pytest.importorskip("auditwheel", reason="auditwheel is not installed")
    run(sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", tmp_path,
        ROOT, IMCL_FAST_PORTABLE="1")  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith(f"{NAME}-py3-none-linux_")
    with ZipFile(wheel) as content:
        content.extractall(tmp_path / "lib")
        libraries = [name for name in content.namelist() if name.endswith(".so")]
    assert libraries == ["imcl_fast/_operators.so"]
    said = run(sys.executable, "-m", "auditwheel", "show", wheel)
    system = re.search(r"manylinux_2_(\d+)_", said)
    assert system and int(system[1]) <= 28, said
    # Without a module of this Python the facts are the library's.
    said = run(sys.executable, "-c", PROGRAM, PWD=str(tmp_path), PYTHONPATH=str(tmp_path / "lib"))
    assert said.splitlines()[1] == "0.0"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clang++", "g++-11"])
def test_other_compilers_take_the_sources(name: str) -> None:
    compiler = shutil.which(name)
    if not compiler:
        pytest.skip(f"{name} is not installed")
    needs_checkout()
    for job, words in {**driver_jobs([]), **kernel_jobs()}.items():
        said = run(compiler, "-fsyntax-only", *words)
        assert "error" not in said, f"{job}: {said}"


@pytest.mark.slow
def test_kernels_of_the_oldest_gcc_are_right(tmp_path: Path) -> None:
    """It has another builtin for shuffles."""
    compiler = shutil.which("g++-11")
    if not compiler:
        pytest.skip("g++-11 is not installed")
    needs_checkout()
    jobs = {**driver_jobs([]), **kernel_jobs(["-O1"])}
    del jobs["own_scratch"]  # stands in for another one
    program = tmp_path / "kernels"
    run(compiler, "-pthread", *compile_all(compiler, tmp_path, jobs), "-o", program)
    print(run(program, "7"))


def test_the_citation_is_of_this_version() -> None:
    path = ROOT / "CITATION.cff"
    if not path.exists():
        pytest.skip("CITATION.cff is not beside the tests")
    assert f"\nversion: {__version__}\n" in path.read_text()


def test_the_tag_is_of_what_is_in_the_wheel(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    from setuptools import Distribution

    def tag(pure: bool = False) -> tuple[str, str, str]:
        command = build.BuildWheel(Distribution({"name": "imcl_fast"}))
        command.ensure_finalized()
        command.root_is_pure = pure
        return command.get_tag()

    here = tag()
    assert here[0] != "py3" and here[1] != "none"
    monkeypatch.setenv("IMCL_FAST_PORTABLE", "1")
    assert tag() == ("py3", "none", here[2])
    monkeypatch.setattr(build, "machine_of", lambda cxx: "aarch64")
    monkeypatch.setattr(build.platform, "machine", lambda: "x86_64")
    assert tag() == ("py3", "none", f"{sys.platform}_aarch64")
    assert tag(pure=True) == ("py3", "none", "any")
    monkeypatch.setenv("IMCL_FAST_PORTABLE", "yes")
    with pytest.raises(SystemExit, match="IMCL_FAST_PORTABLE: expected 0 or 1, got 'yes'"):
        build.portable()


@pytest.mark.parametrize(
    ("said", "machine"),
    [("x86_64-linux-gnu", "x86_64"), ("aarch64-linux-gnu", "aarch64"), ("", "x86_64"),
     ("amd64-portbld-freebsd14", "x86_64")],
)  # fmt: skip
def test_the_machine_is_that_of_the_compiler(
    build: ModuleType, said: str, machine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text(f"#!/bin/sh\necho {said}\n")
    compiler.chmod(0o755)
    monkeypatch.setattr(build.platform, "machine", lambda: "x86_64")
    assert build.machine_of(str(compiler)) == machine
    assert build.is_cross(str(compiler)) == (machine != "x86_64")


def test_a_cross_build_has_one_level_no_cuda_and_no_libraries_of_this_machine(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "machine_of", lambda cxx: "aarch64")
    monkeypatch.setattr(build.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(build, "compiler", lambda: shutil.which("true"))
    monkeypatch.setenv("IMCL_FAST_BUILD", "auto")
    plan = build.ninja_file(Path("_operators.so"))
    assert "pairwise_baseline.o" in plan and "avx2" not in plan and "nvcc" not in plan
    assert "build libtorch_cpu.so: name" in plan and "-ltorch_cpu" not in plan
    assert "_build_info" not in plan


def test_it_builds_in_any_folder(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What ninja reads and what the shell does quote spaces in ways of their own."""
    if shutil.which("ninja") is None:
        pytest.skip("ninja is not installed")
    folder = tmp_path / "my code: $HOME & more"
    folder.mkdir()
    (folder / "csrc").symlink_to(ROOT / "csrc")
    monkeypatch.setattr(build, "ROOT", folder)
    monkeypatch.setenv("IMCL_FAST_BUILD", "cpu")
    monkeypatch.setenv("IMCL_FAST_PORTABLE", "1")
    (folder / "build.ninja").write_text(build.ninja_file(folder / "imcl fast/_operators.so"))
    plan = run("ninja", "-n", "-v", "-C", folder)
    commands = [line.partition("] ")[2] for line in plan.splitlines() if "isa.cpp" in line]
    assert commands and str(folder / "csrc/cpu/isa.cpp") in shlex.split(commands[0])
    assert f"-I{folder}/csrc/cpu" in shlex.split(commands[0])
    run("ninja", "-C", folder, "isa.o", "portable.o")
    assert (folder / "isa.o").exists()


def test_the_compiler_may_be_a_command_of_several_words(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher = tmp_path / "launcher"
    launcher.write_text('#!/bin/sh\nexec "$@"\n')
    launcher.chmod(0o755)
    real = build.program_of(build.compiler())
    monkeypatch.setenv("CXX", f"{launcher} {real} -m64")
    assert build.compiler() == f"{launcher} {real} -m64"
    assert build.program_of(build.compiler()) == real
    assert not build.is_cross(f"{launcher} {real}")
    monkeypatch.setenv("CXX", "no-such-compiler --fast")
    with pytest.raises(SystemExit, match="no C.. compiler found .no-such-compiler --fast"):
        build.compiler()


@pytest.mark.parametrize(
    ("version", "said"),
    [
        ("2.10.0", "2.10 is installed. Run `pip install --upgrade torch "),
        ("2.11.1+cpu", None),
        ("3.0.0", None),
        (None, "none is installed, or the build's isolated environment hides it. Run `pip"),
    ],
)  # fmt: skip
def test_a_torch_that_is_missing_or_too_old_is_named(
    build: ModuleType, version: str | None, said: str | None, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (tmp_path / "torch").mkdir()
    if version:
        (tmp_path / "torch/version.py").write_text(f"__version__ = '{version}'\n")
    monkeypatch.setattr(build, "find_spec", lambda name: None)
    (tmp_path / "left over/torch").mkdir(parents=True)  # by an uninstall
    monkeypatch.setattr(build.sysconfig, "get_path", lambda kind: str(
        tmp_path / "left over" if kind == "platlib" else tmp_path
    ))
    if said is None:
        assert build.torch_folder() == tmp_path / "torch"
    else:
        with pytest.raises(SystemExit, match=f"torch 2.11 or later, and {said}") as stop:
            build.torch_folder()
        assert "`pip install --no-build-isolation .`" in str(stop.value)


@pytest.mark.parametrize("version", ["65.5.0", "76.1"])
def test_setuptools_too_old_for_the_project_s_file_are_named(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some lack what setup.py imports, and the others end in a traceback at the licence."""
    needs_checkout()
    import setuptools

    monkeypatch.setattr(setuptools, "__version__", version)
    with pytest.raises(SystemExit, match=f"setuptools 77 or later, and {version} is installed"):
        runpy.run_path(str(ROOT / "setup.py"))


def test_pybind11_that_is_missing_is_named(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IMCL_FAST_BUILD", "cpu")
    monkeypatch.setitem(sys.modules, "pybind11", None)
    assert "_operators.so" in build.ninja_file(tmp_path / "_operators.so")  # which needs none
    with pytest.raises(SystemExit, match="pybind11 is not installed. Run `pip install pybind11`"):
        build.ninja_file(tmp_path / "_operators.so", tmp_path / "_build_info.so")


@pytest.mark.parametrize("wanted", ["all", "2.5", "0", "-1", "\N{SUPERSCRIPT TWO}"])
def test_a_number_of_jobs_that_is_none_is_refused(
    build: ModuleType, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAX_JOBS", wanted)
    with pytest.raises(SystemExit, match=f"MAX_JOBS: expected a number from 1 on, got {wanted!r}"):
        build.jobs()
    monkeypatch.setenv("MAX_JOBS", "3")
    assert build.jobs() == 3
    monkeypatch.setenv("MAX_JOBS", "")
    assert build.jobs() >= 1


def test_the_user_s_flags_come_after_ours(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which("ninja") is None:
        pytest.skip("ninja is not installed")
    monkeypatch.setenv("IMCL_FAST_BUILD", "cpu")
    monkeypatch.setenv("IMCL_FAST_PORTABLE", "1")
    monkeypatch.setenv("CXXFLAGS", "-O1 '-DSAID=a $HOME & more'")
    monkeypatch.setenv("LDFLAGS", "-Wl,-rpath,/nowhere")
    (tmp_path / "build.ninja").write_text(build.ninja_file(tmp_path / "_operators.so"))
    plan = run("ninja", "-n", "-v", "-C", tmp_path).splitlines()
    (compile_,) = (shlex.split(line) for line in plan if "csrc/cpu/isa.cpp" in line)
    assert compile_.index("-O1") > compile_.index("-O3")
    assert "-DSAID=a $HOME & more" in compile_
    (link,) = (shlex.split(line) for line in plan if "isa.o" in line and "-o" in line
               and "_operators.so" in line)  # fmt: skip
    assert "-Wl,-rpath,/nowhere" in link and "-O1" not in link
    monkeypatch.setenv("CXXFLAGS", "'-O1")
    with pytest.raises(SystemExit, match="CXXFLAGS: No closing quotation"):
        build.ninja_file(tmp_path / "_operators.so")


def test_facts_are_of_the_library_that_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of another Python's build may lie beside it."""
    if operators.build_info is None:
        pytest.skip(operators.LOAD_ERROR)
    module = pytest.importorskip("imcl_fast._build_info", reason="it is in no wheel for others")
    assert operators._load()[0] is module
    monkeypatch.setattr(module, "cuda_architectures", lambda: "35")
    assert operators._load()[0].cuda_architectures() == BuildFacts(
        operators.LIBRARY
    ).cuda_architectures()


def test_the_library_tells_what_the_module_of_this_python_tells(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if operators.build_info is None:
        pytest.skip(operators.LOAD_ERROR)
    facts = BuildFacts(operators.LIBRARY)
    names = [name for name in vars(BuildFacts) if not name.startswith("_")]
    module = operators.build_info
    assert set(names) == {name for name in dir(module) if not name.startswith("_")}
    for name in names:
        assert getattr(facts, name)() == getattr(module, name)(), name
    with pytest.raises(RuntimeError, match="no fact is called age"):
        facts._text("age")
