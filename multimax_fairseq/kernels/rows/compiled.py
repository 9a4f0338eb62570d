"""σ in one pass forward and one backward: functions for a compiler to fuse.

Each is plain torch on rows of scores, (rows, width), without autograd: :mod:`.modulated` and the losses use them.
:mod:`..backend` says whether they run compiled. With u = ∂L/∂σ, and sums over all scores::

    ∂L/∂x     = u · (1 − Σ_n n g_b,n max(b_n − x, 0)^(n−1) [x < b_n] + Σ_n n g_d,n max(x − d_n, 0)^(n−1) [x > d_n])
    ∂L/∂g_b,n = Σ u · max(b_n − x, 0)^n            ∂L/∂b_n =   g_b,n Σ u · n max(b_n − x, 0)^(n−1) [x < b_n]
    ∂L/∂g_d,n = Σ u · max(x − d_n, 0)^n            ∂L/∂d_n = − g_d,n Σ u · n max(x − d_n, 0)^(n−1) [x > d_n]

The backwards return those of thresholds and gains as one tensor, (2, N, 2), so that blocks of rows can be added. The
code is written for the compiler: ``relu`` is one instruction where ``clamp`` is four, and an absent score is filled
once, where its value could reach a result.
"""

from typing import Tuple

import torch
from torch import Tensor

from ..compiler import Kernel
from ..scores import compute_dtype, is_absent


@Kernel
def modulate_rows(scores: Tensor, thresholds: Tensor, gains: Tensor) -> Tensor:
    """σ(x) in the dtype of ``scores``; −inf stays −inf."""
    return present_sigma(scores, thresholds, gains).to(scores.dtype)


@Kernel
def modulate_rows_backward(scores: Tensor, grad: Tensor, thresholds: Tensor, gains: Tensor) -> Tuple[Tensor, Tensor]:
    """∂L/∂x, and ∂L/∂(thresholds, gains), from ∂L/∂σ."""
    upstream = grad.to(compute_dtype(scores.dtype)).masked_fill(is_absent(scores), 0.0)
    return sigma_backward(scores, upstream, thresholds, gains)


def sigma(x: Tensor, thresholds: Tensor, gains: Tensor) -> Tensor:
    """σ(x) in the dtype of ``x``; anything where a score is absent."""
    modulated, thresholds, gains = x, thresholds.to(x.dtype), gains.to(x.dtype)
    for row in reversed(range(len(gains))):  # the formula's order, as it decides what overflows or becomes NaN
        below, above = torch.relu(thresholds[row, 0] - x), torch.relu(x - thresholds[row, 1])
        terms = gains[row, 0] * below, gains[row, 1] * above
        if row == 1:
            terms = terms[0] * below, terms[1] * above
        modulated = modulated + terms[0] + terms[1]
    return modulated


def present_sigma(scores: Tensor, thresholds: Tensor, gains: Tensor) -> Tensor:
    """σ(x) in fp32 at least; −inf stays −inf."""
    x = scores.to(compute_dtype(scores.dtype))
    return sigma(x, thresholds, gains).masked_fill(is_absent(x), float("-inf"))


def sigma_backward(scores: Tensor, upstream: Tensor, thresholds: Tensor, gains: Tensor) -> Tuple[Tensor, Tensor]:
    """∂L/∂x in the dtype of ``scores``, and ∂L/∂(thresholds, gains), from ∂L/∂σ, 0 where a score is absent."""
    x = scores.to(upstream.dtype).clamp(min=torch.finfo(upstream.dtype).min)  # 0 times a finite number is 0
    thresholds, gains = thresholds.to(x.dtype), gains.to(x.dtype)
    grad, grad_thresholds, grad_gains = upstream, [], []
    for row in range(len(gains)):
        below, above = torch.relu(thresholds[row, 0] - x), torch.relu(x - thresholds[row, 1])
        if row == 0:
            slope_below, slope_above = torch.where(below > 0, upstream, 0.0), torch.where(above > 0, upstream, 0.0)
            powers = upstream * below, upstream * above
        else:
            half_below, half_above = upstream * below, upstream * above
            slope_below, slope_above = 2 * half_below, 2 * half_above
            powers = half_below * below, half_above * above
        grad = grad - gains[row, 0] * slope_below + gains[row, 1] * slope_above
        grad_thresholds += [gains[row, 0] * _sum(slope_below), -gains[row, 1] * _sum(slope_above)]
        grad_gains += [_sum(power) for power in powers]
    if not grad_gains:  # softmax
        return grad.to(scores.dtype), grad.new_zeros(2, 0, 2)
    return grad.to(scores.dtype), torch.stack(grad_thresholds + grad_gains).view(2, len(gains), 2)


def _sum(terms: Tensor) -> Tensor:
    # By row, which the compiler fuses, then in double precision: for a sum of more than 4,096 numbers in single,
    # Inductor would make another kernel.
    return terms.sum(-1).double().sum()
