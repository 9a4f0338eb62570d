"""Projection, mapping and loss over chunks, against the whole logits, log_softmax and autograd in float64."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from multimax_fairseq.kernels.loss import chunks
from multimax_fairseq.kernels.loss import chunked_cross_entropy
from multimax_fairseq.mappings.multimax import modulate_formula

NAMES = ("features", "weight", "bias", "thresholds", "gains")


def case(tokens=23, width=7, vocabulary=41, order=2, bias=True, dtype=torch.float64, seed=0):
    """Tensors by name, all of which want gradients, and targets; logits have a standard deviation of 2."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    tensors = {"features": draw(tokens, width), "weight": draw(vocabulary, width)}
    with torch.no_grad():
        tensors["weight"] *= 2 * width**-0.5
    if bias:
        tensors["bias"] = draw(vocabulary)
    if order:
        tensors.update(thresholds=draw(order, 2), gains=draw(order, 2))
        with torch.no_grad():
            tensors["gains"] *= 0.1
    return tensors, torch.randint(vocabulary, (tokens,), generator=generator)


def in_double(tensors):
    return {name: tensor.detach().double().requires_grad_() for name, tensor in tensors.items()}


def without_last_word(tensors):
    """Copies of tensors without a word, whose logit in ``tensors`` is −inf from now on."""
    with torch.no_grad():
        tensors["bias"][-1] = float("-inf")
    deleted = {**tensors, **{name: tensors[name][:-1] for name in ("weight", "bias")}}
    return {name: tensor.detach().clone().requires_grad_() for name, tensor in deleted.items()}


def whole(tensors, targets, smoothing=0.0):
    """(loss, nll_loss), (tokens,) each, from the definition: with smoothing, ε / (V − 1) on all other words."""
    logits = F.linear(tensors["features"], tensors["weight"], tensors.get("bias"))
    logits = logits if logits.dtype == torch.float64 else logits.float()  # under autocast, as the models do
    if "gains" in tensors:
        logits = modulate_formula(logits, tensors["thresholds"], tensors["gains"])
    log_probabilities = F.log_softmax(logits, dim=-1)
    expected = torch.full_like(log_probabilities, smoothing / (log_probabilities.size(1) - 1))
    expected.scatter_(1, targets.unsqueeze(1), 1 - smoothing)
    return -(expected * log_probabilities).sum(1), -log_probabilities.gather(1, targets.unsqueeze(1)).squeeze(1)


def chunked(tensors, targets, smoothing=0.0, chunk_tokens=0, **options):
    return chunked_cross_entropy(targets=targets, **tensors, label_smoothing=smoothing, chunk_tokens=chunk_tokens,
                                 **options)  # fmt: skip


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("order, bias", [(0, False), (0, True), (1, False), (2, True)])
@pytest.mark.parametrize("chunk_tokens", [0, 1, 5, 23, 100])
def test_losses_and_gradients_are_those_of_the_whole_logits(chunk_tokens, order, bias, smoothing):
    tensors, targets = case(order=order, bias=bias)
    expected = [kind.sum() for kind in whole(tensors, targets, smoothing)]
    actual = chunked(tensors, targets, smoothing, chunk_tokens)
    torch.testing.assert_close(list(actual), expected, atol=1e-10, rtol=1e-12)
    inputs = list(tensors.values())
    gradients = torch.autograd.grad(3 * actual.loss, inputs)
    expected_gradients = torch.autograd.grad(3 * expected[0], inputs)
    torch.testing.assert_close(gradients, expected_gradients, atol=1e-10, rtol=1e-10)
    assert not actual.nll_loss.requires_grad


def largest_error(tensors, targets, smoothing=0.0, chunk_tokens=0):
    """Of each gradient, against float64: the largest difference over the largest entry."""
    exact = in_double(tensors)
    expected = torch.autograd.grad(whole(exact, targets, smoothing)[0].sum(), list(exact.values()))
    actual = torch.autograd.grad(chunked(tensors, targets, smoothing, chunk_tokens).loss, list(tensors.values()))
    return {
        name: ((a.double() - e).abs().max() / e.abs().max()).item() for name, a, e in zip(tensors, actual, expected)
    }


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("order, vocabulary", [(0, 301), (2, 5001)])  # 3 rows of which are no multiple of 16 bytes
@pytest.mark.parametrize("backend", ["eager", "compiled"])
def test_single_precision_gradients_stay_close_to_double(backend, order, vocabulary, smoothing, monkeypatch):
    monkeypatch.setenv("MULTIMAX_BACKEND", backend)
    monkeypatch.setattr(chunks, "CPU_BLOCK", 3 * vocabulary)
    tensors, targets = case(tokens=70, width=16, vocabulary=vocabulary, order=order, dtype=torch.float32)
    errors = largest_error(tensors, targets, smoothing, chunk_tokens=32)
    assert max(errors.values()) < 1e-5, errors


# the products have 11 and 8 bits of mantissa
@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 5e-3), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("order", [0, 2])
def test_half_precision_gradients_stay_close_to_double(order, dtype, tolerance):
    tensors, targets = case(tokens=70, width=16, vocabulary=300, order=order, dtype=dtype)
    for name in ("thresholds", "gains"):
        if order:  # as fairseq's --fp16 would not have them, but the error of their rounding is not what is tested
            tensors[name] = tensors[name].detach().float().requires_grad_()
    errors = largest_error(tensors, targets, 0.1, chunk_tokens=32)
    assert max(errors.values()) < tolerance, errors


def run_as_on_a_gpu(monkeypatch, vocabulary):
    """Kernels run, eagerly, on 3 rows as Inductor's on a GPU before torch 2.8: what is written to a copy is lost."""

    def run_compiled(kernel, arguments):
        return kernel.eager(*(a.clone() if a.data_ptr() % 16 else a.contiguous() for a in arguments))

    block_rows = chunks.block_rows
    monkeypatch.setattr(chunks, "block_rows", lambda _, width: block_rows("cuda", width))
    monkeypatch.setattr(chunks, "GPU_BLOCK", 3 * vocabulary)
    monkeypatch.setattr(compiler.Kernel, "compiles", lambda kernel, scores: min(scores.shape) > 1)
    monkeypatch.setattr(compiler.Kernel, "_run_compiled", run_compiled)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 5e-3), (torch.float32, 1e-5)])
def test_what_a_gpus_kernels_write_is_never_written_to_a_copy(dtype, tolerance, monkeypatch):
    run_as_on_a_gpu(monkeypatch, vocabulary=41)
    tensors, targets = case(tokens=70, order=0, dtype=dtype)
    errors = largest_error(tensors, targets, 0.1, chunk_tokens=31)
    assert max(errors.values()) < tolerance, errors


@pytest.mark.parametrize("order", [0, 2])
@pytest.mark.parametrize("features_dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_no_result_has_twice_the_error_of_plain_pytorch(features_dtype, order):
    tensors, targets = case(tokens=300, width=64, vocabulary=500, order=order, dtype=torch.float32)
    tensors["features"] = tensors["features"].detach().to(features_dtype).requires_grad_()
    exact = in_double(tensors)

    def results(losses, tensors):
        return [losses[0].detach(), *torch.autograd.grad(losses[0], list(tensors.values()))]

    expected = results([kind.sum() for kind in whole(exact, targets, 0.1)], exact)
    with torch.autocast("cpu", torch.bfloat16):
        plain = [kind.sum() for kind in whole(tensors, targets, 0.1)]
        with Dtypes() as dtypes:
            ours = chunked(tensors, targets, 0.1, chunk_tokens=70)
            ours_of_each = chunked(tensors, targets, 0.1, chunk_tokens=70, reduce=False)
    assert dtypes.of_products == {torch.bfloat16}
    torch.testing.assert_close(ours_of_each.loss.sum(), ours.loss)
    plain, actual = results(plain, tensors), results(ours, tensors)
    for name, e, p, a in zip(["loss", *tensors], expected, plain, actual):
        assert a.dtype == p.dtype, name
        errors = [(kind.double() - e).norm().item() for kind in (a, p)]
        assert errors[0] <= 2 * errors[1] + 1e-6 * e.norm().item(), (name, errors)


def test_small_gradients_of_half_precision_do_not_vanish():
    """p of a word that never occurs is 2e-8 here, less than half of fp16's smallest number."""
    features = torch.ones(64, 8, dtype=torch.float16, requires_grad=True)
    weight = torch.zeros(30, 8, dtype=torch.float16)
    weight[1:] = -17.75 / 8
    weight.requires_grad_()
    (grad,) = torch.autograd.grad(
        1024 * chunked_cross_entropy(features, weight, torch.zeros(64, dtype=torch.int64), chunk_tokens=16).loss,
        weight,
    )
    expected = 1024 * 64 * torch.tensor(-17.75).exp()
    torch.testing.assert_close(grad[1:].float(), expected.expand(29, 8), rtol=0.2, atol=0)


def test_losses_of_each_token():
    tensors, targets = case()
    actual = chunked(tensors, targets, 0.1, chunk_tokens=5, reduce=False)
    torch.testing.assert_close(list(actual), list(whole(tensors, targets, 0.1)), atol=1e-12, rtol=1e-12)
    assert not actual.loss.requires_grad


def test_no_tokens_at_all():
    tensors, targets = case(tokens=0)
    losses = chunked(tensors, targets)
    gradients = torch.autograd.grad(losses.loss, list(tensors.values()))
    assert losses.loss == losses.nll_loss == 0 and all(not gradient.any() for gradient in gradients)
    assert chunked(tensors, targets, reduce=False).loss.shape == (0,)


@pytest.mark.parametrize("wanted", NAMES)
def test_what_is_frozen_gets_no_gradient(wanted):
    tensors, targets = case()
    (expected,) = torch.autograd.grad(whole(tensors, targets)[0].sum(), tensors[wanted])
    frozen = {name: tensor.detach().requires_grad_(name == wanted) for name, tensor in tensors.items()}
    chunked(frozen, targets, chunk_tokens=5).loss.backward()
    torch.testing.assert_close(frozen.pop(wanted).grad, expected, atol=1e-10, rtol=1e-10)
    assert all(tensor.grad is None for tensor in frozen.values())


def test_gradients_of_updates_of_several_batches_add_up():
    tensors, targets = case()
    expected = torch.autograd.grad(whole(tensors, targets)[0].sum(), tensors["weight"])[0]
    for part in (slice(0, 9), slice(9, None)):
        chunked({**tensors, "features": tensors["features"][part]}, targets[part], chunk_tokens=5).loss.backward()
    torch.testing.assert_close(tensors["weight"].grad, expected, atol=1e-10, rtol=1e-10)


def test_a_second_backward_is_an_error():
    tensors, targets = case()
    loss = chunked(tensors, targets).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="gone after one backward"):
        loss.backward()


def test_logits_that_overflowed_to_minus_infinity_have_no_part():
    tensors, targets = case()
    targets, deleted = targets % 40, without_last_word(tensors)
    loss = chunked(tensors, targets).loss
    torch.testing.assert_close(loss, whole(deleted, targets)[0].sum(), atol=1e-10, rtol=1e-12)
    loss.backward()
    for name, tensor in deleted.items():
        (expected,) = torch.autograd.grad(whole(deleted, targets)[0].sum(), tensor)
        torch.testing.assert_close(tensors[name].grad[: len(expected)], expected, atol=1e-10, rtol=1e-10)
    assert not tensors["weight"].grad[40].any()


class Largest(TorchDispatchMode):
    """Keeps the size of the largest tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


class Dtypes(TorchDispatchMode):
    """Keeps the dtypes of what is multiplied."""

    def __init__(self):
        super().__init__()
        self.of_products = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.mm.default, torch.ops.aten.mm.out, torch.ops.aten.addmm_.default):
            self.of_products.add(args[-1].dtype)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("order", [0, 2])
def test_no_tensor_is_larger_than_a_chunk_of_logits(order, grad):
    tensors, targets = case(tokens=128, vocabulary=500, order=order)
    with Largest() as largest, torch.set_grad_enabled(grad):
        loss = chunked(tensors, targets, 0.1, chunk_tokens=16).loss
        if grad:
            loss.backward()
    assert largest.numel == 16 * 500
    with Largest() as largest:  # the test can fail
        whole(tensors, targets)
    assert largest.numel == 128 * 500


def test_eager_kernels_work_on_as_many_rows_as_fit_into_a_cache(monkeypatch):
    monkeypatch.setattr(compiler, "EAGER_BLOCK", 2 * 41)
    tensors, targets = case()
    gradients = torch.autograd.grad(chunked(tensors, targets, 0.1, chunk_tokens=5).loss, list(tensors.values()))
    expected = torch.autograd.grad(whole(tensors, targets, 0.1)[0].sum(), list(tensors.values()))
    torch.testing.assert_close(gradients, expected, atol=1e-10, rtol=1e-10)
