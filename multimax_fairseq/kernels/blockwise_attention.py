"""MultiMax attention block by block: memory linear in the length, no work on scores that the causal mask hides.

A block is the scores of some heads, for some queries, against all the keys that these may see. What is kept for the
backward is the output and one number a query, log Σ exp σ; the scores are computed again there. That costs one more
product, and saves keeping, and reading back from memory, scores and probabilities of the size length².

With P the probabilities, O = P·V, and G = ∂L/∂O, the sum over a row that the gradient of softmax asks for is
Σ_j P_ij (G·Vᵀ)_ij = Σ_c G_ic O_ic: it is known before the row is.

Source of the idea: Rabe and Staats, *Self-attention Does Not Need O(n²) Memory*, 2021; Dao et al.,
*FlashAttention*, NeurIPS 2022.
"""

import math
from typing import Iterator, Optional, Sequence, Tuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .masks import Masks, length_first
from .rows import exponentials_rows_, exponentials_rows_backward

# Queries in a block. A causal block has queries²/2 scores in vain on its diagonal, a lower one multiplies less
# efficiently: half as many where rows are not long.
QUERIES, LONG_ROW = 128, 1_024

# Scores in a block, for each thread of a CPU: 4 MiB in fp32. Smaller blocks would stay in a core's cache between the
# products and the mapping, but then Python, which gives the orders, takes a share: measured best at 512 and at 2,048
# keys. A GPU is to be filled rather than spared.
SCORES_PER_THREAD = 2**20
SCORES_ON_GPU = 2**26


Block = Tuple[slice, slice, slice]  # heads, queries, keys


class BlockwiseMultiMax(Function):
    """multimax(query · keyᵀ + masks) · value, head by head; differentiable once.

    Args of ``apply``:
        query: (heads, tgt_len, head_dim), scaled; ``heads`` are those of all sentences, bsz · num_heads.
        key, value: (heads, src_len, head_dim).
        thresholds, gains: as in :func:`..mappings.multimax.multimax`.
        masks: the :class:`Masks`.

    Returns:
        (heads, tgt_len, head_dim), laid out in memory as (tgt_len, heads, head_dim).
    """

    @staticmethod
    def forward(
        ctx, query: Tensor, key: Tensor, value: Tensor, thresholds: Tensor, gains: Tensor, masks: Masks
    ) -> Tensor:
        output = length_first(query)
        # one head after the other in memory: products of such are a fifth faster than of projections as they come
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        log_totals = []
        scratch = _scratch(query, key)
        for heads, queries, keys in _blocks(query, key, masks):
            scores = _scores(query[heads, queries], key[heads, keys], masks, (heads, queries, keys), scratch)
            factor, log_total = exponentials_rows_(scores.flatten(0, 1), thresholds, gains)
            block = torch.bmm(scores, value[heads, keys])
            torch.mul(block, factor.view(*block.shape[:2], 1), out=output[heads, queries])
            log_totals.append(log_total)
        ctx.masks = masks
        ctx.save_for_backward(query, key, value, thresholds, gains, output, *log_totals)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        query, key, value, thresholds, gains, output, *log_totals = ctx.saved_tensors
        grad = grad.contiguous()
        expected_grads = torch.linalg.vecdot(grad, output).to(log_totals[0].dtype)
        grad_query, grad_key, grad_value = length_first(query), length_first(key), length_first(value)
        grads_of_parameters = []
        scratches = [_scratch(query, key) for _ in range(4)]
        for (heads, queries, keys), log_total in zip(_blocks(query, key, ctx.masks), log_totals):
            q, k, v, g = query[heads, queries], key[heads, keys], value[heads, keys], grad[heads, queries]
            scores = _scores(q, k, ctx.masks, (heads, queries, keys), scratches[0])
            grad_probabilities, probabilities, grad_scores = (_part(memory, scores.shape) for memory in scratches[1:])
            torch.bmm(g, v.transpose(1, 2), out=grad_probabilities)
            grad_parameters = exponentials_rows_backward(
                scores.flatten(0, 1),
                grad_probabilities.flatten(0, 1),
                log_total,
                expected_grads[heads, queries].reshape(-1, 1),
                probabilities.flatten(0, 1),
                grad_scores.flatten(0, 1),
                thresholds,
                gains,
            )
            grads_of_parameters.append(grad_parameters)
            grad_query[heads, queries] = torch.bmm(grad_scores, k)
            if queries.stop == query.size(1):  # the first block of these heads: it sees all keys
                grad_k, grad_v = (k.new_zeros(k.shape, dtype=log_total.dtype) for _ in range(2))
            _add_product(grad_k[:, keys], grad_scores, q)
            _add_product(grad_v[:, keys], probabilities, g)
            if queries.start == 0:  # the last one
                grad_key[heads], grad_value[heads] = grad_k, grad_v
        grad_parameters = torch.stack(grads_of_parameters).sum(0).to(gains.dtype)
        return grad_query, grad_key, grad_value, grad_parameters[0], grad_parameters[1], None


def _block_size(query: Tensor, key: Tensor) -> Tuple[int, int]:
    """Heads and queries of a block."""
    (num_heads, tgt_len, _), src_len = query.shape, key.size(1)
    count = min(QUERIES if src_len >= LONG_ROW else QUERIES // 2, tgt_len)
    size = SCORES_PER_THREAD * torch.get_num_threads() if query.device.type == "cpu" else SCORES_ON_GPU
    return min(max(size // (count * src_len), 1), num_heads), count


def _blocks(query: Tensor, key: Tensor, masks: Masks) -> Iterator[Block]:
    """The blocks, as slices of heads, of queries, from the last to the first, and of the keys that these may see."""
    (num_heads, tgt_len, _), src_len = query.shape, key.size(1)
    heads, queries = _block_size(query, key)
    for head in range(0, num_heads, heads):
        for start in reversed(range(0, tgt_len, queries)):
            end = min(start + queries, tgt_len)
            keys = slice(0, end if masks.causal else src_len)
            yield slice(head, min(head + heads, num_heads)), slice(start, end), keys


def _scratch(query: Tensor, key: Tensor) -> Tensor:
    """Memory for the scores of any block."""
    heads, queries = _block_size(query, key)
    return query.new_empty(heads * queries * key.size(1))


def _part(scratch: Tensor, shape: Sequence[int]) -> Tensor:
    return scratch[: math.prod(shape)].view(shape)


def _scores(q: Tensor, k: Tensor, masks: Masks, block: Block, scratch: Tensor) -> Tensor:
    """The masked scores of a block, (heads, queries, keys), from the queries and keys in it."""
    heads, queries, keys = block
    scores = torch.bmm(q, k.transpose(1, 2), out=_part(scratch, (len(q), q.size(1), k.size(1))))
    if masks.causal:
        count = queries.stop - queries.start
        scores[:, :, queries].add_(scores.new_full((count, count), float("-inf")).triu_(1))
    if masks.scores is not None:
        scores.add_(masks.scores[queries, keys])
    if masks.keys is not None:
        scores.add_(masks.keys[heads, :, keys])
    return scores


def _add_product(total: Tensor, rows: Tensor, factor: Tensor) -> None:
    """total += rowsᵀ · factor, in place; ``total`` may be of higher precision."""
    if total.dtype == rows.dtype and total.is_contiguous():
        total.baddbmm_(rows.transpose(1, 2), factor)
    else:  # of a part of the keys, baddbmm_ would be a product for each head, one after another
        total.add_(torch.bmm(rows.transpose(1, 2), factor))
