"""Which attention a layer builds where."""

import pytest
import torch
from fairseq.models.transformer import TransformerConfig
from fairseq.modules import MultiheadAttention
from fairseq.modules.transformer_layer import TransformerDecoderLayerBase, TransformerEncoderLayerBase

from multimax_fairseq.mappings import MultiMax
from multimax_fairseq.models import MappingChoice
from multimax_fairseq.modules import MappedDecoderLayer, MappedEncoderLayer, MappedMultiheadAttention


def config(mapping="multimax", sites=("encoder", "decoder", "cross"), **options):
    cfg = TransformerConfig()
    cfg.encoder.embed_dim = cfg.decoder.embed_dim = 8
    cfg.encoder.ffn_embed_dim = cfg.decoder.ffn_embed_dim = 8
    cfg.encoder.attention_heads = cfg.decoder.attention_heads = 2
    for name, value in options.items():
        setattr(cfg, name, value)
    cfg.mapping_choice = MappingChoice((mapping, {}), sites, ("softmax", {}))
    return cfg


def layer_of(cls, cfg):
    torch.manual_seed(0)
    return cls(cfg)


@pytest.mark.parametrize("site", ["encoder", "decoder", "cross"])
def test_the_mapping_is_built_at_its_site_and_nowhere_else(site):
    cfg = config(sites=(site,))
    encoder, decoder = MappedEncoderLayer(cfg), MappedDecoderLayer(cfg)
    attentions = {"encoder": encoder.self_attn, "decoder": decoder.self_attn, "cross": decoder.encoder_attn}
    for name, attention in attentions.items():
        expected = MappedMultiheadAttention if name == site else MultiheadAttention
        assert type(attention) is expected
    assert isinstance(attentions[site].mapping, MultiMax) and attentions[site].site == site


def test_each_module_has_modulators_of_its_own():
    decoder = MappedDecoderLayer(config())
    assert decoder.self_attn.mapping is not decoder.encoder_attn.mapping
    assert not torch.equal(decoder.self_attn.mapping.gains, decoder.encoder_attn.mapping.gains)


@pytest.mark.parametrize("mapped, stock", [
    (MappedEncoderLayer, TransformerEncoderLayerBase), (MappedDecoderLayer, TransformerDecoderLayerBase),
])  # fmt: skip
def test_drawing_modulators_leaves_all_other_parameters_as_in_the_stock_layer(mapped, stock):
    expected = dict(layer_of(stock, config()).named_parameters())
    actual = dict(layer_of(mapped, config()).named_parameters())
    assert {name for name in actual if name not in expected} == {
        name for name in actual if ".mapping." in name
    } != set()
    for name, parameter in expected.items():
        torch.testing.assert_close(actual[name], parameter, atol=0, rtol=0)


def test_a_learned_alpha_has_one_value_a_head():
    layer = MappedEncoderLayer(config(mapping="entmax"))
    assert layer.self_attn.mapping.alpha == 1.5
    cfg = config()
    cfg.mapping_choice = MappingChoice(("entmax", {"alpha": "learned"}), ("encoder",), ("softmax", {}))
    assert MappedEncoderLayer(cfg).self_attn.mapping.alpha.shape == (2,)


def test_evaluation_of_a_loaded_encoder_layer_uses_the_mapping_too():
    """fairseq 0.12.2 leaves for a fused softmax kernel in layers that have been loaded and never trained."""
    cfg = config(mapping="sparsemax")
    source, target = layer_of(MappedEncoderLayer, cfg), MappedEncoderLayer(cfg)
    target.load_state_dict(source.state_dict())
    x = 5 * torch.randn(6, 2, 8)
    source.train()
    cfg.dropout = 0.0
    for module in source.modules():
        if hasattr(module, "p"):
            module.p = 0.0
    with torch.no_grad():
        torch.testing.assert_close(target.eval()(x, None), source(x, None))


def test_quantisation_noise_and_cross_self_attention():
    cfg = config(cross_self_attention=True)
    cfg.quant_noise.pq = 0.1
    cfg.quant_noise.pq_block_size = 4
    decoder = MappedDecoderLayer(cfg, no_encoder_attn=True).train()
    assert not decoder.self_attn.self_attention
    x, encoder_out = torch.randn(3, 2, 8), torch.randn(4, 2, 8)
    mask = torch.triu(torch.full((3, 3), float("-inf")), 1)
    padding = torch.zeros(2, 3, dtype=torch.bool)
    output = decoder(x, encoder_out, torch.zeros(2, 4, dtype=torch.bool), self_attn_mask=mask,
                     self_attn_padding_mask=padding)[0]  # fmt: skip
    (output * torch.randn_like(output)).sum().backward()  # the sum of a normalised output is always 0
    assert decoder.self_attn.mapping.gains.grad.abs().sum() > 0
