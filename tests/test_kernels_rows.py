"""Rows by C++ and by their formulas: against float64, on random rows and on the worst there are.

``ROWS_CASES=2000 pytest tests/test_kernels_rows.py -k random`` takes so many random cases a mapping.
"""

import math
import os
from functools import partial

import entmax as package
import pytest
import torch
from conftest import needs_compiler

from multimax_fairseq.kernels.rows import rows_of
from multimax_fairseq.mappings import MAPPINGS as NAMES
from multimax_fairseq.mappings import build_mapping, entmax, entmax15, evsoftmax, sparsemax
from multimax_fairseq.mappings.exponential import TRAINING_EPSILON, evsoftmax_formula
from multimax_fairseq.mappings.modulator import modulate, modulate_formula, multimax, multimax_formula
from multimax_fairseq.mappings.sparse import entmax15_formula, entmax_formula, sparsemax_formula

INF, NAN = math.inf, math.nan
CASES = int(os.environ.get("ROWS_CASES", 30))
EXTREME_ROWS = int(os.environ.get("MULTIMAX_EXTREME_ROWS", "600"))  # more of them, for who has the time

# name: mapping, its formula, whether α is learned, and the error that the docstring allows
TWINS = {
    "sparsemax": (sparsemax, sparsemax_formula, False, 1e-6),
    "entmax15": (entmax15, entmax15_formula, False, 1e-6),
    "entmax at 1.3": (partial(entmax, alpha=1.3), partial(entmax_formula, c=0.3), False, 1e-5),
    "entmax, learned": (entmax, lambda scores, alpha: entmax_formula(scores, alpha - 1), True, 1e-5),
    "evsoftmax": (evsoftmax, partial(evsoftmax_formula, epsilon=0.0), False, 1e-6),
    "evsoftmax, training": (
        partial(evsoftmax, training=True), partial(evsoftmax_formula, epsilon=TRAINING_EPSILON), False, 1e-6
    ),
}
twins = pytest.mark.parametrize("name", TWINS)
MAPPINGS = {name: mapping for name, (mapping, _, learned, _) in TWINS.items() if not learned}
mappings = pytest.mark.parametrize("mapping", MAPPINGS.values(), ids=MAPPINGS)


@pytest.fixture(params=["eager", pytest.param("compiled", marks=needs_compiler)], autouse=True)
def backend(request, monkeypatch):
    """The formula, and C++."""
    monkeypatch.setenv("MULTIMAX_BACKEND", request.param)
    return request.param


def gradients(function, inputs, upstream):
    inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    probabilities = function(*inputs)
    return [probabilities.detach(), *torch.autograd.grad(probabilities, inputs, upstream)]


# ---------------------------------------------------------------- who computes


def test_a_mapping_says_which_row_function_computes_it(backend):
    for name in NAMES:
        mapping, scores = build_mapping(name), torch.randn(3, 5)
        rows = rows_of(mapping)
        assert rows.name == name or (name, rows.name) == ("entmax", "entmax15")  # α = 1.5
        torch.testing.assert_close(mapping(scores), rows.formula(scores, *rows.numbers), atol=1e-6, rtol=1e-6)
        made = type(mapping(scores.requires_grad_()).grad_fn).__name__
        assert (made == "_RowsBackward") == (backend == "compiled")


def test_a_mapping_with_a_forward_of_its_own_or_with_hooks_has_to_be_called():
    class Other(NAMES["multimax"]):
        def forward(self, scores):
            return super().forward(2 * scores)

    class Third(Other):
        pass

    assert rows_of(Other()) is None and rows_of(Third()) is None and rows_of(torch.nn.Softmax(-1)) is None
    for register in ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"):
        mapping = build_mapping("sparsemax")
        getattr(mapping, register)(lambda *_: None)
        assert rows_of(mapping) is None


# ---------------------------------------------------------------- sparse mappings


def random_case(number):
    """(2, 3, rows, width) scores of any spread, in a third of the cases with absent ones; an α a head."""
    rows, width = (int(torch.randint(1, most, ())) for most in (30, 200))
    scores = torch.randn(2, 3, rows, width) * torch.empty(()).uniform_(0.05, 6)
    if number % 3 == 0:
        scores = scores.masked_fill(torch.rand_like(scores) < 0.3, -INF)
        scores[0, 0, 0] = -INF
    return scores, torch.empty(3, 1, 1).uniform_(1.01, 2)


def package_rows(name, scores, *alpha):
    """What the package ``entmax`` makes of scores in float64, absent ones included; the formula of others."""
    if name.startswith("evsoftmax"):
        return TWINS[name][1](scores)
    empty = (scores == -INF).all(-1, keepdim=True)
    x = scores.masked_fill(empty, 0.0)
    if name.startswith("entmax a") or alpha:
        number = alpha[0].expand(*x.shape[:-1], 1) if alpha else 1.3
        return package.entmax_bisect(x, number, n_iter=60).masked_fill(empty, 0.0)
    return getattr(package, name)(x, dim=-1).masked_fill(empty, 0.0)


@twins
def test_random_cases(name):
    mapping, _, learned, atol = TWINS[name]
    for number in range(CASES):
        scores, alpha = random_case(number)
        upstream = torch.randn_like(scores)
        inputs = [scores, alpha] if learned else [scores]
        actual = gradients(mapping, inputs, upstream)
        expected = gradients(partial(package_rows, name), [tensor.double() for tensor in inputs], upstream.double())
        # the gradient of α is a sum over rows
        sizes = 1, upstream.abs().max().clamp(min=1), expected[-1].abs().max().clamp(min=1)
        for result, oracle, size in zip(actual, expected, sizes):
            torch.testing.assert_close(result.double(), oracle, atol=float(atol * size), rtol=0)
        assert ((expected[0] > 0) == (actual[0] > 0))[expected[0] > 1e-12].all()
        assert (expected[0][actual[0] > 1e-6] > 0).all()
        total = actual[0].sum(-1)
        torch.testing.assert_close(total, (scores > -INF).any(-1).float(), atol=2e-6, rtol=0)


@pytest.mark.parametrize("alpha", [1 + 1e-12, 1 + 1e-8, 1.0001, 1.001, 1.009, 1.011])
def test_alpha_near_1_is_right(alpha):
    """Down to softmax, which is what a float64 bisection is compared with where it has too few digits itself."""
    scores = 3 * torch.randn(40, 70)
    is_softmax = alpha < 1 + 1e-7
    exact = scores.double().softmax(-1) if is_softmax else package.entmax_bisect(scores.double(), alpha, n_iter=60)
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


@pytest.mark.parametrize("alpha", [1.3, 1.5, 1.9, 2.0])
def test_rows_that_take_many_steps(alpha):
    """Scores in powers of a number, more and more of them: each step of Newton's method leaves out a few."""
    for ratio in (0.25, 0.5, 0.9):
        for growth in (1.5, 2.0, 4.0):
            powers = torch.arange(40.0)
            counts = (growth**powers).clamp(max=500).long()
            scores = -torch.repeat_interleave(1 - ratio**powers, counts)[None, :20_000]
            expected = package.entmax_bisect(scores.double(), alpha, n_iter=60)
            # of 20,000 scores at the edge of the support, all rounded the same way
            torch.testing.assert_close(entmax(scores, alpha).double(), expected, atol=3e-6, rtol=0)


@pytest.mark.parametrize("mapping", [*MAPPINGS.values(), multimax], ids=[*MAPPINGS, "multimax"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_loses_only_what_rounding_takes(mapping, dtype):
    scores, upstream = (2 * torch.randn(2, 60, 90)).to(dtype)
    if dtype == torch.float16 and mapping is MAPPINGS["evsoftmax, training"]:
        pytest.skip("probabilities are raised to the smallest normal number")
    inputs = [scores, *(torch.randn(2, 2, 2) / 4).to(dtype)] if mapping is multimax else [scores]
    half = gradients(mapping, inputs, upstream)
    single = gradients(mapping, [tensor.float() for tensor in inputs], upstream.float())
    torch.testing.assert_close(half, [exact.to(dtype) for exact in single], atol=0, rtol=0)


@twins
def test_rows_that_are_not_contiguous_and_other_dimensions(name):
    mapping, _, learned, _ = TWINS[name]
    scores = torch.randn(7, 12, 5)
    parameters = [torch.tensor(1.3)] if learned else []
    expected = mapping(scores.movedim(1, -1).contiguous(), *parameters).movedim(-1, 1)
    torch.testing.assert_close(mapping(scores, *parameters, dim=1), expected, atol=0, rtol=0)


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


def test_evsoftmax_in_training_has_finite_logarithms_and_gradients_in_half_precision():
    """ε of a probability is below the smallest fp16 number; the gradient is that of a softmax."""
    for dtype, least in ((torch.float16, 2.0**-14), (torch.bfloat16, 0.0)):
        scores = torch.tensor([[3.0, 1.0, -5.0, -60_000.0, 0.5]], dtype=dtype, requires_grad=True)
        probabilities = evsoftmax(scores, training=True)
        assert probabilities[0, [0, 1, 2, 4]].log().isfinite().all() and probabilities.min() >= 0.99 * least
        (grad,) = torch.autograd.grad(-probabilities[0, 2].log(), scores)
        expected = probabilities.detach() - torch.eye(5)[2].to(dtype)
        torch.testing.assert_close(grad, expected, atol=2e-2, rtol=2e-2)
    row = evsoftmax(torch.tensor([[3.0, 2.0, -60_000.0]], dtype=torch.float16), training=True)
    assert row.log().isfinite().all()


# ---------------------------------------------------------------- MultiMax


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("shape", [(7,), (5, 7), (3, 2, 4, 7), (4, 1)])
@pytest.mark.parametrize("name", ["multimax", "modulate"])
def test_values_gradients_and_their_gradients_are_the_formulas(name, shape, order):
    """σ alone, as on a vocabulary, is compiled by PyTorch."""
    twins = {"multimax": (multimax, multimax_formula), "modulate": (modulate, modulate_formula)}
    scores = (2 * torch.randn(shape)).masked_fill(torch.rand(shape) < 0.2, -INF)
    results = []
    for function, dtype in zip(twins[name], (torch.float32, torch.float64)):
        torch.manual_seed(1)
        inputs = [tensor.to(dtype).requires_grad_() for tensor in (scores, *torch.randn(2, order, 2) / 2)]
        output = function(*inputs).masked_fill(scores == -INF, 0.0)
        first = torch.autograd.grad(output.square().sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(grad.square().sum() for grad in first), inputs, allow_unused=True)
        results.append([output, *first, *(torch.zeros_like(i) if g is None else g for i, g in zip(inputs, second))])
    for found, expected in zip(*results):
        size = expected.abs().max().clamp(min=1)
        torch.testing.assert_close(found.double() / size, expected / size, atol=3e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(0, 7), (3, 0)])
@pytest.mark.parametrize("name", NAMES)
def test_nothing_gives_nothing(name, shape):
    mapping = build_mapping(name)
    mapping(torch.zeros(shape, requires_grad=True)).sum().backward()
    assert mapping(torch.zeros(shape)).shape == shape
    assert all(parameter.grad.eq(0).all() for parameter in mapping.parameters())


def test_who_compiles_a_vocabulary_sees_one_graph():
    scores, numbers = torch.randn(4, 5), torch.randn(2, 2)
    compiled = torch.compile(modulate, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(scores, numbers, numbers), modulate_formula(scores, numbers, numbers))


@needs_compiler
def test_what_is_kept_for_the_backward_is_scores_and_probabilities(monkeypatch):
    monkeypatch.setenv("MULTIMAX_BACKEND", "compiled")
    scores, kept = torch.randn(64, 50, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda _: _):
        multimax(scores, torch.zeros(2, 2), torch.zeros(2, 2))
    assert sum(tensor.numel() >= 64 * 50 for tensor in kept) == 2


# ---------------------------------------------------------------- scores of any size, and no numbers

LOWEST = torch.finfo(torch.float32).min
EXTREMES = torch.tensor([NAN, INF, -INF, -INF, -INF, LOWEST, -LOWEST, 1e30, -1e30, 1e17, -1e17])


def extreme_case(seed):
    """30 rows of scores, some of them extreme, in half of the rows none of the kind that makes NaN; parameters.

    Gains stay within ±1: beyond, σ of the largest numbers overflows or not by whether a product is rounded before
    the sum. Some are 0, of which the square of a large score must not make NaN.
    """
    generator = torch.Generator().manual_seed(seed)
    width, order = (2, 3, 16, 33, 100)[seed % 5], 1 + seed // 5 % 2
    scores = 2 * torch.randn(30, width, generator=generator)
    chosen = EXTREMES[torch.randint(len(EXTREMES), scores.shape, generator=generator)]
    chosen[::2] = chosen[::2].nan_to_num(-INF, -INF, -INF)
    often = torch.tensor([0.05, 0.3, 1.0])[torch.randint(3, (30, 1), generator=generator)]
    scores = torch.where(torch.rand(scores.shape, generator=generator) < often, chosen, scores)
    thresholds, gains = torch.randn(2, order, 2, generator=generator).mul_(torch.tensor([[[1.0]], [[0.3]]]))
    gains.clamp_(-0.9, 0.9).mul_(torch.rand(order, 2, generator=generator) < (0.0, 0.5, 1.0)[seed % 3])
    return scores, thresholds, gains, torch.randn(scores.shape, generator=generator)


def with_gradients(function, scores, thresholds, gains, upstream):
    """Probabilities, and the gradients of what hangs on the rows in which they are numbers."""
    inputs = [tensor.clone().requires_grad_() for tensor in (scores, thresholds, gains)]
    probabilities = function(*inputs)
    kept = ~probabilities.detach().isnan().any(-1)
    inputs[0] = scores[kept].requires_grad_()
    return probabilities.detach(), *torch.autograd.grad((function(*inputs) * upstream[kept]).sum(), inputs)


def test_extreme_scores_are_the_same_to_every_backend(backend):
    for seed in range(EXTREME_ROWS // 30):
        case = extreme_case(seed)
        probabilities, *grads = with_gradients(multimax, *case)
        expected, expected_grad, *_ = with_gradients(multimax_formula, *case)
        torch.testing.assert_close(probabilities, expected, atol=1e-5, rtol=0, equal_nan=True)
        # what is rounded in ∂L/∂σ, some 1e-7, comes back times the slope
        slope = 1 + 4 * case[0][~probabilities.isnan().any(-1)].nan_to_num(0, 0, 0).abs()
        errors = (grads[0] - expected_grad).abs()
        assert torch.equal(grads[0].isnan(), expected_grad.isnan())
        assert (errors <= 1e-4 * slope + 1e-4 * expected_grad.abs()).logical_or(errors.isnan()).all()


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("size", [1e10, 1e17, 1e19, 1e30, 1e38])
def test_gradients_of_huge_scores_are_the_formulas(size, order, backend):
    """Rows with a huge score, whose probability is 0 or 1: ∂L/∂σ is 0 there, and its square may overflow."""
    scores = torch.tensor([[-size, 1.0, -1.0, 0.5], [0.5, -INF, size / 9, 0.0], [size, 0.5, -size, -INF]])
    case = scores, torch.zeros(order, 2), torch.tensor([[0.3, -0.2], [-0.1, 0.0]])[:order], torch.randn(3, 4)
    found, expected = with_gradients(multimax, *case), with_gradients(multimax_formula, *(t.double() for t in case))
    for ours, exact in zip(found, expected):
        torch.testing.assert_close(ours, exact.float(), atol=1e-5, rtol=1e-4)
    if size < 1e30:  # two that share the probability have the slope of their place; here the square holds
        case = torch.tensor([[-size, -size, -INF]]), *case[1:3], torch.tensor([[1.0, -1.0, 2.0]])
        (_, found, *_), (_, exact, *_) = (
            with_gradients(function, *(tensor.to(dtype) for tensor in case))
            for function, dtype in ((multimax, torch.float32), (multimax_formula, torch.float64))
        )
        torch.testing.assert_close(found, exact.float(), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([1.0, 2.0, LOWEST], [1 / (1 + torch.e), torch.e / (1 + torch.e), 0.0]),
        ([1.0, 1.0, -1e20], [0.5, 0.5, 0.0]),
        ([LOWEST, -INF, LOWEST], [0.5, 0.0, 0.5]),
        ([1e30, 0.0, 1e30], [0.5, 0.0, 0.5]),
        ([LOWEST] * 3, [1 / 3] * 3),
        ([-INF] * 3, [0.0] * 3),
        ([NAN, 1.0, -INF], [NAN] * 3),
        ([NAN, -INF, -INF], [NAN] * 3),
        ([INF, 1.0, -INF], [NAN] * 3),
    ],
)
@pytest.mark.parametrize("order", [1, 2])
def test_gains_of_zero_are_softmax_of_scores_of_any_size(scores, expected, order, backend):
    zeros, scores = torch.zeros(order, 2), torch.tensor([scores, scores])
    for function in (multimax, multimax_formula):
        probabilities, *grads = with_gradients(function, scores, zeros, zeros, torch.ones(scores.shape))
        torch.testing.assert_close(probabilities, torch.tensor([expected] * 2), equal_nan=True)
        assert grads[0].isfinite().all()
    torch.testing.assert_close(
        modulate(scores, zeros, zeros), torch.where(scores == INF, NAN, scores), equal_nan=True, atol=0, rtol=0
    )


@pytest.mark.parametrize(("gain", "expected"), [(0.5, NAN), (-0.5, 0.0)])
def test_a_row_is_empty_by_its_scores_and_not_by_its_sigma(gain, expected, backend):
    """−1e30 is there; where g_b,2 makes +inf of it, or −inf of all, softmax has no answer."""
    gains = torch.tensor([[0.0, 0.0], [gain, 0.0]])
    scores = torch.tensor([[-1e30, 1.0, -INF], [-1e30, -1e30, -INF]])
    for function in (multimax, multimax_formula):
        probabilities = function(scores, torch.zeros(2, 2), gains)
        torch.testing.assert_close(probabilities[0, 0].item(), expected, equal_nan=True)
        assert probabilities[1].isnan().all()


@pytest.mark.parametrize("which", [0, 1])
def test_parameters_that_are_no_numbers_are_not_hidden(which, backend):
    for place in range(4):
        parameters = torch.zeros(2, 2, 2)
        parameters[which].view(-1)[place] = NAN
        assert multimax(torch.randn(3, 20), *parameters).isnan().all()
