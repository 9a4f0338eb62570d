"""Triton's attention without a GPU: interpreted, in a process of its own, and what happens where it cannot run."""

import sys

import pytest
import torch
from conftest import ROOT, run

from multimax_fairseq.kernels import triton_attention
from multimax_fairseq.kernels.masks import Masks

TESTS = ROOT / "tests" / "interpreted_attention.py"


@pytest.mark.slow
@pytest.mark.skipif(triton_attention.version() is None, reason="needs Triton 3.9 (pip install triton==3.9.0)")
def test_interpreted():
    """Triton has to be told before it is imported."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", TESTS]
    assert " passed" in run(*command, cwd=ROOT, env={"TRITON_INTERPRET": "1"}).stdout


def test_importing_needs_no_triton_and_no_gpu():
    code = (
        "import sys; sys.modules['triton'] = None\n"  # importing it fails
        "from multimax_fairseq.kernels import triton_attention\n"
        "assert not any(name.startswith('triton.') for name in sys.modules), 'imported'\n"
        "from multimax_fairseq.kernels import attention\n"
        "print('imported')"
    )
    assert run(sys.executable, "-c", code, cwd=ROOT).stdout.strip().endswith("imported")


def test_tensors_on_a_cpu_are_not_served(monkeypatch):
    monkeypatch.setenv("MULTIMAX_BACKEND", "compiled")
    query, parameters = torch.zeros(1, 2, 3), torch.zeros(2, 2)
    assert not triton_attention.serves(query, query, query, parameters, parameters, Masks(), 0.0)


def test_one_warning_where_kernels_cannot_be_compiled(monkeypatch, caplog):
    class Kernels:
        class write_one:
            def __class_getitem__(cls, grid):
                def launch(_):
                    raise RuntimeError("no C compiler\nand more")

                return launch

    monkeypatch.setenv("MULTIMAX_BACKEND", "auto")
    assert not triton_attention.compiles(Kernels, torch.device("cpu"))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "no C compiler" in caplog.text and "and more" not in caplog.text
    monkeypatch.setenv("MULTIMAX_BACKEND", "compiled")
    with pytest.raises(RuntimeError, match="no C compiler"):
        triton_attention.compiles(Kernels, torch.device("cpu"))


@pytest.mark.parametrize("dtype", triton_attention.DTYPES)
@pytest.mark.parametrize("head_dim", [1, 16, 17, 64, 65, 128])
def test_every_kernel_has_blocks_for_every_case(dtype, head_dim):
    padded = triton_attention.padded(head_dim)
    assert head_dim <= padded <= max(2 * head_dim - 1, 16) and padded & (padded - 1) == 0
    for kernel in ("forward", "backward_queries", "backward_keys"):
        for added in (False, True):
            blocks = triton_attention.blocks_of(kernel, dtype, head_dim, added)
            assert min(blocks.queries, blocks.keys) >= 16  # what products need
