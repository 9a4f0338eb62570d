"""Attention without the matrix of probabilities: C++ (:mod:`.cpu`), Triton (:mod:`.gpu`), blocks (:mod:`.blocks`).

The first two are plain functions of one signature, without autograd, which :func:`attend_by` differentiates.
"""

from types import ModuleType
from typing import Callable, Optional, Tuple

import torch
from torch import Tensor
from torch.autograd import Function

from ..backend import gradients_of, is_plain
from ..scores import HALF
from . import cpu, gpu
from .call import Call


def kernels_for(
    formula: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, call: Call
) -> Optional[ModuleType]:
    """The kernels that take these plain tensors: :mod:`.cpu`, :mod:`.gpu`, or None; ``formula`` as below."""
    if not (query.numel() and key.numel() and value.numel()):
        return None
    if query.is_cpu and not gpu.INTERPRETED:
        return cpu if cpu.serves(query, key, value, call) else None
    return gpu if gpu.serves(query, key, value, call) and gpu.is_right(formula, query, call) else None


def attend_by(
    kernels: ModuleType, formula: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, call: Call
) -> Tensor:
    """dropout(mapping(query · keyᵀ + mask)) · value, by the ``kernels`` that serve these arguments.

    Args:
        formula: the same of (query, key, value, mapping as a function of scores, mask, is_causal), for gradients of
            gradients.
        query: (batch, heads, tgt_len, head_dim), scaled.
        key, value: (batch, heads, src_len, head_dim); in C++ the last size of value may be another.
        call: its mask gets no gradient; its seed comes from torch's default generator, which advances.

    Returns:
        (batch, heads, tgt_len, head_dim), laid out with length first.
    """
    numbers = tuple(number.float() if number.dtype in HALF else number for number in call.rows.numbers)
    call = call._replace(rows=call.rows._replace(numbers=numbers), seed=_seed() if call.dropout else 0)
    if torch.is_grad_enabled():
        return _Attention.apply(kernels, formula, call, query, key, value, *numbers)
    return kernels.forward(query, key, value, call)[0]


def _seed() -> int:
    """63 bits from the generator that ``--seed`` sets and activation checkpointing restores."""
    return int(torch.empty((), dtype=torch.int64, device="cpu").random_())


class _Attention(Function):
    """See :func:`attend_by`."""

    @staticmethod
    def forward(
        ctx, kernels: ModuleType, formula: Callable[..., Tensor], call: Call, query: Tensor, key: Tensor,
        value: Tensor, *numbers: Tensor,
    ) -> Tensor:  # fmt: skip
        output, saved = kernels.forward(query, key, value, call)
        ctx.save_for_backward(call.mask, query, key, value, *numbers, *saved)
        ctx.kernels, ctx.formula, ctx.count = kernels, formula, len(numbers)
        ctx.call = call._replace(rows=call.rows._replace(numbers=()), mask=None)
        return output

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        mask, query, key, value, *rest = ctx.saved_tensors
        query, key, value = (tensor.to(grad.dtype) for tensor in (query, key, value))  # hooks may have changed it
        mask, numbers = None if mask is None else mask.float(), tuple(rest[: ctx.count])
        saved = tuple(tensor.float() for tensor in rest[ctx.count :])
        call = ctx.call._replace(rows=ctx.call.rows._replace(numbers=numbers), mask=mask)
        if not torch.is_grad_enabled() and is_plain(grad, query, key, value, *rest):
            return None, None, None, *ctx.kernels.backward(query, key, value, call, saved, grad)
        if call.dropout:
            raise RuntimeError(
                "attention with dropout has no gradients of gradients, and none in batches: leave out its dropout, "
                "or set MULTIMAX_BACKEND=eager, where PyTorch differentiates the formula"
            )

        def formula(query: Tensor, key: Tensor, value: Tensor, *numbers: Tensor) -> Tensor:
            return ctx.formula(query, key, value, lambda x: call.rows.formula(x, *numbers), mask, call.is_causal)

        inputs = query, key, value, *numbers
        return None, None, None, *gradients_of(formula, inputs, ctx.needs_input_grad[3:], grad)
