"""Attention in C++: layouts, threads, memory and dropout. All of it against float64 is in test_attention.py."""

import math

import numpy as np
import pytest
import torch
from conftest import load_script, needs_compiler
from test_attention import over_present
from test_kernels_rows_cpu import CAPABILITIES, ORACLES, Rows, compiled_for, rows_of

from multimax_fairseq.attention import masked_scores
from multimax_fairseq.kernels.attention import cpu
from multimax_fairseq.kernels.attention.call import Call

BSZ, HEADS = 2, 3
pytestmark = needs_compiler
check_kernels = load_script("check_kernels")  # has the random numbers of dropout
names = pytest.mark.parametrize("name", ORACLES)


@pytest.fixture(autouse=True, scope="module", params=CAPABILITIES)
def library(request, tmp_path_factory):
    with compiled_for(request.param, cpu, tmp_path_factory.mktemp("extensions")):
        yield


@pytest.fixture(params=[2**18, 40 * 7, 1], ids="blocks of {} scores".format)
def blocks(request, monkeypatch):
    monkeypatch.setattr(cpu, "SCORES", request.param)


def case(tgt_len=40, src_len=40, head_dim=16, value_dim=16):
    shapes = (tgt_len, head_dim), (src_len, head_dim), (src_len, value_dim), (tgt_len, value_dim)
    query, key, value, grad = (torch.randn(BSZ, HEADS, *shape) for shape in shapes)
    return [query / head_dim**0.25, key / head_dim**0.25, value], grad


def results(inputs, rows, grad, mask=None, is_causal=False, dropout=0.0, seed=0):
    call = Call(rows, mask, is_causal, dropout, seed)
    output, saved = cpu.forward(*inputs, call)
    return [output, *(g for g in cpu.backward(*inputs, call, saved, grad) if g is not None)]


def exact(inputs, rows, grad, mask=None, is_causal=False, factors=1):
    doubles = [tensor.detach().double().requires_grad_() for tensor in (*inputs, *rows.numbers)]
    query, key, value, *numbers = doubles
    probabilities = over_present(lambda x: ORACLES[rows.name](x, *numbers))
    output = (probabilities(masked_scores(query @ key.mT, mask, is_causal)) * factors) @ value
    return [output, *torch.autograd.grad(output, doubles[:3] if rows.name == "evsoftmax" else doubles, grad.double())]


def assert_near(found, expected):
    """Scores are rounded before the mapping; the gradients of its numbers, from the fifth on, sum over all rows."""
    for place, (result, other) in enumerate(zip(found, expected, strict=True)):
        error = 1e-5 if place < 4 else 5e-5
        torch.testing.assert_close(result.double(), other, atol=error * max(1, other.abs().max().item()), rtol=0)


def kept(seed, heads, tgt_len, src_len, dropout):
    """Which probabilities are kept, (heads, tgt_len, src_len): of a key j the counter is (16 ⌊j / 64⌋ + j mod 16,
    query, head, 0), and of its four numbers that of number ⌊j / 16⌋ mod 4 decides."""
    head, query, key = (axis.ravel() for axis in np.mgrid[:heads, :tgt_len, :src_len])
    counters = 16 * (key // 64) + key % 16, query, head, 0 * head
    numbers = np.stack(check_kernels.philox(counters, (seed % 2**32, seed >> 32)))
    decides = numbers[key // 16 % 4, np.arange(key.size)]
    return torch.from_numpy(decides >= int(dropout * 2**32)).view(heads, tgt_len, src_len)


@names
@pytest.mark.parametrize(("sizes", "mask_shape", "dropout"), [
    ((40, 40, 16, 16), None, 0.0), ((1, 300, 5, 8), (BSZ, 1, 1), 0.0), ((129, 17, 33, 1), (1, HEADS, 129), 0.0),
    ((70, 200, 1, 20), (1, 1, 70), 0.0), ((40, 33, 16, 16), (BSZ, HEADS, 40), 0.0), ((40, 70, 16, 16), None, 0.3),
])  # fmt: skip
@pytest.mark.parametrize("is_causal", [False, True])
def test_output_and_gradients_are_those_of_double_precision(name, sizes, mask_shape, dropout, is_causal, blocks):
    (inputs, grad), rows, seed, mask, factors = case(*sizes), rows_of(name), 0x0123_4567_89AB_CDEF, None, 1
    if mask_shape:
        mask = torch.randn(*mask_shape, sizes[1])
        mask = mask.masked_fill(torch.rand_like(mask) < 0.3, -math.inf)
    if dropout:
        factors = kept(seed, BSZ * HEADS, *sizes[:2], dropout).view(BSZ, HEADS, *sizes[:2]) / (1 - dropout)
    assert cpu.serves(*inputs, Call(rows))
    found = results(inputs, rows, grad, mask, is_causal, dropout, seed)
    assert_near(found, exact(inputs, rows, grad, mask, is_causal, factors))


def test_the_backward_computes_the_same_probabilities_again():
    """Also with a score some ulps from where rows begin to be solved in double precision, EDGE in sparse.hpp."""
    c, rows = 0.6, torch.randn(400, 20)
    t = ORACLES["entmax"](rows.double(), c).amax(-1, keepdim=True) ** c
    bases = -2e-3 + torch.arange(-20, 21) * 2.0**-23
    edge = rows.amax(-1, keepdim=True) + (t * (bases - 1) / c).float()
    query = torch.cat([rows.repeat_interleave(41, 0), edge.view(-1, 1)], 1)[None, None]
    key = value = torch.eye(21)[None, None]
    grad = torch.randn_like(query)
    probabilities, _, _, grad_value, _ = results([query, key, value], Rows("entmax", (torch.tensor(c),)), grad)
    torch.testing.assert_close(grad_value.double(), probabilities.double().mT @ grad.double(), atol=1e-4, rtol=0)


@names
def test_any_layout_in_memory(name):
    """As projections give them, and with head_dim first; the same of what was saved."""
    inputs, grad = case()
    rows, mask, expected = rows_of(name), torch.randn(BSZ, HEADS, 40, 40), None
    for way in (
        lambda x: x,
        lambda x: x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3),
        lambda x: x.mT.contiguous().mT,
    ):
        call = Call(rows, way(mask), True, 0.3, 5)
        output, saved = cpu.forward(*map(way, inputs), call)
        found = [output, *cpu.backward(*map(way, inputs), call, tuple(map(way, saved)), way(grad))]
        expected = expected or found
        torch.testing.assert_close(found, expected, atol=0, rtol=0)


@names
@pytest.mark.parametrize("heads", [1, HEADS])
def test_any_number_of_threads_gives_the_same_bits(name, heads):
    """Also where it changes between forward and backward."""
    inputs, grad = case(300, 300)
    inputs, grad = [tensor[:1, :heads] for tensor in inputs], grad[:1, :heads]
    rows, before, expected = rows_of(name), torch.get_num_threads(), None
    if name == "entmax" and heads == 1:
        rows = Rows(name, (torch.tensor(0.4),))
    try:
        for first, second in ((1, 1), (2, 2), (2, 1), (5, 64), (3, 3), (3, 3)):
            torch.set_num_threads(first)
            output, saved = cpu.forward(*inputs, Call(rows, None, True, 0.2, 7))
            torch.set_num_threads(second)
            found = [output, *cpu.backward(*inputs, Call(rows, None, True, 0.2, 7), saved, grad)]
            expected = expected or found
            torch.testing.assert_close(found, expected, atol=0, rtol=0)
    finally:
        torch.set_num_threads(before)


def test_memory_for_threads_is_bounded(monkeypatch):
    """Of the size of a head's keys and of a block, not of all heads, nor of length²."""
    taken, original = [], torch.Tensor.new_empty
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda *given, **options: taken.append(original(*given, **options)) or taken[-1]
    )
    query = torch.zeros(1, 8, 2_048, 16)
    cpu.forward(query, query, query, Call(rows_of("multimax"), None, True))
    most = torch.get_num_threads() * (4 * 2_048 * 16 + 2 * cpu.SCORES + 2 * 128 * 16 + 6 * 2_048 + 2_048)
    assert max(tensor.numel() for tensor in taken) <= max(most, query.numel())


@names
def test_what_is_not_a_number_stays_in_its_row(name):
    (query, key, value), _ = case()
    query[:, :, 3] = math.nan
    output, _ = cpu.forward(query, key, value, Call(rows_of(name), None, True))
    assert output[:, :, 3].isnan().all() and output[:, :, [*range(3), *range(4, 40)]].isfinite().all()


def test_shapes_that_do_not_go_together():
    (query, key, value), _ = case()
    with pytest.raises(ValueError, match=r"key is \(2, 3, 39, 16\); expected \(2, 3, 40, 16\)"):
        cpu.forward(query, key[:, :, 1:], value, Call(Rows("softmax")))
    with pytest.raises(RuntimeError, match="expand"):
        cpu.forward(query, key, value, Call(Rows("softmax"), torch.zeros(1, 1, 1, 39)))


def test_what_it_serves(monkeypatch):
    inputs, _ = case()
    softmax = Call(Rows("softmax"))
    assert cpu.serves(*inputs, softmax)
    assert not cpu.serves(*(tensor.double() for tensor in inputs), softmax)
    assert not cpu.serves(*inputs, Call(Rows("entmax", (torch.full((BSZ, 1, 40, 1), 0.5),))))
    monkeypatch.setattr(cpu, "sgemm", lambda: None)
    assert not cpu.serves(*inputs, softmax)
