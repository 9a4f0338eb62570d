"""Projection, mapping and loss over chunks, against the whole logits, log_softmax and autograd in float64."""

import pytest
import torch
from torch.nn import functional as F

from multimax_fairseq.kernels import compiler
from multimax_fairseq.kernels.loss import chunked_cross_entropy, chunks
from multimax_fairseq.mappings.modulator import modulate_formula

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


def logits_of(tensors):
    """Products in their dtype, then fp32 at least."""
    logits = F.linear(tensors["features"], tensors["weight"], tensors.get("bias"))
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def whole(tensors, targets, smoothing=0.0):
    """(loss, nll_loss), (tokens,) each, from the definition: with smoothing, ε / (V − 1) on all other words.

    Logits are computed in the dtype of the features, as a model's.
    """
    logits = logits_of(tensors)
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
@pytest.mark.parametrize("chunk_tokens", [0, 1, 5, 23])
@pytest.mark.parametrize("backend", ["eager", "compiled"])
def test_losses_and_gradients_are_those_of_all_logits(backend, chunk_tokens, order, bias, smoothing, monkeypatch):
    monkeypatch.setenv("MULTIMAX_BACKEND", backend)
    monkeypatch.setattr(chunks, "CPU_BLOCK", 2 * 41)
    tensors, targets = case(order=order, bias=bias)
    kinds = whole(tensors, targets, smoothing)
    each = chunked(tensors, targets, smoothing, chunk_tokens, reduce=False)
    torch.testing.assert_close(tuple(each), kinds, atol=1e-12, rtol=1e-12)
    expected, actual = [kind.sum() for kind in kinds], chunked(tensors, targets, smoothing, chunk_tokens)
    torch.testing.assert_close(list(actual), expected, atol=1e-10, rtol=1e-12)
    inputs = list(tensors.values())
    gradients = torch.autograd.grad(3 * actual.loss, inputs)
    expected_gradients = torch.autograd.grad(3 * expected[0], inputs)
    torch.testing.assert_close(gradients, expected_gradients, atol=1e-10, rtol=1e-10)
    assert not actual.nll_loss.requires_grad and not each.loss.requires_grad


def largest_error(tensors, targets, smoothing=0.0, chunk_tokens=0):
    """Of each gradient, against float64: the largest difference over the largest entry."""
    exact = {name: tensor.detach().double().requires_grad_() for name, tensor in tensors.items()}
    expected = torch.autograd.grad(whole(exact, targets, smoothing)[0].sum(), list(exact.values()))
    actual = torch.autograd.grad(chunked(tensors, targets, smoothing, chunk_tokens).loss, list(tensors.values()))
    return max(((a.double() - e).abs().max() / e.abs().max()).item() for a, e in zip(actual, expected))


def run_as_on_a_gpu(monkeypatch, vocabulary):
    """Kernels run, eagerly, on 3 rows as Inductor's on a GPU before torch 2.8: what is written to a copy is lost."""

    def run_compiled(kernel, arguments):
        return kernel.eager(*(a.clone() if a.data_ptr() % 16 else a.contiguous() for a in arguments))

    block_rows = chunks.block_rows
    monkeypatch.setattr(chunks, "block_rows", lambda _, width: block_rows("cuda", width))
    monkeypatch.setattr(chunks, "GPU_BLOCK", 3 * vocabulary)
    monkeypatch.setattr(compiler.Kernel, "compiles", lambda kernel, scores, *_: min(scores.shape) > 1)
    monkeypatch.setattr(compiler.Kernel, "_run_compiled", run_compiled)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 5e-3), (torch.float32, 1e-5)])
def test_what_a_gpus_kernels_write_is_never_written_to_a_copy(dtype, tolerance, monkeypatch):
    run_as_on_a_gpu(monkeypatch, vocabulary=41)
    tensors, targets = case(tokens=70, order=0, dtype=dtype)
    assert largest_error(tensors, targets, 0.1, chunk_tokens=31) < tolerance


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
