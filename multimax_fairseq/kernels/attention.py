"""MultiMax attention, where possible without the whole matrix of probabilities: chooses the backend."""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cpp_attention, triton_attention
from .blockwise_attention import BlockwiseMultiMax
from .fused import fused_multimax
from .masks import Masks

KERNELS = (cpp_attention, triton_attention)  # in the order in which they are tried

MIN_KEYS = 192  # from this many keys on it pays to avoid the whole matrix

# Up to so many scores a GPU computes the whole matrix: a block takes some seven launches, and must fill the GPU for
# long to pay. In half precision they are 64 MiB, which the backward keeps two or three times: 2 GiB in twelve layers.
WHOLE_ON_GPU = 2**25


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
        if 0 in (*query.shape, key.size(1)):
            return _whole(*arguments, dropout)
        for kernels in KERNELS:
            if kernels.serves(*arguments, dropout):
                return kernels.attend(*arguments, dropout, _seed() if dropout else 0)
        if dropout or _fits_as_a_whole(query, key):
            return _whole(*arguments, dropout)
        return BlockwiseMultiMax.apply(*arguments)


def _seed() -> int:
    """63 bits from the generator that ``--seed`` sets and activation checkpointing restores."""
    return int(torch.empty((), dtype=torch.int64, device="cpu").random_())


def _fits_as_a_whole(query: Tensor, key: Tensor) -> bool:
    return query.device.type != "cpu" and query.size(0) * query.size(1) * key.size(1) <= WHOLE_ON_GPU


def _whole(
    query: Tensor, key: Tensor, value: Tensor, thresholds: Tensor, gains: Tensor, masks: Masks, dropout: float
) -> Tensor:
    """The whole matrix at once, differentiated by autograd."""
    block = masks.block(slice(0, query.size(0)), slice(0, query.size(1)), key.size(1))
    heads, queries, keys = block
    scores = torch.bmm(query, key[:, keys].transpose(1, 2))
    masks.add_to(scores, block)
    probabilities = fused_multimax(scores, thresholds, gains, _refuse, True)
    return torch.bmm(F.dropout(probabilities, dropout), value[:, keys])


def _refuse(*_: Tensor) -> Tensor:
    raise RuntimeError("attention is differentiable once: gradients of its gradients are not computed")
