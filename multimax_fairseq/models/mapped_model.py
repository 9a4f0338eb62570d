"""What translation and language models with mappings have in common."""

import functools
import logging
from collections import defaultdict
from typing import Any, Dict, List

import torch
from fairseq.logging import metrics
from fairseq.tasks import FairseqTask
from torch import Tensor, nn

from ..mappings import SPARSE, MultiMax
from .attach import attach, attention_sites
from .checkpoints import OF_MAPPINGS, warn_of_what_is_gone
from .options import check_options, completed, mapped_sites, option_errors
from .sparse_search import build_sparse_generator

logger = logging.getLogger(__name__)

SYMBOLS = ("b", "d", "g_b", "g_d")


class MappedModelMixin:
    """Gives a model its mappings, loads checkpoints, logs modulators; a base class named before the stock class."""

    @classmethod
    @option_errors()
    def build_model(cls, args: Any, task: FairseqTask) -> "MappedModelMixin":
        """The stock model of ``args``, with the mappings that they choose (:class:`.options.MappingOptions`).

        Raises:
            ValueError: a choice that does not exist, or that does not go with this model.
        """
        check_options(args)
        mapping = completed(args).attention_mapping
        has_alignments = getattr(getattr(task, "cfg", None), "load_alignments", False)
        if has_alignments and mapping in SPARSE and "cross" in mapped_sites(args):
            raise ValueError(
                "guided alignment (--load-alignments) is the logarithm of cross-attention's probabilities, and "
                f"{mapping} makes most of them 0: leave cross out of --attention-mapping-sites, or drop "
                "--load-alignments"
            )
        warn_of_what_is_gone(args)
        model = super().build_model(args, task)
        attach(model, args)
        model.logged_modulators = getattr(args, "log_modulators", "site")
        if model.decoder.is_sparse:
            task.build_generator = functools.partial(build_sparse_generator, task.build_generator)
        return model

    def _load_from_state_dict(self, state_dict: Dict[str, Tensor], prefix: str, *args, **kwargs) -> None:
        # Not in fairseq's upgrade_state_dict: --encoder-layers-to-keep renumbers the layers after that.
        add_missing_mappings(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def set_num_updates(self, num_updates: int) -> None:
        super().set_num_updates(num_updates)
        # fairseq calls this before each batch; an update can have many (--update-freq)
        if self.training and num_updates != getattr(self, "_logged_update", None):
            self._logged_update = num_updates
            log_modulators(self, self.logged_modulators)


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
    for name, parameter in model.named_parameters():
        if OF_MAPPINGS.search(name) and prefix + name not in state_dict:
            is_modulator = isinstance(model.get_submodule(name.rpartition(".")[0]), MultiMax)
            missing[prefix + name] = torch.zeros_like(parameter) if is_modulator else parameter.detach().clone()
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
    for site, _, attention in attention_sites(model):
        if isinstance(getattr(attention, "mapping", None), MultiMax):
            modulators[site].append(attention.mapping)
    if isinstance(getattr(model.decoder, "output_mapping", None), MultiMax):
        modulators["output"].append(model.decoder.output_mapping)
    return dict(modulators)


def log_modulators(model: nn.Module, detail: str = "site") -> None:
    """Log the thresholds and gains of a model's modulators.

    For each site: the mean absolute thresholds (b, d) and gains (g_b, g_d) over modules and orders, named
    ``encoder_b``, ``encoder_d``, ``encoder_g_b``, …. For each module: the numbers themselves, named by layer and
    order, ``encoder_0_b1``, …, ``encoder_0_g_d2``. They appear in fairseq's log.

    Args:
        detail: ``"module"`` (sites and modules), ``"site"`` or ``"none"``.
    """
    for site, group in modulators_by_site(model).items() if detail != "none" else ():
        rows = torch.stack([torch.cat(m.coefficients(), dim=1).detach() for m in group]).cpu()  # (modules, orders, 4)
        for symbol, mean in zip(SYMBOLS, rows.abs().mean((0, 1)).tolist()):
            metrics.log_scalar(f"{site}_{symbol}", mean, priority=1000, round=4)
        for number, orders in enumerate(rows.tolist() if detail == "module" else ()):
            name = site if site == "output" else f"{site}_{number}"
            for order, values in enumerate(orders, start=1):
                for symbol, value in zip(SYMBOLS, values):
                    metrics.log_scalar(f"{name}_{symbol}{order}", value, priority=1001, round=4)
