"""multimax_fairseq/analysis/hooks.py: what it reports is what the model computes with, and leaves no trace."""

import pytest
import torch
from fairseq.modules import MultiheadAttention

from multimax_fairseq.analysis import attention_modules, collect, recording
from multimax_fairseq.analysis.hooks import output_mapping

MODELS = [
    ("transformer", []),
    ("transformer_lm", []),
    ("multimax_transformer", []),
    ("multimax_transformer", ["--attention-mapping", "sparsemax", "--attention-mapping-sites", "decoder,cross"]),
    ("multimax_transformer", ["--attention-mapping", "entmax", "--entmax-alpha", "learned"]),
    ("multimax_transformer_lm", ["--output-mapping", "multimax"]),
]


def sites(arch):
    return ["decoder"] if "_lm" in arch else ["encoder", "decoder", "cross"]


def logits(built, sample):
    with torch.no_grad():
        return built.model(**sample["net_input"])[0]


@pytest.fixture(scope="module", params=MODELS, ids=lambda model: " ".join([model[0], *model[1]]))
def case(request, build, batch):
    """A model, a batch, and what is collected of them."""
    arch, options = request.param
    built = build(arch, *options)
    sample = batch(built)
    return arch, built, sample, collect(built.model, sample)


def test_every_site_layer_and_head_is_there(case):
    arch, _, _, collected = case
    assert [(a.site, a.layer) for site in sites(arch) for a in collected.at(site)] == [
        (site, layer) for site in sites(arch) for layer in (0, 1)
    ]
    for attention in collected.attention:
        bsz, num_heads, tgt_len, _ = attention.probabilities.shape
        assert num_heads == 2 and (bsz, tgt_len) == collected.masks[attention.site].shape
        assert attention.scores.shape == attention.probabilities.shape
        rows = attention.probabilities.transpose(1, 2)[collected.masks[attention.site]]
        torch.testing.assert_close(rows.sum(-1), torch.ones(rows.shape[:-1]), atol=1e-5, rtol=0)


def test_probabilities_are_the_mapping_of_the_scores(case):
    """Two ways through the model: its forward pass with head weights, and its scores before the mapping."""
    _, built, _, collected = case
    sites = attention_modules(built.model)
    mappings = {(site, layer): getattr(module, "mapping", None) for site, layer, module in sites}
    for attention in collected.attention:
        assert attention.mapping is mappings[attention.site, attention.layer]
        mapping = attention.mapping or (lambda scores: scores.softmax(-1))
        real = collected.masks[attention.site].unsqueeze(1).expand(-1, 2, -1)
        with torch.no_grad():
            expected = mapping(attention.scores)
        torch.testing.assert_close(attention.probabilities[real], expected[real], atol=2e-6, rtol=0)
        assert attention.probabilities[real][attention.scores[real] == float("-inf")].eq(0).all()


def test_padding_and_future_are_absent(case):
    arch, built, sample, collected = case
    pad = built.task.target_dictionary.pad()
    assert "_lm" in arch or sample["net_input"]["src_tokens"].eq(pad).any()
    for attention in collected.attention:
        absent = attention.scores == float("-inf")
        if attention.site == "decoder":
            expected = torch.ones(absent.shape[-2:], dtype=torch.bool).triu(1).expand_as(absent)
            real = collected.masks["decoder"]
            assert torch.equal(absent.transpose(1, 2)[real] | ~expected.transpose(1, 2)[real],
                               torch.ones_like(absent.transpose(1, 2)[real]))  # fmt: skip
        else:
            expected = sample["net_input"]["src_tokens"].eq(pad)[:, None, None].expand_as(absent)
            assert torch.equal(absent, expected)


def test_the_model_computes_the_same_and_is_left_as_it_was(case):
    _, built, sample, _ = case
    before = logits(built, sample)
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in built.model.modules()]
    checks = [m.skip_embed_dim_check for m in built.model.modules() if isinstance(m, MultiheadAttention)]
    built.model.train()
    collected = collect(built.model, sample)
    assert built.model.training
    built.model.eval()
    assert torch.equal(logits(built, sample), before)
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in built.model.modules()]
    assert checks == [m.skip_embed_dim_check for m in built.model.modules() if isinstance(m, MultiheadAttention)]
    # with softmax where fairseq has a fused path of its own, the sums are taken in another order
    torch.testing.assert_close(collected.output.probabilities, before.float().softmax(-1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("mapping", ["multimax", "entmax15"])
def test_the_outputs_scores_are_those_before_its_mapping(mapping, build, batch):
    built = build("multimax_transformer_lm", "--output-mapping", mapping)
    collected = collect(built.model, batch(built))
    with torch.no_grad():
        expected = output_mapping(built.model)(collected.output.scores)
    torch.testing.assert_close(collected.output.probabilities, expected, atol=1e-6, rtol=0)
    assert output_mapping(build("multimax_transformer_lm").model) is None


@pytest.mark.parametrize("arch", ["transformer", "multimax_transformer"])
def test_outputs_of_the_layers(arch, build, batch):
    built = build(arch)
    sample = batch(built)
    collected = collect(built.model, sample)
    assert [(layer.side, layer.layer) for layer in collected.layers] == [
        (side, number) for side in ("encoder", "decoder") for number in (0, 1, 2)
    ]
    with torch.no_grad():
        encoder_out = built.model.encoder(
            sample["net_input"]["src_tokens"], sample["net_input"]["src_lengths"], return_all_hiddens=True
        )
    for layer, expected in zip(collected.layers, encoder_out["encoder_states"]):
        real = collected.masks["encoder"]
        torch.testing.assert_close(layer.hidden[real], expected.transpose(0, 1)[real], atol=1e-5, rtol=1e-5)


def test_an_error_in_the_listener_leaves_no_hook_behind(build, batch):
    built = build("multimax_transformer")

    def listener(attention):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), recording(built.model, listener):
        logits(built, batch(built))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in built.model.modules())


def test_decoding_with_a_cache_is_refused(build, batch):
    built = build("multimax_transformer_lm")
    tokens = batch(built)["net_input"]["src_tokens"]
    with pytest.raises(ValueError, match="not while decoding"), recording(built.model, print):
        built.model.decoder(tokens[:, :1], incremental_state={})


def test_a_model_without_attention_is_an_error_that_says_so(build):
    embedding = build("transformer_lm").model.decoder.embed_tokens
    with pytest.raises(ValueError, match="Embedding has no attention to analyse"):
        attention_modules(embedding)
