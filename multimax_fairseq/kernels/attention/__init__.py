"""Attention without the matrix of probabilities: C++ (:mod:`.cpu`), Triton (:mod:`.gpu`), blocks (:mod:`.blocks`).

The first two are plain functions of one signature, without autograd, which :func:`attend_by` differentiates.
"""

from types import ModuleType
from typing import Callable, NamedTuple, Optional, Tuple

import torch
from torch import Tensor
from torch.autograd import Function

from ..backend import gradients_of, is_plain, keep, kept
from ..rows import Rows
from ..scores import HALF
from . import cpu, gpu


def kernels_for(
    query: Tensor, key: Tensor, value: Tensor, rows: Rows, mask: Optional[Tensor], is_causal: bool, dropout: float
) -> Optional[ModuleType]:
    """The kernels that take these plain tensors: :mod:`.cpu`, :mod:`.gpu`, or None."""
    if not (query.numel() and key.numel() and value.numel()):
        return None
    if query.is_cpu and not gpu.INTERPRETED:
        return cpu if cpu.serves(query, key, value, rows, mask) else None
    serves = gpu.serves(query, key, value, rows, mask) and gpu.is_right(query, rows, mask, is_causal, dropout)
    return gpu if serves else None


def attend_by(
    kernels: ModuleType,
    formula: Callable[..., Tensor],
    rows: Rows,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Optional[Tensor],
    is_causal: bool,
    dropout: float,
) -> Tensor:
    """dropout(mapping(query · keyᵀ + mask)) · value, by the ``kernels`` that serve these arguments.

    Args:
        formula: the same of (query, key, value, mapping as a function of scores, mask, is_causal), for gradients of
            gradients.
        query: (batch, heads, tgt_len, head_dim), scaled.
        key, value: (batch, heads, src_len, head_dim).
        mask: fp32, to be added to scores, (batch | 1, heads | 1, tgt_len | 1, src_len), or None; without gradient.
        dropout: its random numbers depend on the state of torch's default generator, which advances.

    Returns:
        (batch, heads, tgt_len, head_dim), laid out with length first.
    """
    numbers = tuple(number.float() if number.dtype in HALF else number for number in rows.numbers)
    call = _Call(kernels, formula, rows, is_causal, dropout, _seed() if dropout else 0)
    if torch.is_grad_enabled():
        return _Attention.apply(call, mask, query, key, value, *numbers)
    return kernels.forward(query, key, value, rows._replace(numbers=numbers), mask, *call[3:])[0]


class _Call(NamedTuple):
    """What attention needs besides tensors; ``rows`` counts without its numbers."""

    kernels: ModuleType
    formula: Callable[..., Tensor]
    rows: Rows
    is_causal: bool
    dropout: float
    seed: int


def _seed() -> int:
    """63 bits from the generator that ``--seed`` sets and activation checkpointing restores."""
    return int(torch.empty((), dtype=torch.int64, device="cpu").random_())


class _Attention(Function):
    """See :func:`attend_by`."""

    @staticmethod
    def forward(
        ctx, call: _Call, mask: Optional[Tensor], query: Tensor, key: Tensor, value: Tensor, *numbers: Tensor
    ) -> Tensor:
        rows = call.rows._replace(numbers=numbers)
        output, saved = call.kernels.forward(query, key, value, rows, mask, *call[3:])
        ctx.call, ctx.count = call._replace(rows=rows._replace(numbers=())), len(numbers)
        keep(ctx, mask, query, key, value, *numbers, *saved)
        return output

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        mask, query, key, value, *rest = kept(ctx)
        call = ctx.call
        numbers, saved = tuple(rest[: ctx.count]), tuple(rest[ctx.count :])
        if not torch.is_grad_enabled() and is_plain(grad, query, key, value, *rest):
            rows = call.rows._replace(numbers=numbers)
            return None, None, *call.kernels.backward(query, key, value, rows, mask, *call[3:], saved, grad)
        if call.dropout:
            raise RuntimeError(
                "attention with dropout has no gradients of gradients, and none in batches: leave out its dropout, "
                "or set MULTIMAX_BACKEND=eager, where PyTorch differentiates the formula"
            )

        def formula(query: Tensor, key: Tensor, value: Tensor, *numbers: Tensor) -> Tensor:
            def probabilities(scores: Tensor) -> Tensor:
                return call.rows.formula(scores, *numbers)

            return call.formula(query, key, value, probabilities, mask, call.is_causal)

        inputs = query, key, value, *numbers
        return None, None, *gradients_of(formula, inputs, ctx.needs_input_grad[2:], grad)
