"""Factors of attention's scores, applied before the mapping: ``--attention-scale``.

A score is q · k / √d_head; the factors here come on top. They multiply the queries, (tgt_len, bsz, embed_dim): one
product, which works with every mapping and every way to compute attention.
"""

import math
from typing import Callable, Optional

import torch
from torch import Tensor, nn

from ..kernels.scores import is_absent
from ..mappings import additive_mask

NEUTRAL_LENGTH = 64  # keys at which a new LogLengthScale changes nothing


class LearnedScale(nn.Module):
    """Scores times t, one learned number for all heads of an attention module: a temperature of 1 / t.

    Attributes:
        t: parameter (1,), 1 at the start.

    Source: the second version of MultiMax in its authors' code (February 2026), x ← t · x + b. Their b only moves
    thresholds, and is left out.
    """

    def __init__(self, num_heads: int):
        super().__init__()
        self.t = nn.Parameter(torch.ones(1))

    def forward(self, count_keys: Callable[[], Tensor]) -> Tensor:
        """The factor, (1,); see :class:`LogLengthScale` for the argument."""
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

    def forward(self, count_keys: Callable[[], Tensor]) -> Tensor:
        """The factors of a batch, fp32, (tgt_len or 1, bsz or 1, num_heads); 0 where a query sees one key, or none.

        ``count_keys`` gives n, as :func:`visible_keys` does.
        """
        return count_keys().clamp(min=1).log()[..., None] * self.s.float()


SCALES = {"none": None, "learned": LearnedScale, "log-length": LogLengthScale}


def build_scale(name: str, num_heads: int) -> Optional[nn.Module]:
    """The module of ``--attention-scale name``; None for ``none``.

    Raises:
        ValueError: no scale has this name.
    """
    if name not in SCALES:
        raise ValueError(f"--attention-scale: there is no {name!r}; choose from: {', '.join(SCALES)}")
    return None if SCALES[name] is None else SCALES[name](num_heads)


def visible_keys(src_len: int, padding: Optional[Tensor], attn_mask: Optional[Tensor], causal: bool) -> Tensor:
    """How many keys each query may see.

    Args:
        src_len: keys in all.
        padding: (bsz, src_len), true where a key is padding, or None.
        attn_mask: (tgt_len, src_len), bool or to be added to the scores, or None.
        causal: whether ``attn_mask`` shows each query the keys up to its own position, and no others.

    Returns:
        fp32, (tgt_len, bsz); size 1 where the count does not depend on the query or the sentence.
    """
    if padding is None and attn_mask is None:
        return torch.full((1, 1), float(src_len))
    if attn_mask is None:
        return (src_len - padding.bool().sum(1, keepdim=True).float()).T  # (1, bsz)
    is_key = torch.ones(1, src_len, device=attn_mask.device) if padding is None else (~padding.bool()).float()
    if causal:
        return is_key.cumsum(1).T
    shown = (~is_absent(additive_mask(attn_mask, torch.float32))).float()
    with torch.autocast(shown.device.type, enabled=False):
        return shown @ is_key.T
