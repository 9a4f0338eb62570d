"""Checkpoints of the stock architecture, and modulators in the log."""

import logging

import pytest
import torch
from fairseq.logging import metrics

from multimax_fairseq.models.mapped_model import add_missing_mappings, log_modulators, modulators_by_site

ARCHITECTURES = [("transformer", "multimax_transformer"), ("transformer_lm", "multimax_transformer_lm")]


@pytest.mark.parametrize("stock, mapped", ARCHITECTURES)
def test_softmax_has_the_stock_models_parameters_and_output_to_the_last_bit(stock, mapped, build, batch):
    sides = [build(stock), build(mapped, "--attention-mapping", "softmax")]
    sample = batch(sides[0])
    outputs = []
    for built in sides:
        torch.manual_seed(0)
        outputs.append(built.model.train()(**sample["net_input"])[0])
    assert torch.equal(*outputs)
    assert list(sides[0].model.state_dict()) == list(sides[1].model.state_dict())


def log_probabilities(built, sample):
    built.model.eval()
    with torch.no_grad():
        return built.model.get_normalized_probs(built.model(**sample["net_input"]), log_probs=True)


@pytest.mark.parametrize("stock, mapped", ARCHITECTURES)
def test_a_stock_checkpoint_loads_and_starts_as_softmax(stock, mapped, build, batch, caplog):
    source, target = build(stock, seed=1), build(mapped, "--output-mapping", "multimax", seed=2)
    with caplog.at_level(logging.INFO, "multimax_fairseq"):
        target.model.load_state_dict(source.model.state_dict(), strict=True)
    (record,) = caplog.records
    number = 2 * sum(map(len, modulators_by_site(target.model).values()))
    assert f"lacks {number} parameters of mappings" in record.message and "identity" in record.message
    sample = batch(source)
    torch.testing.assert_close(
        log_probabilities(target, sample), log_probabilities(source, sample), atol=2e-6, rtol=0
    )


@pytest.mark.parametrize("arch", ["multimax_transformer", "multimax_transformer_lm"])
def test_its_own_checkpoint_is_loaded_as_it_is(arch, build, caplog):
    source, target = build(arch, seed=1), build(arch, seed=2)
    with caplog.at_level(logging.INFO, "multimax_fairseq"):
        target.model.load_state_dict(source.model.state_dict(), strict=True)
    assert not caplog.records
    loaded = target.model.state_dict()
    expected = {name: parameter for name, parameter in source.model.named_parameters() if ".mapping." in name}
    assert expected
    for name, parameter in expected.items():
        torch.testing.assert_close(loaded[name], parameter, atol=0, rtol=0)


def test_only_what_is_missing_is_added_under_the_name_of_the_model(build):
    model = build("multimax_transformer_lm").model
    state = {"lm.decoder.layers.0.self_attn.mapping.gains": torch.ones(2, 2)}
    add_missing_mappings(model, state, "lm.")
    assert set(state) == {
        f"lm.decoder.layers.{layer}.self_attn.mapping.{kind}" for layer in (0, 1) for kind in ("thresholds", "gains")
    }
    assert state["lm.decoder.layers.0.self_attn.mapping.gains"].eq(1).all()
    assert state["lm.decoder.layers.1.self_attn.mapping.gains"].eq(0).all()


def test_a_missing_learned_alpha_starts_at_one_and_a_half(build):
    options = ["--attention-mapping", "entmax", "--entmax-alpha", "learned"]
    target = build("multimax_transformer_lm", *options)
    target.model.load_state_dict(build("transformer_lm").model.state_dict(), strict=True)
    torch.testing.assert_close(target.model.decoder.layers[0].self_attn.mapping.alpha, torch.full((2,), 1.5))


def test_state_names_are_stable(build):
    names = {name for name in build("multimax_transformer").model.state_dict() if "mapping" in name}
    assert names == {
        f"{side}.layers.{layer}.{attention}.mapping.{kind}"
        for side, attention in [("encoder", "self_attn"), ("decoder", "self_attn"), ("decoder", "encoder_attn")]
        for layer in (0, 1)
        for kind in ("thresholds", "gains")
    }


def test_mean_absolute_parameters_of_each_site_are_logged(build):
    model = build("multimax_transformer", "--output-mapping", "multimax", "--log-modulators", "module").model.train()
    with torch.no_grad():
        for group in modulators_by_site(model).values():
            for number, modulator in enumerate(group):
                modulator.thresholds.copy_(torch.tensor([[1.0, 2.0], [-3.0, -4.0]]) * (number + 1))
                modulator.gains.copy_(torch.tensor([[0.1, -0.2], [0.3, -0.4]]) * (number + 1))
    with metrics.aggregate(new_root=True) as log:
        model.set_num_updates(1)
    values = log.get_smoothed_values()
    assert {name.split("_")[0] for name in values} == {"encoder", "decoder", "cross", "output"}
    # 4 numbers a site, and of each module the 8 themselves: two layers at three sites, and the output
    assert len(values) == 4 * 4 + 7 * 8
    assert values["cross_1_b2"] == -6.0 and values["encoder_0_d2"] == -4.0
    assert values["decoder_1_g_b1"] == pytest.approx(0.2) and values["output_g_d2"] == pytest.approx(-0.4)
    # two layers, the second with twice the numbers of the first: 1.5 times the mean over orders
    assert values["encoder_b"] == pytest.approx(3.0) and values["cross_d"] == pytest.approx(4.5)
    assert values["decoder_g_b"] == pytest.approx(0.3) and values["encoder_g_d"] == pytest.approx(0.45)
    assert values["output_b"] == pytest.approx(2.0)


@pytest.mark.parametrize("options, names", [([], {"decoder_b", "decoder_d", "decoder_g_b", "decoder_g_d"}),
                                            (["--log-modulators", "none"], set())])  # fmt: skip
def test_by_default_only_sites_are_logged(options, names, build):
    model = build("multimax_transformer_lm", *options).model.train()
    with metrics.aggregate(new_root=True) as log:
        model.set_num_updates(1)
    assert set(log.get_smoothed_values()) == names


def test_nothing_is_logged_without_modulators_or_outside_training(build):
    with metrics.aggregate(new_root=True) as log:
        log_modulators(build("multimax_transformer", "--attention-mapping", "sparsemax").model)
        build("multimax_transformer").model.eval().set_num_updates(1)
    assert not log.get_smoothed_values()


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


@pytest.mark.parametrize("arch", ["multimax_transformer", "multimax_transformer_lm"])
def test_a_learning_rate_of_modulators_that_are_not_there_is_an_error(arch, build):
    with pytest.raises(ValueError, match="^--modulator-lr-scale 10.0: this model has no modulators.*multimax"):
        build(arch, "--attention-mapping", "softmax", "--modulator-lr-scale", 10)
    build(arch, "--attention-mapping", "softmax", "--output-mapping", "multimax", "--modulator-lr-scale", 10)


def test_the_log_has_the_numbers_that_sigma_uses(build):
    models = [build("multimax_transformer_lm", "--modulator-lr-scale", scale).model.train() for scale in (1, 10)]
    logs = []
    for model in models:
        with metrics.aggregate(new_root=True) as log:
            model.set_num_updates(1)
        logs.append(log.get_smoothed_values())
    assert logs[0] == pytest.approx(logs[1], abs=1.1e-4) and logs[0]["decoder_b"] > 0


@pytest.mark.parametrize("mapping, is_refused", [
    ("sparsemax", True), ("entmax15", True), ("entmax", True), ("evsoftmax", False), ("multimax", False),
])  # fmt: skip
def test_guided_alignment_needs_probabilities_above_0(mapping, is_refused, build, batch):
    built = build("multimax_transformer", "--attention-mapping", mapping)
    sample = batch(built)
    built.model.get_targets(sample, None)
    sample["alignments"] = torch.tensor([[0, 0]])
    if is_refused:
        with pytest.raises(ValueError, match=f"{mapping} makes most of them 0: leave cross out of"):
            built.model.get_targets(sample, None)
        with pytest.raises(ValueError, match="leave cross out of"):
            build("multimax_transformer", "--attention-mapping", mapping, "--load-alignments")
        built = build("multimax_transformer", "--attention-mapping", mapping, "--attention-mapping-sites", "decoder")
    assert built.model.get_targets(sample, None) is sample["target"]
