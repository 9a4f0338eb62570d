"""What the attention backends share: their masks, and the memory layouts of tensors."""

from typing import NamedTuple, Optional, Tuple

from torch import Tensor

Block = Tuple[slice, slice, slice]  # heads, queries, and the keys that these may see


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

    def block(self, heads: slice, queries: slice, src_len: int) -> Block:
        """A block with the keys that any of its queries may see."""
        return heads, queries, slice(0, queries.stop if self.causal else src_len)

    def add_to(self, scores: Tensor, block: Block) -> None:
        """Mask the scores of a block, (heads, queries, keys), in place."""
        heads, queries, keys = block
        if self.causal:
            count = queries.stop - queries.start
            scores[:, :, queries].add_(scores.new_full((count, count), float("-inf")).triu_(1))
        if self.scores is not None:
            scores.add_(self.scores[queries, keys])
        if self.keys is not None:
            scores.add_(self.keys[heads, :, keys])


def length_first(tensor: Tensor) -> Tensor:
    """An empty tensor of this shape, (heads, length, head_dim), with length first in memory, as in projections."""
    heads, length, head_dim = tensor.shape
    return tensor.new_empty(length, heads, head_dim).transpose(0, 1)


def without_gaps(tensor: Tensor) -> Tensor:
    """The same numbers, with the last dimension contiguous."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
