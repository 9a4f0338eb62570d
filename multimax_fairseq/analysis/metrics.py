"""How sparse and how multi-modal distributions are, row by row, and means of that in bounded memory.

Sources: multi-modality and sparsity, Zhou, Fritz & Keuper 2024 (Definitions 3.2 and 3.3); the rest is textbook.
A row is a vector of scores x, −inf where there is none, and the probabilities φ that a mapping made of it.
"""

import math
from typing import Dict, List, NamedTuple, Optional

import torch
from torch import Tensor

from ..mappings import compute_dtype, is_absent

# A score within this distance of the default threshold (in nats) is on neither side of it: the threshold is computed,
# and in a row of equal scores, which all lie exactly on it, rounding would throw dice.
RESOLUTION = 1e-5

# Entries looked at together where a distribution is wide (a vocabulary): 64 MiB in fp32.
CHUNK_SIZE = 2**24


class RowMetrics(NamedTuple):
    """A tensor a metric, of the shape of the rows; NaN where a metric is not defined.

    Attributes:
        multimodality: M, see :func:`multimodality`.
        sparsity: S, see :func:`sparsity`.
        entropy: nats.
        support: number of entries above 0.
        effective_support: exp(entropy), a number of entries.
        top_share: probability of the most probable entry.
    """

    multimodality: Tensor
    sparsity: Tensor
    entropy: Tensor
    support: Tensor
    effective_support: Tensor
    top_share: Tensor


def row_metrics(scores: Tensor, probabilities: Tensor) -> RowMetrics:
    """All metrics of each row, with the default threshold and reference.

    Args:
        scores: (…, K); −inf marks an absent score.
        probabilities: (…, K), what the mapping made of them.

    Returns:
        metrics of shape (…), fp32 (fp64 for fp64 scores).
    """
    x, p, present = _prepare(scores, probabilities)
    relevant, irrelevant = _sides(x, present, None)
    nats = entropy(p)
    return RowMetrics(
        multimodality=_multimodality(x, p, relevant),
        sparsity=_sparsity(p, present, irrelevant, None),
        entropy=nats,
        support=support(p),
        effective_support=nats.exp(),
        top_share=top_share(p),
    )


def multimodality(scores: Tensor, probabilities: Tensor, threshold: Optional[float] = None) -> Tensor:
    """M(x) = 1 − (1/N) Σ_{ε < x_n < max x} (max φ − φ_n): 1 where relevant scores share the top, 0 with one mode.

    Args:
        scores: (…, K); −inf marks an absent score.
        probabilities: (…, K).
        threshold: ε; by default log(1/K) + logsumexp(x), with K the number of scores that are there: what softmax
            would give more than 1/K is relevant.

    Returns:
        (…), in [0, 1]; NaN where no score lies between ε and the largest (N = 0).

    Source: Zhou et al. 2024, Definition 3.2.
    """
    x, p, present = _prepare(scores, probabilities)
    return _multimodality(x, p, _sides(x, present, threshold)[0])


def sparsity(
    scores: Tensor,
    probabilities: Tensor,
    threshold: Optional[float] = None,
    reference: Optional[float] = None,
) -> Tensor:
    """S(x) = (1/L) Σ_{x_l < ε} exp(−φ_l / s): 1 where irrelevant scores get nothing, less the more they get.

    Args:
        scores, probabilities, threshold: as in :func:`multimodality`.
        reference: s, a probability that does not depend on φ; 1/K by default.

    Returns:
        (…), in (0, 1]; NaN where no score lies below ε (L = 0).

    Source: Zhou et al. 2024, Definition 3.3.
    """
    x, p, present = _prepare(scores, probabilities)
    return _sparsity(p, present, _sides(x, present, threshold)[1], reference)


def entropy(probabilities: Tensor) -> Tensor:
    """−Σ p log p over the last dimension, in nats; NaN in a row of zeros, which is no distribution."""
    p = probabilities.to(compute_dtype(probabilities.dtype))
    return torch.special.entr(p).sum(-1).masked_fill(_is_empty(p), float("nan"))


def support(probabilities: Tensor) -> Tensor:
    """The number of entries above 0 in the last dimension; NaN in a row of zeros."""
    p = probabilities.to(compute_dtype(probabilities.dtype))
    return (p > 0).sum(-1).to(p.dtype).masked_fill(_is_empty(p), float("nan"))


def effective_support(probabilities: Tensor) -> Tensor:
    """exp(entropy): the number of entries of the uniform distribution with the same entropy."""
    return entropy(probabilities).exp()


def top_share(probabilities: Tensor, k: int = 1) -> Tensor:
    """The probability of the k most probable entries of the last dimension together; NaN in a row of zeros."""
    p = probabilities.to(compute_dtype(probabilities.dtype))
    largest = p.amax(-1) if k == 1 else p.topk(min(k, p.size(-1)), dim=-1).values.sum(-1)
    return largest.masked_fill(_is_empty(p), float("nan"))


def _is_empty(p: Tensor) -> Tensor:
    return p.amax(-1) == 0


def _prepare(scores: Tensor, probabilities: Tensor):
    """Scores and probabilities in the dtype to compute in, and which scores are there."""
    if scores.shape != probabilities.shape:
        raise ValueError(
            f"scores and probabilities differ in shape: {tuple(scores.shape)}, {tuple(probabilities.shape)}"
        )
    x = scores.to(compute_dtype(scores.dtype))
    return x, probabilities.to(x.dtype), ~is_absent(x)


def _sides(x: Tensor, present: Tensor, threshold: Optional[float]):
    """Which scores lie above ε, and which below it."""
    if threshold is not None:
        return present & (x > threshold), present & (x < threshold)
    largest = x.amax(-1, keepdim=True).masked_fill(~present.any(-1, keepdim=True), 0.0)
    below_largest = x - largest  # equal scores stay equal, and the sum keeps its digits
    count = present.sum(-1, keepdim=True).to(x.dtype)
    distance = below_largest - (below_largest.logsumexp(-1, keepdim=True) - count.log())
    return present & (distance > RESOLUTION), present & (distance < -RESOLUTION)


def _multimodality(x: Tensor, p: Tensor, relevant: Tensor) -> Tensor:
    between = relevant & (x < x.amax(-1, keepdim=True))
    gaps = (p.amax(-1, keepdim=True) - p).masked_fill(~between, 0.0)
    return 1 - gaps.sum(-1) / between.sum(-1)  # 0 / 0 is the NaN of an undefined row


def _sparsity(p: Tensor, present: Tensor, irrelevant: Tensor, reference: Optional[float]) -> Tensor:
    inverse = 1 / reference if reference is not None else present.sum(-1, keepdim=True).to(p.dtype)
    return (-p * inverse).exp().masked_fill(~irrelevant, 0.0).sum(-1) / irrelevant.sum(-1)


class MeanMetrics:
    """Means of :class:`RowMetrics` over all rows seen, one for each head (or whatever the groups are).

    Keeps two numbers a metric and group, however many rows there are.

    Args:
        num_groups: number of heads.
    """

    def __init__(self, num_groups: int):
        self.rows = torch.zeros(num_groups, dtype=torch.int64)
        self.sums = {name: torch.zeros(num_groups, dtype=torch.float64) for name in RowMetrics._fields}
        self.defined = {name: torch.zeros(num_groups, dtype=torch.int64) for name in RowMetrics._fields}

    def update(self, scores: Tensor, probabilities: Tensor) -> None:
        """Add rows.

        Args:
            scores, probabilities: (num_groups, rows, K).
        """
        height = max(CHUNK_SIZE // max(scores.size(0) * scores.size(-1), 1), 1)
        for scores_part, probabilities_part in zip(scores.split(height, 1), probabilities.split(height, 1)):
            self.rows += scores_part.size(1)
            for name, values in row_metrics(scores_part, probabilities_part)._asdict().items():
                is_defined = ~values.isnan()
                self.sums[name] += values.double().masked_fill(~is_defined, 0.0).sum(1).cpu()
                self.defined[name] += is_defined.sum(1).cpu()

    def result(self) -> List[Dict[str, Optional[float]]]:
        """For each group the number of rows, each mean (None where no row defines it) and what M and S left out."""
        results = []
        for group in range(len(self.rows)):
            result: Dict[str, Optional[float]] = {"rows": int(self.rows[group])}
            for name in RowMetrics._fields:
                count = int(self.defined[name][group])
                result[name] = float(self.sums[name][group]) / count if count else None
            for name in ("multimodality", "sparsity"):
                result[f"{name}_undefined"] = int(self.rows[group] - self.defined[name][group])
            results.append(result)
        return results


class ScoreHistogram:
    """A histogram of scores whose range is not known beforehand, in a fixed number of bins.

    Bins are [k·w, (k+1)·w) for whole k. Where a score falls outside of the ``num_bins`` bins around those there are,
    neighbours are merged and w doubles, so that a count never has to be guessed.

    Attributes:
        width: w.
        low, high: the smallest and the largest score seen; inf and −inf before the first.
    """

    def __init__(self, num_bins: int = 256, width: float = 2**-6):
        self.num_bins, self.width = num_bins, width
        self.low, self.high = math.inf, -math.inf
        self._first = 0  # k of the first bin
        self._counts = torch.zeros(0, dtype=torch.int64)

    def update(self, scores: Tensor) -> None:
        """Count scores of any shape; those that are not finite are not there."""
        for part in scores.flatten().split(CHUNK_SIZE):
            values = part[part.isfinite()].double().cpu()
            if values.numel():
                self._count(values)

    def _count(self, values: Tensor) -> None:
        self.low, self.high = min(self.low, values.min().item()), max(self.high, values.max().item())
        while math.floor(self.high / self.width) - math.floor(self.low / self.width) >= self.num_bins:
            self._merge_neighbours()
        first, last = math.floor(self.low / self.width), math.floor(self.high / self.width)
        counts = torch.zeros(last - first + 1, dtype=torch.int64)
        offset = self._first - first
        counts[offset : offset + len(self._counts)] = self._counts
        bins = torch.floor(values / self.width).long() - first
        self._first, self._counts = first, counts + torch.bincount(bins, minlength=len(counts))

    def _merge_neighbours(self) -> None:
        self.width *= 2
        if not len(self._counts):
            return
        bins = torch.arange(self._first, self._first + len(self._counts)).div(2, rounding_mode="floor")
        self._first = int(bins[0])
        self._counts = torch.zeros(int(bins[-1] - bins[0]) + 1, dtype=torch.int64).index_add_(
            0, bins - bins[0], self._counts
        )

    @property
    def edges(self) -> List[float]:
        """The borders of the bins, one more than there are counts."""
        return [(self._first + k) * self.width for k in range(len(self._counts) + 1)]

    @property
    def counts(self) -> List[int]:
        return self._counts.tolist()
