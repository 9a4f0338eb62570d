"""The criterion in fairseq: its loss is the entmax package's, and it goes with sparse output mappings alone."""

import entmax as entmax_package
import pytest
import torch
from conftest import trained_parameters
from fairseq.logging import metrics
from test_criterions_chunked_cross_entropy import TIED, assert_same_gradients, criterion, losses_and_gradients

from multimax_fairseq.criterions.entmax_loss import EntmaxLossCriterion

PACKAGE = {
    "sparsemax": entmax_package.sparsemax_loss,
    "entmax15": entmax_package.entmax15_loss,
    "entmax": lambda scores, targets: entmax_package.entmax_bisect_loss(scores, targets, 1.2),
}
ALPHA = ["--entmax-alpha", "1.2"]


def words_of(built, sample):
    """Logits and targets of what is not padding, (words, V) and (words,), and the logits that smoothing sees."""
    pad = built.task.target_dictionary.pad()
    targets = sample["target"].reshape(-1)
    logits = built.model(**sample["net_input"])[0].flatten(0, 1)[targets != pad]
    return logits, targets[targets != pad], torch.cat([logits[:, :pad], logits[:, pad + 1 :]], 1)


@pytest.mark.parametrize("smoothing, mapping, arch, options", [
    (0.1, "sparsemax", "multimax_transformer_lm", []),
    (0.0, "entmax15", "multimax_transformer", TIED),
    (0.1, "entmax", "multimax_transformer_lm", TIED),
])  # fmt: skip
def test_loss_and_gradients_are_those_of_the_package(mapping, arch, options, smoothing, build, batch):
    built = build(arch, "--output-mapping", mapping, *ALPHA, *options)
    built.model.decoder.output_projection.bias = torch.nn.Parameter(torch.randn(len(built.task.target_dictionary)))
    sample = batch(built)
    sample["target"][0, -3:] = sample["target"][3, -1] = built.task.target_dictionary.pad()
    built.model.zero_grad()
    logits, targets, words = words_of(built, sample)
    plain = PACKAGE[mapping](logits, targets)
    losses = plain + smoothing * (logits.gather(1, targets.unsqueeze(1)).squeeze(1) - words.mean(1))
    losses.sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in trained_parameters(built.model)}
    options = ["--criterion", "entmax_loss", "--label-smoothing", smoothing, "--chunk-tokens", 50]
    loss, sample_size, log, actual = losses_and_gradients(built, sample, *options)
    assert loss.item() == pytest.approx(losses.sum().item(), rel=1e-5)
    assert log["plain_loss"].item() == pytest.approx(plain.sum().item(), rel=1e-5)
    assert_same_gradients(actual, gradients)
    p = built.model.decoder.output_mapping(logits)
    assert log["support"].item() == pytest.approx((p > 0).sum().item(), rel=1e-3)  # of ties rounding decides
    assert log["impossible"].item() == (p.gather(1, targets.unsqueeze(1)) == 0).sum()
    each = losses_and_gradients(built, sample, *options, reduce=False)[0]
    torch.testing.assert_close(each[sample["target"].reshape(-1) != 1], losses.detach(), atol=1e-5, rtol=1e-5)
    assert each.shape == sample["target"].reshape(-1).shape and sample_size == sample["ntokens"]


def test_a_learned_alpha_gets_the_gradient_of_differences(build, batch):
    built = build("multimax_transformer_lm", "--output-mapping", "entmax", "--entmax-alpha", "learned")
    built.model.double()
    sample, parameter = batch(built), built.model.decoder.output_mapping.alpha_logits
    options = ["--criterion", "entmax_loss"]
    gradient = losses_and_gradients(built, sample, *options)[3]["decoder.output_mapping.alpha_logits"].item()
    losses = []
    for step in (-1e-2, 1e-2):
        with torch.no_grad():
            parameter += step
            losses.append(losses_and_gradients(built, sample, *options)[0].item())
            parameter -= step
    assert gradient == pytest.approx((losses[1] - losses[0]) / 2e-2, rel=1e-3)


def test_what_is_logged_are_means_over_processes():
    outputs = [{"loss": 6.0, "plain_loss": 4.0, "impossible": 1.0, "support": 10.0, "ntokens": 4, "sample_size": 2},
               {"loss": 3.0, "plain_loss": 2.0, "impossible": 0.0, "support": 2.0, "ntokens": 2, "sample_size": 1}]
    with metrics.aggregate(new_root=True) as log:
        EntmaxLossCriterion.reduce_metrics(outputs)
    assert log.get_smoothed_values() == {"loss": 3.0, "plain_loss": 1.0, "impossible": 16.67, "support": 2.0}


@pytest.mark.parametrize("arch, output, name, message", [
    ("transformer", None, "entmax_loss", "this model has another one"),
    ("multimax_transformer", "softmax", "entmax_loss", "trains --output-mapping sparsemax, entmax15, entmax"),
    ("multimax_transformer_lm", "multimax", "entmax_loss", "another one: use --criterion chunked_cross_entropy"),
    ("multimax_transformer", "sparsemax", "cross_entropy", "sparsemax gives most words.*use --criterion entmax_loss"),
    ("multimax_transformer_lm", "entmax15", "label_smoothed_cross_entropy", "use --criterion entmax_loss"),
    ("multimax_transformer", "entmax", "chunked_cross_entropy", "use --criterion entmax_loss"),
])  # fmt: skip
def test_a_wrong_pair_says_which_to_take(arch, output, name, message, build, batch):
    built = build(arch, *(["--output-mapping", output] if output else []))
    built.model.train()
    with pytest.raises(ValueError, match=message):
        criterion(built, "--criterion", name)(built.model, batch(built))
