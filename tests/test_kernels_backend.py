"""Kernels or formulas: who decides."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from multimax_fairseq.kernels.backend import backend, is_plain, wants_compiled


def test_the_environment_variable(monkeypatch):
    monkeypatch.delenv("MULTIMAX_BACKEND")
    assert backend() == "auto" and wants_compiled(torch.zeros(1))
    monkeypatch.setenv("MULTIMAX_BACKEND", "eager")
    assert backend() == "eager" and not wants_compiled(torch.zeros(1))
    monkeypatch.setenv("MULTIMAX_BACKEND", "slow")
    with pytest.raises(ValueError, match="MULTIMAX_BACKEND: there is no backend 'slow'; choose from: auto, compiled"):
        backend()


def test_plain_tensors_in_plain_contexts():
    x = torch.randn(3, requires_grad=True)
    assert is_plain(x, torch.nn.Parameter(x), x.half(), x.detach().expand(2, 3))
    for context in (torch.inference_mode(), torch.no_grad(), torch.autocast("cpu"), torch.device("cpu")):
        with context:
            assert is_plain(x, torch.randn(2))


class Subclass(torch.Tensor):
    pass


def test_others_are_not():
    x, seen = torch.randn(3), []

    def look(x):
        seen.append(is_plain(x))
        return x * 1

    torch.func.vmap(look)(x[None])
    torch.func.grad(lambda x: look(x).sum())(x)
    torch.func.jvp(look, (x,), (x,))
    torch.func.functionalize(look)(x)
    make_fx(look)(x)
    torch.jit.trace(look, x, check_trace=False)
    with FakeTensorMode():
        look(torch.randn(3))
    look(x.as_subclass(Subclass))
    look(x.to_sparse())
    look(torch.randn(3, dtype=torch.complex64).conj().imag)
    leaf = x.clone().requires_grad_()
    output = leaf * 1
    output.register_hook(lambda grad: seen.append(is_plain(grad)))
    torch.autograd.grad(output, leaf, torch.eye(3), is_grads_batched=True)
    assert len(seen) == 11 and not any(seen)
