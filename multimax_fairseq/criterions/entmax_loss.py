"""The loss of sparse output mappings, for this package's Transformers."""

from typing import Union

from fairseq.criterions import register_criterion
from fairseq.logging import metrics
from torch import Tensor, nn

from ..kernels.loss import EntmaxLosses, chunked_entmax_loss
from ..mappings import SPARSE
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
            raise ValueError(
                f"--criterion entmax_loss trains --output-mapping {', '.join(SPARSE)}, and this model has another "
                "one: use --criterion chunked_cross_entropy, label_smoothed_cross_entropy or cross_entropy"
            )

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
