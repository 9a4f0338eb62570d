"""Scores times a learned factor, and times log n: counted keys, and the same attention by every path."""

import math

import pytest
import torch
from test_modules_attention import BSZ, NUM_HEADS, PADDING, SRC_LEN, additive, inputs
from test_modules_attention import make as make_attention

from multimax_fairseq.kernels import blockwise_attention
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
@pytest.mark.parametrize("mask", [None, CAUSAL, additive(-1e4), additive(float("-inf")).roll(1, 0)])
@pytest.mark.parametrize("zero", [False, True])
def test_counted_keys_are_those_whose_score_is_there(mask, padding, zero):
    mapped = make("log-length", self_attention=True, add_zero_attn=zero)
    x = inputs()
    scores, _ = mapped(x, x, x, key_padding_mask=padding, attn_mask=mask, before_softmax=True)
    shown = scores.view(BSZ, NUM_HEADS, SRC_LEN, -1).isfinite().sum(-1)[:, 0].T  # (tgt_len, bsz)
    counted = visible_keys(SRC_LEN, padding, mask, mask is CAUSAL) + int(zero)
    assert torch.equal(counted.expand(SRC_LEN, BSZ), shown.float())


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
    assert torch.equal(build_scale("learned", 4)(None), torch.ones(1))
    torch.testing.assert_close(LogLengthScale(4)(lambda: torch.full((1, 1), 64.0)), torch.ones(1, 1, 4))


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
def test_blocks_equal_the_full_matrix(mask, scale, monkeypatch):
    monkeypatch.setattr(blockwise_attention, "QUERIES", 4)
    mapped, x = make(scale), inputs().requires_grad_()
    results = []
    for least in (1, 1_000):
        monkeypatch.setattr(attention, "MIN_KEYS", least)
        assert mapped._goes_blockwise(x, x, mask) is (least == 1)
        output, _ = mapped(x, x, x, key_padding_mask=PADDING, attn_mask=mask, need_weights=False)
        wanted = [x, *mapped.parameters()]
        results.append([output, *torch.autograd.grad(output.pow(2).sum(), wanted)])
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
