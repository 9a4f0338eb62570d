"""What a run does with the checkpoint that it goes on from."""

import argparse
import functools
import logging
import zipfile
from typing import Any, Callable

import torch
from fairseq import checkpoint_utils
from fairseq.file_io import PathManager

from .options import GONE, describe, option_errors

logger = logging.getLogger(__name__)


def checks_mappings(load_checkpoint: Callable) -> Callable:
    """``Trainer.load_checkpoint`` that refuses to resume with other mappings, and knows no earlier run's best score.

    fairseq keeps the best score as an attribute of a function, where a Hydra sweep's next job would find it.
    """

    @functools.wraps(load_checkpoint)
    def load_checked(trainer, filename: str, reset_optimizer: bool = False, *args, **kwargs):
        vars(checkpoint_utils.save_checkpoint).pop("best", None)
        if PathManager.isfile(filename):
            trained = options_of(filename)
            warn_of_what_is_gone(trained)
            if not reset_optimizer:  # --finetune-from-model resets it, too
                check_resumed(filename, trained, trainer.cfg.model)
        return load_checkpoint(trainer, filename, reset_optimizer, *args, **kwargs)

    return load_checked


def options_of(path: str) -> Any:
    """The namespace or config of a checkpoint's model; read in each process, as what fairseq sends has lost it."""
    path = PathManager.get_local_path(path)
    is_zip = zipfile.is_zipfile(path)  # not before torch 1.6; with mmap the weights stay on the disk
    state = torch.load(path, map_location="cpu", mmap=is_zip)
    model = (state.get("cfg") or {}).get("model") or state.get("args")
    return argparse.Namespace(**model) if isinstance(model, dict) else model


@option_errors()
def check_resumed(path: str, trained: Any, wanted: Any) -> None:
    """Raise ValueError if a run would go on with other mappings than its checkpoint was trained with.

    Args:
        path: of the checkpoint.
        trained, wanted: options of the model in the checkpoint, and of the run's.
    """
    now = describe(wanted)
    for flag, before in describe(trained).items():
        if before != now[flag]:
            raise ValueError(
                f"{flag}: {path} was trained with {before}, this run has {now[flag]}; go on with the same, or start "
                "a new run from its weights with --finetune-from-model, and another --save-dir"
            )


def warn_of_what_is_gone(options: Any) -> None:
    """Log one warning if a checkpoint was trained with options that there are no more."""
    used = [name for name, unused in GONE.items() if getattr(options, name, unused) != unused]
    if used:
        logger.warning(
            "trained with %s, of version 0.2.0; there is no such option any more",
            ", ".join(f"--{name.replace('_', '-')} {getattr(options, name)}" for name in used),
        )
