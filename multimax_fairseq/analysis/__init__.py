# ruff: noqa: F401  what is imported here is what the package offers
"""Analyses a trained model's attention: numbers and figures from checkpoints, and functions for a notebook.

``multimax-analyze`` (:mod:`.cli`) writes a report on one or more checkpoints. In Python, metrics take tensors, and
:func:`collect` takes a model and a batch. Nothing else in the package imports this.
"""

from .alignment import (
    AlignmentError,
    hard_alignment,
    parse_alignment,
    read_alignments,
    word_attention,
    words_of_tokens,
)
from .collect import Attention, Collected, LayerOutput, Output, attention_modules, collect, recording
from .metrics import (
    MeanMetrics,
    RowMetrics,
    ScoreHistogram,
    effective_support,
    entropy,
    multimodality,
    row_metrics,
    sparsity,
    support,
    top_share,
)
from .modulator import falling_share, is_monotone, slope
from .rollout import attention_rollout, translation_rollout
from .smoothing import mean_average_distance, mean_cosine_similarity
