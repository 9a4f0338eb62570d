"""Rows in C++: digits, ties, threads and layouts, as compiled for this processor and for lesser ones.

Every mapping against float64 oracles is in test_kernels_rows.py.
"""

import math
from contextlib import contextmanager

import entmax as package
import pytest
import torch
from conftest import needs_compiler

from multimax_fairseq.kernels import cpp
from multimax_fairseq.kernels.rows import Rows, cpu
from multimax_fairseq.mappings.exponential import evsoftmax_formula
from multimax_fairseq.mappings.modulator import multimax_formula
from multimax_fairseq.mappings.sparse import entmax_formula

INF = math.inf
pytestmark = needs_compiler
CAPABILITIES = ["DEFAULT", "AVX2", "AVX512"]  # each includes those before it
HEADS = 3
ORACLES = {
    "softmax": lambda x: x.softmax(-1),
    "multimax": multimax_formula,
    "sparsemax": lambda x: package.sparsemax(x, -1),
    "entmax15": lambda x: package.entmax15(x, -1),
    "entmax": lambda x, c: package.entmax_bisect(x, 1 + c, n_iter=60),
    "evsoftmax": lambda x, epsilon: evsoftmax_formula(x, epsilon.detach()),
}
names = pytest.mark.parametrize("name", ORACLES)


@contextmanager
def compiled_for(capability, module, folder):
    """A module's library as compiled for processors with vectors of this length, if this one has them."""
    best = torch.backends.cpu.get_cpu_capability()
    if best not in CAPABILITIES or CAPABILITIES.index(best) < CAPABILITIES.index(capability):
        pytest.skip(f"this processor has {best}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(folder))
        patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        library = cpp.Library(module.LIBRARY.source, module.LIBRARY.signatures)
        assert library.functions is not None
        patch.setattr(module, "LIBRARY", library)
        yield


@pytest.fixture(autouse=True, scope="module", params=CAPABILITIES)
def library(request, tmp_path_factory):
    with compiled_for(request.param, cpu, tmp_path_factory.mktemp("extensions")):
        yield


def rows_of(name, order=2):
    numbers = {
        "multimax": lambda: (0.5 * torch.randn(order, 2), 0.1 * torch.randn(order, 2)),
        "entmax": lambda: (torch.empty(HEADS, 1, 1).uniform_(0.05, 1),),
        "evsoftmax": lambda: (torch.tensor(1e-6),),
    }
    return Rows(name, numbers.get(name, tuple)())


def forward(rows, scores):
    return cpu.forward(cpu.Numbers(rows, scores.shape), scores)


def results(rows, scores, grad):
    numbers = cpu.Numbers(rows, scores.shape)
    probabilities = cpu.forward(numbers, scores)
    return [probabilities, *(g for g in cpu.backward(numbers, scores, probabilities, grad) if g is not None)]


def exact(rows, scores, grad):
    inputs = [tensor.double().requires_grad_() for tensor in (scores, *rows.numbers)]
    probabilities = ORACLES[rows.name](*inputs)
    wanted = inputs[:1] if rows.name == "evsoftmax" else inputs
    return [probabilities, *torch.autograd.grad(probabilities, wanted, grad.double())]


@names
@pytest.mark.parametrize("width", [1, 2, 15, 16, 17, 31, 33, 64, 65, 160, 5_000])
def test_probabilities_and_gradients_are_those_of_double_precision(name, width):
    scores, grad = (torch.randn(2, HEADS, 19, width) for _ in range(2))
    for order in (1, 2) if name == "multimax" else (2,):
        rows = rows_of(name, order)
        for found, expected in zip(results(rows, scores, grad), exact(rows, scores, grad), strict=True):
            size = expected.abs().max().clamp(min=1)
            torch.testing.assert_close(found.double() / size, expected / size, atol=5e-6, rtol=0)


@pytest.mark.parametrize("width", [8, 64, 300])
@pytest.mark.parametrize("name", ["sparsemax", "entmax"])
def test_a_score_exactly_at_the_threshold_is_not_in_the_support(name, width):
    """Scores on a grid, as half-precision ones are, or in sixteenths; α = 2 is sparsemax."""
    rows = Rows(name, (torch.tensor(1.0),) if name == "entmax" else ())
    for grid in (lambda x: (16 * x).round() / 16, lambda x: x.bfloat16().float(), lambda x: x.half().float()):
        scores, grad = grid(torch.randn(2_000, width)), torch.randn(2_000, width)
        found, expected = (function(rows, scores, grad)[:2] for function in (results, exact))
        expected[0] = package.sparsemax(scores.double(), -1)
        assert torch.equal(found[0] > 0, expected[0] > 0)
        x = scores.double().requires_grad_()
        (expected_grad,) = torch.autograd.grad(package.sparsemax(x, -1), x, grad.double())
        torch.testing.assert_close(found[1].double(), expected_grad, atol=1e-5, rtol=0)


@pytest.mark.parametrize("width", [7, 100])
def test_a_score_exactly_at_the_mean_is_kept(width):
    scores = (8 * torch.randn(500, width)).round() / 8
    expected = scores.double() >= scores.double().mean(-1, keepdim=True)
    assert torch.equal(forward(Rows("evsoftmax", (torch.tensor(0.0),)), scores) > 0, expected)


def test_the_exponential_to_two_units_in_the_last_place():
    """Of two scores, 0 and −x, the second has exp(−x) times the probability of the first."""
    x = torch.cat([torch.linspace(0, 87, 100_001), torch.tensor([1e-7, 0.34657, 0.34658])])
    scores = torch.stack([torch.zeros_like(x), -x], -1)
    first, second = forward(Rows("softmax"), scores).double().unbind(-1)
    torch.testing.assert_close(second / first, x.double().neg().exp(), atol=0, rtol=4 * 2**-24)
    scores = torch.tensor([[0.0, -89.0, -1e4, torch.finfo(torch.float32).min, -INF]])
    assert forward(Rows("softmax"), scores).tolist() == [[1.0, 0.0, 0.0, 0.0, 0.0]]


@names
def test_any_number_of_threads_gives_the_same_bits(name):
    rows, before, found = rows_of(name), torch.get_num_threads(), []
    scores, grad = (torch.randn(6, HEADS, 100, 100) for _ in range(2))
    try:
        for threads in (1, 2, 5, 5):  # for 32,768 scores each
            torch.set_num_threads(threads)
            found.append(results(rows, scores, grad))
    finally:
        torch.set_num_threads(before)
    for result in found[1:]:
        torch.testing.assert_close(result, found[0], atol=0, rtol=0)


@names
@pytest.mark.parametrize("width", [40, 300])
def test_masking_is_deleting(name, width):
    rows, present = rows_of(name), torch.rand(width) < 0.7
    scores, grad = (torch.randn(2, HEADS, 5, width) for _ in range(2))
    found = results(rows, scores.masked_fill(~present, -INF), grad)
    expected = results(rows, scores[..., present], grad[..., present])
    for result, other in zip(found[:2], expected[:2]):
        assert (result[..., ~present] == 0).all()
        torch.testing.assert_close(result[..., present], other, atol=2e-6, rtol=0)
    torch.testing.assert_close(found[2:], expected[2:], atol=1e-4, rtol=1e-4)
    empty = results(rows, torch.full_like(scores, -INF), grad)
    assert all((result == 0).all() for result in empty)


@names
def test_layouts_of_scores_gradients_and_numbers(name):
    scores, grad = (torch.randn(HEADS, 12, 20).transpose(1, 2) for _ in range(2))
    rows = rows_of(name)
    expected = results(rows, scores.contiguous(), grad.contiguous())
    strided = Rows(name, tuple(torch.stack([n, n], -1).double()[..., 0] for n in rows.numbers))
    torch.testing.assert_close(results(strided, scores, grad), expected, check_dtype=False)


def test_rows_near_the_end_of_the_search_are_solved_to_the_last_digits():
    """It ends where one more step changes nothing, and has the least to spare at this α."""
    scores = torch.randn(10_000, 64) * torch.tensor([0.1, 1, 3, 10, 40]).repeat(2_000)[:, None]
    expected = package.entmax_bisect(scores.double(), 1.48, n_iter=60)
    found = forward(Rows("entmax, fixed", (torch.tensor(0.48),)), scores)
    torch.testing.assert_close(found.double(), expected, atol=6e-7, rtol=0)


@pytest.mark.parametrize("shape", [(), (1, 1), (HEADS, 1, 1), (2, HEADS, 1, 1), (2, 1, 7, 1)])
@pytest.mark.parametrize("width", [20, 90])
def test_an_alpha_of_any_shape(shape, width):
    rows = Rows("entmax", (torch.empty(shape).uniform_(0.05, 1),))
    scores, grad = (torch.randn(2, HEADS, 7, width) for _ in range(2))
    inputs = [scores.double().requires_grad_(), rows.numbers[0].double().requires_grad_()]
    alpha = 1 + inputs[1].expand(2, HEADS, 7, 1)
    expected = torch.autograd.grad(package.entmax_bisect(inputs[0], alpha, n_iter=60), inputs, grad.double())
    for result, other in zip(results(rows, scores, grad)[1:], expected):
        assert result.shape == other.shape
        torch.testing.assert_close(result.double(), other, atol=2e-5 * other.abs().max().item(), rtol=0)


@pytest.mark.parametrize("c", [1e-6, 0.2, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("width", [50, 1_000])
def test_the_gradient_of_alpha_of_almost_flat_rows(c, width):
    """As at the start of a training, with gradients that have a part in common."""
    scores, grad = 5e-4 * torch.randn(40, width), 10 + torch.randn(40, width)
    numbers = torch.full((40, 1), c)
    inputs = [scores.double(), numbers.double().requires_grad_()]
    (expected,) = torch.autograd.grad(entmax_formula(*inputs), inputs[1], grad.double())
    found = results(Rows("entmax", (numbers,)), scores, grad)[2]
    torch.testing.assert_close(found.double(), expected, atol=4e-5, rtol=1e-5)


def test_sums_for_parameters_lose_no_digits_when_there_are_many_terms():
    rows, scores, grad = rows_of("multimax"), torch.randn(2_000, 1_000), torch.randn(2_000, 1_000)
    size = (exact(rows, scores, grad)[0].detach() * grad).abs().sum()
    for found, expected in zip(results(rows, scores, grad)[2:], exact(rows, scores, grad)[2:]):
        torch.testing.assert_close(found.double(), expected, atol=2e-7 * size.item(), rtol=0)


@pytest.mark.parametrize("other", [{"dtype": torch.float64}, {"dtype": torch.bfloat16}, {"device": "meta"}])
def test_it_serves_fp32_on_a_cpu(other):
    assert cpu.LIBRARY.serves(torch.zeros(2, 3)) and not cpu.LIBRARY.serves(torch.zeros(2, 3, **other))
