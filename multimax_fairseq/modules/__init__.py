"""fairseq's attention, layers, encoder and decoder with mappings other than softmax."""

from .attention import MappedMultiheadAttention
from .transformer import MappedDecoder, MappedEncoder
from .transformer_layer import MappedDecoderLayer, MappedEncoderLayer

__all__ = [
    "MappedDecoder",
    "MappedDecoderLayer",
    "MappedEncoder",
    "MappedEncoderLayer",
    "MappedMultiheadAttention",
]
