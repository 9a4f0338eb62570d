"""The decoder's output mapping, and what fairseq wraps around layers."""

import math

import pytest
import reference
import torch

from multimax_fairseq.kernels.attention import blocks
from multimax_fairseq.mappings import MAPPINGS, MultiMax, build_mapping
from multimax_fairseq.modules.decoder import log_probabilities


def logits(built, sample):
    return built.model(**sample["net_input"])[0]


@pytest.mark.parametrize("arch", ["multimax_transformer", "multimax_transformer_lm"])
def test_the_output_mapping_modulates_the_logits(arch, build, batch):
    plain = build(arch)
    mapped = build(arch, "--output-mapping", "multimax")
    decoder = mapped.model.decoder
    assert isinstance(decoder.output_mapping, MultiMax) and plain.model.decoder.output_mapping is None
    sample = batch(plain)
    with torch.no_grad():
        parameters = decoder.output_mapping.thresholds.tolist(), decoder.output_mapping.gains.tolist()
        expected = reference.over_rows(lambda row: reference.modulator(row, *parameters), logits(plain, sample))
        actual = logits(mapped, sample)
    torch.testing.assert_close(actual.double(), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(actual, logits(plain, sample), atol=1e-4)


def test_modulated_half_precision_logits_are_single(build):
    decoder = build("multimax_transformer_lm", "--output-mapping", "multimax").model.half().decoder
    with torch.no_grad():
        decoder.output_mapping.gains.fill_(1.0)
        features = torch.full((1, 1, 16), 60.0, dtype=torch.float16)
        decoder.output_projection.weight.fill_(1.0)  # logits of 960: σ goes beyond 65504
        output = decoder.output_layer(features)
    assert output.dtype == torch.float32 and torch.isfinite(output).all() and output.max() > 65504


@pytest.mark.parametrize("mapping, alpha, arch, options", [
    ("softmax", None, "multimax_transformer", []),
    ("sparsemax", 2, "multimax_transformer", []),
    ("entmax15", 1.5, "multimax_transformer_lm", ["--decoder-normalize-before"]),
    ("entmax", 1.1, "multimax_transformer_lm", ["--decoder-normalize-before"]),
    ("entmax", "learned", "multimax_transformer", []),
    ("sparsemax", 2, "multimax_transformer", ["--decoder-normalize-before", "--no-decoder-final-norm"]),
])  # fmt: skip
def test_sparse_mappings_start_with_smaller_features(mapping, alpha, arch, options, build, batch, recwarn):
    """By 1 / ((α − 1) log V), where that is below 1: so fewer words that come next start with probability 0."""
    output = ["--output-mapping", mapping, *(["--entmax-alpha", alpha] if mapping == "entmax" else [])]
    plain, sparse = build(arch, *options), build(arch, *options, *output)
    assert not any("requires_grad" in str(warning.message) for warning in recwarn)
    sample, decoder = batch(plain), sparse.model.decoder
    alpha = 1.5 if alpha == "learned" else alpha
    has_norm = "--no-decoder-final-norm" not in options  # without one, features are left as they are
    scale = min(1 / ((alpha - 1) * math.log(len(decoder.dictionary))), 1) if alpha and has_norm else 1
    with torch.no_grad():
        torch.testing.assert_close(logits(sparse, sample), scale * logits(plain, sample), atol=1e-6, rtol=1e-5)


class Own(torch.nn.Module):
    """A mapping that is computed by blocks, whose dropout draws no numbers for what a causal mask hides."""

    def forward(self, scores):
        return scores.softmax(-1)


@pytest.mark.parametrize("arch, options", [
    ("multimax_transformer", []),
    ("multimax_transformer_lm", ["--attention-scale", "log-length"]),
])  # fmt: skip
def test_a_checkpointed_layer_draws_the_same_dropout_again(arch, options, build, monkeypatch):
    monkeypatch.setitem(MAPPINGS, "own", Own)
    monkeypatch.setenv("MULTIMAX_BACKEND", "auto")
    monkeypatch.setitem(blocks.WHOLE, "cpu", 0)
    tokens = torch.randint(4, 20, (2, 100), generator=torch.Generator().manual_seed(1))
    gradients = []
    for checkpointing in ([], ["--checkpoint-activations"]):
        built = build(arch, "--attention-dropout", "0.3", "--attention-mapping", "own", *options, *checkpointing)
        built.model.train()
        torch.manual_seed(0)
        inputs = [tokens] if "_lm" in arch else [tokens, torch.full((2,), 100), tokens]
        built.model(*inputs)[0].square().sum().backward()
        gradients.append({name: p.grad for name, p in built.model.named_parameters()})
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["sparsemax", "entmax15", "entmax"])
def test_logarithms_of_a_sparse_vocabulary_are_finite_and_in_the_order_of_the_scores(name):
    scores = 4 * torch.randn(50, 40)
    scores[0], scores[1, 1:] = 0, -1e30
    scores[2] = torch.linspace(-500, 0, 40)
    probabilities = build_mapping(name)(scores)
    logs = log_probabilities(probabilities, scores)
    is_positive = probabilities > 1e-9
    torch.testing.assert_close(logs[is_positive], probabilities[is_positive].log(), atol=1e-6, rtol=0)
    assert logs[probabilities == 0].max() <= -32 and logs.min() >= -40
    order = scores.argsort(-1)
    ordered, spread = logs.gather(-1, order).diff(dim=-1), scores.gather(-1, order).diff(dim=-1)
    assert ordered.min() >= 0 and ordered[3:][spread[3:] > 1e-3].min() > 0


def test_the_gradient_of_a_vocabularys_modulator_is_divided_by_the_root_of_its_size(build, batch):
    built = build("multimax_transformer_lm", "--output-mapping", "multimax")
    built.model.train()
    mapping, root = built.model.decoder.output_mapping, len(built.task.target_dictionary) ** 0.5
    names, gradients = [name for name, _ in built.model.named_parameters()], []
    for mapping.gradient_scale in (mapping.gradient_scale, 1):  # noqa: B020
        torch.manual_seed(0)
        loss = logits(built, batch(built)).logsumexp(-1).sum()
        gradients.append(torch.autograd.grad(loss, built.model.parameters()))
    for name, scaled, whole in zip(names, *gradients):
        assert "output_mapping" not in name or whole.abs().min() > 0
        torch.testing.assert_close(scaled * (root if "output_mapping" in name else 1), whole, atol=1e-6, rtol=1e-6)
