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


def attention_of(mapping, query, key, value):
    return mapped_attention(query, key, value, mapping, is_causal=True, dropout_p=0.1)


@pytest.mark.parametrize("backend", ["eager", pytest.param("compiled", marks=needs_compiler)])
@pytest.mark.parametrize("name", MAPPINGS)
def test_on_a_cpu(name, backend, monkeypatch):
    monkeypatch.setenv("MULTIMAX_BACKEND", backend)
    threads = torch.get_num_threads()
    torch.set_num_threads(4)  # each sums a part
    try:
        for call, number, size in ((torch.nn.Module.__call__, 1, 300), (attention_of, 3, 16)):
            inputs = [tensor.requires_grad_() for tensor in 3 * torch.randn(number, 2, 4, 300, size)]
            found = []
            for _ in range(2):
                torch.manual_seed(1)
                mapping = build_mapping(name, **MAPPINGS[name])
                output = call(mapping, *inputs)
                upstream = torch.randn(output.shape)
                found.append([output, *torch.autograd.grad(output, [*inputs, *mapping.parameters()], upstream)])
            assert all(map(torch.equal, *found))
            assert all(tensor.ne(0).any() for tensor in found[0])
    finally:
        torch.set_num_threads(threads)
