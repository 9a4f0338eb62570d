"""What translation and language models with mappings have in common."""

import logging
from collections import defaultdict
from typing import Any, Dict, List

import torch
from fairseq.logging import metrics
from torch import Tensor, nn

from ..mappings import MAPPINGS, MultiMax
from ..modules import MappedMultiheadAttention
from ..modules.scale import LearnedScale, LogLengthScale
from .modulator_training import ModulatorTraining, loaded_models
from .options import MappingChoice

logger = logging.getLogger(__name__)

SYMBOLS = ("b", "d", "g_b", "g_d")


class MappedModelMixin:
    """Loads checkpoints and logs modulators; as a base class it is named before the stock class."""

    @classmethod
    def hub_models(cls) -> Dict[str, str]:
        """None: fairseq's are of the stock classes (start from them with --finetune-from-model)."""
        return {}

    def _load_from_state_dict(
        self, state_dict: Dict[str, Tensor], prefix: str, local_metadata: Dict[str, Any], *args, **kwargs
    ) -> None:
        # Not in fairseq's upgrade_state_dict: --encoder-layers-to-keep renumbers the layers after that.
        add_missing_mappings(self, state_dict, prefix)
        self._trained_with = local_metadata.get("mappings", {})  # absent from stock fairseq's checkpoints
        if self.training:
            loaded_models.add(self)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args, **kwargs)

    def _save_to_state_dict(self, destination: Dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # Beside the module versions that torch keeps there, so a resumed run knows the mappings that its checkpoint
        # was trained with, and no parameter is added.
        if hasattr(destination, "_metadata"):
            destination._metadata[prefix[:-1]]["mappings"] = self.mapping_choice.describe()

    def set_mapping_options(self, args: Any, choice: MappingChoice) -> None:
        """Set the model's choice, and the modulator options of ``args`` (:class:`.options.MappingOptions`).

        Raises:
            ValueError: a number is out of range, or modulators are to be trained and there are none.
        """
        self.mapping_choice = choice
        self.logged_modulators = getattr(args, "log_modulators", "site")
        self.modulator_training = ModulatorTraining.from_options(args)
        modulators = [modulator for group in modulators_by_site(self).values() for modulator in group]
        if self.modulator_training.flags and not modulators:
            raise ValueError(
                f"{', '.join(self.modulator_training.flags)}: this model has no modulators to train apart; use "
                "--attention-mapping multimax or --output-mapping multimax, or drop what asks for it"
            )
        for modulator in modulators:
            self.modulator_training.mark(modulator.parameters())

    def set_num_updates(self, num_updates: int) -> None:
        super().set_num_updates(num_updates)
        # fairseq calls this before each batch; an update can have many (--update-freq)
        previous = getattr(self, "_logged_update", None)
        if self.training and num_updates != previous:
            if previous is not None:  # the first call can come from loading a checkpoint, without an optimizer
                self.modulator_training.check_applied()
            self._logged_update = num_updates
            log_modulators(self, self.logged_modulators)

    def check_resumed(self) -> None:
        """Raise ValueError if a resumed run has other mappings than its checkpoint was trained with.

        Starting a new run from such weights is allowed; it does not load the optimizer's state.
        """
        for flag, mapping in self.mapping_choice.describe().items():
            before = self._trained_with.get(flag, mapping)
            if before != mapping:
                raise ValueError(
                    f"{flag}: the checkpoint was trained with {before}, this run has {mapping}; go on with the same, "
                    "or start a new run from it with --finetune-from-model or --reset-optimizer"
                )


def add_missing_mappings(model: nn.Module, state_dict: Dict[str, Tensor], prefix: str) -> None:
    """Add mapping parameters that a state dict lacks, in place, and log it in one line.

    Missing modulators (the checkpoint is from stock fairseq) start as the identity: the softmax that it was trained
    with. A learned α or scale starts as a new one does.

    Args:
        model: the model to load the state dict into.
        state_dict: parameter names to tensors.
        prefix: the start of the model's parameter names: "", or such as "module.".
    """
    missing = {}
    for module_name, module in model.named_modules():
        if isinstance(module, (*MAPPINGS.values(), LearnedScale, LogLengthScale)):
            for parameter_name, parameter in module.named_parameters(f"{prefix}{module_name}"):
                if parameter_name not in state_dict:
                    start = parameter.detach().clone()
                    missing[parameter_name] = torch.zeros_like(start) if isinstance(module, MultiMax) else start
    if missing:
        state_dict.update(missing)
        logger.info(
            "the checkpoint lacks %d parameters of mappings, the first of them %s: "
            "modulators start as the identity (softmax), a learned alpha at 1.5, a scale as a new one",
            len(missing),
            next(iter(missing)),
        )


def modulators_by_site(model: nn.Module) -> Dict[str, List[MultiMax]]:
    """A model's MultiMax modules in model order, by site: encoder, decoder, cross, output."""
    modulators = defaultdict(list)
    for module in model.modules():
        if isinstance(module, MappedMultiheadAttention) and isinstance(module.mapping, MultiMax):
            modulators[module.site].append(module.mapping)
        elif isinstance(getattr(module, "output_mapping", None), MultiMax):
            modulators["output"].append(module.output_mapping)
    return dict(modulators)


def log_modulators(model: nn.Module, detail: str = "site") -> None:
    """Log the thresholds and gains of a model's modulators.

    For each site: the mean absolute thresholds (b, d) and gains (g_b, g_d) over modules and orders, named
    ``encoder_b``, ``encoder_d``, ``encoder_g_b``, …. For each module: the numbers themselves, named by layer and
    order, ``encoder_0_b1``, …, ``encoder_0_g_d2``. They appear in fairseq's log.

    Args:
        detail: ``"module"`` (sites and modules), ``"site"`` or ``"none"``.
    """
    modulators = modulators_by_site(model) if detail != "none" else {}
    if not modulators:
        return
    with torch.no_grad():
        groups = [torch.stack([torch.cat([m.thresholds, m.gains], dim=1) for m in g]) for g in modulators.values()]
        numbers = torch.cat([group.flatten() for group in groups]).tolist()  # one transfer: one wait for a GPU
    start = 0
    for site, group in zip(modulators, groups):
        rows = [
            numbers[i : i + 4] for i in range(start, start + group.numel(), 4)
        ]  # modules · orders of b, d, g_b, g_d
        start += group.numel()
        for symbol, column in zip(SYMBOLS, zip(*rows)):
            mean = sum(map(abs, column)) / len(column)
            metrics.log_scalar(f"{site}_{symbol}", mean, priority=1000, round=4)
        if detail == "module":
            for number, row in enumerate(rows):
                layer, order = divmod(number, group.size(1))
                name = site if site == "output" else f"{site}_{layer}"
                for symbol, value in zip(SYMBOLS, row):
                    metrics.log_scalar(f"{name}_{symbol}{order + 1}", value, priority=1001, round=4)
