"""MultiMax with a backward of its own, made of the kernels of :mod:`.rows`.

Left to autograd, σ takes some sixty passes over the scores, forward and backward, and keeps a dozen tensors of their
size. This keeps the scores and the result.
"""

from typing import Callable, Iterator, Optional, Sequence, Tuple

import torch
from torch import Tensor
from torch.autograd import Function

from . import cpp
from .backend import is_traced, is_transformed
from .rows.compiled import modulate_rows, modulate_rows_backward, multimax_rows, multimax_rows_backward


class FusedMultiMax(Function):
    """``formula(scores, thresholds, gains)`` over the last dimension: softmax of σ, or σ itself.

    Args of ``apply``:
        scores, thresholds, gains: as in :func:`..mappings.multimax.multimax`; a gradient for each.
        formula: the same in plain torch, for gradients of gradients.
        normalise: whether ``formula`` ends in softmax.
    """

    @staticmethod
    def forward(
        ctx, scores: Tensor, thresholds: Tensor, gains: Tensor, formula: Callable[..., Tensor], normalise: bool
    ) -> Tensor:
        ctx.formula, ctx.normalise = formula, normalise
        result = _forward(scores, thresholds, gains, normalise)
        ctx.save_for_backward(scores, thresholds, gains, result if normalise else None)
        return result

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        saved = scores, thresholds, gains, _ = ctx.saved_tensors  # read once: checkpointing allows no second read
        if torch.is_grad_enabled():
            return (*_differentiable_backward(ctx, saved[:3], grad), None, None)
        if scores.numel() == 0:
            return grad, torch.zeros_like(thresholds), torch.zeros_like(gains), None, None

        grad_scores, grad_thresholds, grad_gains = _backward(saved, ctx.normalise, grad)
        return grad_scores, grad_thresholds.to(thresholds.dtype), grad_gains.to(gains.dtype), None, None


def fused_multimax(
    scores: Tensor, thresholds: Tensor, gains: Tensor, formula: Callable[..., Tensor], normalise: bool
) -> Tensor:
    """:class:`FusedMultiMax`, without autograd's overhead where no gradient is wanted, as in decoding.

    Under ``torch.func`` (``vmap``, ``grad``, ``jvp`` and so on) and ``torch.compile`` it is ``formula`` itself.
    """
    if is_traced() or is_transformed():
        return formula(scores, thresholds, gains)
    if torch.is_grad_enabled():
        return FusedMultiMax.apply(scores, thresholds, gains, formula, normalise)
    return _forward(scores, thresholds, gains, normalise)


def _forward(scores: Tensor, thresholds: Tensor, gains: Tensor, normalise: bool) -> Tensor:
    if scores.numel() == 0:
        return scores.clone()
    if normalise and cpp.ROWS.serves(scores):
        return cpp.multimax_rows(scores, thresholds, gains)
    kernel = multimax_rows if normalise else modulate_rows
    return _joined(kernel.over_rows([scores], (thresholds, gains))).view(scores.shape)


def _backward(saved: Sequence[Optional[Tensor]], normalise: bool, grad: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
    """∂L/∂x, ∂L/∂thresholds and ∂L/∂gains."""
    scores, thresholds, gains, probabilities = saved
    if normalise and cpp.ROWS.serves(scores):
        return cpp.multimax_rows_backward(scores, probabilities, grad, thresholds, gains)
    if normalise:
        kernel, rows = multimax_rows_backward, (scores, probabilities, grad)
    else:
        kernel, rows = modulate_rows_backward, (scores, grad)
    grads, grads_of_parameters = zip(*kernel.over_rows(rows, (thresholds, gains)))
    return (_joined(grads).view(scores.shape), *_summed(grads_of_parameters))


def _joined(blocks: Sequence[Tensor]) -> Tensor:
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


def _summed(blocks: Sequence[Tensor]) -> Tensor:
    return blocks[0] if len(blocks) == 1 else torch.stack(blocks).sum(0)


def _differentiable_backward(ctx, inputs: Sequence[Tensor], grad: Tensor) -> Iterator[Optional[Tensor]]:
    """Autograd's gradients of the formula, which it can differentiate again."""
    needed = ctx.needs_input_grad[:3]
    wanted = [tensor for tensor, is_needed in zip(inputs, needed) if is_needed]
    gradients = iter(torch.autograd.grad(ctx.formula(*inputs), wanted, grad, create_graph=True))
    return (next(gradients) if is_needed else None for is_needed in needed)
