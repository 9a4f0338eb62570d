"""Mappings over rows of scores, fast: what a mapping says of itself, for the kernels to compute it."""

from typing import NamedTuple, Tuple

from torch import Tensor


class Rows(NamedTuple):
    """Which row function computes a mapping, and its numbers.

    Attributes:
        name: ``"softmax"``, ``"multimax"``, ``"sparsemax"``, ``"entmax15"``, ``"entmax"`` or ``"evsoftmax"``.
        numbers: multimax: (thresholds, gains), (N, 2) each, N 1 or 2; entmax: (alpha,), () or broadcastable
            (num_heads, 1, 1); evsoftmax: (epsilon,), (); others: ().
    """

    name: str
    numbers: Tuple[Tensor, ...] = ()
