"""The network that a run trains."""

from __future__ import annotations

from torch import nn

from .. import models
from ..data import DataSet
from .config import TrainConfig
from .errors import UsageError


def build_network(config: TrainConfig, data_set: DataSet) -> nn.Module:
    """The network that the configuration names, for the data's channels and classes.

    Raises:
        UsageError: there is none of these sizes, or torchvision isn't installed.
    """
    try:
        return models.build(
            config.model,
            len(data_set.classes),
            channels=data_set.shape[0],
            image_size=data_set.shape[-1],
            width=config.width,
            stem_stride=config.stem_stride,
        )
    except (ValueError, ImportError) as error:
        raise UsageError(str(error)) from error
    except RuntimeError as error:
        reason = str(error).split("\n")[0]
        raise UsageError(f"width: can't make the network ({reason}); make it smaller") from error
