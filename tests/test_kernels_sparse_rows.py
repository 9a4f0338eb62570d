"""The compiler's sparse kernels, as plain torch: the functions that it fuses are right at every size of α and row."""

import pytest
import torch

from multimax_fairseq.kernels import sparse_rows
from multimax_fairseq.mappings.evsoftmax import evsoftmax_formula
from multimax_fairseq.mappings.sparse import entmax15_formula, entmax_formula, sparsemax_formula


@pytest.mark.parametrize("width", [1, 2, 50, 1_000])
@pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_probabilities_are_the_packages(width, dtype, atol):
    scores = torch.randn(40, width, dtype=dtype) * torch.linspace(0.1, 6, 40, dtype=dtype)[:, None]
    scores[0] = float("-inf")
    c = torch.linspace(0.02, 1, 40, dtype=dtype)[:, None]
    wide = scores.double()
    for actual, expected in (
        (sparse_rows.sparsemax_rows.eager(scores), sparsemax_formula(wide)),
        (sparse_rows.entmax15_rows.eager(scores), entmax15_formula(wide)),
        (sparse_rows.entmax_rows.eager(scores, c), entmax_formula(wide, 1 + c.double())),
        (sparse_rows.evsoftmax_rows.eager(scores, torch.zeros_like(c)), evsoftmax_formula(wide, False)),
        (sparse_rows.evsoftmax_rows.eager(scores, torch.full_like(c, 1e-6)), evsoftmax_formula(wide, True)),
    ):
        torch.testing.assert_close(actual.double(), expected, atol=atol, rtol=0)


def test_what_is_not_a_number_stays_so():
    scores = torch.tensor([[float("nan"), 0.0, float("-inf")], [float("inf"), 0.0, 1.0]])
    c = torch.full((2, 1), 0.3)
    for kernel in (sparse_rows.sparsemax_rows, sparse_rows.entmax15_rows):
        assert kernel.eager(scores).isnan().any(-1).all()
    assert sparse_rows.entmax_rows.eager(scores, c).isnan().any(-1).all()


def test_the_gradient_of_alpha_near_softmax():
    """½ (Σ p l² − l²) p at α = 1, l = log p: no difference of the size of c² loses its digits."""
    p, grad = torch.randn(5, 40).softmax(-1), torch.randn(5, 40)
    logs = p.double().log()
    limit = 0.5 * p * ((p * logs**2).sum(-1, keepdim=True) - logs**2)
    actual = sparse_rows.entmax_rows_backward_of_c.eager(p, grad, torch.full((5, 1), 1e-6))
    torch.testing.assert_close(actual.double(), (grad * limit).sum(-1, keepdim=True), atol=2e-5, rtol=1e-5)
