"""What an attention mask hides."""

from typing import Optional, Tuple

import torch
from torch import Tensor

from ..mappings import additive_mask

ROWS = 1_024  # of a mask that are looked at together, so that looking takes no memory of length²

_last: Optional[Tuple[Tuple, Tensor, bool]] = None


def is_causal(mask: Tensor) -> bool:
    """Whether a mask shows each query the keys up to its own position, adds nothing to them, and hides the rest.

    The layers of a decoder are all given the same mask: the answer is kept until another comes.

    Args:
        mask: (tgt_len, src_len), in any convention that :func:`..mappings.additive_mask` knows.
    """
    global _last
    if mask.dim() != 2 or mask.size(0) != mask.size(1):
        return False
    if mask.is_inference():  # has no version, by which a change could be seen
        return _looks_causal(mask)
    key = mask.data_ptr(), mask._version, mask.shape, mask.stride(), mask.dtype, mask.device
    if _last is None or _last[0] != key:
        _last = key, mask, _looks_causal(mask)  # the mask is kept too: no other can then have its address
    return _last[2]


def _looks_causal(mask: Tensor) -> bool:
    for start in range(0, len(mask), ROWS):
        rows = additive_mask(mask[start : start + ROWS], torch.float32)
        if not torch.equal(rows, torch.full_like(rows, float("-inf")).triu_(start + 1)):
            return False
    return True
