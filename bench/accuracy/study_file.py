"""Reads a study from a TOML file.

The file has the settings of all runs in ``[train]``, and in ``[conditions.NAME]``,
``[networks.NAME]`` and ``[methods.NAME]`` those that come on top, in this order, beside a ``title``
each. ``[ways]`` has settings of the methods that have some of the four ways, before their own. The
settings are the fields of ``TrainConfig``. A method also has ``seeds``, N for seeds 1 to N; it may
be restricted by ``conditions`` and ``networks``, lists of names, and say in ``versus`` which other
method it is a variant of; its ``form`` is another definition of way 4 (``kernel_forms``); ``found =
true`` says that its ``kernels`` are those which way 4 found by itself when rows of it were made. A
study that confirms what another was looked at for starts at ``first_seed`` instead of 1, on seeds
that nobody has seen.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

from imcl_fast.runs.config import SETTINGS, TrainConfig

from . import kernel_forms
from .study import Method, Part, PlannedRun, Study

FOLDER = Path(__file__).parent / "studies"
# What the runs of a study don't decide for themselves.
GIVEN = (
    "seed", "data_root", "download", "threads", "run_dir", "resume", "tensorboard", "report",
    "measure_ways",
)  # fmt: skip
TABLES = ("train", "conditions", "networks", "methods")
WAYS = "ways"  # a table that may be missing
TOP = {"title": str, "description": str, "baseline": str, "compare": list, "first_seed": int,
       "jobs": int, "threads": int}  # fmt: skip
NAME = re.compile(r"[a-z0-9][a-z0-9-]*")


class StudyError(ValueError):
    """A study file isn't one; the message names the file, the table and the key."""


def names() -> list[str]:
    """Of the studies that come with the project."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load(name: str) -> Study:
    """A study by its name, or by the path of its file.

    Raises:
        StudyError: there is none, or its file isn't right.
    """
    path = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    try:
        return _read(path.stem, path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StudyError(
            f"study: expected one of {', '.join(names())}, or the path of a .toml file, got "
            f"{name!r} ({error.strerror})"
        ) from error
    except ValueError as error:  # not UTF-8, not TOML, or no study
        raise StudyError(f"{path.name}: {error}") from error


@cache  # for every table and every test asks for some
def _read(name: str, text: str) -> Study:
    content = tomllib.loads(text)
    if unknown := sorted(set(content) - set(TOP) - {*TABLES, WAYS}):
        raise StudyError(
            f"unknown key {unknown[0]!r}, expected {', '.join([*TOP, *TABLES, WAYS])}"
        )
    for key, kind in TOP.items():
        if key in content:
            _check(key, content[key], kind)
    for key in ("title", "baseline", *TABLES):
        if key not in content:
            raise StudyError(f"{key} is missing")
    train = _settings("train", content["train"])
    _config([("train", train)], seed=0)  # alone too it must describe a run
    ways = _settings(WAYS, content.get(WAYS, {}))
    conditions, networks = (
        {part: _part(f"{kind}.{part}", table) for part, table in _named(kind, content).items()}
        for kind in ("conditions", "networks")
    )
    tables = _named("methods", content)
    baseline = content["baseline"]
    _names("baseline", [baseline], tables)
    methods = {}
    for method, table in tables.items():
        key = f"methods.{method}"
        seeds = _at_least_1(f"[{key}] seeds", _check(f"[{key}] seeds", table.get("seeds"), int))
        part = _part(key, table, ("seeds", "conditions", "networks", "versus", "form", "found"))
        form = _check(f"[{key}] form", table.get("form", ""), str)
        try:
            form and kernel_forms.parse(form)
        except ValueError as error:
            raise StudyError(f"[{key}] {error}") from error
        found = _check(f"[{key}] found", table.get("found", False), bool)
        if found and "kernels" not in table:
            raise StudyError(f"[{key}] found: expected the kernels that were; name them in kernels")
        methods[method] = Method(
            part.name,
            part.title,
            part.settings,
            seeds,
            _names(f"[{key}] conditions", table.get("conditions"), conditions),
            _names(f"[{key}] networks", table.get("networks"), networks),
            *_names(f"[{key}] versus", [table.get("versus", baseline)], tables),
            form,
            found,
        )
    compare = [_names("compare", pair, methods) for pair in content.get("compare", [])]
    if any(len(pair) != 2 for pair in compare):
        raise StudyError(f"compare: expected pairs of methods, got {content['compare']}")
    first_seed = _at_least_1("first_seed", content.get("first_seed", 1))
    runs = tuple(_runs(train, ways, conditions, networks, methods, first_seed))
    if len({run.name for run in runs}) < len(runs):
        raise StudyError("expected a name of its own for each run, CONDITION-NETWORK-METHOD-sSEED "
                         "has some twice")  # fmt: skip
    if len({run.config.validation_images for run in runs}) > 1:
        raise StudyError("validation_images: expected the same for all runs, which a table "
                         "compares; set it in [train] only")  # fmt: skip
    return Study(
        name=name,
        title=content["title"],
        description=" ".join(content.get("description", "").split()),
        baseline=baseline,
        compare=tuple((first, second) for first, second in compare),
        jobs=content.get("jobs"),
        threads=content.get("threads"),
        train=train,
        ways=ways,
        conditions=conditions,
        networks=networks,
        methods=methods,
        runs=runs,
    )


def _runs(
    train: Mapping[str, Any],
    ways: Mapping[str, Any],
    conditions: Mapping[str, Part],
    networks: Mapping[str, Part],
    methods: Mapping[str, Method],
    first_seed: int,
) -> Iterator[PlannedRun]:
    counts = range(max(method.seeds for method in methods.values()))
    for count, condition, network, method in product(
        counts, conditions.values(), networks.values(), methods.values()
    ):
        if (
            count >= method.seeds
            or condition.name not in method.conditions
            or network.name not in method.networks
        ):
            continue
        layers = [
            ("train", train),
            (f"conditions.{condition.name}", condition.settings),
            (f"networks.{network.name}", network.settings),
            (f"methods.{method.name}", method.settings),
        ]
        config = _config(layers, first_seed + count)
        if ways and config.has_ways:
            config = _config([*layers[:-1], (WAYS, ways), layers[-1]], config.seed)
        yield PlannedRun(
            condition.name, network.name, method.name, config, method.form, method.found
        )


def _config(layers: Sequence[tuple[str, Mapping[str, Any]]], seed: int) -> TrainConfig:
    merged: dict[str, Any] = {}
    for _, settings in layers:
        merged |= settings
    try:
        return TrainConfig(**merged, seed=seed)
    except (TypeError, ValueError) as error:
        name = str(error).partition(":")[0]
        tables = [table for table, settings in layers if name in settings]
        raise StudyError(f"[{(tables or [layers[-1][0]])[-1]}] {error}") from error


def _part(key: str, table: Mapping[str, Any], besides: Sequence[str] = ()) -> Part:
    name = key.partition(".")[2]
    title = _check(f"[{key}] title", table.get("title", name), str)
    settings = {k: value for k, value in table.items() if k not in ("title", *besides)}
    return Part(name, title, _settings(key, settings))


def _settings(key: str, table: Mapping[str, Any]) -> Mapping[str, Any]:
    for name in _check(f"[{key}]", table, dict):
        if name in GIVEN:
            raise StudyError(f"[{key}] {name}: every run is given its own; leave it out")
        if name not in SETTINGS:
            raise StudyError(f"[{key}] {name}: expected a setting of imcl-train, whose --help "
                             "lists them")  # fmt: skip
    return table


def _named(key: str, content: Mapping[str, Any]) -> Mapping[str, Any]:
    tables = _check(f"[{key}]", content[key], dict)
    if not tables:
        raise StudyError(f"[{key}]: expected at least one table [{key}.NAME]")
    for name, table in tables.items():
        if not NAME.fullmatch(name):
            raise StudyError(f"[{key}.{name}]: expected a name of a-z, 0-9 and -")
        _check(f"[{key}.{name}]", table, dict)
    return tables


def _names(key: str, value: Sequence[str] | None, known: Mapping[str, Any]) -> tuple[str, ...]:
    """Names that must be ``known``; None is all of them."""
    if value is None:
        return tuple(known)
    for name in _check(key, value, list):
        if not isinstance(name, str) or name not in known:
            raise StudyError(f"{key}: expected one of {', '.join(known)}, got {name!r}")
    return tuple(value)


def _check(key: str, value: Any, kind: type) -> Any:
    if type(value) is not kind:  # a bool is no number of seeds
        got = "nothing" if value is None else f"{value!r} ({type(value).__name__})"
        raise StudyError(f"{key}: expected {kind.__name__}, got {got}")
    return value


def _at_least_1(key: str, value: int) -> int:
    if value < 1:
        raise StudyError(f"{key}: expected at least 1, got {value}")
    return value
