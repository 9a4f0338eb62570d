"""What is measured, from tensors: distributions row by row and their means, layers, rollouts.

Sources: multi-modality and sparsity, Zhou, Fritz & Keuper 2024 (Definitions 3.2 and 3.3); MAD, Chen et al. 2020;
rollout, Abnar & Zuidema 2020; the rest is textbook. A row is a vector of scores x (−inf: absent) and the
probabilities φ that a mapping computes from it.
"""

import math
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..mappings import compute_dtype, is_absent

# A score within this distance (nats) of the default threshold is on neither side. In a row of equal scores all lie
# exactly on the threshold, and rounding would decide the side.
RESOLUTION = 1e-5

# Entries processed at a time in wide distributions (a vocabulary): 64 MiB in fp32.
CHUNK_SIZE = 2**24

# k, for metrics of the k largest entries of a row.
TOP_K = 5

# Irrelevant probabilities are counted in bins of their logarithm, from 1 down to e^−32; smaller ones are in the last.
BINS_PER_NAT, NUM_BINS = 64, 2048

# Bins of asinh on either side of 0: scores up to 10^8.
ASINH_BINS = 20 * BINS_PER_NAT


class RowMetrics(NamedTuple):
    """One tensor for each metric, in the shape of the rows; NaN where undefined.

    With ε a threshold on the scores, N the number of relevant scores below the largest, ε < x_n < max x, and L that
    of irrelevant ones, x_l < ε:

    Attributes:
        multimodality: M = 1 − (1/N) Σ_n (max φ − φ_n), in [0, 1]: 1 where relevant scores share the top, 0 with one
            mode; undefined where N = 0 (Zhou et al. 2024, Definition 3.2).
        top_multimodality: M where the ``TOP_K`` largest scores (and all equal to the last) are relevant.
        sparsity: S = (1/L) Σ_l exp(−φ_l / s), in (0, 1]: 1 if irrelevant scores get nothing, less the more they get;
            undefined where L = 0 (Definition 3.3).
        tail: mean probability of the irrelevant entries.
        entropy: nats.
        support: number of entries above 0.
        effective_support: exp(entropy), a number of entries.
        top_share: probability of the most probable entry.
        top_k_share: probability of the ``TOP_K`` most probable entries together.
    """

    multimodality: Tensor
    top_multimodality: Tensor
    sparsity: Tensor
    tail: Tensor
    entropy: Tensor
    support: Tensor
    effective_support: Tensor
    top_share: Tensor
    top_k_share: Tensor


def row_metrics(
    scores: Tensor, probabilities: Tensor, threshold: Optional[float] = None, reference: Optional[float] = None
) -> RowMetrics:
    """All metrics of each row.

    Args:
        scores: (…, K); −inf marks an absent score.
        probabilities: (…, K), from the mapping.
        threshold: ε; by default log(1/K) + logsumexp(x), with K the number of scores present: a score is relevant if
            softmax would give it more than 1/K.
        reference: s, a probability that does not depend on φ; 1/K by default.

    Returns:
        metrics of shape (…), fp32 (fp64 for fp64 scores).
    """
    return _metrics(scores, probabilities, threshold, reference)[0]


def _metrics(
    scores: Tensor, probabilities: Tensor, threshold: Optional[float] = None, reference: Optional[float] = None
) -> Tuple[RowMetrics, Tensor, Tensor]:
    """The metrics, the probabilities in the dtype that they are computed in, and where a score is irrelevant."""
    if scores.shape != probabilities.shape:
        shapes = f"{tuple(scores.shape)}, {tuple(probabilities.shape)}"
        raise ValueError(f"scores and probabilities differ in shape: {shapes}")
    x = scores.to(compute_dtype(scores.dtype))
    p, present = probabilities.to(x.dtype), ~is_absent(x)
    count = present.sum(-1, keepdim=True).to(x.dtype)
    # x − max x: equal scores stay equal, and the sum keeps its digits
    below_largest = x - x.amax(-1, keepdim=True).masked_fill(count == 0, 0.0)
    distance = below_largest - (below_largest.logsumexp(-1, keepdim=True) - count.log())
    distance = distance if threshold is None else x - threshold
    k, nan = min(TOP_K, p.size(-1)), float("nan")
    largest, irrelevant = p.topk(k, dim=-1).values, present & (distance < -RESOLUTION)
    gap, is_below = p.amax(-1, keepdim=True) - p, present & (below_largest < 0)
    is_empty = largest[..., 0] == 0  # a row of zeros is no distribution
    nats = torch.special.entr(p).sum(-1).masked_fill(is_empty, nan)
    metrics = RowMetrics(
        multimodality=1 - _mean(gap, is_below & (distance > RESOLUTION)),
        top_multimodality=1 - _mean(gap, is_below & (x >= x.topk(k, dim=-1).values[..., -1:])),
        sparsity=_mean((-p * (1 / reference if reference is not None else count)).exp(), irrelevant),
        tail=_mean(p, irrelevant),
        entropy=nats,
        support=(p > 0).sum(-1).to(p.dtype).masked_fill(is_empty, nan),
        effective_support=nats.exp(),
        top_share=largest[..., 0].masked_fill(is_empty, nan),
        top_k_share=largest.sum(-1).masked_fill(is_empty, nan),
    )
    return metrics, p, irrelevant


def _mean(values: Tensor, where: Tensor) -> Tensor:
    """The mean of each row's entries in ``where``; 0 / 0 gives the NaN of an undefined row."""
    return values.masked_fill(~where, 0.0).sum(-1) / where.sum(-1)


class MeanMetrics:
    """Means of :class:`RowMetrics` over all rows seen, for each head (or other group).

    Keeps two numbers for each metric and group, however many rows there are, and a histogram of irrelevant
    probabilities. It gives S, with an error below 2e-5, for an s that is known only after all models have been seen.

    Args:
        num_groups: number of heads.
    """

    def __init__(self, num_groups: int):
        self.rows = 0
        # of each metric and group: the sum of its values, and how many rows define it
        self._sums, self._defined = torch.zeros(2, len(RowMetrics._fields), num_groups, dtype=torch.float64)
        # of each group and bin: the sum of weights (1/L, so that rows count equally), and of weights times φ
        self._tails = torch.zeros(num_groups, 2, NUM_BINS, dtype=torch.float64)

    def update(self, scores: Tensor, probabilities: Tensor) -> None:
        """Add rows.

        Args:
            scores, probabilities: (num_groups, rows, K).
        """
        height = max(CHUNK_SIZE // max(scores.size(0) * scores.size(-1), 1), 1)
        for parts in zip(scores.split(height, 1), probabilities.split(height, 1)):
            metrics, p, irrelevant = _metrics(*parts)
            values = torch.stack(metrics).double()
            self.rows += p.size(1)
            self._sums += values.nansum(-1).cpu()
            self._defined += (~values.isnan()).sum(-1).cpu()
            weights = (1 / irrelevant.sum(-1, keepdim=True).double()).expand(p.shape)
            for tails, of_group, weight, where in zip(self._tails, p, weights, irrelevant):
                tail, weight = of_group[where], weight[where]
                bins = (-BINS_PER_NAT * tail.log()).clamp(0, NUM_BINS - 1).long()
                for row, terms in zip(tails, (weight, weight * tail)):
                    row += bins.bincount(terms, NUM_BINS).cpu()

    def result(self) -> List[Dict[str, Optional[float]]]:
        """For each group: its rows, each mean (None if no row defines it), and the rows that M and S leave out."""
        results: List[Dict[str, Optional[float]]] = []
        for sums, defined in zip(self._sums.t().tolist(), self._defined.t().tolist()):
            metrics = list(zip(RowMetrics._fields, sums, defined))
            means = {name: total / n if n else None for name, total, n in metrics}
            left_out = {f"{name}_undefined": self.rows - int(n) for name, _, n in metrics[:3]}  # of M and S
            results.append({"rows": self.rows, **means, **left_out})
        return results

    def sparsity_at(self, reference: float) -> List[Optional[float]]:
        """The mean of S with s = ``reference`` for each group; None if no row defines it."""
        weights, moments = self._tails.unbind(1)
        means = (weights * (-moments / weights / reference).exp()).nansum(1) / weights.sum(1)
        return [None if mean.isnan() else mean.item() for mean in means]


class ScoreHistogram:
    """A histogram of scores of unknown range: bins of asinh(x), so as wide as x is large, and 1/64 around 0.

    Attributes:
        low, high: the smallest and the largest score seen; inf and −inf before the first.
    """

    def __init__(self):
        self.low, self.high = math.inf, -math.inf
        self._counts = torch.zeros(2 * ASINH_BINS, dtype=torch.int64)

    def update(self, scores: Tensor) -> None:
        """Count scores of any shape, except those that are not finite."""
        for part in scores.flatten().split(CHUNK_SIZE):
            values = part[part.isfinite()].double().cpu()
            if values.numel():
                self.low, self.high = min(self.low, values.min().item()), max(self.high, values.max().item())
                bins = (values.asinh() * BINS_PER_NAT).floor().long() + ASINH_BINS
                self._counts += bins.clamp(0, 2 * ASINH_BINS - 1).bincount(minlength=2 * ASINH_BINS)

    def bins(self, outermost: float = 0.0) -> Tuple[Tensor, Tensor]:
        """Borders, (bins + 1,) fp64, and counts, (bins,); without this share of the scores at either end."""
        shares = self._counts.cumsum(0) / self._counts.sum()
        first, last = int((shares <= outermost).sum()), int((shares < 1 - outermost).sum())
        borders = torch.arange(first, last + 2, dtype=torch.float64) - ASINH_BINS
        return (borders / BINS_PER_NAT).sinh(), self._counts[first : last + 1]


# ---------------------------------------------------------------------- layers


def mean_average_distance(hidden: Tensor, mask: Optional[Tensor] = None) -> Tensor:
    """MAD: the mean of 1 − cos(h_i, h_j) over pairs i ≠ j of a sentence's tokens; 0 if all point the same way.

    With u_i = h_i / |h_i| the mean cosine is (|Σ u_i|² − Σ |u_i|²) / (n (n − 1)), which needs no n × n matrix.

    Args:
        hidden: (bsz, length, dim), a layer's output; a zero vector has distance 1 to all others.
        mask: bool (bsz, length), true for tokens; by default all true.

    Returns:
        (bsz,), in [0, 2]; NaN for a sentence of fewer than two tokens.
    """
    units = F.normalize(hidden.to(compute_dtype(hidden.dtype)), dim=-1)
    if mask is None:
        mask = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
    units = units.masked_fill(~mask.unsqueeze(-1), 0.0)
    count = mask.sum(1)
    cosines = units.sum(1).square().sum(-1) - units.square().sum((1, 2))
    return torch.where(count > 1, 1 - cosines / (count * (count - 1)), float("nan"))


# ---------------------------------------------------------------------- all layers together


def attention_rollout(attentions: Sequence[Tensor]) -> Tensor:
    """Π over layers of ½ A + ½ I, rows normalised, for the self-attention of an encoder or a language model.

    Args:
        attentions: one for each layer, first to last: (bsz, num_heads, length, length); heads are averaged. A row of
            zeros (a padded query) passes its token on unchanged.

    Returns:
        (bsz, length, length): row i says how much of output i comes from each input. Rows sum to 1.
    """
    if not attentions:
        raise ValueError("a rollout needs the attention of at least one layer")
    means = [attention.mean(1, dtype=compute_dtype(attention.dtype)) for attention in attentions]
    rollout = torch.eye(means[0].size(-1), dtype=means[0].dtype, device=means[0].device).expand_as(means[0])
    for attention in means:
        rollout = attention @ rollout + rollout
        rollout = rollout / rollout.sum(-1, keepdim=True)
    return rollout


def translation_rollout(
    decoder: Sequence[Tensor], cross: Sequence[Tensor], encoder: Sequence[Tensor]
) -> Tuple[Tensor, Tensor]:
    """The rollout of an encoder and a decoder: each self-attention and each cross-attention has weight ½.

    Let E be the encoder's rollout and R that of a decoder layer's inputs. Self-attention turns R into ½ A R + ½ R;
    cross-attention then turns the new R into ½ C E + ½ R.

    Args:
        decoder: self-attention of each decoder layer, (bsz, num_heads, tgt_len, tgt_len).
        cross: cross-attention of each decoder layer, (bsz, num_heads, tgt_len, src_len).
        encoder: self-attention of each encoder layer, (bsz, num_heads, src_len, src_len).

    Returns:
        how much of each decoder output comes from each source token, (bsz, tgt_len, src_len), and from each target
        token read, (bsz, tgt_len, tgt_len). The two rows of an output together sum to 1.
    """
    tgt_len, src_len = cross[0].shape[-2:]
    # of source and target tokens together: queries that an attention does not have pass their tokens on
    steps = [F.pad(attention, (0, tgt_len, 0, tgt_len)) for attention in encoder]
    for to_target, to_source in zip(decoder, cross, strict=True):
        steps += [F.pad(to_target, (src_len, 0, src_len, 0)), F.pad(to_source, (0, tgt_len, src_len, 0))]
    return attention_rollout(steps)[:, src_len:].split([src_len, tgt_len], dim=-1)
