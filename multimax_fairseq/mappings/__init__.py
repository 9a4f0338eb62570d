"""Mappings from scores to probabilities: everything here is plain torch and needs no fairseq.

Three doors to each: a function (``multimax``), a module over the last dimension (``MultiMax``), and
:func:`build_mapping`, which makes the module from its name.
"""

import inspect
from typing import Any

from torch import nn

from .evsoftmax import EvSoftmax, evsoftmax
from .masking import additive_mask, compute_dtype, is_absent
from .multimax import MultiMax, modulate, multimax
from .softmax import Softmax, softmax
from .sparse import Entmax, Entmax15, Sparsemax, entmax, entmax15, sparsemax

MAPPINGS = {
    "softmax": Softmax,
    "multimax": MultiMax,
    "sparsemax": Sparsemax,
    "entmax15": Entmax15,
    "entmax": Entmax,
    "evsoftmax": EvSoftmax,
}


def build_mapping(name: str, **options: Any) -> nn.Module:
    """The module of a mapping, to be applied over the last dimension of scores.

    Args:
        name: a key of ``MAPPINGS``.
        options: arguments of the module's class: ``order``, ``init``, ``terms`` of ``multimax``; ``alpha``,
            ``num_heads`` of ``entmax``.

    Raises:
        ValueError: no mapping has this name, or an option's value is wrong.
        TypeError: the mapping has no such option.
    """
    if name not in MAPPINGS:
        raise ValueError(f"there is no mapping {name!r}; choose from: {', '.join(MAPPINGS)}")
    known = inspect.signature(MAPPINGS[name]).parameters
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise TypeError(f"{name} has no option {', '.join(unknown)}; it takes: {', '.join(known) or 'none'}")
    return MAPPINGS[name](**options)


__all__ = [
    "MAPPINGS",
    "Entmax",
    "Entmax15",
    "EvSoftmax",
    "MultiMax",
    "Softmax",
    "Sparsemax",
    "additive_mask",
    "build_mapping",
    "compute_dtype",
    "entmax",
    "entmax15",
    "evsoftmax",
    "is_absent",
    "modulate",
    "multimax",
    "softmax",
    "sparsemax",
]
