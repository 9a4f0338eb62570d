"""The walk: which attention gets which mapping, and with which numbers it starts."""

import pytest
import torch
from fairseq.modules import MultiheadAttention

from multimax_fairseq.mappings import MultiMax
from multimax_fairseq.models import attach
from multimax_fairseq.models.attach import attention_sites
from multimax_fairseq.modules import MappedMultiheadAttention

SITES = [("encoder", 0), ("encoder", 1), ("decoder", 0), ("cross", 0), ("decoder", 1), ("cross", 1)]


@pytest.mark.parametrize("options", [[], ["--checkpoint-activations"], ["--encoder-layerdrop", 0.9],
                                     ["--decoder-layerdrop", 0.9], ["--quant-noise-pq", 0.2],
                                     ["--cross-self-attention", "--no-cross-attention"]], ids=str)  # fmt: skip
def test_every_attention_is_found_whatever_is_around_its_layer(options, build):
    sites = [pair for pair in SITES if pair[0] != "cross" or "--no-cross-attention" not in options]
    for arch in ("transformer", "multimax_transformer"):
        found = list(attention_sites(build(arch, *options).model))
        assert [(site, number) for site, number, _ in found] == sites
        kind = MultiheadAttention if arch == "transformer" else MappedMultiheadAttention
        assert all(type(attention) is kind for *_, attention in found)
        if arch == "multimax_transformer":
            assert [attention.site for *_, attention in found] == [site for site, _ in sites]
            has_plain_masks = "--cross-self-attention" not in options  # the others show the source, too
            causal = [site == "decoder" and has_plain_masks for site, _ in sites]
            assert [attention.is_causal for *_, attention in found] == causal


@pytest.mark.parametrize("site", ["encoder", "decoder", "cross"])
def test_a_mapping_is_at_its_sites_and_nowhere_else_with_one_alpha_a_head(site, build):
    learned = ["--attention-mapping", "entmax", "--entmax-alpha", "learned"]
    model = build("multimax_transformer", *learned, "--attention-mapping-sites", site).model
    for name, _, attention in attention_sites(model):
        assert type(attention) is (MappedMultiheadAttention if name == site else MultiheadAttention)
        assert name != site or attention.mapping.alpha.shape == (2,)


@pytest.mark.parametrize("arch", ["transformer", "transformer_lm"])
def test_mappings_change_nothing_else_and_softmax_nothing_at_all(arch, build, batch):
    """Neither the stock model's parameters, nor what is drawn next; with softmax no bit of the output."""
    stock, drawn = build(arch), torch.rand(3)
    expected = dict(stock.model.named_parameters())
    for options in (["--output-mapping", "multimax"], ["--attention-mapping", "sparsemax"],
                    ["--attention-mapping", "softmax"]):  # fmt: skip
        mapped = build(f"multimax_{arch}", *options)
        assert torch.equal(torch.rand(3), drawn)
        actual = dict(mapped.model.named_parameters())
        assert all(".mapping." in name or ".output_mapping." in name for name in actual.keys() - expected.keys())
        assert all(torch.equal(actual[name], parameter) for name, parameter in expected.items())
    assert list(mapped.model.state_dict()) == list(stock.model.state_dict())
    sample, outputs = batch(stock)["net_input"], []
    for built in (stock, mapped):
        torch.manual_seed(0)
        outputs.append(built.model.train()(**sample)[0])
    assert torch.equal(*outputs)


def numbers(model):
    return torch.stack([torch.cat(m.mapping.coefficients()).detach() for *_, m in attention_sites(model)]).flatten()


def test_modulators_depend_on_the_seed_alone(build):
    """All differ, and what the process has done before does not matter."""
    first = numbers(build("multimax_transformer").model)
    assert len(first.unique()) == len(first)
    MultiMax(), MultiMax()
    assert torch.equal(numbers(build("multimax_transformer").model), first)
    torch.testing.assert_close(numbers(build("multimax_transformer", "--modulator-lr-scale", 10).model), first)
    assert not torch.isclose(numbers(build("multimax_transformer", seed=2).model), first).any()


@pytest.mark.parametrize("arch, options", [("transformer", []), ("multimax_transformer",
                                                                 ["--attention-mapping", "sparsemax"])])  # fmt: skip
def test_a_loaded_encoder_computes_in_evaluation_what_it_does_in_training(arch, options, build, batch):
    """fairseq 0.12.2 leaves for a fused softmax kernel, which refuses padding, in layers that were only loaded."""
    source, target = (build(arch, *options, "--dropout", 0, seed=seed) for seed in (1, 2))
    target.model.load_state_dict(source.model.state_dict())
    sample = batch(source)["net_input"]
    assert sample["src_tokens"].eq(source.task.source_dictionary.pad()).any()
    with torch.no_grad():
        expected = source.model.train()(**sample)[0]
        torch.testing.assert_close(target.model.eval()(**sample)[0], expected, atol=1e-5, rtol=1e-5)


def test_parameters_cannot_be_added_to_what_is_spread_over_processes(build, monkeypatch):
    monkeypatch.setattr(attach, "FullyShardedDataParallel", torch.nn.Linear)  # some of the model's modules
    with pytest.raises(ValueError, match="--ddp-backend fully_sharded"):
        build("multimax_transformer")
    build("multimax_transformer", "--attention-mapping", "sparsemax")
