"""Scores times a learned factor, and times log n: counted keys, and the same attention by every path."""

import pytest
import torch
from test_modules_attention import BSZ, MASKS, PADDING, additive, inputs, make

from multimax_fairseq.mappings import MAPPINGS
from multimax_fairseq.modules.scale import SCALES


@pytest.mark.parametrize("padding", [None, PADDING, PADDING.flip(1)], ids=["whole", "right", "left"])
@pytest.mark.parametrize("site, mask", [*MASKS[:2], ("encoder", additive(-1e4)),
                                        ("encoder", additive(float("-inf")).roll(1, 0))])  # fmt: skip
def test_log_length_counts_the_keys_whose_scores_are_there(site, mask, padding):
    (_, mapped), x = make("multimax", "log-length", site), inputs()
    arguments = dict(key_padding_mask=padding, attn_mask=mask, before_softmax=True)
    scores, s = mapped(x, x, x, **arguments)[0], mapped.scale.s.detach().repeat(BSZ)[:, None, None]
    mapped.scale = None
    plain, _ = mapped(x, x, x, **arguments)
    factor = s * plain.isfinite().sum(-1, keepdim=True).clamp(min=1).log()
    torch.testing.assert_close(scores, torch.where(plain.isfinite(), plain * factor, plain))


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
