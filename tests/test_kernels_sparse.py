"""The sparse mappings in C++ against the ``entmax`` package in float64, on random rows and on the worst there are.

``SPARSE_CASES=2000 pytest tests/test_kernels_sparse.py -k random`` takes so many random cases a mapping.
"""

import math
import os
from functools import partial

import pytest
import torch
from conftest import needs_compiler
from test_kernels_cpp import CAPABILITIES, compiled_for
from torch.autograd import gradcheck, gradgradcheck

from multimax_fairseq.kernels import sparse
from multimax_fairseq.mappings import entmax, entmax15, evsoftmax, sparsemax
from multimax_fairseq.mappings.evsoftmax import evsoftmax_formula
from multimax_fairseq.mappings.sparse import entmax15_formula, entmax_formula, sparsemax_formula

INF = float("inf")
pytestmark = needs_compiler
RANDOM_CASES = int(os.environ.get("SPARSE_CASES", 30))

# name: mapping, its formula, whether α is learned, and the error that the docstring allows
TWINS = {
    "sparsemax": (sparsemax, sparsemax_formula, False, 1e-6),
    "entmax15": (entmax15, entmax15_formula, False, 1e-6),
    "entmax at 1.5": (partial(entmax, alpha=1.5), entmax15_formula, False, 1e-5),
    "entmax, learned": (entmax, entmax_formula, True, 1e-5),
    "evsoftmax": (evsoftmax, partial(evsoftmax_formula, training=False), False, 1e-6),
    "evsoftmax, training": (
        partial(evsoftmax, training=True), partial(evsoftmax_formula, training=True), False, 1e-6
    ),
}
twins = pytest.mark.parametrize("name", TWINS)
MAPPINGS = {name: mapping for name, (mapping, _, learned, _) in TWINS.items() if not learned}
mappings = pytest.mark.parametrize("mapping", MAPPINGS.values(), ids=MAPPINGS)


@pytest.fixture(autouse=True, scope="module", params=CAPABILITIES)
def library(request, tmp_path_factory):
    """As compiled for this processor and for lesser ones, whose vectors are shorter."""
    with compiled_for(request.param, sparse, "LIBRARY", tmp_path_factory.mktemp("extensions")):
        yield


def gradients(function, inputs, upstream):
    inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    probabilities = function(*inputs)
    return [probabilities.detach(), *torch.autograd.grad(probabilities, inputs, upstream)]


def random_case(number):
    """(2, 3, rows, width) scores of any spread, in a third of the cases with absent ones; an α a head."""
    rows, width = (int(torch.randint(1, most, ())) for most in (30, 200))
    scores = torch.randn(2, 3, rows, width) * torch.empty(()).uniform_(0.05, 6)
    if number % 3 == 0:
        scores = scores.masked_fill(torch.rand_like(scores) < 0.3, -INF)
        scores[0, 0, 0] = -INF
    return scores, torch.empty(3, 1, 1).uniform_(1.01, 2)


@twins
def test_random_cases(name):
    mapping, formula, learned, atol = TWINS[name]
    for number in range(RANDOM_CASES):
        scores, alpha = random_case(number)
        upstream = torch.randn_like(scores)
        inputs = [scores, alpha] if learned else [scores]
        assert sparse.LIBRARY.serves(scores)
        actual = gradients(mapping, inputs, upstream)
        expected = gradients(formula, [tensor.double() for tensor in inputs], upstream.double())
        # the gradient of α is a sum over rows
        sizes = 1, upstream.abs().max().clamp(min=1), expected[-1].abs().max().clamp(min=1)
        for result, oracle, size in zip(actual, expected, sizes):
            torch.testing.assert_close(result.double(), oracle, atol=float(atol * size), rtol=0)
        assert ((expected[0] > 0) == (actual[0] > 0))[expected[0] > 1e-12].all()
        assert (expected[0][actual[0] > 1e-6] > 0).all()
        total = actual[0].sum(-1)
        torch.testing.assert_close(total, (scores > -INF).any(-1).float(), atol=2e-6, rtol=0)


@pytest.mark.parametrize("alpha", [1 + 1e-12, 1 + 1e-8, 1.0001, 1.001, 1.009, 1.011])
@pytest.mark.parametrize("backend", ["compiled", "eager"])
def test_alpha_near_1_is_right(alpha, backend, monkeypatch):
    """Down to softmax, which is what a float64 bisection is compared with where it has too few digits itself."""
    monkeypatch.setenv("MULTIMAX_BACKEND", backend)
    scores = 3 * torch.randn(40, 70)
    exact = scores.double().softmax(-1) if alpha < 1 + 1e-7 else entmax_formula(scores.double(), alpha)
    if backend == "eager" and alpha < 1 + 1e-7:
        pytest.skip("the package's bisection ends there")
    torch.testing.assert_close(entmax(scores, alpha).double(), exact, atol=1e-5, rtol=0)


@mappings
@pytest.mark.parametrize("width", [3, 40, 100])
def test_what_is_not_a_number_stays_so(mapping, width):
    for wrong in (math.nan, INF):
        scores = torch.randn(40, width)
        scores[1, 1], scores[2], scores[3, 0] = wrong, wrong, -INF
        probabilities = mapping(scores)
        assert probabilities[1].isnan().all() and probabilities[2].isnan().all()
        assert probabilities[[0, *range(3, 40)]].isfinite().all()
        assert gradients(mapping, [scores], torch.randn(40, width))[1][1].isnan().any()


@mappings
@pytest.mark.parametrize("width", [2, 15, 16, 17, 64, 65, 1_000])
def test_scores_of_any_size(mapping, width):
    lowest, largest = torch.finfo(torch.float32).min, torch.finfo(torch.float32).max
    scores = torch.stack([torch.full((width,), fill) for fill in (lowest, largest, -1e4, 0.1, -INF)])
    expected = torch.full((width,), 1 / width).expand(4, -1)
    torch.testing.assert_close(mapping(scores)[:4], expected, atol=1e-7, rtol=1e-5)
    assert (mapping(scores)[4] == 0).all()
    scores[:, 0] = largest
    probabilities = mapping(scores[[0, 2, 3, 4]])
    assert (probabilities == torch.eye(width)[0]).all()


@pytest.mark.parametrize("mapping", [entmax15, sparsemax, partial(entmax, alpha=1.3), partial(entmax, alpha=1.9)])
def test_rows_that_take_many_steps(mapping, monkeypatch):
    """Scores in powers of a number, more and more of them: each step of Newton's method leaves out a few."""
    for ratio in (0.25, 0.5, 0.9):
        for growth in (1.5, 2.0, 4.0):
            powers = torch.arange(40.0)
            counts = (growth**powers).clamp(max=500).long()
            scores = -torch.repeat_interleave(1 - ratio**powers, counts)[None, :20_000]
            with monkeypatch.context() as patch:
                patch.setenv("MULTIMAX_BACKEND", "eager")
                expected = mapping(scores.double())
            # of 20,000 scores at the edge of the support, all rounded the same way
            torch.testing.assert_close(mapping(scores).double(), expected, atol=3e-6, rtol=0)


@mappings
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_loses_only_what_rounding_takes(mapping, dtype):
    scores, upstream = (2 * torch.randn(2, 60, 90)).to(dtype)
    half = gradients(mapping, [scores], upstream)
    single = gradients(mapping, [scores.float()], upstream.float())
    assert half[0].dtype == half[1].dtype == dtype
    for ours, exact in zip(half, single):
        torch.testing.assert_close(ours, exact.to(dtype), atol=0, rtol=0)


def test_open_reports_of_the_package():
    """deep-spin/entmax: NaN of the bisection in fp16 (30), a loss of NaN (23)."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        scores = torch.tensor([[-1e4, 2.0, 1.0, -6e4], [6e4, 6e4, 0.0, -6e4], [0.0, 0.0, 0.0, 0.0]], dtype=dtype)
        for alpha in (1.0001, 1.01, 1.5, 2.0):
            probabilities, gradient = gradients(partial(entmax, alpha=alpha), [scores], torch.ones_like(scores))
            torch.testing.assert_close(probabilities.float().sum(-1), torch.ones(3), atol=5e-3, rtol=0)
            assert gradient.isfinite().all()


@pytest.mark.parametrize("width", [4, 80])
def test_scores_at_the_very_edge_of_the_support(width):
    """Whole numbers, as ties and masks make them: what is exactly at the threshold has a probability of exactly 0."""
    scores = torch.full((20, width), -5.0)
    scores[:, :3] = torch.tensor([0.0, -1.0, -2.0])
    for mapping, edge in ((sparsemax, 1), (entmax15, 2), (partial(entmax, alpha=1.5), 2)):
        scores[:, 1:3] = -float(edge)
        assert torch.equal(mapping(scores), torch.eye(width)[:1].expand(20, -1))


@twins
def test_rows_that_are_not_contiguous_and_other_dimensions(name):
    mapping, _, learned, _ = TWINS[name]
    scores = torch.randn(7, 12, 5)
    parameters = [torch.tensor(1.3)] if learned else []
    expected = mapping(scores.movedim(1, -1).contiguous(), *parameters).movedim(-1, 1)
    torch.testing.assert_close(mapping(scores, *parameters, dim=1), expected, atol=0, rtol=0)


def test_gradients_and_gradients_of_gradients_in_float64(monkeypatch):
    """By the formula of the backward, which is that of the compiler's kernels."""
    monkeypatch.setenv("MULTIMAX_BACKEND", "eager")
    scores = torch.tensor([[0.3, -0.2, 0.1, -9.0], [0.5, 0.1, 0.4, -INF]], dtype=torch.float64, requires_grad=True)
    parameters = {"entmax": torch.tensor([[0.3], [0.6]]), "evsoftmax": torch.tensor([[1e-6]])}
    for name in sparse.KERNELS:
        parameter = parameters.get(name, torch.ones(1, 1)).double().requires_grad_(name == "entmax")
        assert gradcheck(sparse.FusedSparse.apply, (scores, parameter, name))
        assert gradgradcheck(sparse.FusedSparse.apply, (scores, parameter, name))


def test_gradients_of_gradients_of_what_is_compiled(monkeypatch):
    scores = torch.tensor([[0.3, -0.2, 0.1, -9.0], [0.5, 0.1, 0.4, -INF]])
    for name in sparse.KERNELS:
        results = []
        for backend, x in (("compiled", scores.clone()), ("eager", scores.double())):
            monkeypatch.setenv("MULTIMAX_BACKEND", backend)
            parameter = torch.full((1, 1), 0.3, dtype=x.dtype)
            probabilities = sparse.FusedSparse.apply(x.requires_grad_(), parameter, name)
            (first,) = torch.autograd.grad(probabilities.pow(2).sum(), x, create_graph=True)
            results.append(torch.autograd.grad(first.pow(2).sum(), x)[0])
        torch.testing.assert_close(results[0].double(), results[1], atol=1e-5, rtol=1e-5)


def test_under_functorch_the_formula_serves():
    scores = torch.randn(3, 4, 5)
    torch.testing.assert_close(torch.vmap(evsoftmax)(scores), evsoftmax(scores), atol=1e-6, rtol=0)


def test_the_compilers_kernels_are_the_formulas():
    """In float64 on a CPU; on a GPU they serve every dtype."""
    scores = torch.randn(3, 50, dtype=torch.float64) * torch.tensor([[0.3], [1.0], [4.0]])
    scores[0, 3] = -INF
    alpha = torch.tensor([[1.1], [1.4], [1.9]], dtype=torch.float64)
    kernel = sparse.KERNELS["entmax"].forward
    assert kernel.compiles(scores)
    torch.testing.assert_close(entmax(scores, alpha), entmax_formula(scores, alpha), atol=1e-12, rtol=0)


def test_a_score_at_the_very_threshold():
    """A score of probability 0 whose part of the sum is 0 at the root itself, and not only below it."""
    alpha, rows = 1.5372, torch.randn(200, 20) * torch.logspace(-2, 1, 200)[:, None]
    rows -= rows.amax(-1, keepdim=True)
    c, low, high = alpha - 1, torch.zeros(200, 1).double(), torch.ones(200, 1).double()
    for _ in range(60):
        t = (low + high) / 2
        total = (t + c * rows.double()).clamp(min=0).pow(1 / c).sum(-1, keepdim=True)
        low, high = torch.where(total < 1, t, low), torch.where(total < 1, high, t)
    nearby = 1 + torch.arange(-20, 21) * 2.0**-24
    at_threshold = ((-t / c).float() * nearby).reshape(-1, 1)  # (200 · 41, 1)
    scores = torch.cat([rows.repeat_interleave(41, 0), at_threshold], 1)[torch.randperm(200 * 41)]
    probabilities = entmax(scores, torch.tensor(alpha))
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(len(scores)))
