"""Over-smoothing: how similar a layer's outputs for different tokens are.

Source: Chen, Lin, Li, Li, Zhou & Sun, *Measuring and Relieving the Over-smoothing Problem for Graph Neural Networks*,
AAAI 2020 (MAD, over all pairs of a sentence's tokens).
"""

from typing import Optional

import torch
from torch import Tensor
from torch.nn import functional as F

from ..mappings import compute_dtype


def mean_cosine_similarity(hidden: Tensor, mask: Optional[Tensor] = None) -> Tensor:
    """The mean of cos(h_i, h_j) over pairs i ≠ j of a sentence's tokens.

    With u_i = h_i / |h_i| it is (|Σ u_i|² − Σ |u_i|²) / (n (n − 1)), which needs no n × n matrix.

    Args:
        hidden: (bsz, length, dim), a layer's output; a zero vector has similarity 0 with all others.
        mask: bool (bsz, length), true for tokens; by default all true.

    Returns:
        (bsz,), in [−1, 1]; NaN for a sentence of fewer than two tokens.
    """
    h = hidden.to(compute_dtype(hidden.dtype))
    units = F.normalize(h, dim=-1)
    if mask is None:
        mask = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
    units = units.masked_fill(~mask.unsqueeze(-1), 0.0)
    count = mask.sum(1).to(h.dtype)
    pairs = count * (count - 1)
    total = units.sum(1).square().sum(-1) - units.square().sum((1, 2))
    return torch.where(pairs > 0, total / pairs, torch.full_like(total, float("nan")))


def mean_average_distance(hidden: Tensor, mask: Optional[Tensor] = None) -> Tensor:
    """MAD: the mean cosine distance 1 − cos(h_i, h_j) over pairs of a sentence's tokens; 0 if all point the same way.

    Args, Returns: as :func:`mean_cosine_similarity`, in [0, 2].
    """
    return 1 - mean_cosine_similarity(hidden, mask)
