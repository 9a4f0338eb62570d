"""Losses. Importing this folder registers them with fairseq, which does not import it itself."""

from . import entmax_loss
from .chunked_cross_entropy import ChunkedCrossEntropyCriterion, ChunkedCrossEntropyCriterionConfig
from .entmax_loss import EntmaxLossCriterion

entmax_loss.install()

__all__ = ["ChunkedCrossEntropyCriterion", "ChunkedCrossEntropyCriterionConfig", "EntmaxLossCriterion"]
