"""MultiMax attention that never has all of its probabilities, if it can be: which backend computes it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cpp_attention, triton_attention
from .blockwise_attention import BlockwiseMultiMax
from .fused import fused_multimax
from .masks import Masks

KERNELS = (cpp_attention, triton_attention)  # of which the first that serves computes

MIN_KEYS = 192  # from which on it pays not to have the whole matrix

# Scores of which a GPU has the whole matrix: a block is some seven launches, and pays when it fills the GPU for long.
# Of 64 MiB in half precision, which the backward keeps two or three times, twelve layers keep about 2 GiB.
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
        query: (heads, tgt_len, head_dim), scaled; ``heads`` are those of all sentences, bsz · num_heads.
        key, value: (heads, src_len, head_dim).
        thresholds, gains: as in :func:`..mappings.multimax.multimax`; (0, 2) for softmax.
        masks: the :class:`.Masks`.
        dropout: the probability to drop a probability; what is kept is divided by 1 − dropout, as ``F.dropout``
            does. The mask follows from the state of torch's default generator, and moves it.

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
    """63 bits of the generator that ``--seed`` sets, and that checkpointed activations put back."""
    return int(torch.empty((), dtype=torch.int64, device="cpu").random_())


def _fits_as_a_whole(query: Tensor, key: Tensor) -> bool:
    return query.device.type != "cpu" and query.size(0) * query.size(1) * key.size(1) <= WHOLE_ON_GPU


def _whole(
    query: Tensor, key: Tensor, value: Tensor, thresholds: Tensor, gains: Tensor, masks: Masks, dropout: float
) -> Tensor:
    """All of it at once, from operations that autograd knows."""
    block = masks.block(slice(0, query.size(0)), slice(0, query.size(1)), key.size(1))
    heads, queries, keys = block
    scores = torch.bmm(query, key[:, keys].transpose(1, 2))
    masks.add_to(scores, block)
    probabilities = fused_multimax(scores, thresholds, gains, _refuse, True)
    return torch.bmm(F.dropout(probabilities, dropout), value[:, keys])


def _refuse(*_: Tensor) -> Tensor:
    raise RuntimeError("attention is differentiable once: gradients of its gradients are not computed")
