"""Kernels by PyTorch's compiler: what happens without one, and how many are made."""

import logging
import subprocess
import sys

import pytest
import torch
import torch._inductor.codecache

from multimax_fairseq.kernels import backend, compiler, rows
from multimax_fairseq.kernels.backend import set_backend
from multimax_fairseq.kernels.compiler import Kernel
from multimax_fairseq.kernels.rows.compiled import multimax_rows, multimax_rows_backward
from multimax_fairseq.mappings import MultiMax


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.delenv("MULTIMAX_BACKEND", raising=False)
    monkeypatch.setattr(backend, "_chosen", "auto")
    monkeypatch.setattr(compiler, "_failure", "")


def double(scores, thresholds, gains):
    return 2 * scores


def scaled(scores, thresholds, gains):
    return sum(gain for row in range(len(gains)) for gain in gains[row]) * scores


ARGUMENTS = torch.randn(4, 6), torch.zeros(2, 2), torch.zeros(2, 2)


def fail(*_, **__):
    raise RuntimeError("no C++ compiler found\nand more")


def test_without_a_compiler_one_warning_and_plain_pytorch(monkeypatch, caplog):
    monkeypatch.setattr(compiler, "compile_function", fail)
    kernels = Kernel(double), Kernel(double)
    with caplog.at_level(logging.WARNING):
        for kernel in (*kernels, *kernels):
            torch.testing.assert_close(kernel(*ARGUMENTS), 2 * ARGUMENTS[0])
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "no C++ compiler found" in caplog.text and "and more" not in caplog.text


def test_without_a_compiler_but_told_to_compile(monkeypatch):
    monkeypatch.setattr(compiler, "compile_function", fail)
    set_backend("compiled")
    with pytest.raises(RuntimeError, match="no C"):
        Kernel(double)(*ARGUMENTS)


def test_a_machine_without_a_compiler():
    """The real thing: a process whose compiler is not there."""
    code = (
        "import torch; from multimax_fairseq.mappings import MultiMax; "
        "m = MultiMax(); x = torch.randn(3, 5, requires_grad=True); m(x).pow(2).sum().backward(); print(x.grad.shape)"
    )
    environment = {
        "CXX": "/no/such/compiler",
        "PATH": "",
        "PYTHONPATH": ":".join(sys.path),
        "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
    }
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert "torch.Size([3, 5])" in result.stdout, result.stderr
    assert result.stderr.count("MultiMax runs in plain PyTorch") == 1


def test_eager_never_compiles(monkeypatch):
    monkeypatch.setattr(compiler, "compile_function", fail)
    set_backend("eager")
    assert torch.equal(Kernel(double)(*ARGUMENTS), 2 * ARGUMENTS[0])


@pytest.mark.parametrize("shape", [(1, 5), (5, 1)])
def test_single_scores_and_rows_stay_eager(shape, monkeypatch):
    monkeypatch.setattr(compiler, "compile_function", fail)
    set_backend("compiled")
    scores = torch.randn(shape)
    assert torch.equal(Kernel(double)(scores, *ARGUMENTS[1:]), 2 * scores)


def test_one_kernel_for_all_shapes():
    """What an epoch and a generation run see: batches of any size, rows that grow from 1."""
    set_backend("compiled")
    module = MultiMax()
    before = None
    for shape in [(7, 5), (8, 4, 6, 6), (2, 300, 17), (64, 1, 33), (1, 1, 9), (3, 2), (2, 2), (40, 1), (160, 160)]:
        scores = torch.randn(shape, requires_grad=True)
        module(scores).pow(2).sum().backward()
        before = before or len(backend.compiled_graphs)
    assert len(backend.compiled_graphs) == before


@pytest.mark.parametrize("width", [2, 3, 15, 16, 17, 33, 160, 1_000, 4_095, 4_096, 4_097, 10_007])
@pytest.mark.parametrize("rows", [2, 3, 64])
def test_a_kernel_fits_every_shape(rows, width):
    """Nobody looks at a call again: what holds for the shape that was compiled for has to hold for all."""
    set_backend("compiled")
    scores, grad = torch.randn(2, rows, width)
    parameters = torch.randn(2, 2, 2).mul_(0.1).unbind()
    probabilities = multimax_rows.eager(scores, *parameters)
    torch.testing.assert_close(multimax_rows(scores, *parameters), probabilities)
    actual = multimax_rows_backward(scores, probabilities, grad, *parameters)
    expected = multimax_rows_backward.eager(scores, probabilities, grad, *parameters)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_rows_that_are_not_contiguous():
    set_backend("compiled")
    scores, parameters = torch.randn(12, 7).T, ARGUMENTS[1:]
    torch.testing.assert_close(multimax_rows(scores, *parameters), multimax_rows.eager(scores, *parameters))
    (result,) = multimax_rows.over_rows([scores], parameters)
    torch.testing.assert_close(result, multimax_rows.eager(scores, *parameters))


def test_scores_of_the_shape_of_parameters():
    """What is compiled for is scores of another shape, and these very parameters."""
    set_backend("compiled")
    kernel = Kernel(scaled)
    for scores in (torch.ones(2, 2), torch.ones(3, 5)):
        assert torch.equal(kernel(scores, torch.zeros(2, 2), torch.full((2, 2), 3.0)), 12 * scores)


def test_the_first_call_is_announced(caplog):
    set_backend("compiled")
    with caplog.at_level(logging.INFO):
        Kernel(double)(*ARGUMENTS)
        assert "compiling double" in caplog.text and "compiled double in" in caplog.text


def test_rows_in_blocks_where_eager_and_whole_where_compiled(monkeypatch):
    monkeypatch.setattr(compiler, "EAGER_BLOCK", 12)
    scores = torch.arange(60.0).view(2, 5, 6)
    for name, heights in (("eager", [2, 2, 2, 2, 2]), ("compiled", [10])):
        set_backend(name)
        blocks = Kernel(double).over_rows([scores], ARGUMENTS[1:])
        assert [len(block) for block in blocks] == heights
        torch.testing.assert_close(torch.cat(blocks), 2 * scores.view(10, 6))


@pytest.mark.parametrize("width", [160, 5_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["multimax_rows", "multimax_rows_backward"])
def test_what_the_compiler_takes_for_granted_holds_for_every_shape(name, dtype, width, monkeypatch):
    """Its guards, that is. Nobody checks them at a call: they may only say what the choice of a kernel settles."""
    kernel, traced = getattr(rows, name), []
    inductor = torch._inductor.compile

    def stop(*_, **__):
        raise RuntimeError("all the code is there")

    def compile_traced(*inputs, **options):
        traced.append(inputs)
        return inductor(*inputs, **options)

    monkeypatch.setattr(torch._inductor, "compile", compile_traced)
    monkeypatch.setattr(torch._inductor.codecache.PyCodeCache, "write", stop)
    count = {"multimax_rows": 1, "multimax_rows_backward": 3}[name]
    arguments = [torch.zeros(50, width, dtype=dtype)] * count + [torch.zeros(2, 2)] * 2
    with pytest.raises(Exception, match="all the code is there"), torch._inductor.config.patch(fx_graph_cache=False):
        compiler.compile_function(kernel.eager, compiler._examples(arguments, 2))
    ((_, inputs),) = traced
    environment, symbols = inputs[0].fake_mode.shape_env, [size.node.expr for size in inputs[0].shape]
    for height in (2, 10**6):
        for width_now in (2, compiler.WIDE) if width <= compiler.WIDE else (compiler.WIDE + 1, 10**6):
            sizes = {**environment.var_to_val, **dict(zip(symbols, (height, width_now)))}
            broken = [guard.expr for guard in environment.guards if not guard.expr.subs(sizes)]
            assert not broken, (height, width_now)


def test_a_kernel_for_each_number_of_threads(monkeypatch):
    def compile_function(function, _):
        compiled_for.append(torch.get_num_threads())
        return function

    monkeypatch.setattr(compiler, "compile_function", compile_function)
    set_backend("compiled")
    compiled_for, kernel, before = [], Kernel(double), torch.get_num_threads()
    try:
        for threads in (1, 2, 1):
            torch.set_num_threads(threads)
            kernel(*ARGUMENTS)
    finally:
        torch.set_num_threads(before)
    assert compiled_for == [1, 2]


def test_threads_of_an_earlier_process_are_not_taken_over(monkeypatch):
    """PyTorch keeps what it has compiled by its options: the number of threads has to be one of them."""
    given = []
    monkeypatch.setattr(torch._inductor, "compile", lambda graph, inputs, options: given.append(options))
    compiler.compile_function(double, ARGUMENTS)
    assert given[0]["cpp.threads"] == torch.get_num_threads()
