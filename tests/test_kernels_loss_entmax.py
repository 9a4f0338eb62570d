"""The loss of sparse mappings over chunks, against its definition in float64 and the losses of the entmax package."""

import entmax as entmax_package
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels_loss_cross_entropy import Dtypes, Largest, case, in_double, run_as_on_a_gpu, without_last_word
from torch.autograd import Function
from torch.nn import functional as F

from multimax_fairseq.kernels.loss import chunks
from multimax_fairseq.kernels.loss import chunked_entmax_loss
from multimax_fairseq.mappings import entmax, entmax15, sparsemax

MAPPINGS = {2.0: sparsemax, 1.5: entmax15, 1.2: lambda scores: entmax(scores, 1.2)}
PACKAGE = {
    2.0: entmax_package.sparsemax_loss,
    1.5: entmax_package.entmax15_loss,
    1.2: lambda scores, targets: entmax_package.entmax_bisect_loss(scores, targets, 1.2),
}
PADDING = 1


def whole(tensors, targets, alpha, smoothing=0.0):
    """The loss of each token, (tokens,), from the definition, with a maximiser that is not differentiated."""
    x = F.linear(tensors["features"], tensors["weight"], tensors.get("bias"))
    x = x if x.dtype == torch.float64 else x.float()
    p = entmax(x.detach(), alpha.detach() if isinstance(alpha, torch.Tensor) else alpha)
    entropy = (p - p**alpha).sum(1) / (alpha * (alpha - 1))
    target_logits = x.gather(1, targets.unsqueeze(1)).squeeze(1)
    words = torch.arange(x.size(1)) != PADDING
    return (p * x).sum(1) + entropy - target_logits + smoothing * (target_logits - x[:, words].mean(1))


def chunked(tensors, targets, alpha, smoothing=0.0, chunk_tokens=5, **options):
    mapping = MAPPINGS[alpha] if alpha in MAPPINGS else lambda scores: entmax(scores, alpha)
    return chunked_entmax_loss(targets=targets, mapping=mapping, alpha=alpha, **tensors, label_smoothing=smoothing,
                               padding=PADDING, chunk_tokens=chunk_tokens, **options)  # fmt: skip


@pytest.mark.parametrize("chunk_tokens", [1, 5, 100])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("alpha", MAPPINGS)
def test_losses_and_gradients_are_those_of_the_package(alpha, bias, chunk_tokens):
    tensors, targets = case(order=0, bias=bias)
    expected = PACKAGE[alpha](F.linear(tensors["features"], tensors["weight"], tensors.get("bias")), targets)
    inputs = list(tensors.values())
    expected_gradients = torch.autograd.grad(3 * expected.sum(), inputs)
    actual = chunked(tensors, targets, alpha, chunk_tokens=chunk_tokens)
    torch.testing.assert_close(actual.loss, expected.sum(), atol=1e-9, rtol=1e-10)
    gradients = torch.autograd.grad(3 * actual.loss, inputs)
    torch.testing.assert_close(gradients, expected_gradients, atol=1e-8, rtol=1e-8)
    assert actual.plain_loss == actual.loss and not actual.plain_loss.requires_grad
    losses = chunked(tensors, targets, alpha, chunk_tokens=chunk_tokens, reduce=False).loss
    torch.testing.assert_close(losses, expected, atol=1e-9, rtol=1e-10)
    assert not losses.requires_grad


class Repeated(Function):
    """A loss that has one backward, for ``gradcheck``, which asks for several."""

    @staticmethod
    def forward(ctx, loss, *inputs):
        with torch.enable_grad():
            inputs = [tensor.detach().requires_grad_() for tensor in inputs]
            result = loss(*inputs)
            ctx.gradients = torch.autograd.grad(result, inputs)
        return result.detach()

    @staticmethod
    def backward(ctx, grad):
        return (None, *(grad * gradient for gradient in ctx.gradients))


@pytest.mark.parametrize("bias, smoothing", [(True, 0.1), (False, 0.0)])
@pytest.mark.parametrize("alpha", MAPPINGS)
def test_gradients_are_those_of_differences(alpha, bias, smoothing):
    tensors, targets = case(tokens=5, width=3, vocabulary=7, order=0, bias=bias, seed=3)
    names = list(tensors)

    def loss(*values):
        return chunked(dict(zip(names, values)), targets, alpha, smoothing, chunk_tokens=2).loss

    assert torch.autograd.gradcheck(lambda *inputs: Repeated.apply(loss, *inputs), tuple(tensors.values()))


@pytest.mark.parametrize("start", [1.05, 1.5, 1.9])
def test_the_gradient_of_a_learned_alpha_is_that_of_differences(start):
    """The maximiser moves with α, too; that this does not change the loss is what is tested."""
    tensors, targets = case(tokens=5, width=3, vocabulary=7, order=0, seed=4)
    names = list(tensors)
    alpha = torch.tensor(start, dtype=torch.float64, requires_grad=True)

    def loss(alpha, *values):
        mapping = lambda scores: entmax(scores, alpha)  # noqa: E731
        return chunked_entmax_loss(targets=targets, mapping=mapping, alpha=alpha, **dict(zip(names, values)),
                                   label_smoothing=0.1, chunk_tokens=2).loss  # fmt: skip

    assert torch.autograd.gradcheck(lambda *inputs: Repeated.apply(loss, *inputs), (alpha, *tensors.values()))


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**16), tokens=st.integers(1, 9), vocabulary=st.integers(2, 30), alpha=st.floats(1.02, 2.0),
    smoothing=st.sampled_from([0.0, 0.1, 0.5]), scale=st.sampled_from([0.01, 1.0, 30.0]), chunk=st.integers(1, 10),
)  # fmt: skip
def test_any_case_is_the_definition(seed, tokens, vocabulary, alpha, smoothing, scale, chunk):
    tensors, targets = case(tokens, 4, vocabulary, order=0, seed=seed)
    tensors["weight"] = (tensors["weight"].detach() * scale).requires_grad_()
    alpha = torch.tensor(alpha, dtype=torch.float64, requires_grad=True)
    inputs = [alpha, *tensors.values()]
    expected = whole(tensors, targets, alpha, smoothing)
    losses = chunked(tensors, targets, alpha, smoothing, chunk, reduce=False)
    torch.testing.assert_close(losses.loss, expected, atol=1e-8, rtol=1e-8)
    gradients = torch.autograd.grad(chunked(tensors, targets, alpha, smoothing, chunk).loss, inputs)
    expected_gradients = torch.autograd.grad(expected.sum(), inputs)
    torch.testing.assert_close(gradients, expected_gradients, atol=1e-6, rtol=1e-6)
    p = entmax(F.linear(tensors["features"], tensors["weight"], tensors["bias"]), alpha).detach()
    assert losses.support.equal((p > 0).double().sum(1))
    assert losses.impossible.equal((p.gather(1, targets.unsqueeze(1)) == 0).double().squeeze(1))
    assert (losses.plain_loss >= -1e-9).all()  # 0 where the target has all of the probability


def errors_of(actual, expected):
    return {name: ((a.double() - e).norm() / e.norm()).item() for name, a, e in zip(["loss", "f", "w", "b", "α"],
                                                                                  actual, expected)}  # fmt: skip


def results(losses, tensors, alpha):
    inputs = [*tensors.values(), alpha]
    return [losses.detach(), *torch.autograd.grad(losses, inputs)]


def exact_results(tensors, targets, alpha):
    exact, alpha = in_double(tensors), alpha.detach().double().requires_grad_()
    return results(whole(exact, targets, alpha, 0.1).sum(), exact, alpha)


def errors_against_double(tensors, targets, alpha):
    alpha = torch.tensor(alpha, requires_grad=True)
    actual = results(chunked(tensors, targets, alpha, 0.1, 32).loss, tensors, alpha)
    return errors_of(actual, exact_results(tensors, targets, alpha))


def test_compiled_kernels_in_single_precision_stay_close_to_double(monkeypatch):
    monkeypatch.setenv("MULTIMAX_BACKEND", "compiled")
    monkeypatch.setattr(chunks, "CPU_BLOCK", 3 * 301)  # no multiple of 16 bytes
    tensors, targets = case(tokens=70, width=16, vocabulary=301, order=0, dtype=torch.float32)
    errors = errors_against_double(tensors, targets, 1.4)
    assert max(errors.values()) < 2e-5, errors


@pytest.mark.parametrize("features_dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_no_result_has_twice_the_error_of_plain_pytorch(features_dtype):
    tensors, targets = case(tokens=300, width=64, vocabulary=500, order=0, dtype=torch.float32)
    tensors["features"] = tensors["features"].detach().to(features_dtype).requires_grad_()
    alpha = torch.tensor(1.5, requires_grad=True)
    expected = exact_results(tensors, targets, alpha)
    with torch.autocast("cpu", torch.bfloat16):
        plain = whole(tensors, targets, alpha, 0.1).sum()
        with Dtypes() as dtypes:
            ours = chunked(tensors, targets, alpha, 0.1, 70).loss
    assert dtypes.of_products == {torch.bfloat16}
    plain, ours = results(plain, tensors, alpha), results(ours, tensors, alpha)
    assert [tensor.dtype for tensor in ours] == [tensor.dtype for tensor in plain]
    ours, plain = errors_of(ours, expected), errors_of(plain, expected)
    assert all(ours[name] <= 2 * plain[name] + 1e-6 for name in plain), (ours, plain)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 5e-3), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("aligned", [True, False])
def test_half_precision_gradients_stay_close_to_double(aligned, dtype, tolerance, monkeypatch):
    if not aligned:
        run_as_on_a_gpu(monkeypatch, vocabulary=301)
    tensors, targets = case(tokens=70, width=16, vocabulary=301, order=0, dtype=dtype)
    errors = errors_against_double(tensors, targets, 1.5)
    assert max(errors.values()) < tolerance, errors


def test_logits_that_overflowed_to_minus_infinity_have_no_part():
    tensors, targets = case(order=0)
    deleted = without_last_word(tensors)
    loss, expected = chunked(tensors, targets % 40, 1.5).loss, chunked(deleted, targets % 40, 1.5).loss
    torch.testing.assert_close(loss, expected, atol=1e-10, rtol=1e-12)
    loss.backward()
    expected.backward()
    for name, tensor in deleted.items():
        torch.testing.assert_close(tensors[name].grad[: len(tensor)], tensor.grad, atol=1e-10, rtol=1e-10)
    assert not tensors["weight"].grad[40].any()


def test_no_tokens_at_all():
    tensors, targets = case(tokens=0, order=0)
    losses = chunked(tensors, targets, 1.5)
    gradients = torch.autograd.grad(losses.loss, list(tensors.values()))
    assert all(kind == 0 for kind in losses) and all(not gradient.any() for gradient in gradients)


@pytest.mark.parametrize("grad", [True, False])
def test_no_tensor_is_larger_than_a_chunk_of_logits(grad):
    tensors, targets = case(tokens=128, vocabulary=500, order=0)
    with Largest() as largest, torch.set_grad_enabled(grad):
        chunked(tensors, targets, 1.5, 0.1, 16)
    assert largest.numel == 16 * 500


@pytest.mark.parametrize("options, message", [
    ({"label_smoothing": 1.0}, "--label-smoothing"), ({"chunk_tokens": -1}, "--chunk-tokens"),
])  # fmt: skip
def test_options_out_of_range(options, message):
    tensors, targets = case(order=0)
    with pytest.raises(ValueError, match=message):
        chunked_entmax_loss(targets=targets, mapping=sparsemax, alpha=2.0, **tensors, **options)
