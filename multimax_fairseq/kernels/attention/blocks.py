"""Attention by any mapping in plain PyTorch, by blocks, on any device.

A block has the scores of some sentences, all of their heads, and some queries, against all the keys that these may
see. The backward computes it again: one more forward, but nothing of size length² is kept, and no work is done on
scores that the causal mask hides.

Source of the idea: Rabe and Staats, *Self-attention Does Not Need O(n²) Memory*, 2021.
"""

import functools
import logging
from typing import Callable, Optional

import torch
from torch import Tensor

from ..scores import compute_dtype

logger = logging.getLogger(__name__)

# Up to so many scores the whole matrix is computed. On a GPU a block takes some seven launches, and must fill it for
# long to pay: in half precision they are 64 MiB, kept two or three times, 2 GiB in twelve layers.
WHOLE = {"cpu": 2**20, "cuda": 2**25}
# Scores in a block: 4 MiB in fp32, of which the mapping has several. A GPU needs large blocks to be filled.
SCORES = {"cpu": 2**20, "cuda": 2**26}
# Queries in a block, at most. A causal block wastes queries²/2 scores on its diagonal.
QUERIES = {"cpu": 64, "cuda": 512}


def pay(query: Tensor, key: Tensor) -> bool:
    """Whether the matrix of scores is too large to be kept, and can be computed again in the backward."""
    batch, heads, tgt_len, _ = query.shape
    is_large = batch * heads * tgt_len * key.size(2) > WHOLE.get(query.device.type, WHOLE["cuda"])
    return is_large and (not torch.is_grad_enabled() or can_checkpoint())


def attend(
    formula: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    probabilities: Callable[[Tensor], Tensor],
    mask: Optional[Tensor],
    is_causal: bool,
    dropout: float,
) -> Tensor:
    """``formula(query, key, value, probabilities, mask, is_causal, dropout)`` by blocks.

    Args:
        formula: :func:`multimax_fairseq.attention.attend`.
        query: (batch, heads, tgt_len, head_dim), scaled.
        key, value: (batch, heads, src_len, …).
        mask: (batch | 1, heads | 1, tgt_len | 1, src_len | 1), to be added to scores, or None.
    """
    (batch, heads, tgt_len, _), src_len, device = query.shape, key.size(2), query.device.type
    size = SCORES.get(device, SCORES["cuda"]) // (heads * src_len)
    queries = max(min(QUERIES.get(device, QUERIES["cuda"]), tgt_len, size), 1)
    sentences = min(max(size // queries, 1), batch)
    key, value = (tensor.to(compute_dtype(tensor.dtype)) for tensor in (key, value))  # their gradients are sums

    def block(q: Tensor, k: Tensor, v: Tensor, part: Optional[Tensor], first: int) -> Tensor:
        return formula(q, k.to(q.dtype), v.to(q.dtype), probabilities, part, is_causal, dropout, first)

    outputs = []
    for some in (slice(start, start + sentences) for start in range(0, batch, sentences)):
        for start in range(0, tgt_len, queries):
            keys = slice(0, min(start + queries, src_len) if is_causal else src_len)
            part = None if mask is None else _part(mask, some, slice(start, start + queries), keys)
            arguments = query[some, :, start : start + queries], key[some, :, keys], value[some, :, keys], part, start
            outputs.append(_again(block, *arguments) if torch.is_grad_enabled() else block(*arguments))
    count = -(-tgt_len // queries)
    sentences = [torch.cat(outputs[at : at + count], dim=2) for at in range(0, len(outputs), count)]
    return torch.cat(sentences)


def _part(mask: Tensor, *slices: slice) -> Tensor:
    """The part of a broadcast mask for these sentences, queries and keys."""
    for dim, some in zip((0, 2, 3), slices):
        if mask.size(dim) > 1:
            mask = mask.narrow(dim, some.start, min(some.stop, mask.size(dim)) - some.start)
    return mask


def _again(block: Callable[..., Tensor], *arguments) -> Tensor:
    """``block(*arguments)``, computed again in the backward."""
    from torch.utils.checkpoint import checkpoint

    return checkpoint(block, *arguments, use_reentrant=False)


@functools.lru_cache(maxsize=None)
def can_checkpoint() -> bool:
    """Whether ``torch.utils.checkpoint`` works: it imports PyTorch's compiler, which wants a folder to write to."""
    try:
        import torch._dynamo  # noqa: F401
    except Exception as error:  # whatever that import raises
        logger.warning("attention keeps the whole matrix, as PyTorch's compiler does not import: %s", error)
        return False
    return True
