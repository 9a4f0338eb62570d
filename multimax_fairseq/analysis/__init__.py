"""Analyses a trained model's attention: numbers and figures from checkpoints, and functions for a notebook.

``multimax-analyze`` (:mod:`.cli`) writes a report on one or more checkpoints. In Python, metrics take tensors, and
:func:`collect` takes a model and a batch. Nothing else in the package imports this.
"""

from importlib import import_module

_OFFERED = {
    "alignment": "AlignmentError hard_alignment read_alignments word_attention words_of_tokens",
    "hooks": "Attention Collected LayerOutput attention_modules collect",
    "metrics": "MeanMetrics RowMetrics ScoreHistogram attention_rollout mean_average_distance row_metrics "
    "translation_rollout",
}
_HOMES = {name: module for module, names in _OFFERED.items() for name in names.split()}
__all__ = sorted(_HOMES)


def __getattr__(name: str):
    """What the package offers, imported when it is asked for: figures are drawn from a file without torch."""
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
