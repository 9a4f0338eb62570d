"""The language-model architectures."""

import sys
from copy import deepcopy

import pytest
import torch
from fairseq.sequence_scorer import SequenceScorer

from multimax_fairseq.kernels.loss import default_chunk_tokens
from multimax_fairseq.modules import MappedDecoder


def test_an_ensembles_softmax_batch_is_left_alone(build, batch, small_chunks):
    built = build("multimax_transformer_lm")
    sample = batch(built, size=6)
    cfg = eval_lm_config(built, path="ours.pt:stock.pt")
    built.model.prepare_for_inference_(cfg)
    assert cfg.eval_lm.softmax_batch == sys.maxsize
    SequenceScorer(built.task.target_dictionary, cfg.eval_lm.softmax_batch).generate([built.model] * 2, sample)
    assert small_chunks == [sample["target"].numel()] * 2  # at once, as in a stock model


def test_adaptive_input_and_softmax_with_multimax_in_attention(build, batch):
    options = ["--adaptive-input", "--adaptive-input-cutoff", "20,50", "--adaptive-softmax-cutoff", "20,50",
               "--tie-adaptive-weights"]  # fmt: skip
    built = build("multimax_transformer_lm", *options)
    assert torch.isfinite(built.model(**batch(built)["net_input"])[0]).all()


def eval_lm_config(built, path="checkpoint.pt", softmax_batch=sys.maxsize):
    cfg = deepcopy(built.cfg)
    cfg.common_eval.path, cfg.eval_lm.softmax_batch = path, softmax_batch
    return cfg


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 32 tokens, as if the vocabulary were large; returns the numbers of tokens of output layers' calls."""
    monkeypatch.setattr(sys.modules[default_chunk_tokens.__module__], "LOGITS_AT_A_TIME", 1)
    output_layer, tokens = MappedDecoder.output_layer, []

    def recorded(decoder, features):
        tokens.append(features[..., 0].numel())
        return output_layer(decoder, features)

    monkeypatch.setattr(MappedDecoder, "output_layer", recorded)
    return tokens


@pytest.mark.parametrize("output", ["softmax", "multimax"])
@pytest.mark.parametrize("softmax_batch, largest", [(sys.maxsize, 32), (20, 20)])
def test_perplexity_needs_the_logits_of_a_chunk_only(softmax_batch, largest, output, build, batch, small_chunks):
    built = build("multimax_transformer_lm", "--output-mapping", output)
    sample, dictionary = batch(built, size=6), built.task.target_dictionary
    expected = SequenceScorer(dictionary).generate([built.model], sample)
    assert small_chunks == [sample["target"].numel()] and small_chunks[0] > 100
    small_chunks.clear()

    cfg = eval_lm_config(built, softmax_batch=softmax_batch)
    built.model.prepare_for_inference_(cfg)
    assert cfg.eval_lm.softmax_batch == largest
    for models in ([built.model], [built.model] * 2):  # an ensemble asks for probabilities, not for their logarithms
        actual = SequenceScorer(dictionary, cfg.eval_lm.softmax_batch).generate(models, sample)
        for [one], [other] in zip(actual, expected):
            torch.testing.assert_close(
                one["positional_scores"], other["positional_scores"], atol=1e-5, rtol=1e-5
            )
    assert max(small_chunks) == largest and sum(small_chunks) == 3 * sample["target"].numel()


def test_steps_and_python_users_get_logits(build, batch, small_chunks):
    built = build("multimax_transformer_lm")
    tokens = batch(built, size=6)["net_input"]["src_tokens"]
    with torch.no_grad():
        expected = built.model(tokens)[0]
        built.model.prepare_for_inference_(eval_lm_config(built, path=None))
        assert torch.equal(built.model(tokens)[0], expected)

        command = build("multimax_transformer_lm").model
        command.prepare_for_inference_(eval_lm_config(built))
        assert command(tokens)[0].size(-1) == 16  # features
        torch.testing.assert_close(command(tokens[:1])[0], expected[:1], atol=1e-5, rtol=1e-5)  # 32 tokens: a chunk
        steps = command.decoder(tokens[:, :1], incremental_state={})[0]
        torch.testing.assert_close(steps, expected[:, :1], atol=1e-5, rtol=1e-5)
