"""EvSoftMax: softmax that gives 0 to every score below the mean.

Source: Itkina, Ivanovic, Senanayake, Kochenderfer, Pavone, *Evidential Softmax for Sparse Multimodal
Distributions in Deep Generative Models*, NeurIPS 2021.
"""

import math
from functools import partial

import torch
from torch import Tensor, nn

from ..kernels.sparse import fused_sparse
from .masking import compute_dtype, is_absent, masked_softmax

TRAINING_EPSILON = 1e-6


def evsoftmax(scores: Tensor, dim: int = -1, training: bool = False) -> Tensor:
    """w_i exp(x_i) / Σ w_k exp(x_k), with w_i = 1 where x_i ≥ mean(x), else 0 (in training: ε = 1e-6).

    With ε in place of 0, dropped scores keep a gradient and the log-likelihood of every entry is finite. The
    choice of what is kept has no gradient of its own. The largest score is always kept, so that rounding of the
    mean cannot empty a row of equal scores.

    Args:
        scores: any shape, fp16, bf16, fp32 or fp64; −inf marks an absent score, which the mean leaves out.
        dim: the dimension that holds the distribution.
        training: give dropped scores ε of their softmax weight rather than 0.

    Returns:
        probabilities, shape and dtype of ``scores``. Error against float64: below 3e-7 in fp32 (a score within
        rounding of the mean may fall on the other side of it).
    """
    if dim not in (-1, scores.dim() - 1):
        return evsoftmax(scores.movedim(dim, -1), training=training).movedim(-1, dim)
    epsilon = torch.tensor(TRAINING_EPSILON if training else 0.0)
    return fused_sparse("evsoftmax", scores, partial(evsoftmax_formula, training=training), epsilon)


def evsoftmax_formula(scores: Tensor, training: bool) -> Tensor:
    """:func:`evsoftmax` over the last dimension, in plain torch."""
    x = scores.to(compute_dtype(scores.dtype))
    absent = is_absent(x)
    count = (~absent).sum(-1, keepdim=True)
    mean = x.detach().masked_fill(absent, 0.0).sum(-1, keepdim=True) / count  # 0 / 0 in a row without scores
    kept = ~(x < mean) | (x == x.amax(-1, keepdim=True))  # all in a row with NaN, to make it NaN
    if training:
        log_weight = torch.zeros_like(x).masked_fill(~kept, math.log(TRAINING_EPSILON))
        return masked_softmax(x + log_weight, absent, -1).to(scores.dtype)
    return masked_softmax(x, absent | ~kept, -1).to(scores.dtype)


class EvSoftmax(nn.Module):
    """:func:`evsoftmax` over the last dimension; its training form while ``self.training``."""

    def forward(self, scores: Tensor) -> Tensor:
        return evsoftmax(scores, training=self.training)
