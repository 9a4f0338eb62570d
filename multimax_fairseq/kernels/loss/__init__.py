"""Output projection and loss together, in bounded memory."""

from .chunks import check_options, default_chunk_tokens
from .cross_entropy import TokenLosses, chunked_cross_entropy
from .entmax import EntmaxLosses, chunked_entmax_loss

__all__ = ["EntmaxLosses", "TokenLosses", "check_options", "chunked_cross_entropy", "chunked_entmax_loss",
           "default_chunk_tokens"]  # fmt: skip
