"""``TrainConfig`` as command line flags, and a ``TrainConfig`` as the command for it."""

from __future__ import annotations

import argparse
import inspect
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from .. import __version__
from ..ilr import MultiHead
from ..imcl import IMCL
from ..objectives import WAYS
from ..quality_agnostic import QualityAgnostic
from .config import SETTINGS, Range, TrainConfig, argument_of

DEFAULTS = TrainConfig()
WORDS = {"all": WAYS, "none": ()}


class Parser(argparse.ArgumentParser):
    """An argument parser with --version whose errors are one line."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_argument("--version", action="version", version=f"%(prog)s {__version__}")

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (--help lists all flags)\n")


def in_range(kind: type[int] | type[float], within: Range) -> Callable[[str], float]:
    """What reads a number within a range, for ``add_argument(type=...)``."""

    def read(text: str) -> float:
        value = kind(text)
        if not within.has(value):
            raise argparse.ArgumentTypeError(f"expected {within.expected(value)}, got {text}")
        return value

    read.__name__ = kind.__name__  # what an error calls it
    return read


def parse(arguments: Sequence[str] | None, prog: str, description: str) -> TrainConfig:
    """The configuration that command line ``arguments`` describe.

    Exits with code 2 and one line on standard error if they describe none.
    """
    parser = build_parser(prog, description)
    namespace = parser.parse_args(arguments)
    try:
        return TrainConfig(**vars(namespace))
    except (TypeError, ValueError) as error:
        name, _, rest = str(error).partition(": ")
        parser.error(f"argument {_flag(name)}: {rest}")


def build_parser(prog: str, description: str) -> Parser:
    """A parser with a flag for every field of ``TrainConfig``, in its groups."""
    # Without abbreviations: a flag added later must not change what a script means.
    parser = Parser(prog=prog, description=description, allow_abbrev=False)
    groups: dict[str, Any] = {}
    kinds = typing.get_type_hints(TrainConfig)
    for name, setting in SETTINGS.items():
        if setting.group not in groups:
            groups[setting.group] = parser.add_argument_group(setting.group)
        options: dict[str, Any] = {
            "default": getattr(DEFAULTS, name),
            "help": setting.help + _default_text(name),
        }
        kind = _plain(kinds[name])
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["type"] = _ways if name == "ways" else READERS.get(kind, kind)
            options["metavar"] = setting.metavar or {int: "N", float: "X"}.get(kind)
            if kind is str:
                options["choices"] = setting.choices
        groups[setting.group].add_argument(_flag(name), **options)
    return parser


def command(config: TrainConfig) -> list[str]:
    """The flags that describe ``config``: those that differ from the defaults."""
    words = []
    for name in SETTINGS:
        value = getattr(config, name)
        if value == getattr(DEFAULTS, name):
            continue
        if isinstance(value, bool):
            words.append(_flag(name if value else f"no_{name}"))
        else:
            words += [_flag(name), _text(value)]
    return words


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _plain(kind: Any) -> Any:
    """The type of a field's value, whether or not it may be None."""
    if isinstance(kind, types.UnionType):
        (kind,) = (k for k in typing.get_args(kind) if k is not type(None))
    return typing.get_origin(kind) or kind


def _default_text(name: str) -> str:
    """What a help text says of the default, if it doesn't say so itself."""
    value = getattr(DEFAULTS, name)
    if argument := argument_of(name):
        objectives = (IMCL, MultiHead, QualityAgnostic)
        objective = next(o for o in objectives if argument in inspect.signature(o).parameters)
        own = inspect.signature(objective).parameters[argument].default
        text = "all that are found" if own is None else _text(own)
        return f" (default: the method's own, {text} in {objective.__name__})"
    if "by default" in SETTINGS[name].help:
        return ""
    return f" (default: {'none' if value in (None, {}) else _text(value)})"


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ",".join(f"{name}={number}" for name, number in value.items())
    if isinstance(value, tuple):
        names = [word for word, meaning in WORDS.items() if meaning == value]
        return names[0] if names else ",".join(value)
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value)


def _folder(text: str) -> Path:
    if not text:  # which Path would take for the current one
        raise argparse.ArgumentTypeError("expected a folder, got ''")
    return Path(text)


def _ways(text: str) -> tuple[str, ...]:
    if text in WORDS:
        return WORDS[text]
    chosen = text.split(",")
    # In the order of the method, so that the same ways are the same configuration.
    ordered = [way for way in WAYS if way in chosen]
    return tuple([*ordered, *(way for way in chosen if way not in WAYS)])


def _weights(text: str) -> dict[str, float]:
    weights: dict[str, float] = {}
    for part in text.split(","):
        way, separator, number = part.partition("=")
        try:
            if not separator or way in weights:
                raise ValueError(part)
            weights[way] = float(number)
        except ValueError as error:
            raise argparse.ArgumentTypeError(
                f"expected way=number,..., each way once, got {text!r}"
            ) from error
    return weights


READERS: dict[Any, Callable[[str], Any]] = {
    tuple: lambda text: tuple(text.split(",")),
    dict: _weights,
    Path: _folder,
}
