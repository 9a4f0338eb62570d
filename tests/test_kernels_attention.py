"""What every way to compute attention owes: precision, numbers that are none, dropout, who computes."""

import math

import pytest
import torch
import torch.utils.checkpoint
from conftest import needs_compiler
from test_attention import EVERY, gradients, make

from multimax_fairseq.attention import attend, mapped_attention
from multimax_fairseq.kernels.attention import blocks, kernels_for
from multimax_fairseq.kernels.attention.call import Call
from multimax_fairseq.kernels.rows import Rows
from multimax_fairseq.mappings import MAPPINGS, build_mapping
from multimax_fairseq.mappings.masking import probabilities_by

INF, NAN = math.inf, math.nan


@pytest.fixture(params=[pytest.param("C++", marks=needs_compiler), "blocks", "formula"], autouse=True)
def way(request, monkeypatch):
    choose(request.param, monkeypatch)
    return request.param


def choose(way, monkeypatch):
    monkeypatch.setenv("MULTIMAX_BACKEND", "eager" if way == "formula" else "compiled")
    if way == "blocks":  # several of them in what are small problems here
        monkeypatch.setattr("multimax_fairseq.attention.kernels_for", lambda *_: None)
        monkeypatch.setitem(blocks.WHOLE, "cpu", 0)
        monkeypatch.setitem(blocks.QUERIES, "cpu", 32)


def draw(*sizes, dtype=torch.float32, mean=0.0):
    """Query, key and value, the last of this mean, so that scores have standard deviation 2."""
    bsz, heads, tgt_len, src_len, head_dim = sizes
    lengths = tgt_len, src_len, src_len
    spread = 2**0.5 * head_dim**-0.25
    tensors = [torch.randn(bsz, heads, length, head_dim, dtype=torch.float64) for length in lengths]
    tensors = [tensors[0] * spread, tensors[1] * spread, tensors[2] + mean]
    return [tensor.to(dtype).requires_grad_() for tensor in tensors]


# ---------------------------------------------------------------- numbers that are none


@pytest.mark.parametrize("name", EVERY)
def test_a_query_that_sees_no_key_gets_zeros_and_gives_none(name):
    query, key, value = draw(3, 2, 40, 40, 8)
    mask = torch.ones(3, 1, 1, 40, dtype=torch.bool)
    mask[1, ..., 20:] = mask[2] = False
    mapping = make(name, 2)
    output = mapped_attention(query, key, value, mapping, mask, is_causal=True)
    assert output[2].eq(0).all() and output[:2].ne(0).any(-1).all()
    grads = torch.autograd.grad(output.square().sum(), [query, key, value, *mapping.parameters()])
    assert all(grad[2].eq(0).all() and grad.isfinite().all() for grad in grads[:3])
    assert all(grad.isfinite().all() and grad.ne(0).any() for grad in grads[3:])
    assert grads[1][1, :, 20:].eq(0).all() and grads[2][1, :, 20:].eq(0).all()


@pytest.mark.parametrize("name", MAPPINGS)
def test_what_is_not_a_number_stays_so_and_stays_where_it_is(name):
    query, key, value = draw(1, 2, 9, 9, 4)
    query = query.detach().index_fill(2, torch.tensor([0, 3]), NAN)
    output = mapped_attention(query, key, value, make(name, 2), is_causal=True)
    assert output.isnan().all(-1)[0, 0].tolist() == [number in (0, 3) for number in range(9)]


@pytest.mark.parametrize("gain", [-1e3, 1e3])
def test_where_sigma_overflows_there_is_no_number(gain):
    """All σ of a row are −inf, or one is +inf: softmax has no answer. A row is empty by its mask alone."""
    mapping = build_mapping("multimax")
    with torch.no_grad():
        mapping.gains.fill_(gain)
    query, key, value = draw(1, 1, 3, 5, 4)
    query = torch.tensor([[[[0.0] * 4, [1e18] * 4, [0.0] * 4]]])
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[2] = False
    output = mapped_attention(query, -key.abs(), value, mapping, mask)
    assert output[0, 0, 0].isfinite().all() and output[0, 0, 1].isnan().all() and output[0, 0, 2].eq(0).all()


# ---------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_many_equal_scores_and_large_values_do_not_overflow(dtype):
    """4,096 · 20 is beyond fp16, and so is the sum of 70,000 / 4,096."""
    query, key, value = torch.zeros(1, 2, 8), torch.zeros(1, 4_096, 8), torch.full((1, 4_096, 8), 20.0)
    output = mapped_attention(*(x.to(dtype) for x in (query, key, value)), "multimax")
    torch.testing.assert_close(output, torch.full_like(output, 20.0), atol=0, rtol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("length", "causal", "mean"), [(160, True, 4.0), (40, False, 1.0)])
@pytest.mark.parametrize("name", MAPPINGS)
def test_no_result_or_gradient_has_twice_the_error_of_plain_pytorch(name, length, causal, mean, dtype):
    """Root mean squares over seeds: the error of a few numbers may be next to nothing by luck."""
    squares = torch.zeros(3, 6, dtype=torch.float64)
    for seed in range(4 if dtype == torch.float32 else 2):
        torch.manual_seed(seed)
        mapping = make(name, 2)
        inputs, upstream = draw(1, 2, length, length, 64, dtype=dtype, mean=mean), torch.randn(1, 2, length, 64)
        numbers, upstream = list(mapping.parameters()), upstream.to(dtype)

        def ours(query, key, value, *numbers, mapping=mapping):
            return mapped_attention(query, key, value, mapping, is_causal=causal, scale=1.0)

        def plain(query, key, value, *numbers, mapping=mapping):
            return attend(query, key, value, probabilities_by(mapping), None, causal)

        found = [gradients(function, [*inputs, *numbers], upstream) for function in (plain, ours)]
        doubles = [tensor.detach().double().requires_grad_() for tensor in inputs]
        mapping.double()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MULTIMAX_BACKEND", "eager")
            exact = gradients(plain, [*doubles, *mapping.parameters()], upstream.double())
        for row, others in enumerate((*found, [torch.zeros_like(tensor) for tensor in exact])):
            squares[row, : len(exact)] += torch.stack([(a - b).square().sum() for a, b in zip(others, exact)])
    errors = (squares[:2, : len(exact)] / squares[2, : len(exact)]).sqrt()
    assert (errors[1] <= 2 * errors[0] + 2e-7).all(), errors


# ---------------------------------------------------------------- dropout


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", ["multimax", "temperatures"])
def test_dropout_of_checkpointed_activations(name, use_reentrant):
    """Computed again, they are the same: torch puts back the state of the generator that they come from."""
    mapping, inputs = make(name), draw(1, 2, 40, 40, 8)

    def attend(*tensors):
        return mapped_attention(*tensors, mapping, None, 0.3, is_causal=True)

    def checkpointed(*tensors):
        return torch.utils.checkpoint.checkpoint(attend, *tensors, use_reentrant=use_reentrant)

    found = []
    for function in (attend, checkpointed):
        torch.manual_seed(5)
        output = function(*inputs)
        for tensor in inputs:
            tensor.grad = None
        torch.rand(3)  # in between, numbers are drawn for something else
        output.square().sum().backward()
        found.append([output.detach(), *(tensor.grad for tensor in inputs)])
    torch.testing.assert_close(*found, atol=0, rtol=0)


# ---------------------------------------------------------------- who computes


@needs_compiler
@pytest.mark.parametrize("name", MAPPINGS)
def test_a_cpu_has_cpp_for_every_mapping_at_every_length(name, monkeypatch):
    choose("C++", monkeypatch)
    for length in (1, 300):
        query, key, value = draw(1, 2, length, length, 8)
        assert kernels_for(attend, query, key, value, Call(make(name, 2).kernel_rows())) is not None
    empty = torch.zeros(1, 2, 0, 8)
    assert kernels_for(attend, empty, key, value, Call(Rows("softmax"))) is None


def test_blocks_pay_where_the_matrix_is_large():
    """By tensors without memory: there is no GPU here, and no number is asked for."""
    short, long = (torch.empty(4, 8, length, 64, device="meta") for length in (512, 4_096))
    assert blocks.pay(long, long) and not blocks.pay(short, short)
