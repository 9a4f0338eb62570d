"""EvSoftMax: what the oracle, on scores that are exact in binary, would not find."""

import pytest
import torch
from mapping_cases import case_params, dtype_params, masked_scores

from multimax_fairseq.mappings import EvSoftmax, evsoftmax


@case_params("evsoftmax", "evsoftmax_training")
@dtype_params
@pytest.mark.parametrize("length", [3, 7, 49, 1000])
def test_equal_scores_are_all_kept(case, dtype, length):
    """0.1 is no binary number: in single precision the mean of some 0.1s is more than 0.1."""
    scores = torch.full((length,), 0.1, dtype=dtype)
    even = torch.full((length,), 1 / length, dtype=torch.float64)
    torch.testing.assert_close(case.function(scores).double(), even, **case.tolerance(dtype))


def test_module_uses_the_training_form_only_while_training():
    scores, module = masked_scores(4, 9), EvSoftmax()
    assert torch.equal(module.train()(scores), evsoftmax(scores, training=True))
    assert torch.equal(module.eval()(scores), evsoftmax(scores))
    assert not torch.equal(module.train()(scores), module.eval()(scores))
