"""MultiMax and other alternatives to softmax, for fairseq's Transformers.

:mod:`multimax_fairseq.mappings` needs no fairseq, and does not import it. Models and criterions are registered with
fairseq by ``--user-dir``, by importing :mod:`multimax_fairseq.models`, and by importing this package where fairseq
has been imported already.
"""

import sys

__version__ = "0.2.0"


class _Path(list):
    """``__path__`` of this package, which registers where fairseq looks up a ``--user-dir`` in it: all that fairseq
    does about one that is imported already, as it is in a program that came for the mappings first.
    """

    def __contains__(self, folder: object) -> bool:
        is_ours = super().__contains__(folder)
        if is_ours and "fairseq" in sys.modules:
            from . import models  # noqa: F401
        return is_ours


__path__ = _Path(__path__)

if "fairseq" in sys.modules:
    from . import models  # noqa: F401
