"""Softmax under the contract of :mod:`.masking`, and EvSoftMax, which gives 0 to every score below the mean.

Source of EvSoftMax: Itkina, Ivanovic, Senanayake, Kochenderfer, Pavone, *Evidential Softmax for Sparse Multimodal
Distributions in Deep Generative Models*, NeurIPS 2021.
"""

import math

import torch
from torch import Tensor, nn

from ..kernels.rows import Rows
from ..kernels.rows.mapped import map_rows
from ..kernels.scores import compute_dtype, is_absent

TRAINING_EPSILON = 1e-6


def softmax(scores: Tensor, dim: int = -1) -> Tensor:
    """exp(x_i) / Σ exp(x_k) over the scores that are there; an empty row gives zeros where torch gives NaN.

    Args:
        scores: any shape, fp16, bf16, fp32 or fp64; −inf marks an absent score.
        dim: the dimension that holds the distribution.

    Returns:
        probabilities, shape and dtype of ``scores``. Error against float64: below 3e-7 in fp32.
    """
    return map_rows(Rows("softmax", (), softmax_formula), scores, dim)


def softmax_formula(scores: Tensor) -> Tensor:
    """:func:`softmax` over the last dimension, in PyTorch's operators."""
    x = scores.to(compute_dtype(scores.dtype))
    return masked_softmax(x, is_absent(x)).to(scores.dtype)


def masked_softmax(scores: Tensor, absent: Tensor) -> Tensor:
    """Softmax over the scores that are there: exactly 0 elsewhere, and zeros where a row is empty.

    Softmax sees absent scores as −inf. It would make NaN of an empty row, which is filled before and after. Other
    scores may have any finite size. A row with NaN or +inf becomes NaN, and so does one whose scores are present but
    all −inf (σ overflowed): the mask, not the scores, decides whether a row is empty.

    Args:
        scores: (…, width), fp32 or fp64; its values under ``absent`` are not read.
        absent: bool, the shape of ``scores``.

    Returns:
        probabilities, shape and dtype of ``scores``.
    """
    empty = absent.all(-1, keepdim=True)
    present = scores.masked_fill(absent, float("-inf")).masked_fill(empty, 0.0)
    return present.softmax(-1).masked_fill(empty, 0.0)


class Softmax(nn.Module):
    """:func:`softmax` over the last dimension."""

    def kernel_rows(self) -> Rows:
        return Rows("softmax", (), softmax_formula)

    def forward(self, scores: Tensor) -> Tensor:
        return softmax(scores)


def evsoftmax(scores: Tensor, dim: int = -1, training: bool = False) -> Tensor:
    """w_i exp(x_i) / Σ w_k exp(x_k), with w_i = 1 where x_i ≥ mean(x), else 0 (in training: ε = 1e-6).

    With ε in place of 0, dropped scores keep a gradient and the log-likelihood of every entry is finite. The
    choice of what is kept has no gradient of its own. The largest score is always kept, so that rounding of the
    mean cannot empty a row of equal scores.

    Args:
        scores: any shape, fp16, bf16, fp32 or fp64; −inf marks an absent score, which the mean leaves out.
        dim: the dimension that holds the distribution.
        training: give dropped scores ε of their softmax weight rather than 0. In fp16, whose smallest normal number
            is 6e-5, their weights are raised to what gives that probability: its logarithm and the gradient of that,
            1 / p, are numbers in fp16 too.

    Returns:
        probabilities, shape and dtype of ``scores``. Error against float64: below 3e-7 in fp32 (a score within
        rounding of the mean may fall on the other side of it).
    """
    if training and scores.dtype == torch.float16 and scores.numel():
        return evsoftmax_formula(scores.movedim(dim, -1), TRAINING_EPSILON).movedim(-1, dim)
    return map_rows(_rows(training), scores, dim)


def evsoftmax_formula(scores: Tensor, epsilon: float) -> Tensor:
    """:func:`evsoftmax` over the last dimension, in PyTorch's operators; ``epsilon``: w_i below the mean."""
    x = scores.to(compute_dtype(scores.dtype))
    absent = is_absent(x)
    present, count = x.detach().masked_fill(absent, 0.0), (~absent).sum(-1, keepdim=True)
    peak = x.detach().amax(-1, keepdim=True)
    # all are kept in a row with NaN, to make it NaN; the mean is 0 / 0 in a row without scores
    kept = ~(present < present.sum(-1, keepdim=True) / count) | (x.detach() == peak)
    log_weight = torch.full_like(x, math.log(epsilon) if epsilon else -math.inf)
    if epsilon and scores.dtype == torch.float16:
        total = (present - peak).exp().masked_fill(absent | ~kept, 0.0).sum(-1, keepdim=True)
        lowest = math.log(torch.finfo(torch.float16).tiny) + total.log() - (present - peak)
        log_weight = torch.maximum(log_weight, lowest)
    return masked_softmax(x + log_weight.masked_fill(kept, 0.0), absent).to(scores.dtype)


def _rows(training: bool) -> Rows:
    epsilon = TRAINING_EPSILON if training else 0.0
    number = torch.tensor(epsilon, dtype=torch.float32)
    return Rows("evsoftmax", (number,), lambda scores, _: evsoftmax_formula(scores, epsilon))


class EvSoftmax(nn.Module):
    """:func:`evsoftmax` over the last dimension; its training form while ``self.training``."""

    def kernel_rows(self) -> Rows:
        return _rows(self.training)

    def forward(self, scores: Tensor) -> Tensor:
        return evsoftmax(scores, training=self.training)
