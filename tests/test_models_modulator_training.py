"""Modulators with their own weight decay and clip, by fairseq's own optimizers, against arithmetic by hand."""

import fairseq.optim
import pytest
import torch
from conftest import PLUGIN, TINY, parse, run
from fairseq.logging import metrics
from fairseq.optim import FP16Optimizer

from multimax_fairseq.models import modulator_training
from multimax_fairseq.models.mapped_model import modulators_by_site

LR, DECAY = 0.1, 0.5


@pytest.fixture
def training(build):
    """training(*options) → a model, and the optimizer that fairseq's trainer builds for it, by name."""

    def training(*options, optimizer="adam", arch="multimax_transformer"):
        decay = [] if optimizer == "adafactor" else ["--weight-decay", str(DECAY)]
        built = build(arch, "--optimizer", optimizer, "--lr", str(LR), *decay, *options)
        return built, fairseq.optim.build_optimizer(built.cfg.optimizer, list(built.model.parameters()))

    return training


def split(model):
    """The parameters of modulators, and the others."""
    modulators = [p for group in modulators_by_site(model).values() for m in group for p in m.parameters()]
    identities = set(map(id, modulators))
    return modulators, [p for p in model.parameters() if id(p) not in identities]


def set_gradients(parameters, norm):
    """Random gradients of which all together have this norm."""
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(p.shape, generator=generator) for p in parameters]
    total = torch.cat([g.flatten() for g in gradients]).norm()
    for parameter, gradient in zip(parameters, gradients):
        parameter.grad = gradient * norm / total


def norm_of(parameters):
    return torch.cat([p.grad.flatten() for p in parameters]).norm().item()


# ---------------------------------------------------------------------- weight decay


@pytest.mark.parametrize("options, decay", [([], DECAY), (["--modulator-weight-decay", "0"], 0),
                                            (["--modulator-weight-decay", "0.2"], 0.2)])  # fmt: skip
@pytest.mark.parametrize("name, arch", [("adam", "multimax_transformer"), ("adam", "multimax_transformer_lm"),
                                        ("sgd", "multimax_transformer")])  # fmt: skip
def test_without_a_gradient_only_decay_moves_parameters(name, arch, options, decay, training):
    """Adam and SGD without momentum both take p to (1 − lr · decay) · p then."""
    built, optimizer = training(*options, optimizer=name, arch=arch)
    modulators, others = split(built.model)
    assert modulators and others
    before = [[p.detach().clone() for p in group] for group in (modulators, others)]
    for parameter in built.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for group, values, factor in zip((modulators, others), before, (1 - LR * decay, 1 - LR * DECAY)):
        for parameter, value in zip(group, values):
            torch.testing.assert_close(parameter.detach(), value * factor)


def test_the_learning_rate_is_everyones(training):
    built, optimizer = training("--modulator-weight-decay", "0")
    optimizer.set_lr(0.03)
    assert [group["lr"] for group in optimizer.param_groups] == [0.03, 0.03]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(built.model.parameters()))


def test_the_state_of_the_optimizer_is_saved_and_loaded(training):
    """Two steps are the same as a step, a checkpoint and a step.

    Of a language model: on loading, fairseq 0.12.2's encoder layers make some parameters anew from the others.
    """
    options = ["--modulator-weight-decay", "0", "--modulator-clip-norm", "0.5"]
    results = []
    for is_interrupted in (False, True):
        built, optimizer = training(*options, arch="multimax_transformer_lm")
        for step in range(2):
            set_gradients(list(built.model.parameters()), norm=1.0 + step)
            optimizer.step()
            if is_interrupted and step == 0:
                state, weights = optimizer.state_dict(), built.model.state_dict()
                built, optimizer = training(*options, arch="multimax_transformer_lm")
                built.model.load_state_dict(weights)
                optimizer.load_state_dict(state, optimizer_overrides={})
        results.append(dict(built.model.named_parameters()))
    for name, tensor in results[0].items():
        torch.testing.assert_close(results[1][name], tensor, atol=0, rtol=0)


def test_an_optimizer_without_weight_decay_says_so(training):
    """All of fairseq's have it; one of a user's own need not."""
    built, optimizer = training()
    del optimizer.optimizer.defaults["weight_decay"]
    modulators, _ = split(built.model)
    modulator_training.ModulatorTraining(weight_decay=0.0).mark(modulators)
    with pytest.raises(ValueError, match="--modulator-weight-decay: FairseqAdam has no weight decay"):
        modulator_training.separate_modulators(optimizer)


# ---------------------------------------------------------------------- clipping


@pytest.mark.parametrize("clip, modulators_after", [("0", 8.0), ("2", 2.0), ("10", 8.0)])
@pytest.mark.parametrize("max_norm, others_after", [(0.0, 3.0), (1.0, 1.0), (5.0, 3.0)])
def test_modulators_and_others_are_clipped_apart(clip, modulators_after, max_norm, others_after, training):
    built, optimizer = training("--modulator-clip-norm", clip)
    modulators, others = split(built.model)
    set_gradients(modulators, norm=8.0)
    set_gradients(others, norm=3.0)
    assert optimizer.clip_grad_norm(max_norm).item() == pytest.approx(3.0, rel=1e-4)
    assert norm_of(modulators) == pytest.approx(modulators_after, rel=1e-4)
    assert norm_of(others) == pytest.approx(others_after, rel=1e-4)


def test_by_default_all_are_clipped_together(training):
    built, optimizer = training()
    modulators, others = split(built.model)
    set_gradients(modulators, norm=4.0)
    set_gradients(others, norm=3.0)
    assert optimizer.clip_grad_norm(1.0).item() == pytest.approx(5.0, rel=1e-4)
    assert norm_of(modulators) == pytest.approx(0.8, rel=1e-4) and norm_of(others) == pytest.approx(0.6, rel=1e-4)


@pytest.mark.parametrize("options", [[], ["--modulator-clip-norm", "1"]])
def test_the_norm_before_clipping_is_logged(options, training):
    built, optimizer = training(*options)
    modulators, others = split(built.model)
    set_gradients(modulators, norm=8.0)
    set_gradients(others, norm=3.0)
    with metrics.aggregate(new_root=True) as log:
        optimizer.clip_grad_norm(1.0)
    assert log.get_smoothed_values()["modulator_gnorm"] == pytest.approx(8.0, rel=1e-3)


def test_a_gradient_that_is_not_finite_is_not_hidden_from_fairseq(training):
    built, optimizer = training("--modulator-clip-norm", "1")
    modulators, others = split(built.model)
    set_gradients(others, norm=3.0)
    set_gradients(modulators, norm=1.0)
    modulators[0].grad[0, 0] = float("nan")
    assert not optimizer.clip_grad_norm(1.0).isfinite()


# ---------------------------------------------------------------------- where it cannot be


@pytest.mark.parametrize("flag", ["--modulator-weight-decay", "--modulator-clip-norm"])
def test_a_negative_number_is_an_error(flag, build):
    with pytest.raises(ValueError, match=f"{flag} takes a number of at least 0"):
        build("multimax_transformer_lm", flag, "-1")


def test_copies_in_half_precision_are_an_error_at_the_second_update(build):
    built = build("multimax_transformer", "--optimizer", "adam", "--lr", "0.1", "--bf16",
                  "--modulator-clip-norm", "1")  # fmt: skip
    FP16Optimizer.build_optimizer(built.cfg, [p.bfloat16() for p in built.model.parameters()])
    model = built.model.train()
    model.set_num_updates(0)
    with pytest.raises(ValueError, match="do not go with --fp16, --bf16"):
        model.set_num_updates(1)
    plain = build("multimax_transformer").model.train()
    plain.set_num_updates(0)
    plain.set_num_updates(1)


def test_models_without_modulators_and_of_fairseq_are_left_alone(training, build):
    for _, optimizer in [training(arch="transformer"), training("--attention-mapping", "sparsemax")]:
        assert not hasattr(optimizer.clip_grad_norm, "func") and len(optimizer.param_groups) == 1
    before = fairseq.optim.build_optimizer
    modulator_training.install()
    assert fairseq.optim.build_optimizer is before


@pytest.mark.slow
def test_in_training(corpus, tmp_path):
    """With a decay that takes every other parameter to nearly 0, modulators stay about where their gradient takes
    them: lr · updates at most."""
    command = ["fairseq-train", corpus / "data-bin", "--user-dir", PLUGIN, "--arch", "multimax_transformer", *TINY,
               "--optimizer", "adam", "--lr", "0.01", "--weight-decay", "90", "--max-tokens", "1000",
               "--max-update", "4", "--num-workers", "0", "--log-format", "json", "--log-interval", "1",
               "--cpu", "--clip-norm", "1",
               "--modulator-weight-decay", "0", "--modulator-clip-norm", "1", "--disable-validation",
               "--save-dir", tmp_path]  # fmt: skip
    result = run(*command)
    assert "modulator_gnorm" in result.stdout + result.stderr
    assert "cross_1_g_d2" in result.stdout + result.stderr
    state = torch.load(tmp_path / "checkpoint_last.pt")["model"]
    names = [name for name in state if ".mapping." in name]
    start = parse([*map(str, command[1:])])  # the same seed: the modulators that training began with
    from fairseq import tasks

    torch.manual_seed(start[1].common.seed)
    model = tasks.setup_task(start[1].task).build_model(start[1].model)
    assert names
    for name in names:
        assert (state[name] - model.state_dict()[name]).abs().max() <= 4 * 0.01 * 1.1
    assert state["encoder.layers.0.fc1.weight"].abs().max() < 0.05
