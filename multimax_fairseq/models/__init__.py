"""Models and architectures. Importing this folder registers them and the criterions with fairseq, which imports only
the package, ``models`` and ``tasks`` of a ``--user-dir``.
"""

from .. import compat
from ..without_fairseq import advice, has_fairseq

if not has_fairseq():
    raise ModuleNotFoundError(advice(), name="fairseq")
compat.apply()  # before any use of fairseq

from fairseq.sequence_scorer import SequenceScorer  # noqa: E402
from fairseq.trainer import Trainer  # noqa: E402

from .. import criterions  # noqa: E402, F401
from .checkpoints import checks_mappings  # noqa: E402
from .multimax_transformer import MultimaxTransformerModel  # noqa: E402
from .multimax_transformer_lm import MultimaxTransformerLanguageModel  # noqa: E402
from .options import MappingOptions  # noqa: E402
from .sparse_search import smooths_zeros  # noqa: E402

# With those of compat.apply, all that is replaced in fairseq: docs/how-it-is-built.md says why.
Trainer.load_checkpoint = checks_mappings(Trainer.load_checkpoint)
SequenceScorer.generate = smooths_zeros(SequenceScorer.generate)

__all__ = [
    "MappingOptions",
    "MultimaxTransformerLanguageModel",
    "MultimaxTransformerModel",
]
