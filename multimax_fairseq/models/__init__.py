"""Models and architectures; importing a module of this folder registers them with fairseq."""

from . import backend_option, modulator_training
from .multimax_transformer import MultimaxTransformerModel
from .multimax_transformer_lm import MultimaxTransformerLanguageModel
from .options import MappingChoice, MappingOptions

backend_option.install()
modulator_training.install()

__all__ = [
    "MappingChoice",
    "MappingOptions",
    "MultimaxTransformerLanguageModel",
    "MultimaxTransformerModel",
]
