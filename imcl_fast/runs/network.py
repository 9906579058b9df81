"""The network that a run trains, or that a command line names."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from .. import models
from ..data import DataSet
from .config import TrainConfig
from .errors import UsageError, as_usage_error

TIMM = "timm"
# What a factory may call the number of classes, by which it is asked for as many.
CLASSES = ("num_classes", "classes")


def build_network(config: TrainConfig, data_set: DataSet) -> nn.Module:
    """The network that the configuration names, for the data's channels and classes.

    Raises:
        UsageError: there is none of these sizes, it can't be built, or torchvision isn't
            installed.
    """
    classes, channels, size = len(data_set.classes), data_set.shape[0], data_set.shape[-1]
    if ":" in config.model:
        for name in ("width", "stem_stride"):
            if getattr(config, name) != getattr(TrainConfig, name):  # the default
                raise UsageError(
                    f"{name}: expected none for {config.model}, which has its own; leave it out"
                )
        return named(config.model, classes, channels=channels, image_size=size)
    try:
        with as_usage_error(ValueError, ImportError):
            return models.build(
                config.model,
                classes,
                channels=channels,
                image_size=size,
                width=config.width,
                stem_stride=config.stem_stride,
            )
    except RuntimeError as error:
        reason = str(error).split("\n")[0]
        raise UsageError(f"width: can't make the network ({reason}); make it smaller") from error


def named(
    name: str, classes: int | None, *, channels: int | None = None, image_size: int | None = None
) -> nn.Module:
    """``timm:NAME``, or ``package.module:factory``, which is also looked for in the current
    folder; with random weights.

    A factory is called without arguments, but for the number of classes, if it takes one as
    ``num_classes`` or ``classes``. A network of timm's is made for images of ``image_size``
    where it can be.

    Raises:
        UsageError: it can't be built, or is no nn.Module.
    """
    module, _, factory = name.partition(":")
    try:
        network = (
            _of_timm(factory, classes, channels, image_size)
            if module == TIMM
            else _of_factory(module, factory, classes)
        )
    except Exception as error:  # whatever the user's own code raises
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UsageError(f"{name}: can't be built ({reason})") from error
    if not isinstance(network, nn.Module):
        raise UsageError(f"{name}: expected an nn.Module, got {type(network).__name__}")
    return network


def _of_timm(
    name: str, classes: int | None, channels: int | None, image_size: int | None
) -> nn.Module:
    models.import_torchvision()  # which timm looks for
    timm: Any = importlib.import_module(TIMM)
    given = {"num_classes": classes, "in_chans": channels}
    options = {name: number for name, number in given.items() if number is not None}
    if image_size is not None:
        try:
            return timm.create_model(name, img_size=image_size, **options)
        except TypeError:  # convolutional networks take images of any size
            pass
    return timm.create_model(name, **options)


def _of_factory(module: str, name: str, classes: int | None) -> Any:
    if os.getcwd() not in sys.path:  # as python -m has it, and a command of its own not
        sys.path.insert(0, os.getcwd())
    factory: Callable = getattr(importlib.import_module(module), name)
    taken = inspect.signature(factory).parameters
    options = {} if classes is None else {key: classes for key in CLASSES if key in taken}
    return factory(**options)
