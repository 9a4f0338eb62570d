"""multimax_fairseq/analysis/modulator.py: slopes against autograd, monotone or not against a fine grid."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from multimax_fairseq.analysis import falling_share, is_monotone, slope
from multimax_fairseq.analysis.modulator import parameters_of
from multimax_fairseq.mappings import MultiMax, modulate

NUMBERS = st.floats(-1.5, 1.5, width=32)
PARAMETERS = st.integers(1, 2).flatmap(
    lambda order: st.tuples(*[st.lists(st.tuples(NUMBERS, NUMBERS), min_size=order, max_size=order)] * 2)
)


@settings(max_examples=60, deadline=None)
@given(PARAMETERS)
def test_the_slope_is_the_derivative(parameters):
    thresholds, gains = (torch.tensor(numbers, dtype=torch.float64) for numbers in parameters)
    x = torch.linspace(-4, 4, 101, dtype=torch.float64) + 1e-3 * torch.pi  # off the thresholds
    assume((x.unsqueeze(1) - thresholds.flatten()).abs().min() > 1e-9)
    x.requires_grad_()
    (expected,) = torch.autograd.grad(modulate(x, thresholds, gains).sum(), x)
    torch.testing.assert_close(slope(x.detach(), thresholds, gains), expected)


@settings(max_examples=100, deadline=None)
@given(PARAMETERS)
def test_monotone_is_what_a_fine_grid_says(parameters):
    thresholds, gains = (torch.tensor(numbers, dtype=torch.float64) for numbers in parameters)
    low, high = -3.0, 3.0
    grid = torch.linspace(low, high, 20_001, dtype=torch.float64)
    steps = modulate(grid, thresholds, gains).diff()
    assume(steps.min().abs() > 1e-6)  # a slope of about 0 is either
    # a stretch between thresholds that is shorter than the grid's step cannot be seen on it
    assume(all(abs(a - b) > 1e-3 or a == b for a in [low, high, *thresholds.flatten()] for b in thresholds.flatten()))
    assert is_monotone(thresholds, gains, low, high) == bool((steps > 0).all())


def test_the_share_of_scores_where_sigma_falls():
    thresholds, gains = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, -1.5]])  # above 1 the slope is −1/2
    assert not is_monotone(thresholds, gains, 0.0, 2.0) and is_monotone(thresholds, gains, 0.0, 0.9)
    assert falling_share(thresholds, gains, edges=[0, 0.5, 1, 1.5, 2], counts=[1, 2, 3, 4]) == pytest.approx(0.7)


def test_a_term_that_is_not_learned_has_no_gain():
    module = MultiMax(terms=["above"])
    with torch.no_grad():
        module.gains.fill_(3.0)
    assert parameters_of(module).gains.tolist() == [[0.0, 3.0], [0.0, 3.0]]
