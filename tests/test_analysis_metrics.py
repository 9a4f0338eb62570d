"""multimax_fairseq/analysis/metrics.py against hand-computed values, and slow float64 oracles on any."""

import math

import pytest
import reference
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from multimax_fairseq.analysis import (
    MeanMetrics,
    ScoreHistogram,
    attention_rollout,
    falling_share,
    is_monotone,
    mean_average_distance,
    metrics,
    row_metrics,
    slope,
    translation_rollout,
)
from multimax_fairseq.analysis.measure import coefficients
from multimax_fairseq.mappings import MultiMax, build_mapping

ABSENT = -math.inf


def row(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


# ---------------------------------------------------------------------- by hand


# Of four scores, what the relevant ones below the largest lack to its probability.
@pytest.mark.parametrize("options, lacks", [
    ({"threshold": 2.0}, [0.2, 0.35]),
    ({"k": 3}, [0.2, 0.35]),  # wherever the threshold lies
    ({"k": 3, "threshold": 4.5}, [0.2, 0.35]),
    ({"k": 9}, [0.2, 0.35, 0.45]),  # fewer are there
])  # fmt: skip
def test_multimodality_by_hand(options, lacks):
    scores, probabilities = row(5.0, 4.0, 3.0, 0.0, ABSENT), row(0.5, 0.3, 0.15, 0.05, 0.0)
    assert metrics.multimodality(scores, probabilities, **options) == pytest.approx(1 - sum(lacks) / len(lacks))


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


@pytest.mark.parametrize("present", [0, 1])
def test_rows_without_a_choice_are_undefined(present):
    scores = row(2.0, ABSENT, ABSENT) if present else row(ABSENT, ABSENT, ABSENT)
    probabilities = row(float(present), 0.0, 0.0)
    result = row_metrics(scores, probabilities)
    assert result.multimodality.isnan() and result.sparsity.isnan()
    assert result.entropy.isnan() == (not present) and result.top_share.isnan() == (not present)


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


def test_the_bulk_of_a_histogram_leaves_the_tails_out():
    histogram = ScoreHistogram(num_bins=64, width=1.0)
    histogram.update(torch.tensor([-20.0] + [0.5] * 50 + [1.5] * 48 + [30.0]))
    assert histogram.bulk(0.02, 0.02) == (0, 2) and histogram.bulk(0.0, 0.0) == (-20, 31)
    assert histogram.bulk(0.5, 0.01) == (0, 2)  # 51 % lie below 1


# ---------------------------------------------------------------------- layers


@pytest.fixture
def hidden():
    return torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_mad_against_the_loop_over_pairs(hidden):
    mask = torch.arange(6) < torch.tensor([[6], [4], [2], [3]])
    computed = mean_average_distance(hidden, mask)
    for sentence, length in enumerate((6, 4, 2, 3)):
        expected = reference.mean_average_distance(hidden[sentence, :length].tolist())
        assert computed[sentence].item() == pytest.approx(expected, abs=1e-12)
    assert mean_average_distance(hidden[:, :1]).isnan().all()  # one token


def test_what_padding_holds_does_not_matter(hidden):
    mask = torch.tensor([True, True, False, True, False, True])
    expected = mean_average_distance(hidden[:, mask])
    hidden[:, ~mask] = 1e6
    torch.testing.assert_close(mean_average_distance(hidden, mask.expand(4, 6)), expected)


# ---------------------------------------------------------------------- rollout


def attention(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).softmax(-1)


def test_rollout_against_the_product_of_plain_lists():
    layers = [attention(2, 3, 5, 5, seed=seed) for seed in range(3)]
    computed = attention_rollout(layers)
    for sentence in range(2):
        expected = reference.attention_rollout([layer[sentence].tolist() for layer in layers])
        torch.testing.assert_close(computed[sentence], torch.tensor(expected, dtype=torch.float64))


def test_a_padded_query_passes_its_token_on():
    layer = attention(1, 2, 4, 4)
    layer[:, :, 3] = 0
    rollout = attention_rollout([layer, layer])
    torch.testing.assert_close(rollout.sum(-1), torch.ones(1, 4, dtype=torch.float64))
    torch.testing.assert_close(rollout[0, 3], torch.eye(4, dtype=torch.float64)[3])


@pytest.mark.parametrize("of_source", [0, 4])
@pytest.mark.parametrize("has_cross", [True, False])
def test_rollout_of_translation_is_a_product_over_source_and_target_together(of_source, has_cross):
    """Decoders may attend to the source with their self-attention (--cross-self-attention), and have no other."""
    encoder, decoder, cross = (
        [attention(2, 2, *shape, seed=seed) for seed in range(3)] for shape in [(4, 4), (3, of_source + 3), (3, 4)]
    )
    expected = torch.eye(7, dtype=torch.float64).repeat(2, 1, 1)
    expected[:, :4, :4] = attention_rollout(encoder)
    for layer in range(3):
        parts = [(decoder[layer], slice(4 - of_source, 7)), (cross[layer], slice(4))]
        for weights, columns in parts[: 1 + has_cross]:
            step = torch.eye(7, dtype=torch.float64).repeat(2, 1, 1)
            step[:, 4:, columns] += weights.mean(1)
            step[:, 4:] /= 2
            expected = step @ expected
    computed = translation_rollout(decoder, cross if has_cross else [], encoder)
    torch.testing.assert_close(torch.cat(computed, dim=-1), expected[:, 4:])


def test_without_layers_there_is_no_rollout():
    with pytest.raises(ValueError, match="at least one layer"):
        attention_rollout([])
    for layers in ([attention(1, 3, 3)] * 2, []):
        with pytest.raises(ValueError, match="decoder layers are alike"):
            translation_rollout(layers, [attention(1, 3, 4)], [attention(1, 4, 4)])


# ---------------------------------------------------------------------- modulators

NUMBERS = st.floats(-1.5, 1.5, width=32)
PARAMETERS = st.integers(1, 2).flatmap(
    lambda order: st.tuples(*[st.lists(st.tuples(NUMBERS, NUMBERS), min_size=order, max_size=order)] * 2)
)


@settings(max_examples=60, deadline=None)
@given(PARAMETERS)
def test_slope_and_monotonicity_are_those_of_the_formula_on_a_fine_grid(parameters):
    low, high, step = -3.0, 3.0, 1e-3
    grid = [low + step * i for i in range(6001)]
    sigma = torch.tensor(reference.modulator(grid, *parameters), dtype=torch.float64)
    steps, places = sigma.diff(), [x for pair in parameters[0] for x in pair]
    thresholds, gains = (torch.tensor(numbers, dtype=torch.float64) for numbers in parameters)
    middle = torch.tensor(grid[:-1], dtype=torch.float64) + step / 2
    far = torch.tensor([all(abs(x - place) > step for place in places) for x in middle.tolist()])
    torch.testing.assert_close(slope(middle, thresholds, gains)[far], steps[far] / step, atol=1e-6, rtol=0)
    assume(steps.abs().min() > 1e-6)  # a slope of about 0 is either
    # a stretch shorter than the grid's step cannot be seen on it
    assume(all(abs(a - b) > 2 * step or a == b for a in [low, high, *places] for b in places))
    assert is_monotone(thresholds, gains, low, high) == bool((steps > 0).all())


def test_the_share_of_scores_where_sigma_falls():
    thresholds, gains = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, -1.5]])  # above 1 the slope is −1/2
    assert not is_monotone(thresholds, gains, 0.0, 2.0) and is_monotone(thresholds, gains, 0.0, 0.9)
    assert falling_share(thresholds, gains, edges=[0, 0.5, 1, 1.5, 2], counts=[1, 2, 3, 4]) == pytest.approx(0.7)


def test_a_term_that_is_not_learned_has_no_gain():
    module = MultiMax(terms=["above"])
    with torch.no_grad():
        module.gains.fill_(3.0)
    assert coefficients(module)[1].tolist() == [[0.0, 3.0], [0.0, 3.0]]
