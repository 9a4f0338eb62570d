"""Triton's attention, interpreted on the CPU: run by test_kernels_gpu.py, with TRITON_INTERPRET=1."""

import inspect
import logging
import os
import random
from functools import partial

import pytest
import torch
import torch.utils.checkpoint
from conftest import load_script
from test_attention import test_dropout  # noqa: F401  these run here, too
from test_kernels_attention import (  # noqa: F401
    test_a_query_that_sees_no_key_gets_zeros_and_gives_none,
    test_what_is_not_a_number_stays_so_and_stays_where_it_is,
    test_where_sigma_overflows_there_is_no_number,
)

from multimax_fairseq.attention import attend, mapped_attention
from multimax_fairseq.kernels import attention as kernels
from multimax_fairseq.kernels.attention import gpu, gpu_kernels
from multimax_fairseq.kernels.attention.call import Call
from multimax_fairseq.mappings import build_mapping
from multimax_fairseq.mappings.masking import probabilities_by

check_kernels = load_script("check_kernels")
CASES = int(os.environ.get("MULTIMAX_TRITON_CASES", 3))


@pytest.fixture(autouse=True)
def compiled(monkeypatch):
    monkeypatch.setenv("MULTIMAX_BACKEND", "auto")
    monkeypatch.setattr(gpu, "_distrusted", set())
    monkeypatch.setattr(gpu, "_tried", set())
    monkeypatch.setattr(gpu, "TGT_LEN", 20)  # less than a block: the interpreter is slow
    monkeypatch.setattr(gpu, "SRC_LEN", 24)


@pytest.fixture
def trusted(monkeypatch):
    monkeypatch.setattr(gpu, "is_right", lambda *_: True)


def case(tgt_len=5, src_len=7, dtype=torch.float32, mapping="multimax"):
    tensors = [torch.randn(1, 2, length, 4, dtype=dtype) for length in (tgt_len, src_len, src_len)]
    module = build_mapping(mapping)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return [tensor.requires_grad_() for tensor in tensors], module


@pytest.mark.parametrize("number", range(CASES))
def test_random_cases(number):
    case = check_kernels.random_case(random.Random(number), [torch.float32, torch.float16])
    row = check_kernels.check(case)
    assert row["right"], row


def test_a_long_case_in_half_precision():
    row = check_kernels.check(check_kernels.long_case(torch.float16, 130, True, 4.0))
    assert row["right"], row


def test_who_computes(trusted):
    for dtype, mapping, served in (
        (torch.float32, "multimax", True), (torch.float32, "softmax", True), (torch.float32, "sparsemax", False),
        (torch.float64, "multimax", False), (torch.bfloat16, "multimax", False),  # interpreted, that is wrong
    ):  # fmt: skip
        (query, key, value), module = case(dtype=dtype, mapping=mapping)
        assert (kernels.kernels_for(attend, query, key, value, Call(module.kernel_rows())) is gpu) == served


def test_the_same_call_gives_the_same_bits(trusted):
    """Here, and by construction: no program adds to what another has written."""
    (tensors, mapping), found = case(40, 40), []
    for _ in range(2):
        torch.manual_seed(1)
        output = mapped_attention(*tensors, mapping, is_causal=True, dropout_p=0.1)
        found.append([output, *torch.autograd.grad(output.square().sum(), [*tensors, *mapping.parameters()])])
    assert all(map(torch.equal, *found))
    assert "atomic" not in inspect.getsource(gpu_kernels)


# ---------------------------------------------------------------- the check before kernels are trusted


def checkpointed(function, *tensors):
    return torch.utils.checkpoint.checkpoint(function, *tensors, use_reentrant=False).sum().backward()


def within(context):
    return lambda function, *tensors: context()(function)(*tensors)


@pytest.mark.parametrize(("call", "options"), [
    *((lambda function, *tensors: function(*tensors), options) for options in (
        {}, {"attn_mask": torch.ones(7, dtype=torch.bool)}, {"attn_mask": torch.ones(5, 7, dtype=torch.bool)},
    )),
    (within(torch.no_grad), {}), (within(torch.inference_mode), {}),
    (checkpointed, {"is_causal": True, "dropout_p": 0.5}),
])  # fmt: skip
def test_kernels_that_are_right_are_trusted_from_the_first_call_on(call, options, caplog, monkeypatch):
    tensors, mapping = case()
    call(partial(mapped_attention, mapping=mapping, **options), *tensors)
    assert not caplog.records and len(gpu._tried) == 1 and not gpu._distrusted
    monkeypatch.setattr(gpu, "_wrong", None)  # the second time, nothing is tried
    mapped_attention(*tensors, mapping, **options)


def wrong_forward(monkeypatch):
    right = gpu.forward

    def forward(*arguments):
        output, saved = right(*arguments)
        return output * 1.001, saved

    monkeypatch.setattr(gpu, "forward", forward)
    return "output has an error of 1.0e-03"


def wrong_gradient(monkeypatch):
    right = gpu.backward

    def backward(*arguments):
        grad_query, grad_key, *others = right(*arguments)
        return (grad_query, grad_key.roll(1, 2), *others)

    monkeypatch.setattr(gpu, "backward", backward)
    return "gradient of key has an error of"


def other_dropout(monkeypatch):
    """The backward draws other numbers."""
    right = gpu.backward

    def backward(query, key, value, call, *others):
        return right(query, key, value, call._replace(seed=call.seed + 1), *others)

    monkeypatch.setattr(gpu, "backward", backward)
    return "gradient of query has an error of"


def no_memory(monkeypatch):
    class Kernel:
        def __getitem__(self, grid):
            raise RuntimeError("out of resource: shared memory, Required: 131072\nand more")

    monkeypatch.setattr(gpu_kernels, "backward_keys", Kernel())
    return "RuntimeError: out of resource: shared memory, Required: 131072"


@pytest.mark.parametrize("fault", [wrong_forward, wrong_gradient, other_dropout, no_memory])
def test_kernels_that_are_wrong_or_fail_give_one_warning_and_right_numbers(fault, monkeypatch, caplog):
    """As in a training: several calls, with other constants too."""
    message = fault(monkeypatch)
    for is_causal in (False, True):
        dropout = 0.3 if fault is other_dropout else 0.0
        (query, key, value), mapping = case(7, 7)
        torch.manual_seed(3)
        output = mapped_attention(query, key, value, mapping, None, dropout, is_causal)
        torch.manual_seed(3)
        expected = attend(query / 2, key, value, probabilities_by(mapping), None, is_causal, dropout)
        torch.testing.assert_close(output, expected)
        found, right = (torch.autograd.grad(o.sum(), [query, *mapping.parameters()]) for o in (output, expected))
        torch.testing.assert_close(found, right)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and message in record.getMessage() and "and more" not in caplog.text
    assert "attention runs in plain PyTorch on CPU from now on" in caplog.text and "Please report" in caplog.text
    monkeypatch.setenv("MULTIMAX_BACKEND", "compiled")
    monkeypatch.setattr(gpu, "_distrusted", set())
    with pytest.raises(RuntimeError):
        mapped_attention(query, key, value, mapping, is_causal=True, dropout_p=dropout / 2)


def test_nothing_of_length_squared_is_kept_and_results_lie_length_first(trusted):
    kept, length = [], 40
    tensors, mapping = case(length, length)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda _: _):
        output = mapped_attention(*tensors, mapping, is_causal=True, scale=1.0)
    assert sum(tensor.numel() for tensor in kept) == 2 * length * (3 * 4 + 2) + 8
    assert output.permute(2, 0, 1, 3).is_contiguous()
