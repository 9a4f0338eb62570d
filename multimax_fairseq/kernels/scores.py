"""What every kernel must know about scores: the dtype to compute in, and that −inf means no score."""

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)


def is_absent(scores: Tensor) -> Tensor:
    """Where a score is −inf: bool, the shape of ``scores``."""
    return scores == float("-inf")


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that a mapping computes in: fp32 for fp16 and bf16, else ``dtype`` itself."""
    return torch.float32 if dtype in HALF else dtype
