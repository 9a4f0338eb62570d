"""Triton's attention, interpreted on the CPU: run by test_kernels_triton_attention.py, with TRITON_INTERPRET=1."""

import math
import os

import pytest
import torch
from conftest import load_script

from multimax_fairseq.kernels import cpp_attention, triton_attention
from multimax_fairseq.kernels.attention import multimax_attention
from multimax_fairseq.kernels.masks import Masks

check_kernels = load_script("check_kernels")
INF = math.inf
WHY = ["float64", "mixed dtypes", "head_dim 129", "order 3", "too few keys", "eager", "none"]
CASES = int(os.environ.get("MULTIMAX_TRITON_CASES", 3))


@pytest.fixture(autouse=True)
def compiled(monkeypatch):
    monkeypatch.setenv("MULTIMAX_BACKEND", "compiled")


def case(tgt_len=5, src_len=7, order=2, dtype=torch.float32):
    query, key, value = (torch.randn(2, length, 4, dtype=dtype) for length in (tgt_len, src_len, src_len))
    inputs = query, key, value, torch.randn(order, 2), 0.1 * torch.randn(order, 2)
    return [tensor.requires_grad_() for tensor in inputs]


@pytest.mark.parametrize("number", range(CASES))
def test_random_cases(number):
    (row,) = check_kernels.check_cases(1, seed=number)
    assert row["right"], row


def test_a_wrong_result_is_seen(monkeypatch):
    attend = triton_attention.attend
    monkeypatch.setattr(triton_attention, "attend", lambda *arguments: 1.001 * attend(*arguments))
    assert not all(row["right"] for row in check_kernels.check_cases(2, seed=0, dtypes=["fp32"]))


def test_half_precision_beside_plain_pytorch():
    row = check_kernels.check_halves(130, True, 4.0, torch.float16)
    assert row["right"], row


def test_dropout_follows_from_the_seed():
    inputs = case()
    first, again, other = (triton_attention.attend(*inputs, Masks(), 0.5, seed) for seed in (7, 7, 8))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_query_that_sees_no_key_gets_zeros_and_gives_none():
    """A row is empty by its scores: σ of those in the second is below all that fp32 has, and they are there."""
    inputs = case()
    with torch.no_grad():
        inputs[0][:, 1] = 1e18
        inputs[1].abs_().mul_(-1)
        inputs[4].fill_(-1e3)
    scores = torch.zeros(5, 7)
    scores[2] = -INF
    output = triton_attention.attend(*inputs, Masks(scores=scores))
    assert output[:, 2].eq(0).all() and output[:, 1].ne(0).all() and output.isfinite().all()
    keys = torch.zeros(2, 1, 7)
    keys[1] = -INF
    inputs = case()
    output = triton_attention.attend(*inputs, Masks(keys=keys))
    grads = torch.autograd.grad(output.sum(), inputs)
    assert output[1].eq(0).all() and all(grad[1].eq(0).all() for grad in grads[:3])
    assert all(grad.isfinite().all() for grad in grads)


def test_what_is_not_a_number_stays_so():
    query, *others = case(5, 5)
    query = query.detach().index_fill(1, torch.tensor([0, 3]), float("nan"))
    output = triton_attention.attend(query, *others, Masks(causal=True))
    assert output[:, [0, 3]].isnan().all() and output[:, [1, 2, 4]].isfinite().all()


def test_gradients_of_gradients_are_refused():
    inputs = case()
    output = triton_attention.attend(*inputs, Masks())
    grads = torch.autograd.grad(output.pow(2).sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grads[0].sum().backward()


def test_nothing_of_length_squared_is_kept_and_results_lie_length_first():
    kept, length = [], 40
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda _: _):
        output = triton_attention.attend(*case(length, length), Masks(causal=True))
    assert sum(tensor.numel() for tensor in kept) == 2 * length * (3 * 4 + 2) + 8
    assert output.transpose(0, 1).is_contiguous()


def test_attention_goes_to_triton_where_that_serves(monkeypatch):
    monkeypatch.setattr(cpp_attention, "serves", lambda *_: False)
    for dtype, served in ((torch.float32, True), (torch.float16, True), (torch.bfloat16, False)):
        output = multimax_attention(*case(dtype=dtype), Masks())
        assert (type(output.grad_fn).__name__ == "_TritonMultiMaxBackward") == served


@pytest.mark.parametrize("why", WHY)
def test_what_is_not_served(why, monkeypatch):
    inputs, masks = case(), Masks()
    if why == "float64":
        inputs = [tensor.double() for tensor in inputs]
    elif why == "mixed dtypes":
        inputs[1] = inputs[1].half()
    elif why == "head_dim 129":
        inputs[:3] = (torch.randn(2, 3, 129) for _ in range(3))
    elif why == "order 3":
        inputs[3:] = torch.randn(2, 3, 2)
    elif why == "too few keys":
        inputs, masks = case(7, 5), Masks(causal=True)
    elif why == "eager":
        monkeypatch.setenv("MULTIMAX_BACKEND", "eager")
    assert triton_attention.serves(*inputs, masks, 0.1) == (why == "none")
