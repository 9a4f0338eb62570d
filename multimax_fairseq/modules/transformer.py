"""Transformer encoder and decoder made of the layers of :mod:`.transformer_layer`."""

import math
from typing import Any, Dict, List, Optional, Tuple, Union

import torch
from fairseq.distributed import fsdp_wrap
from fairseq.models.transformer import TransformerConfig, TransformerDecoderBase, TransformerEncoderBase
from fairseq.modules.checkpoint_activations import checkpoint_wrapper
from torch import Tensor, nn

from ..kernels.loss import default_chunk_tokens
from ..mappings import compute_dtype
from .attention import CAUSAL
from .transformer_layer import MappedDecoderLayer, MappedEncoderLayer, with_mapping


def wrap_layer(layer: nn.Module, cfg: TransformerConfig) -> nn.Module:
    """What fairseq wraps around a layer: ``--checkpoint-activations``, and sharding where FSDP is on.

    A checkpointed layer is sharded whatever its size, as FSDP must then be the outer of the two.
    """
    if not cfg.checkpoint_activations:
        return fsdp_wrap(layer, min_num_params=cfg.min_params_to_wrap)
    return fsdp_wrap(checkpoint_wrapper(layer, offload_to_cpu=cfg.offload_activations), min_num_params=0)


# Key in what a decoder returns besides its output: the output is features, and the output layer is still to come.
DEFERRED = "output_layer_deferred"


# Output mappings that give most words probability 0.
SPARSE = ("sparsemax", "entmax15", "entmax")

# Below any logarithm of a probability, also times the weight of a language model in the search.
LOWEST_LOG = -(2.0**10)
ZERO_LOG = -(2.0**16)


def refuse_cross_entropy(mapping: str) -> None:
    """Raise ValueError: cross-entropy cannot train a sparse output mapping."""
    raise ValueError(
        f"--output-mapping {mapping} gives most words probability 0, which cross-entropy cannot train: use "
        "--criterion entmax_loss"
    )


class MappedEncoder(TransformerEncoderBase):
    """fairseq's encoder with the mappings of ``cfg.mapping_choice``."""

    def build_encoder_layer(self, cfg: TransformerConfig) -> nn.Module:
        return wrap_layer(MappedEncoderLayer(cfg, return_fc=self.return_fc), cfg)


class MappedDecoder(TransformerDecoderBase):
    """fairseq's decoder with the mappings of ``cfg.mapping_choice``, in its attention and on the vocabulary.

    Attributes:
        output_mapping: None for softmax; a MultiMax, whose σ modulates the logits; or one of ``SPARSE``, which
            :meth:`get_normalized_probs` applies to them.
        is_sparse: whether it is one of ``SPARSE``.
        ranks_zeros: whether log 0 is a number below ``LOWEST_LOG`` instead of −inf, in the order of words' scores,
            for a search that may have nothing else to choose.
        defers_output_layer: whether a full forward of more tokens than a chunk returns features;
            :meth:`get_normalized_probs` then applies the output layer to the part of them that it is given.
    """

    defers_output_layer = False
    ranks_zeros = False

    def __init__(self, cfg, dictionary, embed_tokens, no_encoder_attn=False, output_projection=None):
        super().__init__(cfg, dictionary, embed_tokens, no_encoder_attn, output_projection)
        self._set_output_mapping(cfg.mapping_choice)

    @classmethod
    def adopt(cls, decoder: TransformerDecoderBase, choice: Any) -> "MappedDecoder":
        """Turn fairseq's ``decoder``, without cross-attention, into one with the mappings of ``choice``."""
        decoder.__class__ = cls
        decoder.cfg.mapping_choice = choice
        for layer in decoder.layers.children():  # iterating over the list itself would drop layers
            if hasattr(layer, "self_attn"):  # a BASE layer has none
                layer.self_attn = with_mapping(layer.self_attn, decoder.cfg, "decoder")
        decoder._set_output_mapping(choice)
        return decoder

    def _set_output_mapping(self, choice: Any) -> None:
        self.output_mapping = choice.build_output()
        self.is_sparse = choice.output[0] in SPARSE
        if self.is_sparse:
            self._shrink_features()

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

    def build_decoder_layer(self, cfg: TransformerConfig, no_encoder_attn: bool = False) -> nn.Module:
        return wrap_layer(MappedDecoderLayer(cfg, no_encoder_attn), cfg)

    def buffered_future_mask(self, tensor: Tensor) -> Union[Tensor, Tuple[Tensor]]:
        """As the stock decoder's, marked as hiding what comes after each query, and nothing else.

        ``--checkpoint-activations`` copies tensors without their marks. The recomputed attention would take another
        path, and draw other dropout than the forward pass had; so mapped attention gets the mask in a tuple. With
        ``--cross-self-attention`` the layer appends to the mask, and no attention ever sees the mark.
        """
        mask = super().buffered_future_mask(tensor)
        setattr(mask, CAUSAL, True)
        is_copied = self.cfg.checkpoint_activations and not self.cfg.cross_self_attention
        return (mask,) if is_copied and not self.cfg.mapping_choice.is_stock_at("decoder") else mask

    def forward(
        self,
        prev_output_tokens: Tensor,
        encoder_out: Optional[Dict[str, List[Tensor]]] = None,
        incremental_state: Optional[Dict[str, Any]] = None,
        features_only: bool = False,
        **options: Any,
    ) -> Tuple[Tensor, Dict[str, Any]]:
        """As the stock decoder's; see ``defers_output_layer``."""
        deferred = (
            self.defers_output_layer
            and incremental_state is None
            and not features_only
            and self.adaptive_softmax is None  # which gets features anyway
            and prev_output_tokens.numel() > default_chunk_tokens(len(self.dictionary))
        )
        output, extra = super().forward(
            prev_output_tokens, encoder_out, incremental_state, features_only or deferred, **options
        )
        return output, {**extra, DEFERRED: True} if deferred else extra

    def get_normalized_probs(self, net_output, log_probs: bool, sample=None) -> Tensor:
        """(Log-)probabilities, (…, len(dictionary)), of what :meth:`forward` returned, or of a part of it.

        Raises:
            ValueError: the logarithm of a sparse mapping is asked for in training.
        """
        output, extra = net_output[:2]
        if extra and DEFERRED in extra:
            net_output = (self.output_layer(output), extra)
        if self.is_sparse:
            return self._sparse_probabilities(net_output[0], log_probs)
        return super().get_normalized_probs(net_output, log_probs, sample)

    def _sparse_probabilities(self, logits: Tensor, log_probs: bool) -> Tensor:
        if log_probs and self.training:
            refuse_cross_entropy(type(self.output_mapping).__name__.lower())
        scores = logits.to(compute_dtype(logits.dtype))
        probabilities = self.output_mapping(scores)
        if not (log_probs and self.ranks_zeros):
            return probabilities.log() if log_probs else probabilities
        distance = (scores - scores.amax(-1, keepdim=True)).clamp(min=ZERO_LOG / 2)
        return torch.where(probabilities > 0, probabilities.log(), ZERO_LOG + distance)

    def output_layer(self, features: Tensor) -> Tensor:
        """Logits, (…, len(dictionary)), of features, (…, output_embed_dim).

        MultiMax modulates them, so that every later log_softmax gives its distribution: in fp32 at least, because σ
        of fp16 logits overflows fp16.
        """
        logits = super().output_layer(features)
        if self.output_mapping is None or self.is_sparse:
            return logits
        return self.output_mapping.modulate(logits.to(compute_dtype(logits.dtype)))
