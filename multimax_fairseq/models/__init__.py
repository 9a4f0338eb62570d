"""Models and architectures; importing a module of this folder registers them with fairseq."""

from .multimax_transformer import MultimaxTransformerModel
from .multimax_transformer_lm import MultimaxTransformerLanguageModel
from .options import MappingChoice, MappingOptions

__all__ = [
    "MappingChoice",
    "MappingOptions",
    "MultimaxTransformerLanguageModel",
    "MultimaxTransformerModel",
]
