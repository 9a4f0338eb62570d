"""Models and architectures. Importing this folder registers them and the criterions with fairseq, which imports only
the package, ``models`` and ``tasks`` of a ``--user-dir``.
"""

from .. import compat
from ..without_fairseq import require_fairseq

require_fairseq()
compat.apply()  # before any use of fairseq

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
