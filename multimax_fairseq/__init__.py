"""MultiMax and other alternatives to softmax, for fairseq's Transformers.

With fairseq installed, importing this package registers its models and criterions, as ``--user-dir`` does; without
it, :mod:`multimax_fairseq.mappings` works all the same.
"""

import importlib.util

__version__ = "0.1.0"

if importlib.util.find_spec("fairseq") is not None:
    from . import compat

    compat.apply()

    from . import criterions, models  # noqa: F401, E402
