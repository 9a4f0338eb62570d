"""Triton's attention without a GPU: interpreted, in a process of its own; as binaries; and where it cannot run."""

import sys

import pytest
import torch
from conftest import ROOT, load_script, run

from multimax_fairseq.kernels.attention import gpu
from multimax_fairseq.kernels.attention.call import Call
from multimax_fairseq.kernels.rows import Rows

TESTS = ROOT / "tests" / "interpreted_attention.py"
needs_triton = pytest.mark.skipif(gpu.version() is None, reason="needs Triton 3.7 or later (pip install triton)")


@pytest.mark.slow
@needs_triton
def test_interpreted():
    """Triton has to be told before it is imported."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", TESTS]
    assert " passed" in run(*command, cwd=ROOT, env={"TRITON_INTERPRET": "1"}).stdout


def test_importing_needs_no_triton_and_no_gpu():
    code = (
        "import sys; sys.modules['triton'] = None\n"  # importing it fails
        "import multimax_fairseq.attention\n"
        "assert not any(name.startswith('triton.') for name in sys.modules), 'imported'\n"
        "print('imported')"
    )
    assert run(sys.executable, "-c", code, cwd=ROOT).stdout.strip().endswith("imported")


def test_tensors_on_a_cpu_are_not_served():
    query = torch.zeros(1, 1, 2, 3)
    assert not gpu.serves(query, query, query, Call(Rows("softmax")))


@pytest.mark.parametrize("dtype", gpu.DTYPES)
@pytest.mark.parametrize("head_dim", [1, 16, 17, 64, 65, 128])
def test_every_kernel_has_blocks_for_every_case(dtype, head_dim):
    padded = gpu.padded(head_dim)
    assert head_dim <= padded <= max(2 * head_dim - 1, 16) and padded & (padded - 1) == 0
    for kernel in ("forward", "backward_queries", "backward_keys"):
        for added in (False, True):
            blocks = gpu.blocks_of(kernel, dtype, head_dim, added)
            assert min(blocks.queries, blocks.keys) >= 16  # what products need


# ---------------------------------------------------------------- binaries


@pytest.fixture(scope="module")
def check_kernels():
    return load_script("check_kernels")


# One of each kernel, dtype and target; benchmarks/check_kernels.py compiles them all.
@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize(
    ("kernel", "target", "dtype", "head_dim"),
    [
        ("forward", "sm_90", "bf16", 128),
        ("backward_queries", "sm_80", "fp32", 64),
        ("backward_keys", "gfx942", "fp16", 64),
    ],
)
def test_binaries_without_spills_that_fit_into_shared_memory(kernel, target, dtype, head_dim, check_kernels):
    row = check_kernels.binary(target, dtype, head_dim, "dropout", kernel)
    limit = 65_536 if target == "gfx942" else 99 * 1_024
    assert row["spilled"] == 0 and 0 < row["shared"] <= limit


@pytest.mark.slow
@needs_triton
def test_what_spills_is_seen(check_kernels, monkeypatch):
    monkeypatch.setitem(gpu.BLOCKS, ("forward", 2, 64), gpu.Blocks(64, 64, 1, 1))
    row = check_kernels.binary("sm_80", "fp16", 64, "dropout", "forward")
    assert row["spilled"] > 0 and not row["right"]
