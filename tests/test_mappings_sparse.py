"""Sparsemax, 1.5-entmax and α-entmax: the solution, α fixed and learned."""

from functools import partial

import entmax as entmax_package
import pytest
import reference
import torch
from conftest import needs_compiler
from mapping_cases import (
    ALPHA,
    CASES,
    DTYPES,
    INF,
    case_params,
    masked_scores,
    random_scores,
    weighted_gradient,
)
from torch.autograd import gradcheck

from multimax_fairseq.mappings import Entmax, build_mapping, entmax, entmax15, sparsemax

SPARSE = case_params("sparsemax", "entmax15", "entmax")


def test_oracles_agree_where_they_meet():
    """Two independent ways to sparsemax: its closed form, and 2-entmax by bisection."""
    scores = masked_scores(20, 9, scale=1.5)
    closed_form = reference.over_rows(reference.sparsemax, scores)
    bisection = reference.over_rows(partial(reference.entmax, alpha=2.0), scores)
    torch.testing.assert_close(closed_form, bisection, atol=1e-14, rtol=0)


# By hand: (0.5, 0, −1) less τ = −0.25; (1.5, 0.5, 0) less τ = 0.5, where the support ends.
@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([0.5, 0.0, -1.0], [0.75, 0.25, 0.0]),
        ([1.5, 0.5, 0.0], [1.0, 0.0, 0.0]),
        ([2.0, -INF, 2.0], [0.5, 0.0, 0.5]),
    ],
)
def test_sparsemax_by_hand(scores, expected):
    assert sparsemax(torch.tensor(scores)).tolist() == expected


@SPARSE
def test_shift_of_a_row_changes_nothing(case):
    scores = masked_scores(4, 6)
    torch.testing.assert_close(case.function(scores + 3), case.function(scores), atol=1e-13, rtol=0)


@SPARSE
def test_some_scores_get_nothing(case):
    probabilities = case.function(random_scores(20, 30, scale=5.0))
    assert (probabilities == 0).float().mean() > 0.5
    assert ((probabilities > 0).sum(-1) > 1).any()


def points_for_gradients():
    """Rows with several scores in the support and some out of it, none near its edge; one row is empty."""
    scores = [
        [0.3, -0.2, -INF, 0.1, -9.0],
        [-INF] * 5,
        [0.5, 0.1, 0.4, -INF, -INF],
        [-INF, 2.0, -8.0, -7.0, -INF],
    ]
    return torch.tensor(scores, dtype=torch.float64, requires_grad=True)


@SPARSE
def test_gradients(case):
    scores = points_for_gradients()
    assert (case.function(scores)[0] > 0).tolist() == [True, True, False, True, False]
    assert gradcheck(case.function, scores)
    assert gradcheck(partial(case.function, dim=-2), scores.detach().T.contiguous().requires_grad_())


@pytest.mark.parametrize("shape", [(), (1,), (4, 1)])
def test_gradients_of_alpha(shape):
    alpha = 1.3 + 0.1 * torch.arange(4, dtype=torch.float64)[: max(1, sum(shape) - 1)].reshape(shape)
    assert gradcheck(entmax, (points_for_gradients(), alpha.requires_grad_()))


def test_gradient_of_alpha_is_masking_equals_deleting():
    scores = random_scores(3, 5)
    padding = torch.full((3, 2), -INF, dtype=scores.dtype)
    padded = torch.cat([torch.cat([scores, padding], dim=1), torch.full((1, 7), -INF, dtype=scores.dtype)])

    def gradient(scores):
        alpha = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
        entmax(scores, alpha)[:3, 0].sum().backward()
        return alpha.grad

    assert gradient(scores).abs() > 1e-3
    torch.testing.assert_close(gradient(padded), gradient(scores), atol=1e-12, rtol=0)


@pytest.mark.parametrize("form", [float, torch.tensor])
def test_alpha_has_the_special_cases(form):
    scores = masked_scores(6, 9)
    torch.testing.assert_close(entmax(scores, form(2.0)), sparsemax(scores), atol=1e-13, rtol=0)
    torch.testing.assert_close(entmax(scores, form(1.5)), entmax15(scores), atol=1e-13, rtol=0)
    difference = (entmax(scores, form(1.01)) - CASES["softmax"].function(scores)).abs().max()
    assert difference < 0.01


# x^(1 / (α − 1)) in fp32, so the more rounding the smaller α; 1e-5 is what the docstring states.
@pytest.mark.parametrize("alpha", [1.01, 1.1, 1.75, 2.0])
def test_any_alpha_agrees_with_oracle(alpha):
    for dtype, atol in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        scores = masked_scores(6, 40, scale=5.0, dtype=dtype).clamp(max=20)
        exact = torch.tensor(alpha, dtype=dtype).item()  # 1.1 as this dtype has it
        expected = reference.over_rows(partial(reference.entmax, alpha=exact), scores)
        torch.testing.assert_close(entmax(scores, alpha).double(), expected, atol=atol, rtol=0)


def test_module_with_fixed_alpha_is_the_function():
    for dtype in DTYPES:
        scores = masked_scores(2, 3, 4, 5, dtype=dtype)
        assert torch.equal(Entmax(alpha=ALPHA)(scores), entmax(scores, ALPHA))
    assert torch.equal(Entmax()(scores), entmax(scores, 1.5))
    assert torch.equal(Entmax(alpha="1.25")(scores), entmax(scores, ALPHA))  # as a flag has it
    assert not Entmax(alpha=ALPHA).state_dict()


@pytest.mark.parametrize("num_heads", [None, 1, 4])
def test_learned_alpha_starts_as_entmax15(num_heads):
    module = Entmax(alpha="learned", num_heads=num_heads)
    assert {name: tuple(value.shape) for name, value in module.state_dict().items()} == {
        "alpha_logits": (num_heads or 1,)
    }
    scores = masked_scores(2, num_heads or 3, 4, 5, dtype=torch.float32)
    torch.testing.assert_close(module(scores), entmax15(scores), **CASES["entmax"].tolerance(torch.float32))


def test_each_head_has_its_own_learned_alpha():
    module = Entmax(alpha="learned", num_heads=4)
    with torch.no_grad():
        module.alpha_logits.copy_(torch.tensor([-2.0, -0.5, 0.5, 2.0]))
    scores = masked_scores(2, 4, 3, 5)  # (bsz, heads, tgt_len, src_len)
    probabilities = module(scores)
    for head, alpha in enumerate(module.alpha.tolist()):
        torch.testing.assert_close(probabilities[:, head], entmax(scores[:, head], alpha), atol=1e-13, rtol=0)
    (probabilities[..., 0] * random_scores(2, 4, 3)).sum().backward()
    assert module.alpha_logits.grad.all()
    assert module.alpha_logits.grad.unique().numel() == 4


def test_alpha_broadcasts_in_another_dimension():
    scores, alpha = random_scores(2, 5, 3), torch.tensor([1.2, 1.5, 1.9], dtype=torch.float64)
    probabilities = entmax(scores, alpha.view(1, 3), dim=1)
    for column in range(3):
        expected = entmax(scores[..., column], alpha[column].item())
        torch.testing.assert_close(probabilities[..., column], expected, atol=1e-13, rtol=0)


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
    assert module(scores).isfinite().all()
    assert gradient.isfinite().all()
    assert module.alpha_logits.grad.isfinite().all()
    assert module.alpha_logits.grad[1] != 0


@pytest.mark.parametrize("alpha", [1, 1.0, 0.5, 2.1, -1.5, float("nan"), float("inf")])
def test_alpha_out_of_range_is_refused(alpha):
    for make in (
        Entmax,
        lambda alpha: build_mapping("entmax", alpha=alpha),
        lambda a: entmax(torch.zeros(2), a),
    ):
        with pytest.raises(ValueError, match=r"\(1, 2\]"):
            make(alpha)


@pytest.mark.parametrize("alpha", ["x", "", None, "2.5", "1_5e-1"])
def test_alpha_that_is_no_number_is_refused(alpha):
    with pytest.raises(ValueError, match=r"\(1, 2\] or 'learned'") as error:
        Entmax(alpha=alpha)
    assert repr(alpha) in str(error.value)


@pytest.mark.parametrize("backend", ["eager", pytest.param("compiled", marks=needs_compiler)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mapping", [sparsemax, lambda x: entmax(x, 2.0)], ids=["sparsemax", "entmax"])
def test_a_score_exactly_at_the_threshold_is_outside_the_support(mapping, dtype, backend, monkeypatch):
    """Scores on a grid, as half precision's are, often lie there; the gradient jumps with the support."""
    monkeypatch.setenv("MULTIMAX_BACKEND", backend)
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
