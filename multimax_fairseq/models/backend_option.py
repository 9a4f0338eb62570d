"""``--multimax-backend`` belongs to a run, not to a model: what a checkpoint says of it is not restored.

fairseq saves every option of a model with it, and builds the model from them where it is loaded, perhaps on a machine
without a compiler, or beside others that were trained with another backend. Whatever loads a model does so by
``fairseq.checkpoint_utils.load_checkpoint_to_cpu``, so that is where this takes the option back.
"""

import functools
from typing import Any, Dict, Optional

from fairseq import checkpoint_utils

OPTION, DEFAULT = "multimax_backend", "auto"


def install() -> None:
    """Let fairseq load every checkpoint with the default; does nothing the second time."""
    load = checkpoint_utils.load_checkpoint_to_cpu
    if hasattr(load, OPTION):
        return

    @functools.wraps(load)
    def load_checkpoint_to_cpu(path: str, arg_overrides: Optional[Dict[str, Any]] = None, *args, **kwargs):
        state = load(path, arg_overrides, *args, **kwargs)
        if OPTION not in (arg_overrides or {}):  # what --model-overrides says is of this run
            for options in (state.get("args"), (state.get("cfg") or {}).get("model")):
                if getattr(options, OPTION, None) is not None:
                    setattr(options, OPTION, DEFAULT)
        return state

    setattr(load_checkpoint_to_cpu, OPTION, True)
    checkpoint_utils.load_checkpoint_to_cpu = load_checkpoint_to_cpu
