"""Sparsemax, 1.5-entmax and α-entmax: the solution, α fixed and learned."""

from functools import partial

import entmax as entmax_package
import pytest
import reference
import torch
from mapping_cases import CASES, DTYPES, INF, masked_scores, weighted_gradient
from test_mappings_init import POINTS
from torch.autograd import gradcheck, gradgradcheck

from multimax_fairseq.mappings import Entmax, entmax, entmax15, sparsemax


@pytest.mark.parametrize("shape", [(), (1,), (4, 1)])
def test_gradients_of_alpha_and_their_gradients(shape):
    alpha = 1.3 + 0.1 * torch.arange(4, dtype=torch.float64)[: max(1, sum(shape) - 1)].reshape(shape)
    inputs = POINTS.clone().requires_grad_(), alpha.requires_grad_()
    assert gradcheck(entmax, inputs) and gradgradcheck(entmax, inputs)


# x^(1 / (α − 1)) in fp32, so the more rounding the smaller α; 1e-5 is what the docstring states.
@pytest.mark.parametrize("form", ["number", "tensor", "module", "flag"])
@pytest.mark.parametrize("alpha", [1.01, 1.1, 1.5, 1.75, 2.0])
def test_any_alpha_agrees_with_oracle(alpha, form):
    for dtype, atol in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        scores = masked_scores(6, 40, scale=5.0, dtype=dtype).clamp(max=20)
        exact = torch.tensor(alpha, dtype=dtype).item()  # 1.1 as this dtype has it
        expected = reference.over_rows(partial(reference.entmax, alpha=exact), scores)
        if form in ("module", "flag"):
            actual = Entmax(exact if form == "module" else str(exact))(scores)
        else:
            actual = entmax(scores, exact if form == "number" else torch.tensor(exact, dtype=torch.float64))
        torch.testing.assert_close(actual.double(), expected, atol=atol, rtol=0)


@pytest.mark.parametrize("num_heads", [None, 1, 4])
def test_learned_alpha_starts_as_entmax15(num_heads):
    module = Entmax(alpha="learned", num_heads=num_heads)
    assert module.state_dict()["alpha_logits"].shape == (num_heads or 1,)
    scores = masked_scores(2, num_heads or 3, 4, 5, dtype=torch.float32)
    torch.testing.assert_close(module(scores), entmax15(scores), **CASES["entmax"].tolerance(torch.float32))


@pytest.mark.parametrize("logit", [-1e4, -20.0, 20.0, 1e4])
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_learned_alpha_stays_in_range(logit, dtype):
    module = Entmax(alpha="learned", num_heads=2)
    with torch.no_grad():
        module.alpha_logits[0] = logit
    assert ((module.alpha > 1) & (module.alpha <= 2)).all()
    scores = masked_scores(3, 2, 4, 6, scale=5.0, dtype=dtype)
    scores[0, 0, 1] = -INF
    gradient = weighted_gradient(module, scores)
    assert module(scores).isfinite().all() and gradient.isfinite().all()
    assert module.alpha_logits.grad.isfinite().all() and module.alpha_logits.grad[1] != 0


@pytest.mark.parametrize("alpha", [1, 1.0, 0.5, 2.1, -1.5, float("nan"), INF])
def test_alpha_out_of_range_is_refused(alpha):
    with pytest.raises(ValueError, match=r"\(1, 2\]"):
        entmax(torch.zeros(2), alpha)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mapping", [sparsemax, lambda x: entmax(x, 2.0)], ids=["sparsemax", "entmax"])
def test_a_score_exactly_at_the_threshold_is_outside_the_support(mapping, dtype):
    """Scores on a grid, as half precision's are, often lie there; the gradient jumps with the support."""
    for width in (8, 64, 1_000):
        scores, upstream = (torch.randn(200, width) * 16).round() / 16, torch.randn(200, width)
        results = []
        for function, kind in ((mapping, dtype), (entmax_package.sparsemax, torch.float64)):
            x = scores.to(kind).requires_grad_()
            probabilities = function(x)
            results.append((probabilities > 0, torch.autograd.grad(probabilities, x, upstream.to(kind))[0].double()))
        (support, grad), (exact_support, exact) = results
        assert torch.equal(support, exact_support)
        assert (grad - exact).norm() <= torch.finfo(dtype).eps * 2 * exact.norm()


@pytest.mark.parametrize("dim", [0, 1])
def test_an_alpha_of_each_row_of_a_matrix(dim):
    scores, alpha = torch.randn(5, 7).movedim(-1, dim), torch.linspace(1.1, 2.0, 5)[:, None].movedim(-1, dim)
    expected = torch.stack([entmax(row, float(a)) for row, a in zip(scores.movedim(dim, -1), alpha.flatten())])
    torch.testing.assert_close(entmax(scores, alpha, dim=dim), expected.movedim(-1, dim), atol=1e-5, rtol=0)
