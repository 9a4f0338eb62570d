"""MultiMax attention, where possible without the whole matrix of probabilities: chooses the backend."""

import torch
from torch import Tensor

from . import blockwise_attention, cpp_attention, triton_attention
from .masks import Masks

KERNELS = (cpp_attention, triton_attention)  # in the order in which they are tried, before plain PyTorch

MIN_KEYS = 192  # from this many keys on it pays to avoid the whole matrix


def multimax_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    thresholds: Tensor,
    gains: Tensor,
    masks: Masks,
    dropout: float = 0.0,
) -> Tensor:
    """dropout(multimax(query · keyᵀ + masks)) · value, head by head, in the dtype of ``query``, also under autocast.

    Args:
        query: (heads, tgt_len, head_dim), scaled; ``heads`` is bsz · num_heads.
        key, value: (heads, src_len, head_dim).
        thresholds, gains: as in :func:`..mappings.multimax.multimax`; (0, 2) for softmax.
        masks: the :class:`.Masks`.
        dropout: the probability to drop a probability; what is kept is divided by 1 − dropout, as in ``F.dropout``.
            The mask depends on the state of torch's default generator, which advances.

    Returns:
        (heads, tgt_len, head_dim), differentiable once.
    """
    arguments = query, key.to(query.dtype), value.to(query.dtype), thresholds, gains, masks
    with torch.autocast(query.device.type, enabled=False):
        if 0 not in (*query.shape, key.size(1)):
            for kernels in KERNELS:
                if kernels.serves(*arguments, dropout):
                    return kernels.attend(*arguments, dropout, _seed() if dropout else 0)
        return blockwise_attention.attend(*arguments, dropout)


def _seed() -> int:
    """63 bits from the generator that ``--seed`` sets and activation checkpointing restores."""
    return int(torch.empty((), dtype=torch.int64, device="cpu").random_())
