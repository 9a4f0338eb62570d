"""Over-smoothing: how alike a layer's outputs of different tokens have become.

Source: Chen, Lin, Li, Li, Zhou & Sun, *Measuring and Relieving the Over-smoothing Problem for Graph Neural Networks*,
AAAI 2020 (MAD, over all pairs of a sentence's tokens).
"""

from typing import Optional

import torch
from torch import Tensor
from torch.nn import functional as F

from ..mappings import compute_dtype


def mean_cosine_similarity(hidden: Tensor, mask: Optional[Tensor] = None) -> Tensor:
    """The mean over pairs i ≠ j of a sentence's tokens of cos(h_i, h_j).

    With u_i = h_i / |h_i| it is (|Σ u_i|² − Σ |u_i|²) / (n (n − 1)), which needs no n × n matrix.

    Args:
        hidden: (bsz, length, dim), a layer's output; a vector of zeros is similar to none.
        mask: bool (bsz, length), true where there is a token; all of them by default.

    Returns:
        (bsz,), in [−1, 1]; NaN for a sentence of less than two tokens.
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
    """MAD: the mean cosine distance 1 − cos(h_i, h_j) over pairs of a sentence's tokens; 0 where all are alike.

    Args, Returns: as :func:`mean_cosine_similarity`, in [0, 2].
    """
    return 1 - mean_cosine_similarity(hidden, mask)
