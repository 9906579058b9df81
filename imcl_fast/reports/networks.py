"""Finds the network that a command line names, or that a checkpoint is of."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import data
from ..models import import_torchvision
from ..runs import checkpoint
from ..runs.checkpoint import BEST
from ..runs.config import TrainConfig
from ..runs.errors import CheckpointError, UsageError, one_line
from ..runs.folder import CHECKPOINTS, CONFIG, WEIGHTS, UnreadableRun, read_own
from ..runs.network import build_network, named

OBJECTIVE_PREFIX = "model."  # of the plain network in its objective's state_dict
AVERAGED_PREFIX = "module."  # of it in a moving average's
EXTRA_STATE = "_extra_state"  # how torch ends the names of what is no parameter or buffer


class UnknownNetwork(ValueError):
    """There is no such network, or the weights aren't its own; the message is one line."""


@dataclass(frozen=True, eq=False)
class Found:
    """A network, and the data it was trained on where that is known."""

    network: nn.Module
    data_set: data.DataSet | None = None


def find(name: str, model: str | None, classes: int | None) -> Found:
    """The network that ``name`` says.

    Args:
        name: a run folder of ``imcl-train``, a checkpoint of one, a file that holds a
            state_dict, or what ``model`` can be.
        model: the network of a state_dict that lies in no run folder: a name of
            torchvision's, ``timm:NAME``, or ``package.module:factory``; see ``network.named``.
        classes: outputs of the network, if not its own number.

    Raises:
        UnknownNetwork: see the class. Files are read with ``weights_only=True``, which
            refuses those that could run code.
    """
    path = Path(name)
    if not path.exists():
        if path.suffix in (".pt", ".pth", ".ckpt"):
            raise UnknownNetwork(f"{name}: there is no such file")
        return Found(_built(name, classes))
    if path.is_dir():
        path = _weights_of(path)
    state = _state(path)
    if model is not None:
        found = Found(_built(model, classes))
    else:
        config = _config_of(path)
        if config is None:
            raise UnknownNetwork(
                f"{path}: weights of an unknown network, for it lies in no run folder; say which "
                "with --model"
            )
        found = _of_run(config)
    own = found.network.state_dict()
    wrong = [key for key in own if key not in state or _size(state[key]) != _size(own[key])]
    wrong += [key for key in state if key not in own]
    if wrong:
        shapes = [_size(side[wrong[0]]) if wrong[0] in side else "none" for side in (own, state)]
        raise UnknownNetwork(
            f"{path}: not the weights of this network: {len(wrong)} entries differ, the first is "
            f"{wrong[0]}, expected {shapes[0]}, got {shapes[1]}"
        )
    found.network.load_state_dict(state)
    return found


def _size(entry: Any) -> str:
    """Of a state_dict's entry; extra state is anything, and its module's own affair."""
    return str(tuple(entry.shape)) if isinstance(entry, Tensor) else "no Tensor"


def _built(name: str, classes: int | None) -> nn.Module:
    """A network with random weights."""
    if ":" in name:
        try:
            return named(name, classes)
        except UsageError as error:
            raise UnknownNetwork(str(error)) from error
    models: Any = import_torchvision().models
    options = {} if classes is None else {"num_classes": classes}
    try:
        return models.get_model(name, weights=None, **options)
    except ValueError as error:
        raise UnknownNetwork(
            f"{name}: neither a file nor a network of torchvision's; one of timm's is timm:NAME, "
            "one of your own package.module:factory"
        ) from error


def _weights_of(folder: Path) -> Path:
    for path in (folder / WEIGHTS, folder / CHECKPOINTS / BEST):
        if path.is_file():
            return path
    raise UnknownNetwork(f"{folder}: expected a run folder, it has no {WEIGHTS} and no checkpoint")


def _state(path: Path) -> Mapping[str, Tensor]:
    """The plain network's state_dict in a checkpoint or a file of one."""
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UnknownNetwork(
            f"{path}: no file of tensors; one that holds other objects is refused, for it could "
            "run code: save the network's state_dict()"
        ) from error
    except Exception as error:  # a damaged file can fail anywhere in torch.load
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UnknownNetwork(f"{path}: can't be read as weights ({reason})") from error
    if isinstance(stored, Mapping) and stored.get("kind") == checkpoint.KIND:
        try:
            content = checkpoint.load(path)
        except CheckpointError as error:
            raise UnknownNetwork(str(error)) from error
        # The moving average is what was measured, where there is one.
        averaged = content.get("averaged")
        prefix = OBJECTIVE_PREFIX if averaged is None else AVERAGED_PREFIX
        state = content["objective"] if averaged is None else averaged
        return {
            key.removeprefix(prefix): value
            for key, value in state.items()
            if key.startswith(prefix)
        }
    if isinstance(stored, Mapping) and isinstance(stored.get("state_dict"), Mapping):
        stored = stored["state_dict"]
    if not isinstance(stored, Mapping) or not all(
        isinstance(value, Tensor) or str(key).endswith(EXTRA_STATE) for key, value in stored.items()
    ):
        raise UnknownNetwork(f"{path}: expected a state_dict, or a checkpoint of imcl-train")
    return stored


def _config_of(path: Path) -> TrainConfig | None:
    """The configuration of the run folder that a file lies in; None if it lies in none."""
    for folder in (path.parent, path.parent.parent):
        if (folder / CONFIG).is_file():
            try:
                own = read_own(folder)
                config = TrainConfig.read(folder / CONFIG)
            except (OSError, TypeError, ValueError, UnreadableRun) as error:
                raise UnknownNetwork(str(error)) from error
            if own:
                what = " and ".join(f"{name} {value}" for name, value in own.items())
                raise UnknownNetwork(
                    f"{path}: its run was given {what}, which no file says how to make; say with "
                    "--model which network it is, as package.module:factory"
                )
            return config
    return None


def _of_run(config: TrainConfig) -> Found:
    try:
        data_set = data.load(config.dataset, config.data_root, image_size=config.image_size)
        return Found(build_network(config, data_set), data_set)
    except (OSError, ValueError, ImportError, UsageError) as error:
        raise UnknownNetwork(
            f"the run's data set tells the network's shape, but: {one_line(error)}"
        ) from error
