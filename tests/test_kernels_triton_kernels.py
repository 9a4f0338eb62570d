"""The kernels for a GPU as binaries: of attention, and what PyTorch's compiler makes of the functions of rows."""

import importlib.util
import sys

import pytest
from conftest import ROOT, load_script, run

from multimax_fairseq.kernels import triton_attention

needs_triton = pytest.mark.skipif(
    triton_attention.version() is None, reason="needs Triton 3.9 (pip install triton==3.9.0)"
)
pytestmark = needs_triton


@pytest.fixture(scope="module")
def check_kernels():
    return load_script("check_kernels")


# One of each kernel, dtype and target; benchmarks/check_kernels.py binaries compiles them all.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel", "target", "dtype", "head_dim"),
    [
        ("forward", "sm_90", "bf16", 128),
        ("backward_queries", "sm_80", "fp32", 64),
        ("backward_keys", "gfx942", "fp16", 64),
    ],
)
def test_binaries_without_spills_that_fit_into_shared_memory(kernel, target, dtype, head_dim, check_kernels):
    row = check_kernels.binary(kernel, target, dtype, head_dim)
    limit = 65_536 if target == "gfx942" else 99 * 1_024
    assert row["spilled"] == 0 and 0 < row["registers"] <= 512 and 0 < row["shared"] <= limit


@pytest.mark.slow
def test_what_spills_is_seen(check_kernels, monkeypatch):
    blocks = triton_attention.Blocks(64, 64, 1, 1)
    monkeypatch.setitem(triton_attention.BLOCKS, ("forward", 2, 64), blocks)
    row = check_kernels.binary("forward", "sm_80", "fp16", 64)
    assert row["spilled"] > 0 and not row["right"]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("torch._inductor.graph") is None, reason="needs PyTorch's compiler")
def test_rows_by_the_compiler_become_binaries():
    names = ["multimax_rows", "multimax_rows_backward", "cross_entropy_rows_"]
    output = run(sys.executable, ROOT / "tests" / "inductor_binaries.py", *names).stdout
    lines = [line.split() for line in output.splitlines()]
    assert {line[0] for line in lines} == set(names)
    assert all(int(size) > 1_000 and is_elf == "True" for _, _, size, is_elf in lines)
