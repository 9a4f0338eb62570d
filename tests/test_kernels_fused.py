"""The fused MultiMax, compiled and eager, against the formula that autograd differentiates."""

import pytest
import torch

from multimax_fairseq.kernels import compiler
from multimax_fairseq.mappings.multimax import modulate, modulate_formula, multimax, multimax_formula

TWINS = {"multimax": (multimax, multimax_formula), "modulate": (modulate, modulate_formula)}
SHAPES = [(7,), (5, 7), (3, 2, 4, 7), (4, 1), (0, 7), (3, 0)]


def case(shape, order=2, dtype=torch.float64, seed=0):
    """Scores with a fifth of them absent and one empty row, thresholds and gains; all want gradients."""
    generator = torch.Generator().manual_seed(seed)
    scores = 2 * torch.randn(shape, generator=generator, dtype=dtype)
    scores = scores.masked_fill(torch.rand(shape, generator=generator) < 0.2, float("-inf"))
    if scores.dim() > 1 and scores.numel():
        scores.flatten(0, -2)[1] = float("-inf")
    parameters = [torch.randn(order, 2, generator=generator, dtype=dtype) for _ in range(2)]
    return [tensor.requires_grad_() for tensor in (scores, *parameters)]


def gradients(function, inputs, upstream):
    output = function(*inputs)
    upstream = upstream.masked_fill(output.isinf(), 0.0)  # nothing can hang on the σ of an absent score
    return output, torch.autograd.grad((output * upstream).nan_to_num(0.0, 0.0, 0.0).sum(), inputs)


@pytest.fixture(params=["compiled", 1, 16, 2**17], ids=lambda way: way if way == "compiled" else f"blocks of {way}")
def way(request, monkeypatch):
    """How the kernels run: compiled, or eager in blocks of so many scores."""
    monkeypatch.setenv("MULTIMAX_BACKEND", "compiled" if request.param == "compiled" else "eager")
    if request.param != "compiled":
        monkeypatch.setattr(compiler, "EAGER_BLOCK", request.param)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", TWINS)
def test_values_and_gradients_are_the_formulas(name, shape, order, way):
    function, formula = TWINS[name]
    inputs = case(shape, order)
    upstream = torch.randn(shape, dtype=torch.float64)
    expected, expected_gradients = gradients(formula, inputs, upstream)
    actual, actual_gradients = gradients(function, inputs, upstream)
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(actual_gradients, expected_gradients, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("name", TWINS)
def test_single_precision_gradients_stay_close_to_double(name, way):
    function, _ = TWINS[name]
    inputs = case((64, 50))
    upstream = torch.randn(64, 50, dtype=torch.float64)
    _, expected = gradients(function, inputs, upstream)
    _, actual = gradients(function, [tensor.detach().float().requires_grad_() for tensor in inputs], upstream.float())
    for single, double in zip(actual, expected):
        scale = double.abs().max()
        assert (single.double() - double).abs().max() / scale < 1e-5  # sums of 3,200 terms in fp32


@pytest.mark.parametrize("name", TWINS)
def test_gradients_of_gradients_are_the_formulas(name):
    function, formula = TWINS[name]
    results = []
    for candidate in (function, formula):
        inputs = case((3, 5))
        output = candidate(*inputs)
        first = torch.autograd.grad(
            output.masked_fill(output.isinf(), 0.0).pow(2).sum(), inputs, create_graph=True
        )
        results.append(torch.autograd.grad(sum(gradient.pow(2).sum() for gradient in first), inputs))
    torch.testing.assert_close(results[0], results[1], atol=1e-10, rtol=1e-10)
    assert all(gradient.abs().sum() > 0 for gradient in results[0])


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, True), (True, False, True)])
def test_gradients_of_gradients_of_some_inputs_only(wanted):
    inputs = [tensor.detach().requires_grad_(needed) for tensor, needed in zip(case((3, 5)), wanted)]
    needing = [tensor for tensor in inputs if tensor.requires_grad]
    first = torch.autograd.grad(multimax(*inputs).pow(2).sum(), needing, create_graph=True)
    second = torch.autograd.grad(sum(gradient.pow(2).sum() for gradient in first), needing)
    assert all(torch.isfinite(gradient).all() for gradient in second)


def test_what_is_kept_for_the_backward_is_scores_and_probabilities():
    inputs, kept = case((64, 50)), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda _: _):
        multimax(*inputs)
    assert sum(tensor.numel() >= 64 * 50 for tensor in kept) == 2


def test_scores_are_left_as_they_are():
    scores, thresholds, gains = (tensor.detach() for tensor in case((6, 9)))
    before = scores.clone()
    leaf = scores.requires_grad_()
    multimax(leaf, thresholds, gains).pow(2).sum().backward()
    torch.testing.assert_close(leaf.detach(), before, atol=0, rtol=0)
