"""multimax_fairseq/analysis/hooks.py: what it collects is what the model computes with, and it leaves no trace."""

import itertools

import pytest
import torch
from fairseq.modules import MultiheadAttention

from multimax_fairseq.analysis import attention_modules, collect

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


def test_probabilities_are_those_that_the_model_computes_with(case):
    """Of every site, layer and head: times the values they are what each module gives when nobody looks."""
    arch, built, sample, collected = case
    sites = ["decoder"] if "_lm" in arch else ["encoder", "decoder", "cross"]
    assert [(a.site, a.layer) for site in sites for a in collected.at(site)] == [*itertools.product(sites, (0, 1))]
    given, modules = {}, {(site, layer): module for site, layer, module in attention_modules(built.model)}

    def keep(module, args, kwargs, result):
        given[module] = kwargs["value"], result[0]

    handles = [module.register_forward_hook(keep, with_kwargs=True) for module in modules.values()]
    logits(built, sample)
    for handle in handles:
        handle.remove()
    of_modules = [attention for attention in collected.attention if attention.site != "output"]
    assert len(given) == len(of_modules)
    for attention in of_modules:
        module, real = modules[attention.site, attention.layer], collected.masks[attention.site]
        assert attention.mapping is getattr(module, "mapping", None) and attention.scores.size(1) == 2
        value, expected = given[module]
        with torch.no_grad():
            values = module.v_proj(value).unflatten(-1, (2, -1)).permute(1, 2, 0, 3)  # (bsz, heads, src_len, dim)
            output = module.out_proj((attention.probabilities @ values).transpose(1, 2).flatten(2))
        torch.testing.assert_close(output[real], expected.transpose(0, 1)[real], atol=2e-6, rtol=1e-5)
        assert attention.probabilities[attention.scores == float("-inf")].eq(0).all()


def test_the_model_is_left_as_it_was(case):
    """Also where it ends in an error."""
    _, built, sample, collected = case
    before = logits(built, sample)
    torch.testing.assert_close(collected.at("output")[0].probabilities[:, 0], before.float().softmax(-1),
                               atol=1e-5, rtol=0)  # fmt: skip
    built.model.train()
    with pytest.raises(IndexError):
        collect(built.model, {"net_input": {**sample["net_input"], "src_tokens": torch.tensor([[10**6]])}})
    assert built.model.training
    built.model.eval()
    assert torch.equal(logits(built, sample), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in built.model.modules())
    assert not any(m.skip_embed_dim_check for m in built.model.modules() if type(m) is MultiheadAttention)


@pytest.mark.parametrize("mapping", ["multimax", "entmax15"])
def test_the_outputs_scores_are_those_before_its_mapping(mapping, build, batch):
    built = build("multimax_transformer_lm", "--output-mapping", mapping)
    (output,) = collect(built.model, batch(built)).at("output")
    with torch.no_grad():
        expected = built.model.decoder.output_mapping(output.scores)
    torch.testing.assert_close(output.probabilities, expected, atol=1e-6, rtol=0)


def test_outputs_of_the_layers(build, batch):
    built = build("multimax_transformer")
    sample = batch(built)
    collected = collect(built.model, sample)
    numbers = [(layer.side, layer.layer) for layer in collected.layers]
    assert numbers == [*itertools.product(("encoder", "decoder"), (0, 1, 2))]
    net_input, model = sample["net_input"], built.model
    with torch.no_grad():
        encoder_out = model.encoder(net_input["src_tokens"], net_input["src_lengths"], return_all_hiddens=True)
        _, extra = model.decoder(net_input["prev_output_tokens"], encoder_out=encoder_out)
    assert not all(mask.all() for mask in collected.masks.values())  # there is padding
    for layer, expected in zip(collected.layers, encoder_out["encoder_states"] + extra["inner_states"]):
        real = collected.masks[layer.side]
        torch.testing.assert_close(layer.hidden[real], expected.transpose(0, 1)[real], atol=1e-5, rtol=1e-5)
