"""multimax_fairseq/analysis/metrics.py against slow float64 oracles."""

import math

import pytest
import reference
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from multimax_fairseq.analysis import metrics
from multimax_fairseq.mappings import build_mapping

ABSENT = -math.inf


def test_rows_without_a_choice_are_undefined():
    """One score, none, and equal ones, which lie exactly on the threshold."""
    probabilities = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3]])
    result = metrics.row_metrics(probabilities.log(), probabilities)
    for name in ("multimodality", "top_multimodality", "sparsity", "tail"):
        assert getattr(result, name).isnan().all()
    for name in ("entropy", "support", "effective_support", "top_share", "top_k_share"):
        assert getattr(result, name).isnan().tolist() == [False, True, False]
    with pytest.raises(ValueError, match="differ in shape"):
        metrics.row_metrics(probabilities, probabilities[:, :2])


# ---------------------------------------------------------------------- against oracles

SCORES = st.lists(st.floats(-12, 12, width=32) | st.just(ABSENT), min_size=1, max_size=12)
MAPPINGS = st.sampled_from(["softmax", "sparsemax", "entmax15", "evsoftmax", "multimax"])


def below_the_largest(scores):
    """A threshold that the k largest scores lie above, and all that equal the k-th."""
    there = sorted((x for x in scores if x != ABSENT), reverse=True)
    return math.nextafter(there[: metrics.TOP_K][-1], -math.inf)


@settings(max_examples=150, deadline=None)
@given(SCORES, MAPPINGS)
def test_all_metrics_are_those_of_the_oracle(scores, name):
    assume(any(x != ABSENT for x in scores))
    x = torch.tensor(scores, dtype=torch.float64)
    mapping = build_mapping(name).eval()
    with torch.no_grad():
        p = mapping(x)
    threshold = reference.relevance_threshold(scores)
    assume(all(x == ABSENT or min(abs(x - ε) for ε in (threshold, 0.7)) > 2 * metrics.RESOLUTION for x in scores))
    result = metrics.row_metrics(x, p)
    for computed, expected in [
        (result.multimodality, reference.multimodality(scores, p.tolist(), threshold)),
        (result.sparsity, reference.sparsity(scores, p.tolist(), threshold, 1 / sum(x != ABSENT for x in scores))),
        (metrics.row_metrics(x, p, reference=0.1).sparsity, reference.sparsity(scores, p.tolist(), threshold, 0.1)),
        (metrics.row_metrics(x, p, 0.7).multimodality, reference.multimodality(scores, p.tolist(), 0.7)),
        (result.top_multimodality, reference.multimodality(scores, p.tolist(), below_the_largest(scores))),
        (result.tail, reference.mean_between(-math.inf, threshold, scores, p.tolist())),
        (result.entropy, reference.entropy(p.tolist())),
        (result.effective_support, math.exp(reference.entropy(p.tolist()))),
        (result.support, sum(q > 0 for q in p.tolist())),
        (result.top_share, max(p.tolist())),
        (result.top_k_share, sum(sorted(p.tolist())[-metrics.TOP_K :])),
    ]:
        assert computed.isnan() if expected is None else computed.item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float16, 2e-2), (torch.bfloat16, 1e-1)])
def test_precision(dtype, tolerance):
    """Half precision is computed in fp32: what is left is the rounding of the scores themselves."""
    scores = torch.randn(50, 9, dtype=torch.float64) * 3
    exact, rounded = (metrics.row_metrics(x, scores.softmax(-1).to(x.dtype)) for x in (scores, scores.to(dtype)))
    assert rounded.entropy.dtype == torch.float32
    torch.testing.assert_close(rounded.entropy.double(), exact.entropy, atol=tolerance, rtol=tolerance)


# ---------------------------------------------------------------------- over many rows


@settings(max_examples=60, deadline=None)
@given(st.lists(SCORES, min_size=1, max_size=5), MAPPINGS, st.floats(1e-6, 1.0))
def test_sparsity_for_an_s_that_is_known_afterwards(rows, name, s):
    """From the histogram of tails: within 2e-5 of the mean over rows of the formula."""
    width = max(map(len, rows))
    x = torch.tensor([[*scores, *[ABSENT] * (width - len(scores))] for scores in rows], dtype=torch.float64)
    with torch.no_grad():
        p = build_mapping(name).eval()(x)
    mean = metrics.MeanMetrics(1)
    mean.update(x.unsqueeze(0), p.unsqueeze(0))
    expected = metrics.row_metrics(x, p, reference=s).sparsity.nanmean().item()
    (computed,) = mean.sparsity_at(s)
    assert computed is None if math.isnan(expected) else computed == pytest.approx(expected, abs=2e-5)


def test_a_mean_of_nothing_is_none():
    mean = metrics.MeanMetrics(1)
    mean.update(torch.tensor([[[1.0, ABSENT]]]), torch.tensor([[[1.0, 0.0]]]))
    (result,) = mean.result()
    assert result["multimodality"] is None and result["multimodality_undefined"] == 1 and result["entropy"] == 0
    assert mean.sparsity_at(0.1) == [None]


def test_a_histogram_has_every_finite_score_and_leaves_its_tails_out():
    scores = [-1e7, -20.0, *[0.5] * 50, *[1.5] * 48, 30.0, ABSENT, math.inf, math.nan]
    histogram = metrics.ScoreHistogram()
    for part in (scores[:40], scores[40:]):
        histogram.update(torch.tensor(part, dtype=torch.float64))
    assert (histogram.low, histogram.high) == (-1e7, 30) and histogram.bins()[1].sum() == len(scores) - 3
    for share, lowest, highest in ((0, -1e7, 30), (0.03, 0.5, 1.5)):
        edges, counts = histogram.bins(share)
        assert edges[0] <= lowest < edges[1] and edges[-2] <= highest < edges[-1]
        assert counts[0] > 0 and counts[-1] > 0


# ---------------------------------------------------------------------- layers


def test_mad_against_the_loop_over_pairs():
    hidden = torch.randn(4, 6, 5, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 1, 0, 1], [1, 0, 0, 0, 0, 1], [0, 0, 1, 0, 0, 0]]).bool()
    hidden[~mask] = 1e6  # what padding holds does not matter
    computed = metrics.mean_average_distance(hidden, mask)
    for sentence in range(3):
        expected = reference.mean_average_distance(hidden[sentence, mask[sentence]].tolist())
        assert computed[sentence].item() == pytest.approx(expected, abs=1e-12)
    assert computed[3].isnan() and metrics.mean_average_distance(hidden[:, :1]).isnan().all()  # one token


# ---------------------------------------------------------------------- rollout


def attention(*shape):
    return torch.randn(*shape, dtype=torch.float64).softmax(-1)


def test_rollout_is_the_product_of_the_layers():
    layers = [attention(2, 3, 5, 5) for _ in range(3)]
    steps = [(layer.mean(1) + torch.eye(5)) / 2 for layer in layers]
    torch.testing.assert_close(metrics.attention_rollout(layers), steps[2] @ steps[1] @ steps[0])
    for layer in layers:
        layer[:, :, 4] = 0  # a padded query passes its token on
    assert metrics.attention_rollout(layers)[:, 4].tolist() == 2 * [[0, 0, 0, 0, 1]]
    with pytest.raises(ValueError, match="at least one layer"):
        metrics.attention_rollout([])


def test_rollout_of_translation_is_a_product_over_source_and_target_together():
    encoder, decoder, cross = ([attention(2, 2, *shape) for _ in range(3)] for shape in [(4, 4), (3, 3), (3, 4)])
    expected = torch.eye(7, dtype=torch.float64).repeat(2, 1, 1)  # of four source tokens, then three target tokens
    expected[:, :4, :4] = metrics.attention_rollout(encoder)
    for layer in range(3):
        for weights, columns in ((decoder[layer], slice(4, 7)), (cross[layer], slice(4))):
            step = torch.eye(7, dtype=torch.float64).repeat(2, 1, 1)
            step[:, 4:, columns] += weights.mean(1)
            step[:, 4:] /= 2
            expected = step @ expected
    computed = torch.cat(metrics.translation_rollout(decoder, cross, encoder), dim=-1)
    torch.testing.assert_close(computed, expected[:, 4:])
    with pytest.raises(ValueError):
        metrics.translation_rollout(decoder, cross[:2], encoder)
