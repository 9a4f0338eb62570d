"""Factors of attention's scores, applied before the mapping: ``--attention-scale``.

A score is q · k / √d_head; the factors here come on top. They multiply the queries, one product that works with every
mapping and every way to compute attention.
"""

import math

import torch
from torch import Tensor, nn

from ..mappings import is_absent

NEUTRAL_LENGTH = 64  # keys at which a new LogLengthScale changes nothing


class LearnedScale(nn.Module):
    """Scores times t, one learned number for all heads of an attention module: a temperature of 1 / t.

    Attributes:
        t: parameter (1,), 1 at the start.

    Source: the second version of MultiMax in its authors' code (February 2026), x ← t · x + b. Their b only moves
    thresholds, and is left out.
    """

    def __init__(self):
        super().__init__()
        self.t = nn.Parameter(torch.ones(1))

    def forward(self) -> Tensor:
        """The factor, (1,)."""
        return self.t


class LogLengthScale(nn.Module):
    """Scores times s · log n, with n the number of keys that a query may see, and one learned s per head.

    With more keys, softmax of scores of the same size gets flatter. The factor grows with log n, so that the largest
    score keeps its share.

    Attributes:
        s: parameter (num_heads,), 1 / log 64 at the start: nothing changes at 64 keys.

    Source: Nakanishi, *Scalable-Softmax Is Superior for Attention*, 2025.
    """

    def __init__(self, num_heads: int):
        super().__init__()
        self.s = nn.Parameter(torch.full((num_heads,), 1 / math.log(NEUTRAL_LENGTH)))

    def forward(self, counts: Tensor) -> Tensor:
        """The factors, fp32, (bsz, num_heads, tgt_len, 1), of the n of :func:`visible_keys`; 0 where n is 1 or 0."""
        return counts.clamp(min=1).log() * self.s.float()[:, None, None]


# By the names of --attention-scale: num_heads → the module, or None.
SCALES = {"none": lambda num_heads: None, "learned": lambda num_heads: LearnedScale(), "log-length": LogLengthScale}


def visible_keys(mask: Tensor, is_causal: bool, tgt_len: int) -> Tensor:
    """How many keys each query may see: fp32, (bsz, heads, tgt_len, 1), of size 1 where it does not depend on that.

    Args:
        mask: (bsz | 1, heads | 1, tgt_len | 1, src_len), −inf where a key is hidden: a mask to be added, or scores.
        is_causal: whether, besides, query i sees only the keys up to i; ``mask`` is then the same for all queries.
    """
    shown = (~is_absent(mask)).float()
    if not is_causal:
        return shown.sum(-1, keepdim=True)
    last = torch.arange(tgt_len, device=mask.device).clamp(max=mask.size(-1) - 1)
    return shown.cumsum(-1)[..., last].transpose(2, 3)
