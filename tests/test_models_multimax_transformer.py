"""The architectures, of translation and language models."""

import pytest
import torch
from conftest import parse
from omegaconf import OmegaConf

import multimax_fairseq.models  # noqa: F401
from multimax_fairseq.mappings import MAPPINGS
from multimax_fairseq.models.options import MAPPING_OPTIONS, SITES
from multimax_fairseq.modules.scale import SCALES

ARCHITECTURES = [
    *("transformer", "transformer_tiny", "transformer_iwslt_de_en", "transformer_wmt_en_de"),
    *("transformer_vaswani_wmt_en_de_big", "transformer_lm", "transformer_lm_gpt", "transformer_lm_big"),
    "transformer_lm_baevski_wiki103",
]


@pytest.mark.parametrize("stock", ARCHITECTURES)
def test_dimensions_and_defaults_are_those_of_the_stock_architecture(stock, corpus):
    data = [corpus / "data-bin-lm", "--task", "language_modeling"] if "_lm" in stock else [corpus / "data-bin"]
    parsed = [parse([*data, "--arch", arch]) for arch in (stock, f"multimax_{stock}")]
    if "_lm" in stock:
        expected, actual = ({**cfg.model, "arch": cfg.model._name} for _, cfg in parsed)
    else:
        expected, actual = (vars(args) for args, _ in parsed)
    own = {option.name: option.default for option in MAPPING_OPTIONS}
    assert {name: actual[name] for name in actual.keys() - expected.keys()} == own
    assert {name for name in expected if actual[name] != expected[name]} <= {"arch", "_name"}
    assert actual["arch"] == f"multimax_{expected['arch']}"


@pytest.mark.parametrize(("name", "sites", "scale"), [
    *((name, ",".join(SITES), "none") for name in MAPPINGS),
    *(("multimax", site, "none") for site in SITES),
    *((name, ",".join(SITES), scale) for scale in SCALES if scale != "none" for name in ("multimax", "entmax")),
])  # fmt: skip
def test_steps_with_reordered_beams_equal_the_full_forward(name, sites, scale, build, batch):
    options = ["--attention-mapping", name, "--attention-mapping-sites", sites, "--output-mapping", "multimax"]
    options += ["--attention-scale", scale]
    built = build("multimax_transformer", *options)
    model = built.model.eval()
    sample = batch(built, size=4)["net_input"]
    # two sentences with two hypotheses each, which change places or push each other out
    sentences, order = torch.tensor([0, 0, 1, 1]), torch.tensor([1, 0, 3, 3])
    tokens = sample["prev_output_tokens"]
    with torch.no_grad():
        encoder_out = model.encoder(sample["src_tokens"][sentences], sample["src_lengths"][sentences])
        incremental_state, steps = {}, []
        for length in range(1, tokens.size(1) + 1):
            if length == 4:
                model.decoder.reorder_incremental_state_scripting(incremental_state, order)
                encoder_out = model.encoder.reorder_encoder_out(encoder_out, order)
                tokens, steps = tokens[order], [step[order] for step in steps]
            step = model.decoder(tokens[:, :length], encoder_out=encoder_out, incremental_state=incremental_state)
            steps.append(model.get_normalized_probs(step, log_probs=True))
        full = model.decoder(tokens, encoder_out=encoder_out)
        expected = model.get_normalized_probs(full, log_probs=True)
    padding = tokens.eq(model.decoder.padding_idx).unsqueeze(-1)
    difference = (torch.cat(steps, dim=1) - expected).masked_fill(padding, 0.0)
    assert difference.abs().max() < 1e-5


@pytest.mark.parametrize("flag", [
    "--cross-self-attention", "--no-cross-attention", "--encoder-learned-pos", "--layernorm-embedding",
    "--share-all-embeddings", "--encoder-normalize-before", "--quant-noise-pq=0.2", "--attention-scale=learned",
    "--attention-scale=log-length",
])  # fmt: skip
def test_modulators_and_scales_learn_whatever_else_is_chosen(flag, build, batch):
    built = build("multimax_transformer", flag, *(["--no-cross-attention"] if "cross-self" in flag else []))
    model = built.model.train()
    output = model(**batch(built)["net_input"])[0]
    assert torch.isfinite(output).all()
    output.logsumexp(-1).sum().backward()
    ours = ("mapping.gains", "scale.t", "scale.s")
    learned = [parameter.grad for name, parameter in model.named_parameters() if name.endswith(ours)]
    assert len(learned) >= (12 if "scale" in flag else 4)
    reached = [grad.abs().min() > 0 for grad in learned if grad is not None]
    # without cross-attention nothing flows from the two layers of the encoder
    assert all(reached) and len(reached) == len(learned) - (2 if flag == "--no-cross-attention" else 0)


def test_adaptive_input_and_softmax_with_multimax_in_attention(build, batch):
    built = build("multimax_transformer_lm", "--adaptive-input", "--adaptive-input-cutoff", "20,50",
                  "--adaptive-softmax-cutoff", "20,50", "--tie-adaptive-weights")  # fmt: skip
    assert torch.isfinite(built.model(**batch(built)["net_input"])[0]).all()


def test_a_misspelt_option_in_a_config_file_stops_at_model_build(build):
    built = build("multimax_transformer")
    size = {"encoder_layers": 1, "decoder_layers": 1, "encoder_embed_dim": 8, "decoder_embed_dim": 8,
            "encoder_attention_heads": 2, "decoder_attention_heads": 2, "modulator_lr_scale": 3}  # fmt: skip
    cfg = OmegaConf.create({"_name": "multimax_transformer", **size})
    assert built.task.build_model(cfg).encoder.layers[0].self_attn.mapping.lr_scale == 3
    built.task.build_model(cfg)  # as a checkpoint has it: with all that the architecture has added
    for wrong, nearest in [("attention_maping", "attention_mapping"), ("multimax-order", "multimax_order")]:
        with pytest.raises(ValueError, match=f"^model.{wrong}: there is no such field.* is model.{nearest}$"):
            built.task.build_model(OmegaConf.create({"_name": "multimax_transformer", **size, wrong: 1}))
