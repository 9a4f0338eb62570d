"""A score of −inf is not there: masking equals deleting, as the oracles that test_mappings_init compares with do."""

import pytest
import torch
from mapping_cases import INF, case_params, dtype_params, masked_scores, weighted_gradient

from multimax_fairseq.mappings import additive_mask


def delete_and_put_back(function, scores):
    """``function`` of the scores that are there, row by row; zeros elsewhere. Differentiable."""
    rows = []
    for row in scores:
        present = (row != -INF).nonzero().squeeze(1)
        zeros = torch.zeros_like(row)
        rows.append(zeros.index_put((present,), function(row[present])) if len(present) else zeros)
    return torch.stack(rows)


@case_params()
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_masking_equals_deleting_for_gradients(case, dtype, atol):
    """Nor is there NaN on the way back, which a ``masked_fill`` of the scores would hide from the caller."""
    scores = masked_scores(8, 9, dtype=dtype)
    scores[3] = -INF
    with torch.autograd.set_detect_anomaly(True, check_nan=True):
        gradient = weighted_gradient(case.function, scores)
    deleted = weighted_gradient(lambda scores: delete_and_put_back(case.function, scores), scores)
    torch.testing.assert_close(gradient, deleted, atol=atol, rtol=0)
    assert (gradient[scores == -INF] == 0).all()
    assert gradient.abs().max() > 0.01  # else the comparison would say nothing


@dtype_params
@pytest.mark.parametrize(("mask", "kinds", "expected"), [
    ([[0, 1], [1, 0]], [torch.bool, torch.uint8], [[0.0, -INF], [-INF, 0.0]]),
    ([-INF, 0.0, 2.0], [torch.float32], [-INF, 0.0, 2.0]),
    ([-1e8, 0.0, 2.0], [torch.float32], [-INF, 0.0, 2.0]),
    ([-1e4, 0.0, 2.0], [torch.float32, torch.float16, torch.bfloat16], [-INF, 0.0, 2.0]),
    ([-4096.0, -0.5], [torch.float32], [-4096.0, -0.5]),  # a steep bias is no mask
], ids=str)  # fmt: skip
def test_additive_mask_takes_every_convention_of_fairseq(mask, kinds, expected, dtype):
    for kind in kinds:
        added = additive_mask(torch.tensor(mask).to(kind), dtype)
        assert added.dtype == dtype and added.tolist() == expected


@case_params()
@dtype_params
@pytest.mark.parametrize("wrong", [float("nan"), INF])
def test_a_row_with_a_number_that_is_none_is_nan_and_others_are_as_without_it(case, dtype, wrong):
    scores = masked_scores(3, 7, dtype=dtype)
    bad = scores.clone()
    bad[1, 3] = wrong
    probabilities = case.function(bad)
    assert probabilities[1].isnan().all()
    assert torch.equal(probabilities[[0, 2]], case.function(scores)[[0, 2]])
