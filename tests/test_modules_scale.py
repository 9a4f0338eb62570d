"""Scores times a learned factor, and times log n: counted keys, and the same attention by every path."""

import math

import pytest
import torch
from test_modules_attention import BSZ, NUM_HEADS, PADDING, SRC_LEN, additive, causal_mask, inputs, make

from multimax_fairseq.mappings import MAPPINGS
from multimax_fairseq.modules.scale import SCALES, visible_keys


@pytest.mark.parametrize("padding", [None, PADDING, PADDING.flip(1)], ids=["whole", "right", "left"])
@pytest.mark.parametrize("mask", [None, causal_mask(), additive(-1e4), additive(float("-inf")).roll(1, 0)])
def test_counted_keys_are_those_whose_score_is_there(mask, padding):
    _, mapped = make("multimax", "log-length")
    x = inputs()
    scores, _ = mapped(x, x, x, key_padding_mask=padding, attn_mask=mask, before_softmax=True)
    shown = scores.view(BSZ, NUM_HEADS, SRC_LEN, -1).isfinite().sum(-1, keepdim=True)[:, :1]
    keys = x.view(SRC_LEN, BSZ, NUM_HEADS, -1).permute(1, 2, 0, 3)
    added, is_causal = mapped._mask(keys, padding, mask)
    added = torch.zeros(1, 1, 1, SRC_LEN) if added is None else added
    counted = visible_keys(added, is_causal, SRC_LEN)
    assert torch.equal(counted.expand_as(shown), shown.float())


def test_log_length_times_the_scores_of_a_query():
    (_, mapped), x, mask = make("multimax", "log-length"), inputs(), causal_mask()
    scores, _ = mapped(x, x, x, key_padding_mask=PADDING, attn_mask=mask, before_softmax=True)
    factor = mapped.scale.s.detach().clone()
    mapped.scale = None
    plain, _ = mapped(x, x, x, key_padding_mask=PADDING, attn_mask=mask, before_softmax=True)
    for sentence, padding in enumerate(PADDING):
        for head in range(NUM_HEADS):
            for query in range(SRC_LEN):
                seen = [key for key in range(query + 1) if not padding[key]]
                row = sentence * NUM_HEADS + head
                expected = plain[row, query, seen] * factor[head] * math.log(max(len(seen), 1))
                torch.testing.assert_close(scores[row, query, seen], expected)


def test_nothing_changes_at_the_start_but_with_the_length():
    assert SCALES["none"](4) is None and torch.equal(SCALES["learned"](4)(), torch.ones(1))
    torch.testing.assert_close(SCALES["log-length"](4)(torch.full((1, 1, 1, 1), 64.0)), torch.ones(1, 4, 1, 1))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", MAPPINGS)
def test_a_padded_sentence_is_attended_to_as_it_is_alone(name, scale):
    (_, mapped), x = make(name, scale), inputs()
    together, _ = mapped(x, x, x, key_padding_mask=PADDING)
    for sentence, padding in enumerate(PADDING):
        alone = x[~padding, sentence : sentence + 1]
        torch.testing.assert_close(together[~padding, sentence : sentence + 1], mapped(alone, alone, alone)[0])
