"""Mappings over rows of scores: what a mapping says of itself (:class:`Rows`), and who computes it."""

from typing import Callable, NamedTuple, Optional, Tuple

import torch
from torch import Tensor, nn

from ..backend import is_compiling

HOOKS = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
GLOBAL_HOOKS = "_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks"


class Rows(NamedTuple):
    """Which row function computes a mapping, and its numbers.

    Attributes:
        name: ``"softmax"``, ``"multimax"``, ``"sparsemax"``, ``"entmax15"``, ``"entmax"``, ``"entmax, fixed"``
            (without a gradient of α) or ``"evsoftmax"``.
        numbers: multimax: (thresholds, gains), (N, 2) each, N 1 or 2; entmax: (c,), c = α − 1, which
            broadcasts over the scores; a fixed one: (c,), (); evsoftmax: (epsilon,), (); others: ().
        formula: formula(scores, *numbers) → probabilities over the last dimension, in PyTorch's operators, which
            says what the row function computes.
    """

    name: str
    numbers: Tuple[Tensor, ...] = ()
    formula: Optional[Callable[..., Tensor]] = None


def rows_of(mapping: nn.Module) -> Optional[Rows]:
    """What a mapping says of itself; None where it has to be called: its own ``forward``, hooks, ``torch.compile``.

    ``kernel_rows`` is believed where the class that defines ``forward`` defines it too, so that a class derived from
    a mapping that overrides only ``forward`` is not taken for it.
    """
    if is_compiling():
        return None
    for kind in type(mapping).__mro__:
        own = {"forward", "kernel_rows"} & vars(kind).keys()
        if own:
            break
    has_hooks = any(getattr(mapping, name, None) for name in HOOKS) or "forward" in vars(mapping)
    has_hooks = has_hooks or any(getattr(torch.nn.modules.module, name) for name in GLOBAL_HOOKS)
    return mapping.kernel_rows() if len(own) == 2 and not has_hooks else None
