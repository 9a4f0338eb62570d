"""multimax_fairseq/analysis/hooks.py: what it reports is what the model computes with, and leaves no trace."""

import itertools

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
    sites = ["decoder"] if "_lm" in arch else ["encoder", "decoder", "cross"]
    assert [(a.site, a.layer) for site in sites for a in collected.at(site)] == [*itertools.product(sites, (0, 1))]
    assert len(collected.attention) == 2 * len(sites)
    for attention in collected.attention:
        bsz, num_heads, tgt_len, _ = attention.probabilities.shape
        assert num_heads == 2 and (bsz, tgt_len) == collected.masks[attention.site].shape


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
    is_padding = sample["net_input"]["src_tokens"].eq(built.task.target_dictionary.pad())
    assert "_lm" in arch or is_padding.any()
    for attention in collected.attention:
        absent = (attention.scores == float("-inf")).transpose(1, 2)  # (bsz, tgt_len, num_heads, src_len)
        if attention.site == "decoder":
            future = torch.ones(absent.size(1), absent.size(3), dtype=torch.bool).triu(1)[:, None].expand_as(absent)
            real = collected.masks["decoder"]
            assert absent[real][future[real]].all()
        else:
            assert torch.equal(absent, is_padding[:, None, None].expand_as(absent))


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


def test_errors(build, batch):
    """One in the listener leaves no hook behind; decoding and models without attention are refused."""
    built = build("multimax_transformer")
    with pytest.raises(ZeroDivisionError), recording(built.model, lambda attention: 1 / 0):
        logits(built, batch(built))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in built.model.modules())
    model = build("multimax_transformer_lm").model
    with pytest.raises(ValueError, match="not while decoding"), recording(model, print):
        model.decoder(torch.tensor([[5]]), incremental_state={})
    with pytest.raises(ValueError, match="Embedding has no attention to analyse"):
        attention_modules(model.decoder.embed_tokens)
