"""MultiMax attention block by block: memory linear in the length, no work on scores that the causal mask hides.

A block has the scores of some heads and some queries against all the keys that these may see. The forward keeps each
query's normaliser, peak and factor: a probability is exp(σ − peak) · factor. The backward computes the scores again.
That costs one more product, but no scores and probabilities of size length² are kept and read back from memory.

With P the probabilities, O = P·V and G = ∂L/∂O, the gradient of softmax needs the row's sum Σ_j P_ij (G·Vᵀ)_ij.
Σ_c G_ic O_ic is equal and known before the row, but not used: the two differ by a rounding error, the same for all
scores of a row, which would add up in the gradients of thresholds and gains.

Source of the idea: Rabe and Staats, *Self-attention Does Not Need O(n²) Memory*, 2021; Dao et al.,
*FlashAttention*, NeurIPS 2022.
"""

import math
from typing import Iterator, Optional, Sequence, Tuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .compiler import kernel
from .masks import Block, Masks, length_first
from .rows import normalised, present_sigma, sigma_backward

# Queries in a block. A causal block wastes queries²/2 scores on its diagonal; one of fewer queries multiplies less
# efficiently. Where rows are not long, half as many. On a GPU, more: a launch has to pay.
QUERIES, LONG_ROW = 128, 1_024
QUERIES_ON_GPU = 512

# Scores in a block per CPU thread: 4 MiB in fp32, measured best at 512 and 2,048 keys. Smaller blocks would stay in a
# core's cache between products and mapping, but Python's overhead would count. A GPU needs large blocks to be filled.
SCORES_PER_THREAD = 2**20
SCORES_ON_GPU = 2**26


@kernel
def probabilities_rows_(scores: Tensor, thresholds: Tensor, gains: Tensor) -> Tuple[Tensor, Tensor]:
    """Replaces rows of scores by their probabilities; zeros in a row without scores.

    Normalised here, not after the product with values, which would overflow in half precision.

    Returns:
        the normalisers, peak and factor, (rows, 1) each.
    """
    probabilities, peak, factor = normalised(scores, thresholds, gains)
    scores.copy_(probabilities)
    return peak, factor


@kernel
def probabilities_rows_backward(
    scores: Tensor,
    grad: Tensor,
    peak: Tensor,
    factor: Tensor,
    probabilities: Tensor,
    grad_scores: Tensor,
    thresholds: Tensor,
    gains: Tensor,
) -> Tensor:
    """Probabilities, and gradients of scores, from ∂L/∂p.

    Args:
        peak, factor: (rows, 1), of :func:`probabilities_rows_`.
        probabilities, grad_scores: (rows, width), written to. Allocating them for each block would take longer than
            the kernel.

    Returns:
        ∂L/∂(thresholds, gains), (2, N, 2).
    """
    p, grad = (present_sigma(scores, thresholds, gains) - peak).exp() * factor, grad.to(peak.dtype)
    upstream = p * (grad - (p * grad).sum(-1, keepdim=True))
    grad_x, grad_parameters = sigma_backward(scores, upstream, thresholds, gains)
    probabilities.copy_(p)
    grad_scores.copy_(grad_x)
    return grad_parameters


class BlockwiseMultiMax(Function):
    """multimax(query · keyᵀ + masks) · value, head by head; differentiable once.

    Args and Returns of ``apply`` are those of :func:`.attention.multimax_attention`. The output, (heads, tgt_len,
    head_dim), is laid out in memory as (tgt_len, heads, head_dim).
    """

    @staticmethod
    def forward(
        ctx, query: Tensor, key: Tensor, value: Tensor, thresholds: Tensor, gains: Tensor, masks: Masks
    ) -> Tensor:
        output = length_first(query)
        # head after head in memory: products are a fifth faster than on projections as they come
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        normalisers = []
        scratch = _scratch(query, key)
        for heads, queries, keys in _blocks(query, key, masks):
            scores = _scores(query[heads, queries], key[heads, keys], masks, (heads, queries, keys), scratch)
            normalisers += probabilities_rows_(scores.flatten(0, 1), thresholds, gains)
            output[heads, queries] = torch.bmm(scores, value[heads, keys])
        ctx.masks = masks
        ctx.save_for_backward(query, key, value, thresholds, gains, *normalisers)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        query, key, value, thresholds, gains, *normalisers = ctx.saved_tensors
        grad = grad.contiguous()
        grad_query, grad_key, grad_value = length_first(query), length_first(key), length_first(value)
        grads_of_parameters = []
        scratches = [_scratch(query, key) for _ in range(4)]
        blocks = zip(_blocks(query, key, ctx.masks), normalisers[::2], normalisers[1::2])
        for (heads, queries, keys), peak, factor in blocks:
            q, k, v, g = query[heads, queries], key[heads, keys], value[heads, keys], grad[heads, queries]
            scores = _scores(q, k, ctx.masks, (heads, queries, keys), scratches[0])
            grad_probabilities, probabilities, grad_scores = (_part(memory, scores.shape) for memory in scratches[1:])
            torch.bmm(g, v.transpose(1, 2), out=grad_probabilities)
            grad_parameters = probabilities_rows_backward(
                scores.flatten(0, 1),
                grad_probabilities.flatten(0, 1),
                peak,
                factor,
                probabilities.flatten(0, 1),
                grad_scores.flatten(0, 1),
                thresholds,
                gains,
            )
            grads_of_parameters.append(grad_parameters)
            grad_query[heads, queries] = torch.bmm(grad_scores, k)
            if queries.stop == query.size(1):  # the first block of these heads: it sees all keys
                grad_k, grad_v = (k.new_zeros(k.shape, dtype=peak.dtype) for _ in range(2))
            _add_product(grad_k[:, keys], grad_scores, q)
            _add_product(grad_v[:, keys], probabilities, g)
            if queries.start == 0:  # the last one
                grad_key[heads], grad_value[heads] = grad_k, grad_v
        grad_parameters = torch.stack(grads_of_parameters).sum(0).to(gains.dtype)
        return grad_query, grad_key, grad_value, grad_parameters[0], grad_parameters[1], None


def _block_size(query: Tensor, key: Tensor) -> Tuple[int, int]:
    """How many heads and how many queries a block has."""
    (num_heads, tgt_len, _), src_len = query.shape, key.size(1)
    if query.device.type == "cpu":
        count, size = QUERIES if src_len >= LONG_ROW else QUERIES // 2, SCORES_PER_THREAD * torch.get_num_threads()
    else:
        count, size = QUERIES_ON_GPU, SCORES_ON_GPU
    count = min(count, tgt_len)
    return min(max(size // (count * src_len), 1), num_heads), count


def _blocks(query: Tensor, key: Tensor, masks: Masks) -> Iterator[Block]:
    """Slices of heads, of queries (the last ones first), and of the keys that these may see."""
    (num_heads, tgt_len, _), src_len = query.shape, key.size(1)
    heads, queries = _block_size(query, key)
    for head in range(0, num_heads, heads):
        for start in reversed(range(0, tgt_len, queries)):
            end = min(start + queries, tgt_len)
            yield masks.block(slice(head, min(head + heads, num_heads)), slice(start, end), src_len)


def _scratch(query: Tensor, key: Tensor) -> Tensor:
    """Memory for the scores of any block."""
    heads, queries = _block_size(query, key)
    return query.new_empty(heads * queries * key.size(1))


def _part(scratch: Tensor, shape: Sequence[int]) -> Tensor:
    return scratch[: math.prod(shape)].view(shape)


def _scores(q: Tensor, k: Tensor, masks: Masks, block: Block, scratch: Tensor) -> Tensor:
    """The masked scores of a block, (heads, queries, keys), from the queries and keys in it."""
    scores = torch.bmm(q, k.transpose(1, 2), out=_part(scratch, (len(q), q.size(1), k.size(1))))
    masks.add_to(scores, block)
    return scores


def _add_product(total: Tensor, rows: Tensor, factor: Tensor) -> None:
    """total += rowsᵀ · factor, in place; ``total`` may be of higher precision."""
    if total.dtype == rows.dtype and total.is_contiguous():
        total.baddbmm_(rows.transpose(1, 2), factor)
    else:  # on a part of the keys, baddbmm_ would compute head after head
        total.add_(torch.bmm(rows.transpose(1, 2), factor))
