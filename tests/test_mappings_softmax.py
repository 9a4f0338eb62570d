"""Softmax: torch's own, except on rows without scores."""

import torch
from mapping_cases import CASES, INF, dtype_params, masked_scores, random_scores, weighted_gradient
from torch.autograd import gradcheck, gradgradcheck

from multimax_fairseq.mappings import Softmax, softmax


@dtype_params
def test_equals_torch_where_rows_have_scores(dtype):
    scores = masked_scores(5, 9, scale=3.0, dtype=dtype)
    expected = torch.softmax(scores.to(torch.promote_types(dtype, torch.float32)), -1).to(dtype)
    assert torch.equal(softmax(scores), expected)
    assert torch.equal(Softmax()(scores), softmax(scores))


def test_gradient_equals_torch_where_rows_have_scores():
    scores = masked_scores(5, 9, scale=3.0)
    expected = weighted_gradient(lambda scores: torch.softmax(scores, -1), scores)
    torch.testing.assert_close(weighted_gradient(softmax, scores), expected, atol=1e-15, rtol=0)


def test_shift_of_a_row_changes_nothing():
    scores = random_scores(3, 5)
    tolerance = CASES["softmax"].tolerance(scores.dtype)
    torch.testing.assert_close(softmax(scores + 7.0), softmax(scores), **tolerance)


def test_is_twice_differentiable_with_masked_entries_and_empty_rows():
    scores = masked_scores(3, 4)
    scores[1] = -INF
    scores.requires_grad_()
    assert gradcheck(softmax, scores)
    assert gradgradcheck(softmax, scores)
