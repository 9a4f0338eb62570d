"""fairseq's decoder with an output mapping."""

import math
from typing import Dict, List, Optional, Tuple

import torch
from fairseq.models.transformer import TransformerDecoderBase
from torch import Tensor, nn

from ..mappings import MultiMax, compute_dtype

# What stands for the logarithm of 0 is between LOG_ZERO − DEPTH and LOG_ZERO, by the word's score. Twice that is
# still the logarithm of an fp32 number, so that sampling can draw such a word where nothing else is allowed, also
# where the logarithms of two models are added.
LOG_ZERO, DEPTH = -32.0, 8.0


def refuse_cross_entropy(mapping: str) -> None:
    """Raise ValueError: cross-entropy cannot train a sparse output mapping."""
    raise ValueError(
        f"--output-mapping {mapping} gives most words probability 0, which cross-entropy cannot train: use "
        "--criterion entmax_loss"
    )


def log_probabilities(probabilities: Tensor, scores: Tensor) -> Tensor:
    """The logarithms, finite where a probability is 0, in the order of the scores everywhere.

    fairseq's search sums logarithms over steps and models, with weights, and takes −inf for what it has forbidden
    itself. So log 0 is here a number between −40 and −32, that much lower, the lower the score::

        log (p + exp z),    z = −32 + d / (1 − d / 8),    d = score − largest score

    Args:
        probabilities: (…, words), fp32 or fp64.
        scores: the same shape, from which a sparse mapping has made them.
    """
    distance = scores - scores.amax(-1, keepdim=True)
    return torch.logaddexp(probabilities.log(), LOG_ZERO + distance / (1 - distance / DEPTH))


class MappedDecoder(TransformerDecoderBase):
    """fairseq's decoder, with an output mapping.

    Attributes:
        output_mapping: None for softmax; a MultiMax, whose σ modulates the logits; or a sparse mapping, which
            :meth:`get_normalized_probs` applies to them.
    """

    __jit_unused_properties__ = ["is_sparse"]  # tracing compiles all others

    @classmethod
    def adopt(cls, decoder: TransformerDecoderBase, output_mapping: Optional[nn.Module]) -> "MappedDecoder":
        """Give fairseq's ``decoder`` an output mapping; returns the same object.

        The gradient of the vocabulary's thresholds and gains is a sum over all words, which grows with √V: times
        1 / √V it does not dominate the norm that ``--clip-norm`` bounds. Adam's updates stay the same.
        """
        decoder.__class__ = cls
        decoder.output_mapping = output_mapping
        if isinstance(output_mapping, MultiMax):
            output_mapping.gradient_scale = len(decoder.dictionary) ** -0.5
        if decoder.is_sparse:
            decoder._shrink_features()
        return decoder

    @property
    def is_sparse(self) -> bool:
        """Whether the output mapping gives most words probability 0."""
        return self.output_mapping is not None and not isinstance(self.output_mapping, MultiMax)

    def _shrink_features(self) -> None:
        """Start with smaller features, as sparse mappings need smaller logits, by the weight of the last layer norm.

        One word has all probability as soon as its logit is 1 / (α − 1) above the others, where softmax needs some
        log V for nearly all. With the logits of a new softmax model, most words that come next would start with
        probability 0. Training would first shrink the embeddings, which the input may share. Nothing is done where
        features come without a norm; where layer drop leaves out the last layer, they have their usual size.
        """
        if self.cfg.decoder.normalize_before:
            norm = self.layer_norm  # None with --no-decoder-final-norm
        else:
            norm = getattr(next(reversed(list(self.layers.children())), None), "final_layer_norm", None)
        if norm is not None:
            with torch.no_grad():
                c = float(self.output_mapping.alpha) - 1
                norm.weight.mul_(min(1 / (c * math.log(len(self.dictionary))), 1))

    @torch.jit.unused  # tracing compiles what fairseq exports, and that calls this
    def get_normalized_probs(
        self,
        net_output: Tuple[Tensor, Optional[Dict[str, List[Optional[Tensor]]]]],
        log_probs: bool,
        sample: Optional[Dict[str, Tensor]] = None,
    ) -> Tensor:
        """(Log-)probabilities, (…, len(dictionary)), of what the decoder has returned.

        The logarithms are finite: see :func:`log_probabilities`.

        Raises:
            ValueError: the logarithm of a sparse mapping is asked for in training.
        """
        if not self.is_sparse:
            return super().get_normalized_probs(net_output, log_probs, sample)
        if log_probs and self.training:
            refuse_cross_entropy(type(self.output_mapping).__name__.lower())
        logits = net_output[0]
        scores = logits.to(compute_dtype(logits.dtype))
        probabilities = self.output_mapping(scores)
        return log_probabilities(probabilities, scores) if log_probs else probabilities

    def output_layer(self, features: Tensor) -> Tensor:
        """Logits, (…, len(dictionary)), of features, (…, output_embed_dim).

        MultiMax modulates them, so that every later log_softmax gives its distribution: in fp32 at least, because σ
        of fp16 logits overflows fp16.
        """
        logits = super().output_layer(features)
        if self.output_mapping is None or self.is_sparse:
            return logits
        return self.output_mapping.modulate(logits.to(compute_dtype(logits.dtype)))
