"""MultiMax and other alternatives to softmax, for fairseq's Transformers.

:mod:`multimax_fairseq.mappings` neither needs nor imports fairseq. Three things register the models and criterions
with fairseq: ``--user-dir``, importing :mod:`multimax_fairseq.models`, and importing this package after fairseq.
"""

import sys

__version__ = "0.3.0"


class _Path(list):
    """This package's ``__path__``; registers the models when fairseq looks up a ``--user-dir`` in it.

    If the package is already imported (for its mappings, say), fairseq does nothing else with a ``--user-dir``.
    """

    def __contains__(self, folder: object) -> bool:
        is_ours = super().__contains__(folder)
        if is_ours and "fairseq" in sys.modules:
            from . import models  # noqa: F401
        return is_ours


__path__ = _Path(__path__)

if "fairseq" in sys.modules:
    from . import models  # noqa: F401
