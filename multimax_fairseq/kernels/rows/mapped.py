"""Mappings over rows of scores: by their formula, or in C++ (:mod:`.cpu`) where that serves."""

from typing import Optional, Tuple

import torch
from torch import Tensor
from torch.autograd import Function

from ..backend import gradients_of, is_plain, wants_compiled
from ..scores import HALF
from . import Rows, cpu


def map_rows(rows: Rows, scores: Tensor, dim: int = -1) -> Tensor:
    """``rows.formula`` of ``scores``, over a dimension; in C++ for fp32 and half precision on a CPU."""
    if scores.numel() == 0:  # the numbers get gradients of 0, which who trains in several processes waits for
        return sum((0 * number.sum() for number in rows.numbers), scores.clone())
    if dim != -1 and dim != scores.dim() - 1:
        return map_rows(rows, scores.movedim(dim, -1)).movedim(-1, dim)
    if not (scores.is_cpu and wants_compiled(scores, *rows.numbers)):
        return rows.formula(scores, *rows.numbers)
    x = scores.float() if scores.dtype in HALF else scores
    if not cpu.LIBRARY.serves(x):
        return rows.formula(scores, *rows.numbers)
    is_learning = torch.is_grad_enabled()
    probabilities = _Rows.apply(rows, x, *rows.numbers) if is_learning else cpu.forward(cpu.Numbers(rows, x.shape), x)
    return probabilities if x is scores else probabilities.to(scores.dtype)


class _Rows(Function):
    """:func:`map_rows` in C++."""

    @staticmethod
    def forward(ctx, rows: Rows, scores: Tensor, *numbers: Tensor) -> Tensor:
        ctx.formula, ctx.numbers = rows.formula, cpu.Numbers(rows, scores.shape)
        probabilities = cpu.forward(ctx.numbers, scores)
        ctx.save_for_backward(scores, probabilities, *numbers)
        return probabilities

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        scores, probabilities, *numbers = ctx.saved_tensors
        if torch.is_grad_enabled() or not is_plain(grad):
            return None, *gradients_of(ctx.formula, (scores, *numbers), ctx.needs_input_grad[1:], grad)
        return None, *cpu.backward(ctx.numbers, scores, probabilities, grad)
