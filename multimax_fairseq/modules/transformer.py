"""Transformer encoder and decoder made of the layers of :mod:`.transformer_layer`."""

from typing import Any, Dict, List, Optional, Tuple

from fairseq.distributed import fsdp_wrap
from fairseq.models.transformer import TransformerConfig, TransformerDecoderBase, TransformerEncoderBase
from fairseq.modules.checkpoint_activations import checkpoint_wrapper
from torch import Tensor, nn

from ..kernels.chunked_cross_entropy import default_chunk_tokens
from ..mappings import compute_dtype
from .transformer_layer import MappedDecoderLayer, MappedEncoderLayer, with_mapping


def wrap_layer(layer: nn.Module, cfg: TransformerConfig) -> nn.Module:
    """What fairseq wraps around a layer: ``--checkpoint-activations``, and sharding where FSDP is on.

    A checkpointed layer is sharded whatever its size, as FSDP must then be the outer of the two.
    """
    if not cfg.checkpoint_activations:
        return fsdp_wrap(layer, min_num_params=cfg.min_params_to_wrap)
    return fsdp_wrap(checkpoint_wrapper(layer, offload_to_cpu=cfg.offload_activations), min_num_params=0)


# In what a decoder returns beside its output: that the output are features, and the output layer is still to come.
DEFERRED = "output_layer_deferred"


class MappedEncoder(TransformerEncoderBase):
    """fairseq's encoder with the mappings of ``cfg.mapping_choice``."""

    def build_encoder_layer(self, cfg: TransformerConfig) -> nn.Module:
        return wrap_layer(MappedEncoderLayer(cfg, return_fc=self.return_fc), cfg)


class MappedDecoder(TransformerDecoderBase):
    """fairseq's decoder with the mappings of ``cfg.mapping_choice``, in its attention and on the vocabulary.

    Attributes:
        output_mapping: None for softmax, else the module whose σ the logits go through.
        defers_output_layer: whether a full forward of more tokens than a chunk returns features, and
            :meth:`get_normalized_probs` applies the output layer to the part of them that it is given.
    """

    defers_output_layer = False

    def __init__(self, cfg, dictionary, embed_tokens, no_encoder_attn=False, output_projection=None):
        super().__init__(cfg, dictionary, embed_tokens, no_encoder_attn, output_projection)
        self.output_mapping = cfg.mapping_choice.build_output()

    @classmethod
    def adopt(cls, decoder: TransformerDecoderBase, choice: Any) -> "MappedDecoder":
        """Turn fairseq's ``decoder``, without cross-attention, into one with the mappings of ``choice``."""
        decoder.__class__ = cls
        decoder.cfg.mapping_choice = choice
        for layer in decoder.layers.children():  # iterating over the list itself would drop layers
            if hasattr(layer, "self_attn"):  # a BASE layer has none
                layer.self_attn = with_mapping(layer.self_attn, decoder.cfg, "decoder")
        decoder.output_mapping = choice.build_output()
        return decoder

    def build_decoder_layer(self, cfg: TransformerConfig, no_encoder_attn: bool = False) -> nn.Module:
        return wrap_layer(MappedDecoderLayer(cfg, no_encoder_attn), cfg)

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
        """(Log-)probabilities, (…, len(dictionary)), of what :meth:`forward` returned, or of a part of it."""
        output, extra = net_output[:2]
        if extra and DEFERRED in extra:
            net_output = (self.output_layer(output), extra)
        return super().get_normalized_probs(net_output, log_probs, sample)

    def output_layer(self, features: Tensor) -> Tensor:
        """Logits of the vocabulary, modulated, so that every log_softmax downstream sees the mapped distribution.

        Args:
            features: (…, output_embed_dim).

        Returns:
            (…, len(dictionary)); fp32 at least where σ acts, because σ of fp16 logits overflows fp16.
        """
        logits = super().output_layer(features)
        if self.output_mapping is None:
            return logits
        return self.output_mapping.modulate(logits.to(compute_dtype(logits.dtype)))
