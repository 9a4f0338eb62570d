"""The masks of attention: what a block of them does is what the whole of them does, cut out."""

import pytest
import torch

from multimax_fairseq.kernels.masks import Masks, length_first

INF = float("inf")
HEADS, TGT_LEN, SRC_LEN = 4, 6, 9
HEAD, QUERIES = slice(1, 3), slice(2, 5)


def expected(masks, scores):
    """Element by element."""
    masked = scores.clone()
    for head in range(HEADS):
        for query in range(TGT_LEN):
            for key in range(SRC_LEN):
                if masks.causal and key > query:
                    masked[head, query, key] = -INF
                if masks.keys is not None:
                    masked[head, query, key] += masks.keys[head, 0, key]
                if masks.scores is not None:
                    masked[head, query, key] += masks.scores[query, key]
    return masked


KEYS = torch.zeros(HEADS, 1, SRC_LEN).index_fill(0, torch.tensor([2]), -INF)
SCORES = torch.arange(float(TGT_LEN * SRC_LEN)).view(TGT_LEN, SRC_LEN)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("keys", [None, KEYS])
@pytest.mark.parametrize("added", [None, SCORES])
def test_a_block_is_a_part_of_the_whole(causal, keys, added):
    masks, scores = Masks(causal, keys, added), torch.randn(HEADS, TGT_LEN, SRC_LEN)
    whole = expected(masks, scores)
    block = masks.block(HEAD, QUERIES, SRC_LEN)
    part = scores[block].clone()
    masks.add_to(part, block)
    assert torch.equal(part, whole[block])
    assert (whole[HEAD, QUERIES, block[2].stop :] == -INF).all()  # keys beyond the block are hidden


def test_a_causal_block_ends_with_the_key_of_its_last_query():
    assert Masks(causal=True).block(HEAD, QUERIES, SRC_LEN) == (HEAD, QUERIES, slice(0, QUERIES.stop))
    assert Masks().block(HEAD, QUERIES, SRC_LEN) == (HEAD, QUERIES, slice(0, SRC_LEN))


def test_length_first():
    tensor = length_first(torch.empty(2, 3, 4, dtype=torch.float16))
    assert tensor.shape == (2, 3, 4) and tensor.stride() == (4, 8, 1) and tensor.dtype == torch.float16
