"""The criterion in fairseq: its numbers are those of the stock criterion (test_distributed.py: in two processes)."""

from argparse import Namespace

import pytest
import torch
from conftest import parse, trained_parameters
from fairseq.quantization_utils import quantize_model_scalar

from multimax_fairseq.criterions.chunked_cross_entropy import check_output_layer

TIED = ["--share-decoder-input-output-embed"]


def criterion(built, *options):
    """The criterion that fairseq-train builds of its options."""
    _, cfg = parse([built.cfg.task.data, "--task", built.cfg.task._name, "--arch", "transformer", *options])
    return built.task.build_criterion(cfg.criterion)


def assert_same_gradients(actual, expected):
    """Sums in fp32 in another order: some, as of a key's bias, are only what rounding leaves of large terms."""
    assert actual.keys() == expected.keys()
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in expected.items():
        error = (actual[name] - gradient).abs().max().item()
        assert error < 1e-5 * gradient.abs().max().item() + 1e-6 * largest, (name, error, largest)


def losses_and_gradients(built, sample, *options, **forward):
    built.model.zero_grad()
    loss, sample_size, log = criterion(built, *options)(built.model, sample, **forward)
    if loss.requires_grad:
        loss.sum().backward()
    return loss, sample_size, log, {name: p.grad for name, p in trained_parameters(built.model)}


@pytest.mark.parametrize("smoothing, average, arch, options", [
    (0.0, ["--sentence-avg"], "transformer", TIED),
    (0.1, [], "transformer_lm", []),
    (0.1, ["--sentence-avg"], "multimax_transformer", ["--output-mapping", "multimax"]),
    (0.1, [], "multimax_transformer", ["--output-mapping", "multimax", "--multimax-terms", "above", *TIED]),
    (0.0, [], "multimax_transformer_lm", ["--output-mapping", "multimax", "--multimax-order", "1", *TIED]),
], ids=str)  # fmt: skip
def test_loss_and_gradients_are_those_of_the_stock_criterion(smoothing, average, arch, options, build, batch):
    built = build(arch, *options)
    built.model.decoder.output_projection.bias = torch.nn.Parameter(torch.randn(len(built.task.target_dictionary)))
    sample = batch(built)
    sample["target"][0, -3:] = sample["target"][3, -1] = built.task.target_dictionary.pad()
    smooth = ["--label-smoothing", smoothing, *average]
    stock = ["--criterion", "label_smoothed_cross_entropy", *smooth]
    chunked = ["--criterion", "chunked_cross_entropy", *smooth, "--chunk-tokens", 50]
    expected, actual = (losses_and_gradients(built, sample, *options) for options in (stock, chunked))
    assert actual[1] == expected[1] and actual[2].keys() == expected[2].keys()
    for name, value in expected[2].items():
        assert float(actual[2][name]) == pytest.approx(float(value), rel=1e-6), name
    assert_same_gradients(actual[3], expected[3])
    of_each = [losses_and_gradients(built, sample, *options, reduce=False)[0] for options in (stock, chunked)]
    torch.testing.assert_close(*(losses.flatten() for losses in of_each), atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        assert losses_and_gradients(built, sample, *chunked)[0].item() == pytest.approx(actual[0].item(), rel=1e-6)


@pytest.mark.parametrize("options, message", [
    (["--ddp-backend", "fully_sharded"], "fully_sharded .* use --ddp-backend legacy_ddp"),
    (["--find-unused-parameters"], "--ddp-backend legacy_ddp, or pytorch_ddp without this flag"),
    (["--label-smoothing", "1.5"], "--label-smoothing"),
    (["--chunk-tokens", "-5"], "--chunk-tokens"),
])  # fmt: skip
def test_options_that_cannot_work(options, message, build):
    with pytest.raises(ValueError, match=message):
        criterion(build("multimax_transformer"), "--criterion", "chunked_cross_entropy", *options)


def test_a_model_without_a_plain_projection_is_refused(build):
    adaptive = build("multimax_transformer_lm", "--adaptive-softmax-cutoff", "20,50").model
    noisy, scaled = (build("multimax_transformer").model for _ in range(2))
    check_output_layer(noisy)
    noisy = quantize_model_scalar(noisy, Namespace(quant_noise_scalar=0.1))  # as the task does after it has built it

    class Scaled(type(scaled.decoder)):
        def output_layer(self, features):
            return 2 * super().output_layer(features)

    scaled.decoder.__class__ = Scaled
    for model in (adaptive, noisy, scaled, scaled.encoder):
        kind = type(getattr(model, "decoder", None)).__name__
        with pytest.raises(ValueError, match=f"this {kind} is not known to be one: drop --quant-noise-scalar or"):
            check_output_layer(model)
