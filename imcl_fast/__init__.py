"""Intra-model collaborative learning: fused losses with which the parts of one
network teach each other while it trains (a reconstruction of arXiv 2105.09590)."""

from . import functional
from .imcl import IMCL
from .modules import (
    CollaborativeConsistencyLoss,
    KernelSimilarityLoss,
    RepresentationSimilarityLoss,
)

__version__ = "0.1.0"
__all__ = [
    "IMCL",
    "CollaborativeConsistencyLoss",
    "KernelSimilarityLoss",
    "RepresentationSimilarityLoss",
    "functional",
]
