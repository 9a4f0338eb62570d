"""multimax_fairseq/analysis/metrics.py against hand-computed rows, and slow float64 oracles on any."""

import math

import pytest
import reference
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from multimax_fairseq.analysis import metrics
from multimax_fairseq.analysis.metrics import MeanMetrics, ScoreHistogram, row_metrics
from multimax_fairseq.mappings import build_mapping

ABSENT = -math.inf


def row(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


# ---------------------------------------------------------------------- by hand


def test_multimodality_by_hand():
    scores, probabilities = row(5.0, 4.0, 3.0, 0.0), row(0.5, 0.3, 0.15, 0.05)
    # above ε = 2 and below the largest: 4 and 3, which lack 0.2 and 0.35 to the top
    assert metrics.multimodality(scores, probabilities, threshold=2.0) == pytest.approx(1 - (0.2 + 0.35) / 2)


def test_multimodality_of_the_largest_by_hand():
    scores, probabilities = row(5.0, 4.0, 3.0, 0.0, ABSENT), row(0.5, 0.3, 0.15, 0.05, 0.0)
    # the three largest are 5, 4 and 3, wherever the threshold lies
    for threshold in (None, 4.5):
        assert metrics.multimodality(scores, probabilities, threshold, k=3) == pytest.approx(1 - (0.2 + 0.35) / 2)
    # fewer than k are there
    assert metrics.multimodality(scores, probabilities, k=9) == pytest.approx(1 - (0.2 + 0.35 + 0.45) / 3)
    assert metrics.multimodality(row(5.0, 5.0, ABSENT), row(0.5, 0.5, 0.0), k=2).isnan()


def test_one_s_for_all_models_is_the_geometric_mean_of_their_tails():
    assert metrics.common_reference([0.04]) == pytest.approx(0.04)
    # a tail of 0 (all irrelevant entries have nothing) and one of a model without irrelevant entries do not count
    assert metrics.common_reference([0.01, 0.09, 0.0, math.nan]) == pytest.approx(0.03)
    assert metrics.common_reference([0.0]) is None


def test_sparsity_by_hand():
    scores, probabilities = row(5.0, 1.0, 0.0, ABSENT), row(0.9, 0.1, 0.0, 0.0)
    # below ε = 2 there are 1 and 0, with 0.1 and 0; s = 0.2
    expected = (math.exp(-0.5) + 1) / 2
    assert metrics.sparsity(scores, probabilities, threshold=2.0, reference=0.2) == pytest.approx(expected)
    # by default s = 1/3, as the absent score does not count
    expected = (math.exp(-0.3) + 1) / 2
    assert metrics.sparsity(scores, probabilities, threshold=2.0) == pytest.approx(expected)


def test_a_uniform_row():
    scores = torch.full((7,), 3.7)
    result = row_metrics(scores, scores.softmax(-1))
    assert result.multimodality.isnan() and result.sparsity.isnan()  # every score lies exactly on the threshold
    assert result.entropy == pytest.approx(math.log(7)) and result.effective_support == pytest.approx(7)
    assert result.support == 7 and result.top_share == pytest.approx(1 / 7)


def test_a_one_hot_row():
    result = row_metrics(row(9.0, 0.0, 0.0, 0.0), row(1.0, 0.0, 0.0, 0.0))
    assert result.multimodality.isnan()  # no second relevant score
    assert result.sparsity == 1
    assert (result.entropy, result.effective_support, result.support, result.top_share) == (0, 1, 1, 1)


def test_one_mode_where_there_were_two_is_not_multimodal():
    assert metrics.multimodality(row(5.0, 4.9, -5.0, -5.0), row(1.0, 0.0, 0.0, 0.0)) == 0


def test_two_equal_modes_are_as_multimodal_as_can_be():
    assert metrics.multimodality(row(5.0, 4.9, -5.0, -5.0), row(0.5, 0.5, 0.0, 0.0)) == 1


@pytest.mark.parametrize("present", [0, 1])
def test_rows_without_a_choice_are_undefined(present):
    scores = row(2.0, ABSENT, ABSENT) if present else row(ABSENT, ABSENT, ABSENT)
    probabilities = row(float(present), 0.0, 0.0)
    result = row_metrics(scores, probabilities)
    assert result.multimodality.isnan() and result.sparsity.isnan()
    assert result.entropy.isnan() == (not present) and result.top_share.isnan() == (not present)


def test_the_top_k_share():
    assert metrics.top_share(row(0.1, 0.5, 0.4), k=2) == pytest.approx(0.9)
    assert metrics.top_share(row(0.1, 0.5, 0.4), k=9) == pytest.approx(1)


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match="differ in shape"):
        metrics.multimodality(torch.zeros(2, 3), torch.zeros(3, 2))


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
    assume(all(x == ABSENT or abs(x - threshold) > 2 * metrics.RESOLUTION for x in scores))
    result = row_metrics(x, p)
    for computed, expected in [
        (result.multimodality, reference.multimodality(scores, p.tolist(), threshold)),
        (result.sparsity, reference.sparsity(scores, p.tolist(), threshold, 1 / sum(x != ABSENT for x in scores))),
        (result.top_multimodality, reference.multimodality(scores, p.tolist(), below_the_largest(scores))),
        (result.tail, reference.mean_below(scores, p.tolist(), threshold)),
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
    scores = torch.randn(50, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    exact = row_metrics(scores, scores.softmax(-1))
    rounded = row_metrics(scores.to(dtype), scores.softmax(-1).to(dtype))
    for name in ("entropy", "top_share"):
        expected = getattr(exact, name)
        computed = getattr(rounded, name)
        assert computed.dtype == torch.float32
        torch.testing.assert_close(computed.double(), expected, atol=tolerance, rtol=tolerance)


def random_rows(num_heads=3, rows=20, width=8):
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(num_heads, rows, width, generator=generator) * 2
    scores[:, ::5, 1:] = ABSENT  # rows of one score: undefined
    scores[:, 1::5, 4:] = ABSENT
    return scores


# ---------------------------------------------------------------------- over many rows


@pytest.mark.parametrize("chunk_size", [metrics.CHUNK_SIZE, 30])
def test_means_leave_undefined_rows_out_and_count_them(chunk_size, monkeypatch):
    monkeypatch.setattr(metrics, "CHUNK_SIZE", chunk_size)
    scores = random_rows()
    p = scores.softmax(-1)
    mean = MeanMetrics(3)
    for part in (slice(0, 7), slice(7, 20)):
        mean.update(scores[:, part], p[:, part])
    rows = row_metrics(scores, p)
    for head, result in enumerate(mean.result()):
        undefined = int(rows.multimodality[head].isnan().sum())
        assert result["rows"] == 20 and result["multimodality_undefined"] == undefined >= 4
        assert result["sparsity_undefined"] == int(rows.sparsity[head].isnan().sum()) >= 4
        for name, values in rows._asdict().items():
            assert result[name] == pytest.approx(values[head].nanmean().item(), rel=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.lists(SCORES, min_size=1, max_size=5), MAPPINGS, st.floats(1e-6, 1.0))
def test_sparsity_for_an_s_that_is_known_afterwards(rows, name, s):
    """From the histogram of tails: within 2e-5 of the mean over rows of the formula."""
    width = max(map(len, rows))
    x = torch.tensor([[*scores, *[ABSENT] * (width - len(scores))] for scores in rows], dtype=torch.float64)
    with torch.no_grad():
        p = build_mapping(name).eval()(x)
    mean = MeanMetrics(1)
    mean.update(x.unsqueeze(0), p.unsqueeze(0))
    expected = metrics.sparsity(x, p, reference=s).nanmean().item()
    (computed,) = mean.sparsity_at(s)
    assert computed is None if math.isnan(expected) else computed == pytest.approx(expected, abs=2e-5)


def test_a_mean_of_nothing_is_none():
    mean = MeanMetrics(1)
    mean.update(torch.tensor([[[1.0, ABSENT]]]), torch.tensor([[[1.0, 0.0]]]))
    (result,) = mean.result()
    assert result["multimodality"] is None and result["multimodality_undefined"] == 1 and result["entropy"] == 0
    assert mean.sparsity_at(0.1) == [None]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.floats(-1e4, 1e4, width=32), max_size=30), max_size=6))
def test_a_histogram_counts_every_score_in_its_bin(batches):
    histogram = ScoreHistogram(num_bins=16)
    values = [x for batch in batches for x in batch]
    for batch in batches:
        histogram.update(torch.tensor([*batch, ABSENT, math.inf, math.nan], dtype=torch.float64))
    edges, counts = histogram.edges, histogram.counts
    assert len(counts) <= 16 and sum(counts) == len(values)
    if values:
        assert (histogram.low, histogram.high) == (min(values), max(values))
        for low, high, count in zip(edges, edges[1:], counts):
            assert count == sum(low <= x < high for x in values)
