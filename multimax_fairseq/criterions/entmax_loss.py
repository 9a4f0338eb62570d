"""The loss of sparse output mappings, for this package's Transformers."""

import functools
from typing import Union

import fairseq.criterions
from fairseq.criterions import FairseqCriterion, register_criterion
from fairseq.logging import metrics
from torch import Tensor, nn

from ..kernels.loss import EntmaxLosses, chunked_entmax_loss
from ..models.options import option_errors
from ..modules.transformer import SPARSE, refuse_cross_entropy
from .chunked_cross_entropy import (
    ChunkedCrossEntropyCriterion,
    ChunkedCrossEntropyCriterionConfig,
    check_output_layer,
)


@register_criterion("entmax_loss", dataclass=ChunkedCrossEntropyCriterionConfig)
class EntmaxLossCriterion(ChunkedCrossEntropyCriterion):
    """The Fenchel-Young loss of the model's ``--output-mapping``, sparsemax, entmax15 or entmax, in bounded memory.

    See :func:`..kernels.loss.entmax.chunked_entmax_loss`. Training and validation log, per token: ``loss``,
    in its own unit (neither bits nor nats); ``plain_loss``, the same without label smoothing; ``impossible``, the
    percentage of tokens with probability 0; ``support``, the number of types above 0.

    Args, Raises: as :class:`.ChunkedCrossEntropyCriterion`; in training also if the model has another output mapping.
    """

    def losses_of_words(self, decoder: nn.Module, features: Tensor, targets: Tensor, reduce: bool) -> EntmaxLosses:
        projection, mapping = decoder.output_projection, decoder.output_mapping
        return chunked_entmax_loss(
            features,
            projection.weight,
            targets,
            mapping,
            mapping.alpha,
            projection.bias,
            label_smoothing=self.eps,
            padding=self.padding_idx,
            chunk_tokens=self.chunk_tokens,
            reduce=reduce,
        )

    def check(self, model: nn.Module) -> None:
        check_output_layer(model, "entmax_loss")
        if not getattr(model.decoder, "is_sparse", False):
            refuse_entmax_loss()

    @classmethod
    def reduce_metrics(cls, logging_outputs) -> None:
        """Means over all processes and batches."""

        def total(name: str) -> Union[float, Tensor]:
            return sum(log.get(name, 0) for log in logging_outputs)

        metrics.log_scalar("loss", total("loss") / total("sample_size"), total("sample_size"), round=3)
        tokens = total("ntokens")
        metrics.log_scalar("plain_loss", total("plain_loss") / tokens, tokens, round=3)
        metrics.log_scalar("impossible", 100 * total("impossible") / tokens, tokens, round=2)
        metrics.log_scalar("support", total("support") / tokens, tokens, round=1)


def refuse_entmax_loss() -> None:
    """Raise the error for a model that :class:`EntmaxLossCriterion` does not fit."""
    raise ValueError(
        f"--criterion entmax_loss trains --output-mapping {', '.join(SPARSE)}, and this model has another one: use "
        "--criterion chunked_cross_entropy, label_smoothed_cross_entropy or cross_entropy"
    )


def install() -> None:
    """Make a criterion refuse a task whose model it does not fit; does nothing the second time.

    fairseq's own criterions see no model before the data are loaded; this checks earlier, when they are built.
    """
    build = fairseq.criterions.build_criterion
    if hasattr(build, "refuses_models"):  # not __wrapped__: another plugin's wrapper has that too
        return

    @functools.wraps(build)
    @option_errors()
    def build_criterion(cfg, task, *args, **kwargs) -> FairseqCriterion:
        criterion = build(cfg, task, *args, **kwargs)
        output = getattr(task, "output_mapping", None)  # None: the model is not built yet, or not ours
        if output in SPARSE and not isinstance(criterion, EntmaxLossCriterion):
            refuse_cross_entropy(output)
        if output not in (None, *SPARSE) and isinstance(criterion, EntmaxLossCriterion):
            refuse_entmax_loss()
        return criterion

    build_criterion.refuses_models = True
    fairseq.criterions.build_criterion = build_criterion
