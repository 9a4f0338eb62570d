"""The language-model architectures."""

import pytest
import torch
from conftest import parse
from fairseq.models import transformer_lm

import multimax_fairseq  # noqa: F401
from multimax_fairseq.mappings import MAPPINGS
from multimax_fairseq.models import MappingOptions

ARCHITECTURES = ["transformer_lm", "transformer_lm_gpt", "transformer_lm_big", "transformer_lm_baevski_wiki103"]


@pytest.mark.parametrize("stock", ARCHITECTURES)
def test_dimensions_and_defaults_are_those_of_the_stock_architecture(stock, corpus):
    data = [corpus / "data-bin-lm", "--task", "language_modeling"]
    expected, expected_cfg = parse([*data, "--arch", stock])
    actual, actual_cfg = parse([*data, "--arch", f"multimax_{stock}"])
    expected, actual = dict(expected_cfg.model), dict(actual_cfg.model)
    assert actual.pop("_name") == f"multimax_{expected.pop('_name')}"
    for name, default in vars(MappingOptions()).items():
        if name != "_name":
            assert actual.pop(name) == default
    assert actual == expected


@pytest.mark.parametrize("name", MAPPINGS)
def test_steps_equal_the_full_forward(name, build, batch):
    built = build("multimax_transformer_lm", "--attention-mapping", name, "--output-mapping", "multimax")
    model = built.model.eval()
    tokens = batch(built, size=4)["net_input"]["src_tokens"]
    with torch.no_grad():
        expected = model.get_normalized_probs(model(tokens), log_probs=True)
        incremental_state = {}
        steps = [
            model.get_normalized_probs(
                model.decoder(tokens[:, :length], incremental_state=incremental_state), log_probs=True
            )
            for length in range(1, tokens.size(1) + 1)
        ]
    padding = tokens.eq(model.decoder.padding_idx).unsqueeze(-1)
    assert (torch.cat(steps, dim=1) - expected).masked_fill(padding, 0.0).abs().max() < 1e-5


def test_the_lent_decoder_class_is_given_back(build):
    stock = transformer_lm.TransformerDecoder
    build("multimax_transformer_lm")
    with pytest.raises(ValueError):
        build("multimax_transformer_lm", "--attention-mapping", "softmin")
    assert transformer_lm.TransformerDecoder is stock


def test_adaptive_input_and_softmax_with_multimax_in_attention(build, batch):
    options = ["--adaptive-input", "--adaptive-input-cutoff", "20,50", "--adaptive-softmax-cutoff", "20,50",
               "--tie-adaptive-weights"]  # fmt: skip
    built = build("multimax_transformer_lm", *options)
    assert torch.isfinite(built.model(**batch(built)["net_input"])[0]).all()
    with pytest.raises(ValueError, match="adaptive"):
        build("multimax_transformer_lm", *options, "--output-mapping", "multimax")


def test_a_site_that_a_language_model_lacks(build):
    with pytest.raises(ValueError, match="choose from: decoder"):
        build("multimax_transformer_lm", "--attention-mapping-sites", "encoder,cross")
