"""What attention's backends have in common: the masks that they are given, and how their results lie in memory."""

from typing import NamedTuple, Optional

from torch import Tensor


class Masks(NamedTuple):
    """What hides keys from queries.

    Attributes:
        causal: whether a query sees only the keys up to its own position.
        keys: (bsz · num_heads, 1, src_len), 0 or −inf, or None.
        scores: (tgt_len, src_len), to be added, or None.
    """

    causal: bool = False
    keys: Optional[Tensor] = None
    scores: Optional[Tensor] = None


def length_first(tensor: Tensor) -> Tensor:
    """An empty tensor of this shape, (heads, length, head_dim), with length first in memory, as in projections."""
    heads, length, head_dim = tensor.shape
    return tensor.new_empty(length, heads, head_dim).transpose(0, 1)
