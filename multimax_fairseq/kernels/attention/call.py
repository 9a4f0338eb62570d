"""What C++ and Triton share: what attention is asked for, besides query, key and value, and the layout of results."""

from typing import NamedTuple, Optional

from torch import Tensor

from ..rows import Rows


class Call(NamedTuple):
    """dropout(mapping(query · keyᵀ + mask)) · value.

    Attributes:
        rows: the mapping. In C++, c of entmax is one number, or (num_heads, 1, 1).
        mask: fp32, to be added to scores, (batch | 1, heads | 1, tgt_len | 1, src_len), or None.
        is_causal: whether query i sees the keys 0 to i alone.
        dropout: the probability to drop a probability; what is kept is divided by 1 − dropout.
        seed: of dropout's random numbers, 63 bits: the same seed drops the same ones.
    """

    rows: Rows
    mask: Optional[Tensor] = None
    is_causal: bool = False
    dropout: float = 0.0
    seed: int = 0


def length_first(query: Tensor, length: int, dim: int) -> Tensor:
    """An empty (batch, heads, length, dim) tensor, in memory with length first, as projections take it."""
    batch, heads = query.shape[:2]
    return query.new_empty(length, batch, heads, dim).permute(1, 2, 0, 3)
