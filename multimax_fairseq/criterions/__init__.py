"""Losses. Importing this folder registers them with fairseq, which does not import it itself."""

from .chunked_cross_entropy import ChunkedCrossEntropyCriterion, ChunkedCrossEntropyCriterionConfig
from .entmax_loss import EntmaxLossCriterion

__all__ = ["ChunkedCrossEntropyCriterion", "ChunkedCrossEntropyCriterionConfig", "EntmaxLossCriterion"]
