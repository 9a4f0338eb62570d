"""The loss of sparse mappings over chunks, against its definition in float64 and the losses of the entmax package."""

import entmax as entmax_package
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels_loss_cross_entropy import case, logits_of
from torch.nn import functional as F

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
    x = logits_of(tensors)
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
