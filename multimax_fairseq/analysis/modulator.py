"""Is a trained modulator's σ monotone on the scores that it sees, and how steep is it?"""

from typing import NamedTuple, Sequence

import torch
from torch import Tensor

from ..mappings import MultiMax


class ModulatorParameters(NamedTuple):
    """Thresholds (b_n, d_n) and gains (g_b,n, g_d,n), each fp64 (N, 2), on the CPU; gains of fixed terms are 0."""

    thresholds: Tensor
    gains: Tensor


def parameters_of(mapping: MultiMax) -> ModulatorParameters:
    """The numbers of a modulator as σ uses them."""
    return ModulatorParameters(*(tensor.detach().double().cpu() for tensor in mapping.coefficients()))


def slope(scores: Tensor, thresholds: Tensor, gains: Tensor) -> Tensor:
    """σ'(x) = 1 − Σ_n n g_b,n max(b_n − x, 0)^(n−1) [x < b_n] + Σ_n n g_d,n max(x − d_n, 0)^(n−1) [x > d_n].

    Args:
        scores: any shape.
        thresholds, gains: (N, 2), as in :func:`multimax_fairseq.mappings.modulate`.

    Returns:
        the shape of ``scores``; below 0 where σ falls.
    """
    result = torch.ones_like(scores)
    for n, ((b, d), (gain_b, gain_d)) in enumerate(zip(thresholds, gains), start=1):
        below, above = (b - scores).clamp(min=0) ** (n - 1), (scores - d).clamp(min=0) ** (n - 1)
        result = result - n * gain_b * below * (scores < b) + n * gain_d * above * (scores > d)
    return result


def is_monotone(thresholds: Tensor, gains: Tensor, low: float, high: float) -> bool:
    """Whether σ rises all the way from ``low`` to ``high``.

    σ' is linear between neighbouring thresholds (orders 1 and 2), so checking both ends of each interval, from
    inside, is enough.
    """
    inside = [float(x) for x in thresholds.flatten() if low < x < high]
    ends = torch.tensor(sorted([low, *inside, high]), dtype=torch.float64)
    lengths = ends[1:] - ends[:-1]
    near_ends = torch.cat([ends[:-1] + 1e-9 * lengths, ends[1:] - 1e-9 * lengths])
    return bool((slope(near_ends, thresholds.double(), gains.double()) > 0).all())


def falling_share(thresholds: Tensor, gains: Tensor, edges: Sequence[float], counts: Sequence[int]) -> float:
    """The share of a histogram's scores where σ falls, judged at the middle of each bin."""
    edges = torch.tensor(edges, dtype=torch.float64)
    counts = torch.tensor(counts, dtype=torch.float64)
    falls = slope((edges[1:] + edges[:-1]) / 2, thresholds.double(), gains.double()) < 0
    return float((counts * falls).sum() / counts.sum())
