"""Models and architectures; importing a module of this folder registers them with fairseq."""

from . import modulator_training, sparse_decoding
from .multimax_transformer import MultimaxTransformerModel
from .multimax_transformer_lm import MultimaxTransformerLanguageModel
from .options import MappingChoice, MappingOptions

modulator_training.install()
sparse_decoding.install()

__all__ = [
    "MappingChoice",
    "MappingOptions",
    "MultimaxTransformerLanguageModel",
    "MultimaxTransformerModel",
]
