"""Losses; importing this folder registers them with fairseq, which does not import it by itself."""

from .chunked_cross_entropy import ChunkedCrossEntropyCriterion, ChunkedCrossEntropyCriterionConfig

__all__ = ["ChunkedCrossEntropyCriterion", "ChunkedCrossEntropyCriterionConfig"]
