"""The fused MultiMax, compiled and eager, against the formula that autograd differentiates."""

import os

import pytest
import torch
from conftest import needs_compiler

from multimax_fairseq.kernels import compiler, cpp
from multimax_fairseq.kernels.rows.compiled import FAR
from multimax_fairseq.mappings.multimax import modulate, modulate_formula, multimax, multimax_formula

TWINS = {"multimax": (multimax, multimax_formula), "modulate": (modulate, modulate_formula)}
EXTREME_ROWS = int(os.environ.get("MULTIMAX_EXTREME_ROWS", "600"))  # more of them, for who has the time
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


@pytest.mark.parametrize("chosen", ["eager", "compiled"])
@pytest.mark.parametrize("mean", [0.0, 4.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_as_good_as_plain_pytorch(dtype, mean, chosen, monkeypatch):
    """Against float64: no result and no gradient has twice the error of the formula that autograd differentiates.

    ∂L/∂p of that mean, as of values of one: its sum with the probabilities of a row is to cancel.
    """
    monkeypatch.setenv("MULTIMAX_BACKEND", chosen)
    scores, thresholds, gains = (tensor.detach().to(dtype) for tensor in case((256, 96)))
    gains = 0.2 * gains
    upstream = (torch.randn(scores.shape) + mean).to(dtype)

    def errors(function):
        inputs = [tensor.clone().requires_grad_() for tensor in (scores, thresholds, gains)]
        probabilities = function(*inputs)
        results = probabilities, *torch.autograd.grad(probabilities, inputs, upstream)
        return [(result.double() - other).norm() for result, other in zip(results, exact)]

    inputs = [tensor.double().requires_grad_() for tensor in (scores, thresholds, gains)]
    probabilities = multimax_formula(*inputs)
    exact = probabilities.detach(), *torch.autograd.grad(probabilities, inputs, upstream.double())
    for ours, plain in zip(errors(multimax), errors(multimax_formula)):
        assert ours <= 2 * plain


TRANSFORMS = {
    "vmap over scores": lambda f, x, b, g: torch.func.vmap(f, (0, None, None))(x, b, g),
    "vmap over parameters": lambda f, x, b, g: torch.func.vmap(f, (None, 0, 0))(
        x, torch.stack([b, 2 * b]), torch.stack([g, g])
    ),
    "grad": lambda f, x, b, g: torch.func.grad(lambda *inputs: f(*inputs)[..., 0].sum(), (0, 1, 2))(x, b, g),
    "a gradient for each row": lambda f, x, b, g: torch.func.vmap(
        torch.func.grad(lambda gains, row: f(row, b, gains)[0]), (None, 0)
    )(g, x),
    "jvp": lambda f, x, b, g: torch.func.jvp(f, (x, b, g), (torch.cos(x), torch.ones_like(b), torch.ones_like(g))),
    "hessian": lambda f, x, b, g: torch.func.hessian(lambda gains: f(x, b, gains)[..., 0].sum())(g),
    "forward mode": lambda f, x, b, g: torch.autograd.functional.jvp(f, (x, b, g), (x, b, g), strict=True),
}


@pytest.mark.parametrize("with_grad", [True, False])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", TWINS)
@pytest.mark.parametrize("chosen", ["eager", "compiled"])
def test_transforms_of_torch_func(chosen, name, transform, with_grad, monkeypatch):
    monkeypatch.setenv("MULTIMAX_BACKEND", chosen)
    if not with_grad and transform == "forward mode":
        pytest.skip("it needs autograd")
    inputs = torch.randn(4, 5), torch.randn(2, 2), torch.randn(2, 2)
    with torch.set_grad_enabled(with_grad):
        actual, expected = (TRANSFORMS[transform](function, *inputs) for function in TWINS[name])
    torch.testing.assert_close(actual, expected)


def test_who_compiles_a_mapping_sees_one_graph():
    inputs = case((4, 5), dtype=torch.float32)
    compiled = torch.compile(multimax, fullgraph=True, backend="aot_eager")
    actual, expected = (gradients(function, inputs, torch.ones(4, 5)) for function in (compiled, multimax_formula))
    torch.testing.assert_close(actual, expected)


# ---------------------------------------------------------------- scores of any size, and no numbers

INF, NAN, LOWEST = float("inf"), float("nan"), torch.finfo(torch.float32).min
EXTREMES = torch.tensor([NAN, INF, -INF, -INF, -INF, LOWEST, -LOWEST, 1e30, -1e30, 1e20, -1e20])


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


@pytest.fixture(params=["eager", "Inductor", pytest.param("C++", marks=needs_compiler)])
def backend(request, monkeypatch):
    monkeypatch.setenv("MULTIMAX_BACKEND", "eager" if request.param == "eager" else "compiled")
    if request.param == "Inductor":
        monkeypatch.setattr(cpp.Library, "serves", lambda self, tensor: False)


def test_extreme_scores_are_the_same_to_every_backend(backend):
    for seed in range(EXTREME_ROWS // 30):
        case = extreme_case(seed)
        probabilities, *grads = with_gradients(multimax, *case)
        expected, expected_grad, *_ = with_gradients(multimax_formula, *case)
        torch.testing.assert_close(probabilities, expected, atol=1e-5, rtol=0, equal_nan=True)
        assert all(grad.isfinite().all() for grad in grads)
        near = case[0][~probabilities.isnan().any(-1)].abs() <= FAR  # the slope further away is that at FAR
        torch.testing.assert_close(grads[0][near], expected_grad[near], atol=1e-4, rtol=1e-4)


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
