"""``--multimax-backend`` belongs to a run, not to a model, so it is not restored from a checkpoint.

fairseq saves every option with a model and builds the loaded model from them, perhaps on a machine without a
compiler, or beside models trained with another backend. Every model is loaded by
``fairseq.checkpoint_utils.load_checkpoint_to_cpu``, so the option is reset there.
"""

import functools
from typing import Any, Dict, Optional

from fairseq import checkpoint_utils

OPTION, DEFAULT = "multimax_backend", "auto"


def install() -> None:
    """Make fairseq load every checkpoint with the default; does nothing the second time."""
    load = checkpoint_utils.load_checkpoint_to_cpu
    if hasattr(load, OPTION):
        return

    @functools.wraps(load)
    def load_checkpoint_to_cpu(path: str, arg_overrides: Optional[Dict[str, Any]] = None, *args, **kwargs):
        state = load(path, arg_overrides, *args, **kwargs)
        if OPTION not in (arg_overrides or {}):  # --model-overrides belongs to this run
            for options in (state.get("args"), (state.get("cfg") or {}).get("model")):
                if getattr(options, OPTION, None) is not None:
                    setattr(options, OPTION, DEFAULT)
        return state

    setattr(load_checkpoint_to_cpu, OPTION, True)
    checkpoint_utils.load_checkpoint_to_cpu = load_checkpoint_to_cpu
