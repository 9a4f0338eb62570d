"""What a run does with the checkpoint that it goes on from."""

import argparse
import functools
import logging
import re
import zipfile
from typing import Any, Callable, Dict

import torch
from fairseq import checkpoint_utils
from fairseq.file_io import PathManager
from torch import Tensor, nn

from .options import GONE, describe, option_errors

logger = logging.getLogger(__name__)

# Names of the parameters that mappings and scales have.
OF_MAPPINGS = re.compile(r"_attn\.(mapping|scale)\.|^decoder\.output_mapping\.")


def checks_mappings(load_checkpoint: Callable) -> Callable:
    """``Trainer.load_checkpoint`` that refuses to resume with other mappings, and knows no earlier run's best score.

    A new run from old weights (``--finetune-from-model``, ``--reset-optimizer``) may have others. The best score is
    an attribute of a function of fairseq's, where a Hydra sweep's next job would find it.
    """

    @functools.wraps(load_checkpoint)
    def load_checked(trainer, filename: str, reset_optimizer: bool = False, *args, **kwargs):
        vars(checkpoint_utils.save_checkpoint).pop("best", None)
        if PathManager.isfile(filename):
            trained = options_of(filename)
            warn_of_what_is_gone(trained)
            if not reset_optimizer:  # --finetune-from-model resets it, too
                check_resumed(filename, trained, trainer.cfg.model)
        model = trainer.get_model()
        hook = model._register_load_state_dict_pre_hook(leave_out_other_mappings, with_module=True)
        try:
            return load_checkpoint(trainer, filename, reset_optimizer, *args, **kwargs)
        finally:
            hook.remove()

    return load_checked


def leave_out_other_mappings(model: nn.Module, state_dict: Dict[str, Tensor], *_) -> None:
    """Fit a state dict, in place, to a model with other mappings, a stock one included, and log it in one line.

    Parameters of mappings that the model has not are left out. Where it has them in another shape, it keeps its own.
    """
    names = list(filter(OF_MAPPINGS.search, state_dict))
    own = model.state_dict() if names else {}
    others = [name for name in names if name not in own or own[name].shape != state_dict[name].shape]
    for name in others:
        del state_dict[name]
        if name in own:
            state_dict[name] = own[name]
    if others:
        logger.info("%d parameters of the checkpoint's mappings are left out, first %s", len(others), others[0])


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
