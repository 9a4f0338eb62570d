"""MultiMax attention that never has all of its probabilities: which backend computes it."""

import torch
from torch import Tensor

from . import cpp_attention, triton_attention
from .blockwise_attention import BlockwiseMultiMax
from .masks import Masks

MIN_KEYS = 192  # from which on it pays not to have the whole matrix


def multimax_attention(
    query: Tensor, key: Tensor, value: Tensor, thresholds: Tensor, gains: Tensor, masks: Masks
) -> Tensor:
    """multimax(query · keyᵀ + masks) · value, head by head, in the dtype of ``query``, also under autocast.

    Args:
        query: (heads, tgt_len, head_dim), scaled; ``heads`` are those of all sentences, bsz · num_heads.
        key, value: (heads, src_len, head_dim).
        thresholds, gains: as in :func:`..mappings.multimax.multimax`.
        masks: the :class:`.Masks`.

    Returns:
        (heads, tgt_len, head_dim), laid out in memory as (tgt_len, heads, head_dim); differentiable once.
    """
    key, value = key.to(query.dtype), value.to(query.dtype)
    if cpp_attention.serves(query):
        return cpp_attention.CppMultiMax.apply(query, key, value, thresholds, gains, *masks)
    if triton_attention.serves(query, key, value, thresholds, gains, masks):
        return triton_attention.attend(query, key, value, thresholds, gains, masks)
    with torch.autocast(query.device.type, enabled=False):
        return BlockwiseMultiMax.apply(query, key, value, thresholds, gains, masks)
