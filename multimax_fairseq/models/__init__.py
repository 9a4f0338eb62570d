"""Models and architectures. Importing this folder registers them with fairseq, and the criterions with them: of a
``--user-dir`` fairseq imports the package, ``models`` and ``tasks``.
"""

from .. import compat

compat.apply()  # before fairseq is asked for anything

from .. import criterions  # noqa: E402, F401
from . import backend_option, modulator_training, sparse_decoding  # noqa: E402
from .multimax_transformer import MultimaxTransformerModel  # noqa: E402
from .multimax_transformer_lm import MultimaxTransformerLanguageModel  # noqa: E402
from .options import MappingChoice, MappingOptions  # noqa: E402

backend_option.install()
modulator_training.install()
sparse_decoding.install()

__all__ = [
    "MappingChoice",
    "MappingOptions",
    "MultimaxTransformerLanguageModel",
    "MultimaxTransformerModel",
]
