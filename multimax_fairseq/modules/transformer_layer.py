"""Transformer layers that build each attention module with the mapping of its site."""

from fairseq.models.transformer import TransformerConfig
from fairseq.modules import MultiheadAttention
from fairseq.modules.transformer_layer import TransformerDecoderLayerBase, TransformerEncoderLayerBase

from ..mappings import MAPPINGS, arguments_of, build_mapping
from .attention import MappedMultiheadAttention
from .scale import build_scale


def with_mapping(attention: MultiheadAttention, cfg: TransformerConfig, site: str) -> MultiheadAttention:
    """fairseq's ``attention`` with the mapping and scale of ``site``; as it is where they are softmax and none."""
    choice = cfg.mapping_choice
    if choice.is_stock_at(site):
        return attention
    name, options = choice.attention_at(site)
    scale = build_scale(choice.scale_at(site), attention.num_heads)
    if "num_heads" in arguments_of(MAPPINGS[name]):
        options = {**options, "num_heads": attention.num_heads}
    return MappedMultiheadAttention.adopt(attention, build_mapping(name, **options), site, scale)


class MappedEncoderLayer(TransformerEncoderLayerBase):
    """fairseq's encoder layer; ``cfg.mapping_choice`` says what its self-attention maps with."""

    def build_self_attention(self, embed_dim: int, cfg: TransformerConfig) -> MultiheadAttention:
        return with_mapping(super().build_self_attention(embed_dim, cfg), cfg, "encoder")


class MappedDecoderLayer(TransformerDecoderLayerBase):
    """fairseq's decoder layer; ``cfg.mapping_choice`` says what its self- and cross-attention map with."""

    def build_self_attention(
        self, embed_dim: int, cfg: TransformerConfig, add_bias_kv: bool = False, add_zero_attn: bool = False
    ) -> MultiheadAttention:
        attention = super().build_self_attention(embed_dim, cfg, add_bias_kv, add_zero_attn)
        return with_mapping(attention, cfg, "decoder")

    def build_encoder_attention(self, embed_dim: int, cfg: TransformerConfig) -> MultiheadAttention:
        return with_mapping(super().build_encoder_attention(embed_dim, cfg), cfg, "cross")
