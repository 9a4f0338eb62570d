"""Mappings of rows of fp32 scores on a CPU, and their gradients, in C++: plain functions, without autograd."""

from typing import Optional, Tuple

import torch
from torch import Tensor

from .. import cpp, sparse
from . import Rows


def serves(scores: Tensor) -> bool:
    """Whether :func:`forward` takes these scores: fp32 on a CPU, where there is a compiler."""
    return scores.numel() > 0 and cpp.ROWS.serves(scores) and sparse.LIBRARY.serves(scores)


def forward(rows: Rows, scores: Tensor) -> Tensor:
    """Probabilities, (…, width), contiguous, of ``scores`` of the same shape."""
    if rows.name in ("softmax", "multimax"):
        return cpp.multimax_rows(scores, *_modulator(rows))
    return sparse._forward(scores, _parameter(rows, scores), rows.name)


def backward(
    rows: Rows, scores: Optional[Tensor], probabilities: Optional[Tensor], grad: Tensor
) -> Tuple[Tensor, ...]:
    """∂L/∂scores and the gradients of ``rows.numbers``, from ∂L/∂probabilities.

    Args:
        scores: needed by ``softmax`` and ``multimax`` alone.
        probabilities: what :func:`forward` returned.
    """
    if rows.name in ("softmax", "multimax"):
        grad_scores, *grads = cpp.multimax_rows_backward(scores, probabilities, grad, *_modulator(rows))
        return (grad_scores, *grads) if rows.numbers else (grad_scores,)
    wants_alpha, parameter = rows.name == "entmax", _parameter(rows, probabilities)
    grad_scores, grads = sparse._backward_in_cpp(rows.name, probabilities, parameter, grad, wants_alpha)
    if not wants_alpha:
        return (grad_scores, *map(torch.zeros_like, rows.numbers))
    (alpha,) = rows.numbers
    grad_alpha = grads.view(*grad.shape[:-1], 1).sum_to_size(alpha.shape)
    return grad_scores, grad_alpha.to(alpha.dtype)


def _modulator(rows: Rows) -> Tuple[Tensor, Tensor]:
    return rows.numbers or (torch.zeros(0, 2), torch.zeros(0, 2))


def _parameter(rows: Rows, scores: Tensor) -> Tensor:
    """c = α − 1, or ε: (rows, 1) or (1, 1)."""
    if not rows.numbers:
        return scores.new_ones(1, 1)
    number = rows.numbers[0].detach()
    number = (number.double() - 1 if rows.name == "entmax" else number).to(scores)
    return (number.expand(*scores.shape[:-1], 1) if number.numel() > 1 else number).reshape(-1, 1)
