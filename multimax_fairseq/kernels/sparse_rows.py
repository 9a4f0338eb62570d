"""Sparsemax, 1.5-entmax, α-entmax and EvSoftMax without sorting: functions of rows for a compiler to fuse.

With c = α − 1 and d = x − max x, the first three are p = max(t + c·d, 0)^(1/c) for the t in (0, 1] that makes
Σ p = 1. It is the root of N(t) − 1 with the norm N(t) = (Σ max(t + c·d, 0)^(1/c))^c. That is convex and nearly
straight, so Newton's method from t = 1 falls to the root in a few steps and never below it::

    q = max(1 + (c / t)·d, 0)^(1/c)        p = q / Σ q        t ← t − (t − (Σ q)^−c) · Σ q / Σ q^(1−c)

The logarithm of 1 + (c / t)·d keeps its digits where c is small, so this holds down to softmax, c = 0.

The backwards are plain enough for autograd to differentiate them again. With s = p^(1−c) and sums over a row::

    ∂L/∂x = s · (g − Σ s·g / Σ s)

Sources: Newton's method on a norm is ours; bisection on the GPU, Gonçalves, Treviso & Martins, *AdaSplash*, 2025; the
gradients, Peters, Niculae & Martins 2019, and that of α, Correia, Niculae & Martins 2019.
"""

import math
from typing import Callable, Tuple, Union

import torch
from torch import Tensor

from .compiler import row_kernel
from .scores import is_absent

# Rows of normal scores take 6. A step reduces (N − 1)·N' to a quarter or less. The worst rows found, whose scores are
# powers of a number, take 7 with 512 scores and 12 with 32,768.
STEPS = 12


@row_kernel
def sparsemax_rows(scores: Tensor) -> Tensor:
    """Probabilities, (rows, width), fp32 or fp64; zeros in a row without scores."""
    return _project(scores, 1.0, lambda base, _: base)


@row_kernel
def entmax15_rows(scores: Tensor) -> Tensor:
    """Likewise."""
    return _project(scores, 0.5, lambda base, _: base * base)


@row_kernel
def entmax_rows(scores: Tensor, c: Tensor) -> Tensor:
    """Likewise; ``c``: α − 1, (rows, 1)."""
    return _project(scores, c, lambda _, base_less_1: (torch.log1p(base_less_1) / c).exp())


@row_kernel
def evsoftmax_rows(scores: Tensor, epsilon: Tensor) -> Tensor:
    """Likewise; ``epsilon``: the weight of a score below the mean, (rows, 1)."""
    present = ~is_absent(scores)
    mean = torch.where(present, scores, 0.0).sum(-1, keepdim=True) / present.sum(-1, keepdim=True)
    largest = _largest(scores)
    exponentials = (scores - largest).exp()
    weighted = torch.where((scores < mean) & (scores < largest), epsilon * exponentials, exponentials)
    return weighted / _at_least(weighted.sum(-1, keepdim=True))


@row_kernel
def sparsemax_rows_backward(probabilities: Tensor, grad: Tensor) -> Tensor:
    """∂L/∂x from ∂L/∂p, both (rows, width)."""
    return _scores_backward((probabilities > 0).to(grad.dtype) + 0 * probabilities, grad)


@row_kernel
def entmax15_rows_backward(probabilities: Tensor, grad: Tensor) -> Tensor:
    """Likewise."""
    return _scores_backward(_nonzero(probabilities, torch.sqrt), grad)


@row_kernel
def entmax_rows_backward(probabilities: Tensor, grad: Tensor, c: Tensor) -> Tensor:
    """Likewise."""
    return _scores_backward(_nonzero(probabilities, lambda p: ((1 - c) * p.log()).exp()), grad)


@row_kernel
def evsoftmax_rows_backward(probabilities: Tensor, grad: Tensor) -> Tensor:
    """Likewise; as for softmax, since the choice of what is kept has no gradient."""
    return _scores_backward(probabilities, grad)


@row_kernel
def entmax_rows_backward_of_c(probabilities: Tensor, grad: Tensor, c: Tensor) -> Tensor:
    """∂L/∂c, which is ∂L/∂α, (rows, 1).

    The formula of Correia, Niculae & Martins without its differences of size c². With l = log p and
    B = (exp(−c·l) − 1 + c·l) / c², which is l² / 2 at c = 0, and sums over the row::

        ∂L/∂c = (Σ p·B · Σ g·p·(1 − c·l) − (1 − c·Σ p·l) · Σ g·p·B) / Σ p^(1−c)
    """
    p = probabilities
    logs = _nonzero(p, torch.log)
    x = -c * logs
    power = x.exp()
    bend = logs * logs * _bent(x, power)

    def row_sum(terms: Tensor) -> Tensor:
        return (p * terms).sum(-1, keepdim=True)

    over = row_sum(bend) * row_sum(grad * (1 + x)) - (1 + row_sum(x)) * row_sum(grad * bend)
    return over / _at_least(row_sum(power))


def _project(scores: Tensor, c: Union[float, Tensor], power: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Probabilities; ``power`` maps (base, base − 1) to base^(1/c), for base > 0."""
    d = scores - _largest(scores)
    ratio = c
    for _ in range(STEPS):
        q, base = _powers(d, ratio, power)
        total, slopes = _at_least(q.sum(-1, keepdim=True)), _at_least((q / base).sum(-1, keepdim=True))
        t = c / ratio
        ratio = c / (t - (t - (-c * total.log()).exp()) * total / slopes)
    q, _ = _powers(d, ratio, power)
    return q / _at_least(q.sum(-1, keepdim=True))


def _powers(
    d: Tensor, ratio: Union[float, Tensor], power: Callable[[Tensor, Tensor], Tensor]
) -> Tuple[Tensor, Tensor]:
    """q and its base, which is 1 where q is 0."""
    base_less_1 = ratio * d
    outside = base_less_1 <= -1  # false for NaN
    base = torch.where(outside, 1.0, 1 + base_less_1)
    return torch.where(outside, 0.0, power(base, base_less_1)), base


def _largest(scores: Tensor) -> Tensor:
    """The maximum, (rows, 1); the lowest finite number in a row without scores."""
    return scores.amax(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min)


def _at_least(total: Tensor) -> Tensor:
    """``total``, kept above 0. It is 1 or more, except in a row without scores, where all is 0."""
    return total.clamp(min=torch.finfo(total.dtype).tiny)


def _nonzero(probabilities: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """``function`` of the probabilities; 0 at 0, where it or its derivative may be infinite."""
    zero = probabilities == 0
    return torch.where(zero, 0.0, function(torch.where(zero, 1.0, probabilities)))


def _scores_backward(slope: Tensor, grad: Tensor) -> Tensor:
    mean = (slope * grad).sum(-1, keepdim=True) / _at_least(slope.sum(-1, keepdim=True))
    return slope * (grad - mean)


def _bent(x: Tensor, power: Tensor) -> Tensor:
    """(exp(x) − 1 − x) / x² for x ≥ 0, from x and exp(x); for x < 1 its series, of which fp64 needs 16 terms."""
    near = x < 1
    small, series = torch.where(near, x, 0.0), torch.zeros_like(x)
    for n in range(17, 1, -1):
        series = series * small + 1 / math.factorial(n)
    large = torch.where(near, 1.0, x)
    return torch.where(near, series, (power - 1 - x) / (large * large))

