"""The same call twice gives the same bits, output and gradients: those of thresholds and gains are long sums.

In Triton: interpreted_attention.py.
"""

import pytest
import torch
from conftest import needs_compiler

from multimax_fairseq.attention import mapped_attention
from multimax_fairseq.mappings import build_mapping

MAPPINGS = {
    "multimax": {"init": "shaped"},
    "entmax": {"alpha": "learned", "num_heads": 4},
    "sparsemax": {},
}


def rows_of(mapping, scores):
    return mapping(scores)


def attention_of(mapping, query, key, value):
    return mapped_attention(query, key, value, mapping, is_causal=True, dropout_p=0.1)


def assert_twice_the_same(name, call, *inputs):
    """What a call of a mapping gives, and the gradients of the inputs and of the mapping's parameters."""
    found = []
    for _ in range(2):
        torch.manual_seed(1)
        mapping, inputs = build_mapping(name, **MAPPINGS[name]), [tensor.requires_grad_() for tensor in inputs]
        output = call(mapping, *inputs)
        upstream = torch.randn(output.shape)
        found.append([output, *torch.autograd.grad(output, [*inputs, *mapping.parameters()], upstream)])
    assert all(map(torch.equal, *found)), (name, call.__name__)
    assert all(tensor.ne(0).any() for tensor in found[0])


@pytest.mark.parametrize("backend", ["eager", pytest.param("compiled", marks=needs_compiler)])
@pytest.mark.parametrize("name", MAPPINGS)
def test_on_a_cpu(name, backend, monkeypatch):
    monkeypatch.setenv("MULTIMAX_BACKEND", backend)
    threads = torch.get_num_threads()
    torch.set_num_threads(4)  # each sums a part
    try:
        assert_twice_the_same(name, rows_of, 3 * torch.randn(2, 4, 300, 300))
        assert_twice_the_same(name, attention_of, *torch.randn(3, 2, 4, 300, 16))
    finally:
        torch.set_num_threads(threads)
