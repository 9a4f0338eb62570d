"""MultiMax attention in plain PyTorch, by blocks; on a GPU, only where the whole matrix of scores would be large.

A block has the scores of some heads and some queries against all the keys that these may see. The backward computes
it again: one more forward, but nothing of size length² is kept, and no work is done on scores that the causal mask
hides.

Source of the idea: Rabe and Staats, *Self-attention Does Not Need O(n²) Memory*, 2021.
"""

from typing import Tuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .fused import fused_multimax
from .masks import Block, Masks
from .scores import compute_dtype

# Queries in a block. A causal block wastes queries²/2 scores on its diagonal; one of fewer queries multiplies less
# efficiently. Where rows are not long, half as many. On a GPU, more: a launch has to pay.
QUERIES, LONG_ROW = 128, 1_024
QUERIES_ON_GPU = 512

# Scores in a block per CPU thread: 4 MiB in fp32, measured best at 512 and 2,048 keys. Smaller blocks would stay in a
# core's cache between products and mapping, but Python's overhead would count. A GPU needs large blocks to be filled.
SCORES_PER_THREAD = 2**20
SCORES_ON_GPU = 2**26

# Up to so many scores a GPU computes the whole matrix: a block takes some seven launches, and must fill the GPU for
# long to pay. In half precision they are 64 MiB, which the backward keeps two or three times: 2 GiB in twelve layers.
WHOLE_ON_GPU = 2**25


def attend(
    query: Tensor, key: Tensor, value: Tensor, thresholds: Tensor, gains: Tensor, masks: Masks, dropout: float
) -> Tensor:
    """:func:`.attention.multimax_attention`, with the dropout of PyTorch."""
    src_len = key.size(1)
    if fits_as_a_whole(query, key):
        everything = masks.block(slice(0, query.size(0)), slice(0, query.size(1)), src_len)
        return _attend_block(query, key, value, thresholds, gains, masks, everything, dropout)
    # In half precision too, their gradients are summed over blocks in fp32.
    key, value, *parameters = (tensor.to(compute_dtype(tensor.dtype)) for tensor in (key, value, thresholds, gains))
    num_heads, num_queries = block_size(query, key)
    outputs = []
    for head, (queries, k, v) in enumerate(zip(*(tensor.split(num_heads) for tensor in (query, key, value)))):
        heads = slice(head * num_heads, head * num_heads + len(queries))
        outputs.append([])
        for number, q in enumerate(queries.split(num_queries, dim=1)):
            start = number * num_queries
            block = masks.block(heads, slice(start, start + q.size(1)), src_len)
            outputs[-1].append(
                checkpoint(
                    _attend_block, q, k, v, *parameters, masks, block, dropout,
                    use_reentrant=False, preserve_rng_state=dropout > 0,
                )
            )  # fmt: skip
    return torch.cat([torch.cat(blocks, dim=1) for blocks in outputs])


def fits_as_a_whole(query: Tensor, key: Tensor) -> bool:
    """Whether the matrix of scores is small enough to be kept; on a CPU it never is."""
    scores = query.size(0) * query.size(1) * key.size(1)
    return scores <= (0 if query.device.type == "cpu" else WHOLE_ON_GPU)


def block_size(query: Tensor, key: Tensor) -> Tuple[int, int]:
    """How many heads and how many queries a block has."""
    (num_heads, tgt_len, _), src_len = query.shape, key.size(1)
    if query.device.type == "cpu":
        count, size = QUERIES if src_len >= LONG_ROW else QUERIES // 2, SCORES_PER_THREAD * torch.get_num_threads()
    else:
        count, size = QUERIES_ON_GPU, SCORES_ON_GPU
    count = min(count, tgt_len)
    return min(max(size // (count * src_len), 1), num_heads), count


def _attend_block(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    thresholds: Tensor,
    gains: Tensor,
    masks: Masks,
    block: Block,
    dropout: float,
) -> Tensor:
    """The output of the queries of a block, (heads, queries, head_dim), from these, and all keys of its heads."""
    *_, keys = block
    key, value = (tensor[:, keys].to(query.dtype) for tensor in (key, value))
    scores = torch.bmm(query, key.transpose(1, 2))
    masks.add_to(scores, block)
    probabilities = fused_multimax(scores, thresholds, gains, _refuse, True)
    return torch.bmm(F.dropout(probabilities, dropout), value)


def _refuse(*_: Tensor) -> Tensor:
    raise RuntimeError("attention is differentiable once: gradients of its gradients are not computed")
