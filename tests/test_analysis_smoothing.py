"""multimax_fairseq/analysis/smoothing.py against loops over pairs of tokens, and what must hold of any layer."""

import pytest
import reference
import torch

from multimax_fairseq.analysis import mean_average_distance, mean_cosine_similarity


@pytest.fixture
def hidden():
    return torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_against_the_loop_over_pairs(hidden):
    mask = torch.arange(6) < torch.tensor([[6], [4], [2], [3]])
    computed = mean_average_distance(hidden, mask)
    for sentence, length in enumerate((6, 4, 2, 3)):
        expected = reference.mean_average_distance(hidden[sentence, :length].tolist())
        assert computed[sentence].item() == pytest.approx(expected, abs=1e-12)


def test_by_hand():
    hidden = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]]])  # cosines 0, −1, 0
    assert mean_cosine_similarity(hidden).item() == pytest.approx(-1 / 3)
    assert mean_average_distance(hidden).item() == pytest.approx(4 / 3)


def test_what_padding_holds_does_not_matter(hidden):
    mask = torch.tensor([True, True, False, True, False, True])
    expected = mean_average_distance(hidden[:, mask])
    hidden[:, ~mask] = 1e6
    torch.testing.assert_close(mean_average_distance(hidden, mask.expand(4, 6)), expected)


def test_equal_tokens_have_no_distance_and_one_token_has_none_defined(hidden):
    assert mean_average_distance(hidden[:, :1].expand(-1, 6, -1)).abs().max() < 1e-12
    assert mean_average_distance(hidden[:, :1]).isnan().all()


def test_half_precision_is_computed_in_fp32(hidden):
    half = mean_average_distance(hidden.half())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.double(), mean_average_distance(hidden), atol=2e-3, rtol=0)
