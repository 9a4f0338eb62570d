"""Scores times a learned factor, and times log n: counted keys, and the same attention by every path."""

import math

import pytest
import torch
from test_modules_attention import BSZ, NUM_HEADS, PADDING, SRC_LEN, additive, inputs
from test_modules_attention import make as make_attention

from multimax_fairseq.mappings import MAPPINGS
from multimax_fairseq.modules import attention
from multimax_fairseq.modules.scale import SCALES, LogLengthScale, build_scale, visible_keys

CAUSAL = additive(float("-inf"))
scaled = pytest.mark.parametrize("scale", [name for name in SCALES if name != "none"])


def causal_mask():
    """As a decoder makes it."""
    mask = CAUSAL.clone()
    setattr(mask, attention.CAUSAL, True)
    return mask


def make(scale, mapping="multimax", **options):
    _, mapped = make_attention(mapping, scale, **options)
    return mapped


@pytest.mark.parametrize("padding", [None, PADDING, PADDING.flip(1)], ids=["whole", "right", "left"])
@pytest.mark.parametrize("mask", [None, CAUSAL, causal_mask(), additive(-1e4), additive(float("-inf")).roll(1, 0)])
@pytest.mark.parametrize("zero", [False, True])
def test_counted_keys_are_those_whose_score_is_there(mask, padding, zero):
    mapped = make("log-length", self_attention=True, add_zero_attn=zero)
    x = inputs()
    scores, _ = mapped(x, x, x, key_padding_mask=padding, attn_mask=mask, before_softmax=True)
    shown = scores.view(BSZ, NUM_HEADS, SRC_LEN, -1).isfinite().sum(-1, keepdim=True)[:, :1]
    keys = torch.empty(BSZ, NUM_HEADS, SRC_LEN + int(zero), 1)
    added, is_causal = mapped._mask(keys, padding, mask)
    added = torch.zeros(1, 1, 1, keys.size(2)) if added is None else added
    counted = visible_keys(added, is_causal, SRC_LEN)
    assert torch.equal(counted.expand_as(shown), shown.float())


def test_log_length_times_the_scores_of_a_query():
    mapped, x = make("log-length"), inputs()
    mask = causal_mask()
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
    assert build_scale("none", 4) is None
    assert torch.equal(build_scale("learned", 4)(), torch.ones(1))
    torch.testing.assert_close(LogLengthScale(4)(torch.full((1, 1, 1, 1), 64.0)), torch.ones(1, 4, 1, 1))


def test_a_scale_that_does_not_exist():
    with pytest.raises(ValueError, match="there is no 'sqrt'; choose from: none, learned, log-length"):
        build_scale("sqrt", 4)


@scaled
@pytest.mark.parametrize("name", MAPPINGS)
def test_a_padded_sentence_is_attended_to_as_it_is_alone(name, scale):
    mapped, x = make(scale, name), inputs()
    together, _ = mapped(x, x, x, key_padding_mask=PADDING)
    for sentence, padding in enumerate(PADDING):
        alone = x[~padding, sentence : sentence + 1]
        torch.testing.assert_close(together[~padding, sentence : sentence + 1], mapped(alone, alone, alone)[0])


@scaled
@pytest.mark.parametrize("mask", [None, CAUSAL, causal_mask()], ids=["none", "added", "causal"])
def test_attention_without_weights_is_that_with_them(mask, scale):
    mapped, x = make(scale), inputs().requires_grad_()
    results = []
    for need_weights in (False, True):
        output, _ = mapped(x, x, x, key_padding_mask=PADDING, attn_mask=mask, need_weights=need_weights)
        results.append([output, *torch.autograd.grad(output.pow(2).sum(), [x, *mapped.parameters()])])
    assert results[0][-1].abs().sum() > 0
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-4)


@scaled
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_half(dtype, scale):
    mapped, x = make(scale), inputs()
    expected, _ = mapped(x, x, x)
    output, _ = mapped.to(dtype)(x.to(dtype), x.to(dtype), x.to(dtype))
    assert output.dtype == dtype
    torch.testing.assert_close(output.float(), expected, atol=8 * torch.finfo(dtype).eps, rtol=0.02)
    output.float().pow(2).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in mapped.scale.parameters())
