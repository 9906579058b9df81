"""The mutants, as the files in lists/ state them: one line changed, and the tests that see it."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
LISTS = Path(__file__).resolve().parent / "lists"
FIELDS = {"file", "breaks", "old", "new", "tests"}  # and equivalent, where no test can see it


class MutantError(ValueError):
    """A list of mutants is wrong, or doesn't fit the sources any more: a sentence."""


class Tests(NamedTuple):
    """A run of pytest, and what its environment is to have besides."""

    name: str
    arguments: tuple[str, ...]
    environment: tuple[tuple[str, str], ...]


class Mutant(NamedTuple):
    """One line of one file, changed.

    Attributes:
        file: path in the repository.
        breaks: what is wrong then, a phrase; with the file, the mutant's name.
        old, new: part of the line, which stands in the file exactly once, and what it becomes.
        tests: those that should see it, the quickest first.
        equivalent: why no test can see it; empty where one should.
    """

    file: str
    breaks: str
    old: str
    new: str
    tests: tuple[Tests, ...]
    equivalent: str

    @property
    def name(self) -> str:
        return f"{self.file}: {self.breaks}"

    @property
    def compiled(self) -> bool:
        """Whether the extension has to be built again. The CUDA kernels that run on the CPU are
        compiled by the tests themselves."""
        return self.file.startswith("csrc/") and not self.file.startswith("csrc/cuda/")

    def applied_to(self, text: str) -> str:
        """The file's text, changed.

        Raises:
            MutantError: ``old`` doesn't stand in it exactly once.
        """
        if (count := text.count(self.old)) != 1:
            raise MutantError(f"{self.name}: expected {self.old!r} once in the file, found {count}")
        return text.replace(self.old, self.new)


def load(folder: Path = LISTS) -> list[Mutant]:
    """The mutants of all lists in ``folder``.

    Raises:
        MutantError: a list states something else, or a mutant twice.
    """
    mutants: dict[str, Mutant] = {}
    for path in sorted(folder.glob("*.toml")):
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        tests = {
            name: Tests(name, tuple(stated["arguments"]),
                        tuple(stated.get("environment", {}).items()))
            for name, stated in content["tests"].items()
        }  # fmt: skip
        for stated in content["mutants"]:
            mutant = _mutant(path.name, stated, tests)
            if mutant.name in mutants:
                raise MutantError(f"{path.name}: {mutant.name!r} stands there twice")
            mutants[mutant.name] = mutant
    return list(mutants.values())


def _mutant(source: str, stated: dict, tests: dict[str, Tests]) -> Mutant:
    where = f"{source}: {stated.get('file')}: {stated.get('breaks')}"
    if stated.keys() - {"equivalent"} != FIELDS:
        raise MutantError(f"{where}: expected {sorted(FIELDS)}, got {sorted(stated)}")
    if not stated["tests"] or set(stated["tests"]) - tests.keys():
        raise MutantError(
            f"{where}: tests: expected some of {sorted(tests)}, got {stated['tests']}"
        )
    if "\n" in stated["old"] or not stated["old"] or stated["old"] == stated["new"]:
        raise MutantError(f"{where}: old: expected part of a line, and new to differ from it")
    return Mutant(
        **{**stated, "tests": tuple(tests[name] for name in stated["tests"]),
           "equivalent": stated.get("equivalent", "")}
    )  # fmt: skip
