"""Checkpoints of the stock architecture, and modulators in the log."""

import logging
from contextlib import nullcontext

import pytest
import torch
from fairseq.logging import metrics

from multimax_fairseq.models.mapped_model import add_missing_mappings, modulators_by_site

ARCHITECTURES = [("transformer", "multimax_transformer"), ("transformer_lm", "multimax_transformer_lm")]


def log_probabilities(built, sample):
    built.model.eval()
    with torch.no_grad():
        return built.model.get_normalized_probs(built.model(**sample["net_input"]), log_probs=True)


@pytest.mark.parametrize("stock, mapped", ARCHITECTURES)
def test_a_stock_checkpoint_loads_and_starts_as_softmax(stock, mapped, build, batch, caplog):
    source, target = build(stock, seed=1), build(mapped, "--output-mapping", "multimax", seed=2)
    sample, number = batch(source), 2 * sum(map(len, modulators_by_site(target.model).values()))
    with caplog.at_level(logging.INFO, "multimax_fairseq"):
        target.model.load_state_dict(source.model.state_dict(), strict=True)
        own = build(mapped, "--output-mapping", "multimax", seed=3)
        own.model.load_state_dict(target.model.state_dict(), strict=True)
    (record,) = caplog.records  # its own checkpoint lacks nothing
    assert f"lacks {number} parameters of mappings" in record.message and "identity" in record.message
    for built in (target, own):
        actual, expected = log_probabilities(built, sample), log_probabilities(source, sample)
        torch.testing.assert_close(actual, expected, atol=2e-6, rtol=0)


def test_only_what_is_missing_is_added_under_the_name_of_the_model(build):
    """A modulator starts as the identity, a learned alpha at 1.5. The names are those of all checkpoints."""
    options = ["--output-mapping", "entmax", "--entmax-alpha", "learned"]
    there = "mt.decoder.layers.0.encoder_attn.mapping.gains"
    state = {there: torch.ones(2, 2)}
    add_missing_mappings(build("multimax_transformer", *options).model, state, "mt.")
    alpha = state.pop("mt.decoder.output_mapping.alpha_logits")
    assert alpha.sigmoid().item() * 0.99 + 1.01 == pytest.approx(1.5)
    modules = ("encoder.layers.{}.self_attn", "decoder.layers.{}.self_attn", "decoder.layers.{}.encoder_attn")
    names = {f"mt.{module.format(layer)}.mapping.{kind}" for module in modules for layer in (0, 1)
             for kind in ("thresholds", "gains")}  # fmt: skip
    assert state.keys() == names
    assert all(tensor.eq(1.0 if name == there else 0.0).all() for name, tensor in state.items())


def logged(model):
    with metrics.aggregate(new_root=True) as log:
        model.set_num_updates(1)
    return log.get_smoothed_values()


@pytest.mark.parametrize("scale", [1, 10])  # of the parameters; the log has the numbers that σ uses
def test_mean_absolute_parameters_of_each_site_are_logged(scale, build):
    options = ["--output-mapping", "multimax", "--log-modulators", "module", "--modulator-lr-scale", scale]
    model = build("multimax_transformer", *options).model.train()
    with torch.no_grad():
        for group in modulators_by_site(model).values():
            for number, modulator in enumerate(group):
                modulator.thresholds.copy_(torch.tensor([[1.0, 2.0], [-3.0, -4.0]]) * (number + 1) / scale)
                modulator.gains.copy_(torch.tensor([[0.1, -0.2], [0.3, -0.4]]) * (number + 1) / scale)
    values = logged(model)
    assert {name.split("_")[0] for name in values} == {"encoder", "decoder", "cross", "output"}
    # 4 numbers a site, and of each module the 8 themselves: two layers at three sites, and the output.
    # Of two layers, the second has twice the numbers of the first: 1.5 times the mean over orders.
    assert len(values) == 4 * 4 + 7 * 8
    expected = {"cross_1_b2": -6.0, "encoder_0_d2": -4.0, "decoder_1_g_b1": 0.2, "output_g_d2": -0.4,
                "encoder_b": 3.0, "cross_d": 4.5, "decoder_g_b": 0.3, "encoder_g_d": 0.45,
                "output_b": 2.0}  # fmt: skip
    assert {name: values[name] for name in expected} == pytest.approx(expected)


def test_what_is_logged_by_default_and_where_nothing_is(build):
    names = {"decoder_b", "decoder_d", "decoder_g_b", "decoder_g_d"}
    assert set(logged(build("multimax_transformer_lm").model.train())) == names
    for options in (["--log-modulators", "none"], ["--attention-mapping", "sparsemax"]):
        assert not logged(build("multimax_transformer_lm", *options).model.train())
    assert not logged(build("multimax_transformer_lm").model.eval())


def test_layers_to_keep_of_a_stock_checkpoint(build, batch):
    """fairseq drops and renumbers layers while it loads; the modulators must be those of the layers that stay."""
    source = build("transformer", "--encoder-layers", 4)
    cfg = build("multimax_transformer", "--encoder-layers", 4).cfg.model
    # as --model-overrides sets them: together, and as strings (on its command line fairseq takes them for lists)
    cfg.encoder_layers_to_keep, cfg.decoder_layers_to_keep = "1,3", "0,1"
    model = source.task.build_model(cfg)
    assert cfg.encoder_layers == 2  # what a checkpoint of it will say
    model.load_state_dict(source.model.state_dict(), strict=True, model_cfg=cfg)
    for kept, layer in zip((1, 3), model.encoder.layers):
        torch.testing.assert_close(layer.fc1.weight, source.model.encoder.layers[kept].fc1.weight, atol=0, rtol=0)
        assert layer.self_attn.mapping.gains.eq(0).all()


@pytest.mark.parametrize("mapping, sites, is_refused", [
    ("sparsemax", "cross", True), ("entmax15", "cross", True), ("entmax", "cross", True),
    ("evsoftmax", "cross", False), ("sparsemax", "encoder,decoder", False),
])  # fmt: skip
def test_guided_alignment_needs_probabilities_above_0(mapping, sites, is_refused, build):
    refusal = pytest.raises(ValueError, match=f"{mapping} makes most of them 0: leave cross out of")
    with refusal if is_refused else nullcontext():
        build("multimax_transformer", "--attention-mapping", mapping, "--attention-mapping-sites", sites,
              "--load-alignments")  # fmt: skip
