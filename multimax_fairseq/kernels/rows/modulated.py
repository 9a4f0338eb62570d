"""σ over rows of scores, for a whole vocabulary: by its formula, or by PyTorch's compiler where that serves.

Left to autograd, σ takes some fifty passes over the scores, forward and backward, and keeps a dozen tensors of their
size. This keeps the scores.
"""

from typing import Callable, Optional, Tuple

import torch
from torch import Tensor
from torch.autograd import Function

from ..backend import gradients_of, is_plain
from .compiled import modulate_rows, modulate_rows_backward


def modulated(
    scores: Tensor, thresholds: Tensor, gains: Tensor, formula: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Tensor:
    """``formula(scores, thresholds, gains)``, which is σ."""
    rows = scores.reshape(-1, scores.size(-1)) if scores.numel() else None
    if rows is None or not modulate_rows.compiles(rows, thresholds, gains):
        return formula(scores, thresholds, gains)
    return _Modulated.apply(rows, thresholds, gains, formula).view(scores.shape)


class _Modulated(Function):
    """See :func:`modulated`."""

    @staticmethod
    def forward(
        ctx, scores: Tensor, thresholds: Tensor, gains: Tensor, formula: Callable[[Tensor, Tensor, Tensor], Tensor]
    ) -> Tensor:
        ctx.formula = formula
        ctx.save_for_backward(scores, thresholds, gains)
        return modulate_rows(scores, thresholds, gains)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        scores, thresholds, gains = saved = ctx.saved_tensors
        if torch.is_grad_enabled() or not is_plain(grad, *saved):
            return (*gradients_of(ctx.formula, saved, ctx.needs_input_grad[:3], grad), None)
        grad_scores, (grad_thresholds, grad_gains) = modulate_rows_backward(scores, grad, thresholds, gains)
        return grad_scores, grad_thresholds.to(thresholds.dtype), grad_gains.to(gains.dtype), None
