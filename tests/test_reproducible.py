"""The same call twice gives the same bits, output and gradients: those of thresholds and gains are long sums."""

import subprocess
import sys

import pytest
import torch
from conftest import ROOT, environment, needs_compiler

from multimax_fairseq.attention import mapped_attention
from multimax_fairseq.mappings import build_mapping

MAPPINGS = {
    "multimax": {"init": "shaped"},
    "entmax": {"alpha": "learned", "num_heads": 4},
    "sparsemax": {},
}


def results(name, call, *inputs):
    """What a call of a mapping gives, and the gradients of the inputs and of the mapping's parameters."""
    torch.manual_seed(1)
    mapping = build_mapping(name, **MAPPINGS[name])
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    output = call(mapping, *inputs)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    return [output, *torch.autograd.grad(output, [*inputs, *mapping.parameters()], upstream)]


def assert_twice_the_same(name, length=300):
    def rows(mapping, scores):
        return mapping(scores)

    def attention(mapping, query, key, value):
        return mapped_attention(query, key, value, mapping, is_causal=True, dropout_p=0.1)

    torch.manual_seed(0)
    for call, inputs in (
        (rows, [3 * torch.randn(2, 4, length, length)]),
        (attention, torch.randn(3, 2, 4, length, 16).unbind()),
    ):
        first, again = (results(name, call, *inputs) for _ in range(2))
        assert all(torch.equal(one, other) for one, other in zip(first, again)), (name, call.__name__)
        assert all(tensor.ne(0).any() for tensor in first)


@pytest.mark.parametrize("backend", ["eager", pytest.param("compiled", marks=needs_compiler)])
@pytest.mark.parametrize("name", MAPPINGS)
def test_on_a_cpu(name, backend, monkeypatch):
    monkeypatch.setenv("MULTIMAX_BACKEND", backend)
    threads = torch.get_num_threads()
    torch.set_num_threads(4)  # each sums a part
    try:
        assert_twice_the_same(name)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
def test_in_triton():
    """Interpreted, and by construction: no program adds to what another has written."""
    pytest.importorskip("triton", minversion="3.7", reason="needs Triton 3.7 or later: pip install 'triton>=3.7'")
    code = (
        "import test_reproducible; from multimax_fairseq.kernels.attention import gpu; assert gpu.INTERPRETED; "
        "test_reproducible.assert_twice_the_same('multimax', length=40)"
    )
    variables = {"TRITON_INTERPRET": "1", "MULTIMAX_BACKEND": "compiled"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment() | variables, cwd=ROOT / "tests")
    kernels = (ROOT / "multimax_fairseq" / "kernels" / "attention" / "gpu_kernels.py").read_text()
    assert "atomic" not in kernels
