"""Output projection and loss together, in bounded memory."""

from .chunks import check_options
from .cross_entropy import TokenLosses, chunked_cross_entropy
from .entmax import EntmaxLosses, chunked_entmax_loss
