"""multimax_fairseq/analysis/rollout.py against products of plain lists, and what must hold of any rollout."""

import pytest
import reference
import torch

from multimax_fairseq.analysis import attention_rollout, translation_rollout


def attention(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).softmax(-1)


def test_against_the_product_of_plain_lists():
    layers = [attention(2, 3, 5, 5, seed=seed) for seed in range(3)]
    computed = attention_rollout(layers)
    for sentence in range(2):
        expected = reference.attention_rollout([layer[sentence].tolist() for layer in layers])
        torch.testing.assert_close(computed[sentence], torch.tensor(expected, dtype=torch.float64))


def test_one_layer_by_hand():
    (rollout,) = attention_rollout([torch.tensor([[[0.2, 0.8], [1.0, 0.0]]])])
    torch.testing.assert_close(rollout, torch.tensor([[0.6, 0.4], [0.5, 0.5]]))


def test_a_padded_query_passes_its_token_on():
    layer = attention(1, 2, 4, 4)
    layer[:, :, 3] = 0
    rollout = attention_rollout([layer, layer])
    torch.testing.assert_close(rollout.sum(-1), torch.ones(1, 4, dtype=torch.float64))
    torch.testing.assert_close(rollout[0, 3], torch.eye(4, dtype=torch.float64)[3])


def test_translation_by_hand():
    """One layer on each side: half of ½ A + ½ I stays with the target, the other half is C (½ E + ½ I)."""
    encoder, decoder, cross = (attention(1, 2, *shape) for shape in [(4, 4), (3, 3), (3, 4)])
    over_source, over_target = translation_rollout([decoder], [cross], [encoder])
    encoded = (encoder.mean(1)[0] + torch.eye(4)) / 2
    torch.testing.assert_close(over_target[0], (decoder.mean(1)[0] + torch.eye(3)) / 4)
    torch.testing.assert_close(over_source[0], cross.mean(1)[0] @ encoded / 2)


def test_source_and_target_together_sum_to_one():
    layers = range(3)
    over_source, over_target = translation_rollout(
        [attention(2, 2, 5, 5, seed=seed) for seed in layers],
        [attention(2, 2, 5, 7, seed=seed) for seed in layers],
        [attention(2, 2, 7, 7, seed=seed) for seed in layers],
    )
    torch.testing.assert_close(over_source.sum(-1) + over_target.sum(-1), torch.ones(2, 5, dtype=torch.float64))
    # each cross-attention halves what has come from the target before
    torch.testing.assert_close(over_target.sum(-1), torch.full((2, 5), 1 / 8, dtype=torch.float64))


def test_without_layers_there_is_no_rollout():
    with pytest.raises(ValueError, match="at least one layer"):
        attention_rollout([])
    with pytest.raises(ValueError, match="decoder layers are alike"):
        translation_rollout([attention(1, 3, 3)] * 2, [attention(1, 3, 4)], [attention(1, 4, 4)])
    with pytest.raises(ValueError, match="decoder layers are alike"):
        translation_rollout([], [], [attention(1, 4, 4)])


def test_self_attention_over_source_and_target_by_hand():
    """--cross-self-attention, with and without cross-attention: what A has of the source goes through its rollout."""
    encoder, decoder, cross = (attention(1, 2, *shape) for shape in [(4, 4), (3, 7), (3, 4)])
    encoded, means = (encoder.mean(1)[0] + torch.eye(4)) / 2, decoder.mean(1)[0]
    over_source, over_target = translation_rollout([decoder], [], [encoder])
    torch.testing.assert_close(over_source[0], means[:, :4] @ encoded / 2)
    torch.testing.assert_close(over_target[0], (means[:, 4:] + torch.eye(3)) / 2)
    both_source, both_target = translation_rollout([decoder], [cross], [encoder])
    torch.testing.assert_close(both_source, (over_source + cross.mean(1) @ encoded) / 2)
    torch.testing.assert_close(both_target, over_target / 2)
