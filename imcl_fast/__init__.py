"""Intra-model collaborative learning: fused losses with which the parts of one
network teach each other while it trains (a reconstruction of arXiv 2105.09590)."""

from typing import TYPE_CHECKING, Any

from . import functional
from .imcl import IMCL
from .modules import (
    CollaborativeConsistencyLoss,
    JensenShannonLoss,
    KernelSimilarityLoss,
    RepresentationSimilarityLoss,
    ViewDependence,
)
from .perturbation import Perturbation
from .quality_agnostic import QualityAgnostic

if TYPE_CHECKING:
    from .runs.config import TrainConfig
    from .training.trainer import Trainer

__version__ = "0.2.0"
__all__ = [
    "IMCL",
    "CollaborativeConsistencyLoss",
    "JensenShannonLoss",
    "KernelSimilarityLoss",
    "Perturbation",
    "QualityAgnostic",
    "RepresentationSimilarityLoss",
    "TrainConfig",
    "Trainer",
    "ViewDependence",
    "functional",
]


def __getattr__(name: str) -> Any:
    # Imported when asked for: a training loop of one's own needs none of it.
    if name == "Trainer":
        from .training.trainer import Trainer

        return Trainer
    if name == "TrainConfig":
        from .runs.config import TrainConfig

        return TrainConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
