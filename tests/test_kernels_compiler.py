"""Kernels by PyTorch's compiler: what happens without one, and how many are made."""

import logging
import os
import subprocess
import sys
import threading

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from multimax_fairseq.kernels import backend, compiler
from multimax_fairseq.kernels.compiler import Kernel
from multimax_fairseq.kernels.rows.compiled import modulate_rows, modulate_rows_backward
from multimax_fairseq.mappings import modulate


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setenv("MULTIMAX_BACKEND", "compiled")
    monkeypatch.setattr(compiler, "_failure", "")
    monkeypatch.setattr(backend, "failures", [])


def double(scores, thresholds, gains):
    return 2 * scores


def scaled(scores, thresholds, gains):
    return sum(gain for row in range(len(gains)) for gain in gains[row]) * scores


ARGUMENTS = torch.randn(4, 6), torch.zeros(2, 2), torch.zeros(2, 2)


def fail(*_, **__):
    raise RuntimeError("no C++ compiler found")


def test_without_a_compiler_but_told_to_compile(monkeypatch):
    monkeypatch.setattr(compiler, "compile_function", fail)
    with pytest.raises(RuntimeError, match="no C"):
        Kernel(double)(*ARGUMENTS)


@pytest.mark.parametrize("environment", [
    {"CXX": "/bin/false", "PATH": "", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"},
    {"TORCHINDUCTOR_CACHE_DIR": "/dev/null/cache"},
], ids=["no compiler", "no folder"])  # fmt: skip
def test_a_machine_that_cannot_compile(environment):
    """The real thing: a process whose compiler is not there, or whose folder for binaries cannot be made."""
    code = (
        "import torch; from multimax_fairseq.kernels.loss import chunked_cross_entropy as loss; "
        "from multimax_fairseq.attention import mapped_attention; x = torch.randn(3, 5, requires_grad=True); "
        "loss(x, mapped_attention(x, x, x, 'multimax'), torch.arange(3)).loss.backward(); print(x.grad.shape)"
    )
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": ":".join(sys.path), **environment}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert "torch.Size([3, 5])" in result.stdout, result.stderr
    assert result.stderr.count("MultiMax runs in plain PyTorch") == 1


@pytest.mark.parametrize("choice, shape", [("eager", (4, 6)), ("compiled", (1, 5)), ("compiled", (5, 1))])
def test_what_stays_eager(choice, shape, monkeypatch):
    """All of it where eager is asked for, and single rows and scores."""
    monkeypatch.setattr(compiler, "compile_function", fail)
    monkeypatch.setenv("MULTIMAX_BACKEND", choice)
    scores = torch.randn(shape)
    assert torch.equal(Kernel(double)(scores, *ARGUMENTS[1:]), 2 * scores)


def compiled_in(caplog):
    return sum(" in " in record.getMessage() for record in caplog.records if record.msg.startswith("compiled"))


def test_one_kernel_for_all_shapes(caplog, monkeypatch):
    """What an epoch and a generation run see: batches of any size, rows that grow from 1."""
    caplog.set_level(logging.INFO)
    for kernel in (modulate_rows, modulate_rows_backward):
        monkeypatch.setattr(kernel, "_compiled", {})
    for shape in [(7, 5), (8, 4, 6, 6), (2, 300, 17), (64, 1, 33), (1, 1, 9), (3, 2), (2, 2), (40, 1), (160, 160)]:
        scores = torch.randn(shape, requires_grad=True)
        modulate(scores, *ARGUMENTS[1:]).pow(2).sum().backward()
        assert compiled_in(caplog) == 2 and "compiling modulate_rows;" in caplog.text


@pytest.mark.parametrize("width", [2, 3, 15, 16, 17, 33, 160, 1_000, 4_095, 4_096, 4_097, 10_007])
@pytest.mark.parametrize("rows", [2, 3, 64])
def test_a_kernel_fits_every_shape(rows, width):
    """Nobody looks at a call again: what holds for the shape that was compiled for has to hold for all."""
    scores, grad = torch.randn(2, width, rows).mT  # with gaps, too
    parameters = torch.randn(2, 2, 2).mul_(0.1).unbind()
    torch.testing.assert_close(modulate_rows(scores, *parameters), modulate_rows.eager(scores, *parameters))
    actual = modulate_rows_backward(scores, grad, *parameters)
    expected = modulate_rows_backward.eager(scores, grad, *parameters)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)


def test_scores_of_the_shape_of_parameters():
    """What is compiled for is scores of another shape, and these very parameters."""
    kernel = Kernel(scaled)
    for scores in (torch.ones(2, 2), torch.ones(3, 5)):
        assert torch.equal(kernel(scores, torch.zeros(2, 2), torch.full((2, 2), 3.0)), 12 * scores)


def test_a_kernel_for_each_number_of_threads(monkeypatch):
    """PyTorch keeps what it has compiled by its options, of which the number has to be one."""
    monkeypatch.setattr(torch._inductor, "compile", lambda graph, _, options: given.append(options) or graph)
    given, kernel, before = [], Kernel(double), torch.get_num_threads()
    try:
        for threads in (1, 2, 1):
            torch.set_num_threads(threads)
            kernel(*ARGUMENTS)
    finally:
        torch.set_num_threads(before)
    assert [options["cpp.threads"] for options in given] == [1, 2]


def run_in_two_threads(kernel, results):
    threads = [threading.Thread(target=lambda: results.append(kernel(*ARGUMENTS))) for _ in range(2)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]


@pytest.mark.parametrize("first_call", [
    run_in_two_threads,
    lambda kernel, results: results.append(make_fx(kernel, tracing_mode="symbolic")(*ARGUMENTS)(*ARGUMENTS)),
    lambda kernel, results: results.append(torch.func.vmap(lambda _: kernel(*ARGUMENTS))(torch.ones(1))[0]),
], ids=["threads", "make_fx", "vmap"])  # fmt: skip
def test_a_first_call_in_any_context_leaves_kernels_that_compile(first_call, caplog):
    caplog.set_level(logging.INFO)
    kernel, results = Kernel(double), []
    first_call(kernel, results)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert kernel(*map(mode.from_tensor, ARGUMENTS)).shape == ARGUMENTS[0].shape
    results.append(kernel(*ARGUMENTS))
    assert all(torch.equal(result, 2 * ARGUMENTS[0]) for result in results) and not compiler._failure
    assert compiled_in(caplog) == 1
