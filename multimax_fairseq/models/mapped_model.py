"""What translation and language models with mappings have in common."""

import logging
from collections import defaultdict
from typing import Dict, List

import torch
from fairseq.logging import metrics
from torch import Tensor, nn

from ..mappings import MAPPINGS, MultiMax
from ..modules import MappedMultiheadAttention

logger = logging.getLogger(__name__)


class MappedModelMixin:
    """To stand before the stock class among the bases of a model: loads its checkpoints, logs its modulators."""

    @classmethod
    def hub_models(cls) -> Dict[str, str]:
        """None: fairseq's pre-trained models are of the stock classes (restore their files with --restore-file)."""
        return {}

    def upgrade_state_dict_named(self, state_dict: Dict[str, Tensor], name: str) -> None:
        super().upgrade_state_dict_named(state_dict, name)
        add_missing_mappings(self, state_dict, name)

    def set_num_updates(self, num_updates: int) -> None:
        super().set_num_updates(num_updates)
        if self.training:
            log_modulators(self)


def add_missing_mappings(model: nn.Module, state_dict: Dict[str, Tensor], name: str) -> None:
    """Give a state dict what it lacks of a model's mappings, in place, and say so in one log line.

    Modulators that a checkpoint of stock fairseq does not have start as the identity, which is the softmax that
    it was trained with; a learned α starts where a new one does.

    Args:
        model: the model that the state dict is to be loaded into.
        state_dict: parameter names to tensors.
        name: the model's own name in them, "" or such as "encoder", as in ``upgrade_state_dict_named``.
    """
    prefix = f"{name}." if name else ""
    added = []
    for module_name, module in model.named_modules():
        if not isinstance(module, tuple(MAPPINGS.values())):
            continue
        for parameter_name, parameter in module.named_parameters():
            key = f"{prefix}{module_name}.{parameter_name}"
            if key not in state_dict:
                start = parameter.detach().clone()
                state_dict[key] = torch.zeros_like(start) if isinstance(module, MultiMax) else start
                added.append(module_name)
    if added:
        logger.info(
            "the checkpoint has no parameters for %d mappings (%s, …): modulators start as the identity, "
            "a learned α as in a new model",
            len(set(added)),
            added[0],
        )


def modulators_by_site(model: nn.Module) -> Dict[str, List[MultiMax]]:
    """The MultiMax modules of a model, in its order, by site: encoder, decoder, cross, output."""
    modulators = defaultdict(list)
    for module in model.modules():
        if isinstance(module, MappedMultiheadAttention) and isinstance(module.mapping, MultiMax):
            modulators[module.site].append(module.mapping)
        elif isinstance(getattr(module, "output_mapping", None), MultiMax):
            modulators["output"].append(module.output_mapping)
    return dict(modulators)


def log_modulators(model: nn.Module) -> None:
    """Log the mean absolute thresholds (b, d) and gains (g_b, g_d) of each site, over its modules and orders.

    They appear as ``encoder_b``, ``encoder_d``, ``encoder_g_b``, … in fairseq's log and what reads it.
    """
    modulators = modulators_by_site(model)
    if not modulators:
        return
    with torch.no_grad():
        # (sites, 4), fetched together: one wait for the GPU an update
        means = torch.stack(
            [
                torch.cat([torch.stack([getattr(m, kind) for m in group]).abs().mean(dim=(0, 1)) for kind in
                           ("thresholds", "gains")])
                for group in modulators.values()
            ]
        ).tolist()
    for site, values in zip(modulators, means):
        for symbol, value in zip(("b", "d", "g_b", "g_d"), values):
            metrics.log_scalar(f"{site}_{symbol}", value, priority=1000, round=4)
