"""fairseq's attention and decoder with mappings other than softmax."""

from .attention import MappedMultiheadAttention
from .decoder import MappedDecoder
