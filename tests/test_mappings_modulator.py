"""MultiMax: the modulator σ, its parameters and their initialisation."""

from functools import partial

import pytest
import reference
import torch
from mapping_cases import (
    CASES,
    GAINS,
    INF,
    THRESHOLDS,
    dtype_params,
    masked_scores,
    random_scores,
    weighted_gradient,
)
from torch.autograd import gradcheck, gradgradcheck

from multimax_fairseq.mappings import MultiMax, modulate, multimax


def with_parameters(module, thresholds=THRESHOLDS, gains=GAINS):
    with torch.no_grad():
        module.thresholds.copy_(thresholds[: module.order])
        module.gains.copy_(gains[: module.order])
    return module


@dtype_params
@pytest.mark.parametrize("order", [1, 2])
def test_modulate_agrees_with_oracle(dtype, order):
    thresholds, gains = THRESHOLDS[:order], GAINS[:order]
    scores = masked_scores(6, 20, scale=5.0, dtype=dtype)
    oracle = partial(reference.modulator, thresholds=thresholds.tolist(), gains=gains.tolist())
    expected = reference.over_rows(oracle, scores)
    modulated = modulate(scores, thresholds, gains)
    assert modulated.dtype == dtype
    # A few roundings of terms up to 20 in the arithmetic's dtype (fp32 for half), one of the result.
    atol = 80 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    rtol = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(modulated.double(), expected, atol=atol, rtol=rtol)


def test_half_precision_is_modulated_in_single():
    """g·x² of this score is 78,125, beyond fp16, and a term of opposite sign brings it back."""
    thresholds = torch.tensor([[0.0, 0.0], [0.0, 0.0]])
    gains = torch.tensor([[0.0, -311.5], [0.0, 1.25]])
    scores = torch.tensor([250.0, 250.0], dtype=torch.float16)
    assert modulate(scores, thresholds, gains).tolist() == [500.0, 500.0]
    assert multimax(scores, thresholds, gains).tolist() == [0.5, 0.5]


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("sign", [1.0, -1.0])
@dtype_params
def test_modulate_keeps_absent_scores_absent(order, sign, dtype):
    """With g_b > 0 the term of a score of −inf is +inf, with g_b < 0 it is −inf, with g_b = 0 it is NaN."""
    scores, thresholds = torch.tensor([-INF, 1.0, -INF, -3.0], dtype=dtype), torch.full((order, 2), 0.5)
    for gains in (torch.full((order, 2), sign), torch.zeros(order, 2), torch.tensor([[sign, -sign]] * order)):
        modulated = modulate(scores, thresholds, gains)
        assert (modulated == -INF).tolist() == [True, False, True, False]
        assert modulated[[1, 3]].isfinite().all()
        gradient = weighted_gradient(partial(modulate, thresholds=thresholds, gains=gains), scores)
        assert gradient.isfinite().all() and (gradient[[0, 2]] == 0).all()


@pytest.mark.parametrize("order", [1, 2])
@dtype_params
def test_gains_of_zero_are_softmax(order, dtype):
    scores = masked_scores(5, 9, scale=4.0, dtype=dtype)
    expected, tolerance = CASES["softmax"].function(scores), CASES["softmax"].tolerance(dtype)
    zeros = torch.zeros(order, 2)
    torch.testing.assert_close(multimax(scores, random_scores(order, 2), zeros), expected, **tolerance)
    module = MultiMax(order=order, init="identity")
    assert module.thresholds.shape == module.gains.shape == (order, 2)
    torch.testing.assert_close(module(scores), expected, **tolerance)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("dim", [0, -1])
def test_gradients_of_scores_thresholds_and_gains(order, dim):
    """Scores at least 0.1 from each threshold, two of them absent; one row is empty."""
    scores = torch.tensor([[-1.5, 0.1, -INF, 0.62, 2.0], [-INF] * 5, [1.25, -0.6, 0.3, -INF, -3.0]])
    inputs = [tensor.double().clone().requires_grad_() for tensor in (scores, THRESHOLDS[:order], GAINS[:order])]
    assert gradcheck(partial(multimax, dim=dim), inputs)
    assert gradgradcheck(partial(multimax, dim=dim), [inputs[0].detach()[:2, :4].requires_grad_(), *inputs[1:]])


@pytest.mark.parametrize(("term", "column"), [("below", 0), ("above", 1)])
@pytest.mark.parametrize("order", [1, 2])
def test_one_term_leaves_the_other_side_alone(term, column, order):
    module = MultiMax(order=order, terms=(term,))
    assert not module.gains[:, 1 - column].any() and not module.thresholds[:, 1 - column].any()
    assert module.gains[:, column].all() and module.thresholds[:, column].all()

    with_parameters(module, torch.zeros(2, 2), torch.ones(2, 2))  # also where another optimiser wrote into it
    scores = torch.tensor([-2.0, -1.0, 1.0, 2.0])
    untouched = scores > 0 if term == "below" else scores < 0
    assert torch.equal(module.modulate(scores) == scores, untouched)
    (module(scores) ** 2).sum().backward()
    for parameter in (module.thresholds, module.gains):
        assert not parameter.grad[:, 1 - column].any() and parameter.grad[:, column].all()


def test_normal_initialisation_has_the_paper_s_spread():
    values = torch.stack([torch.cat(MultiMax().coefficients()).flatten().detach() for _ in range(500)])  # (500, 8)
    assert values.abs().max() <= 2
    # 4 standard errors: 0.02 / √4000 of the mean, 0.02 / √8000 of the deviation.
    assert values.mean().abs() < 4 * 0.02 / 4000**0.5
    assert (values.std() - 0.02).abs() < 4 * 0.02 / 8000**0.5
    correlations = torch.corrcoef(values.T) - torch.eye(8)  # no number is a copy of another
    assert correlations.abs().max() < 5 / 500**0.5


@pytest.mark.parametrize("terms", ["below,above", "above"])
@pytest.mark.parametrize("init", ["normal", "identity", "shaped"])
def test_a_module_made_without_memory_starts_like_another(init, terms):
    """As FSDP makes modules: without memory, then with any, then reset_parameters."""
    torch.manual_seed(1)
    expected = MultiMax(init=init, terms=terms)
    with torch.device("meta"):
        module = MultiMax(init=init, terms=terms)
    module.to_empty(device="cpu")
    with_parameters(module, torch.full((2, 2), 7.0), torch.full((2, 2), 7.0))
    torch.manual_seed(1)
    module.reset_parameters()
    assert all(map(torch.equal, module.parameters(), expected.parameters()))


@pytest.mark.parametrize("terms", ["below,above", "below"])
def test_a_scaled_module_is_the_same_mapping_with_other_parameters(terms):
    """They are a tenth of the numbers, and get the numbers' gradients; a state dict has the numbers."""
    plain = MultiMax(terms=terms)
    scaled = MultiMax(init="identity", terms=terms, lr_scale=10)
    scaled.load_state_dict(plain.state_dict())
    for name, number in plain.state_dict().items():
        torch.testing.assert_close(scaled.state_dict()[name], number)
        torch.testing.assert_close(scaled.get_parameter(name), number / 10)
    scores = random_scores(5, 9)
    torch.testing.assert_close(scaled(scores), plain(scores))
    expected = torch.autograd.grad(plain(scores).square().sum(), plain.parameters())
    for scaled.gradient_scale in (1.0, 0.25):  # noqa: B020
        actual = torch.autograd.grad(scaled(scores).square().sum(), scaled.parameters())
        torch.testing.assert_close(actual, tuple(scaled.gradient_scale * gradient for gradient in expected))


@pytest.mark.parametrize("order", [1, 2])
def test_shaped_is_steeper_below_and_flatter_above(order):
    x = torch.linspace(-12, 12, 481, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(MultiMax(order=order, init="shaped").modulate(x).sum(), x)
    assert slope[x < 0].min() >= 1.5 and slope[x > 2].max() <= 0.5 and slope[x > 2].min() > 0
    assert slope[(x > 0) & (x < 2)].eq(1).all()
    (one_side,) = torch.autograd.grad(MultiMax(order=order, init="shaped", terms="above").modulate(x).sum(), x)
    assert torch.equal(one_side, slope.where(x > 2, 1.0))


@pytest.mark.parametrize("function", [modulate, multimax])
@pytest.mark.parametrize(
    ("thresholds", "gains"),
    [((2, 3), (2, 3)), ((4,), (4,)), ((2, 2), (1, 2)), ((0, 2), (0, 2)), ((3, 2), (3, 2))],
)
def test_wrong_shapes_are_named(function, thresholds, gains):
    with pytest.raises(ValueError, match=r"\(order, 2\), order 1 or 2, rows \(below, above\)") as error:
        function(torch.zeros(3), torch.zeros(thresholds), torch.zeros(gains))
    assert str(thresholds) in str(error.value) and str(gains) in str(error.value)
