"""Cross-entropy that never holds the logits of all tokens, for any of fairseq's Transformers."""

from dataclasses import dataclass, field
from typing import Any, Dict, NamedTuple, Tuple

from fairseq.criterions import register_criterion
from fairseq.criterions.label_smoothed_cross_entropy import LabelSmoothedCrossEntropyCriterion
from fairseq.dataclass import FairseqDataclass
from fairseq.dataclass.constants import DDP_BACKEND_CHOICES
from fairseq.models.transformer import TransformerDecoderBase
from omegaconf import II
from torch import Tensor, nn

from ..kernels.loss import check_options, chunked_cross_entropy
from ..modules import MappedDecoder
from ..modules.decoder import refuse_cross_entropy

# Output layers known to be only a projection, followed in ours by an output mapping.
OUTPUT_LAYERS = (TransformerDecoderBase.output_layer, MappedDecoder.output_layer)


@dataclass
class ChunkedCrossEntropyCriterionConfig(FairseqDataclass):
    """Each field is a field of a Hydra config and, with dashes, an option of ``fairseq-train``."""

    label_smoothing: float = field(
        default=0.0, metadata={"help": "share of the probability that goes to all other words; 0 for none"}
    )
    chunk_tokens: int = field(
        default=0,
        metadata={"help": "tokens whose logits are computed at a time; 0: as many as make 2^26 logits (256 MiB)"},
    )
    sentence_avg: bool = II("optimization.sentence_avg")
    ddp_backend: DDP_BACKEND_CHOICES = II("distributed_training.ddp_backend")
    find_unused_parameters: bool = II("distributed_training.find_unused_parameters")


@register_criterion("chunked_cross_entropy", dataclass=ChunkedCrossEntropyCriterionConfig)
class ChunkedCrossEntropyCriterion(LabelSmoothedCrossEntropyCriterion):
    """fairseq's ``label_smoothed_cross_entropy`` (``cross_entropy`` if smoothing is 0), in a fraction of its memory.

    The model computes features. Projection, output mapping and loss are then computed for one chunk of tokens at a
    time, without padding (see :func:`..kernels.loss.cross_entropy.chunked_cross_entropy`).

    Raises:
        ValueError: ``label_smoothing`` or ``chunk_tokens`` is out of range; in training, the model's output layer is
            no plain projection.
    """

    def __init__(self, task, sentence_avg: bool, label_smoothing: float = 0.0, chunk_tokens: int = 0):
        check_options(label_smoothing, chunk_tokens)
        super().__init__(task, sentence_avg, label_smoothing)
        self.chunk_tokens = chunk_tokens

    @classmethod
    def build_criterion(cls, cfg: ChunkedCrossEntropyCriterionConfig, task):
        looks_for_unused = cfg.ddp_backend in ("c10d", "pytorch_ddp") and cfg.find_unused_parameters
        if looks_for_unused or cfg.ddp_backend == "fully_sharded":
            raise ValueError(
                f"--criterion {cfg._name} uses the output layer after the model has returned: fully_sharded has then "
                "spread its weight over processes, and --find-unused-parameters has taken it for unused; use "
                "--ddp-backend legacy_ddp, or pytorch_ddp without this flag"
            )
        return super().build_criterion(cfg, task)

    def forward(self, model, sample: Dict[str, Any], reduce: bool = True) -> Tuple[Tensor, int, Dict[str, Any]]:
        """Losses of a batch.

        Args:
            model: one of fairseq's Transformers, or of this package's.
            sample: a fairseq batch.
            reduce: return the sum; otherwise a loss for each token, 0 at padding, without a gradient.

        Returns:
            loss in nat, () or (tokens,); sample size; logging output.
        """
        self.check(model)
        features, *rest = model(**sample["net_input"], features_only=True)
        targets = model.get_targets(sample, (features, *rest)).reshape(-1)
        words = targets.ne(self.padding_idx)
        features = features.reshape(-1, features.size(-1))[words]
        losses = self.losses_of_words(model.decoder, features, targets[words], reduce)
        if not reduce:
            losses = type(losses)(*(kind.new_zeros(len(words)).masked_scatter(words, kind) for kind in losses))
        sample_size = sample["target"].size(0) if self.sentence_avg else sample["ntokens"]
        logging_output = {
            **{name: kind.data for name, kind in losses._asdict().items()},
            "ntokens": sample["ntokens"],
            "nsentences": sample["target"].size(0),
            "sample_size": sample_size,
        }
        return losses.loss, sample_size, logging_output

    def losses_of_words(self, decoder: nn.Module, features: Tensor, targets: Tensor, reduce: bool) -> NamedTuple:
        """Losses of features, (words, D), and targets, (words,); the first loss has a gradient, all are logged."""
        projection, mapping = decoder.output_projection, getattr(decoder, "output_mapping", None)
        return chunked_cross_entropy(
            features,
            projection.weight,
            targets,
            projection.bias,
            *((None, None) if mapping is None else mapping.coefficients()),
            label_smoothing=self.eps,
            chunk_tokens=self.chunk_tokens,
            reduce=reduce,
        )

    def check(self, model: nn.Module) -> None:
        """Raise ValueError, saying what to do, if this loss does not fit a model."""
        check_output_layer(model)
        if getattr(model.decoder, "is_sparse", False):
            refuse_cross_entropy(type(model.decoder.output_mapping).__name__.lower())


def check_output_layer(model: nn.Module, criterion: str = "chunked_cross_entropy") -> None:
    """Raise ValueError, saying what to do, unless a model's output layer is a plain projection."""
    decoder = getattr(model, "decoder", None)
    is_plain = getattr(type(decoder), "output_layer", None) in OUTPUT_LAYERS and decoder.adaptive_softmax is None
    if not is_plain or type(decoder.output_projection) is not nn.Linear:
        raise ValueError(
            f"--criterion {criterion} needs a Transformer whose output layer is a linear projection of its decoder's "
            f"features; that of this {type(decoder).__name__} is not known to be one: drop --quant-noise-scalar or "
            "--adaptive-softmax-cutoff if you use them, or take another --criterion"
        )
