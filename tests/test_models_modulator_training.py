"""Modulators trained apart, by fairseq's own optimizers and schedulers, against arithmetic by hand and in fp32."""

import functools
import io
from types import SimpleNamespace

import fairseq.optim
import pytest
import torch
from conftest import PLUGIN, TINY, run
from fairseq.logging import metrics
from fairseq.optim.lr_scheduler import build_lr_scheduler

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


def test_an_update_without_layers_that_have_modulators_is_none_too_many(training):
    """Layer drop may leave out all of them."""
    built, optimizer = training("--modulator-clip-norm", "2")
    modulators, others = split(built.model)
    set_gradients(others, norm=3.0)
    assert optimizer.clip_grad_norm(1.0).item() == pytest.approx(3.0, rel=1e-4)
    getattr(modulators[0], modulator_training.MARK).check_applied()


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


# ---------------------------------------------------------------------- every precision, optimizer and scheduler

PRECISIONS = {
    "fp32": [],
    "amp": ["--amp"],
    "fp16": ["--fp16"],
    "fp16 in separate copies": ["--fp16", "--fp16-no-flatten-grads"],
    "fp16 without copies": ["--memory-efficient-fp16"],
    "bf16": ["--bf16"],
    "bf16 without copies": ["--memory-efficient-bf16"],
}
SCHEDULES = {
    "inverse_sqrt": ["--warmup-updates", "2"],
    "cosine": ["--max-update", "10", "--warmup-updates", "2"],
    "polynomial_decay": ["--total-num-update", "10", "--power", "2"],
    "reduce_lr_on_plateau": [],
    "fixed": ["--force-anneal", "1", "--lr-shrink", "0.5"],
}
OWN = ["--modulator-weight-decay", "0.1", "--modulator-clip-norm", "0.5", "--modulator-lr-scale", "10"]


@pytest.fixture
def trainer(build, monkeypatch):
    """trainer(precision, *options) → model, optimizer and scheduler as fairseq's trainer makes them.

    All weights have the same value in each dtype.
    """
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)  # for fairseq's flat copies

    def trainer(precision, *options, optimizer="adam", scheduler="fixed", decay=DECAY, lr=0.01):
        decays = [] if optimizer == "adafactor" else ["--weight-decay", str(decay)]
        built = build("multimax_transformer_lm", "--optimizer", optimizer, "--lr", lr, *decays, "--lr-scheduler",
                      scheduler, *SCHEDULES[scheduler], "--fp16-init-scale", 64, *PRECISIONS[precision],
                      *options)  # fmt: skip
        common = built.cfg.common
        is_half = common.fp16 or common.bf16
        for parameter in built.model.parameters():
            parameter.data = torch.where(parameter.abs() < 1e-3, 0, parameter.bfloat16().float())
        if is_half:
            built.model.to(torch.bfloat16 if common.bf16 else torch.float16)
        parameters = list(built.model.parameters())
        if common.memory_efficient_fp16 or common.memory_efficient_bf16:
            built.optimizer = fairseq.optim.MemoryEfficientFP16Optimizer.build_optimizer(built.cfg, parameters)
        elif is_half:
            built.optimizer = fairseq.optim.FP16Optimizer.build_optimizer(built.cfg, parameters)
        elif common.amp:
            built.optimizer = fairseq.optim.AMPOptimizer.build_optimizer(built.cfg, parameters)
        else:
            built.optimizer = fairseq.optim.build_optimizer(built.cfg.optimizer, parameters)
        built.scheduler = build_lr_scheduler(built.cfg.lr_scheduler, built.optimizer)
        built.scheduler.step_update(0)
        return built

    return trainer


def update(built, number):
    """One update with gradients that each dtype can hold; returns the norm that fairseq logs."""
    generator = torch.Generator().manual_seed(number)
    terms = []
    built.optimizer.zero_grad()
    for parameter in built.model.parameters():
        gradient = torch.randint(-8, 9, parameter.shape, generator=generator) / 8
        terms.append((parameter.float() * gradient).sum())
    built.optimizer.backward(sum(terms))
    built.optimizer.multiply_grads(0.5)
    norm = built.optimizer.clip_grad_norm(1.0)
    built.optimizer.step()
    built.scheduler.step_update(number)
    return norm.item()


def resumed(built, make):
    """What goes on from a checkpoint of ``built``."""
    file = io.BytesIO()
    torch.save([built.model.state_dict(), built.optimizer.state_dict(), built.scheduler.state_dict()], file)
    file.seek(0)
    weights, optimizer, scheduler = torch.load(file)
    new = make()
    new.model.load_state_dict(weights)  # in place, but copies in fp32 are made of what is there
    copies = getattr(new.optimizer, "fp32_params", [])
    if isinstance(copies, dict):
        (flat,) = copies.values()
        flat.data.copy_(torch.cat([p.detach().flatten() for p in new.optimizer.fp16_params]))
    else:
        for copy, parameter in zip(copies, new.model.parameters()):
            copy.data.copy_(parameter.detach())
    new.scheduler.load_state_dict(scheduler)
    new.optimizer.load_state_dict(optimizer, optimizer_overrides={})
    new.scheduler.step_update(1)
    return new


def weights(built):
    """Names to weights, in fp32 where the optimizer has such copies."""
    names = {id(parameter): name for name, parameter in built.model.named_parameters()}
    copies = getattr(built.optimizer, "fp32_params", None)
    if copies is None:
        return {name: parameter.detach().float().clone() for name, parameter in built.model.named_parameters()}
    parameters = built.optimizer.fp16_params
    if isinstance(copies, dict):
        (flat,) = copies.values()
        copies = [c.view_as(p) for c, p in zip(flat.split([p.numel() for p in parameters]), parameters)]
    return {names[id(p)]: copy.detach().clone() for p, copy in zip(parameters, copies)}


def train(make, is_interrupted=False):
    """Three updates, after the first of them a checkpoint: the weights, and the two norms in the log at the end."""
    built = make()
    for number in (1, 2, 3):
        with metrics.aggregate(new_root=True) as log:
            norm = update(built, number)
        if number == 1 and is_interrupted:
            built = resumed(built, make)
    return weights(built), norm, log.get_smoothed_values()["modulator_gnorm"]


@pytest.mark.parametrize("precision, is_interrupted", [
    ("fp32", True), ("amp", False), ("amp", True), ("fp16", False), ("fp16", True),
    ("fp16 in separate copies", False), ("fp16 in separate copies", True),
    ("fp16 without copies", False), ("fp16 without copies", True),
    ("bf16", False), ("bf16", True), ("bf16 without copies", False),
])  # fmt: skip
def test_every_precision_makes_the_updates_of_fp32(precision, is_interrupted, trainer):
    expected, *norms = train(functools.partial(trainer, "fp32", *OWN))
    actual, *actual_norms = train(functools.partial(trainer, precision, *OWN), is_interrupted)
    assert actual_norms == pytest.approx(norms, rel=2e-3) and norms[1] > 1
    dtype = torch.bfloat16 if "bf16" in precision else torch.float16 if "fp16" in precision else torch.float32
    has_copies = "without" not in precision and not is_interrupted
    for name, weight in expected.items():
        # fairseq rounds to half precision: each update without copies, and on resuming
        tolerance = 2e-7 + (0 if has_copies else 3 * torch.finfo(dtype).eps) * weight.abs().max().item()
        torch.testing.assert_close(actual[name], weight, atol=tolerance, rtol=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "fp16 in separate copies", "bf16 without copies"])
def test_a_checkpoint_holds_the_state_as_if_nothing_were_apart(precision, trainer, monkeypatch):
    """The state after a step is stock fairseq's, parameter by parameter: a run can go on with other options."""
    states = []
    for options in ([], OWN):
        with monkeypatch.context() as context:
            if not options:
                context.setattr(modulator_training.ModulatorTraining, "mark", lambda *_: None)
            built = trainer(precision, *options)
        terms = [(p.float() * (number + 1)).sum() for number, p in enumerate(built.model.parameters())]
        built.optimizer.backward(sum(terms) / 64)
        built.optimizer.step()
        states.append(built.optimizer.state_dict())
    stock, apart = states
    assert stock["state"].keys() == apart["state"].keys() and stock["param_groups"] == apart["param_groups"]
    for number, entry in stock["state"].items():
        for name, value in entry.items():
            torch.testing.assert_close(apart["state"][number][name], value, atol=0, rtol=0)
    for wanted in ([], OWN):  # and goes back to where it came from
        built = trainer(precision, *wanted)
        built.optimizer.load_state_dict(apart, optimizer_overrides={})
        again = built.optimizer.state_dict()
        assert again["param_groups"] == apart["param_groups"]
        for number, entry in apart["state"].items():
            for name, value in entry.items():
                torch.testing.assert_close(again["state"][number][name], value, atol=0, rtol=0)


def moved(trainer, precision, scale, updates=3, interrupted_after=None, **kwargs):
    """How far each weight has gone, and the learning rates that fairseq's log shows."""
    make = functools.partial(trainer, precision, *([] if scale == 1 else ["--modulator-lr-scale", scale]), **kwargs)
    built, rates = make(), []
    start = weights(built)
    for number in range(1, updates + 1):
        update(built, number)
        rates.append(built.optimizer.get_lr())
        if number == interrupted_after:
            built = resumed(built, make)
        built.scheduler.step(number, val_loss=1.0)  # the end of an epoch
    end = weights(built)
    return {name: end[name] - start[name] for name in start}, rates


# Where a step is as long as the gradient, of which clipping leaves little.
RATES = {"sgd": 1, "nag": 100, "adadelta": 10}


@pytest.mark.parametrize("precision, options", [
    *((precision, {"optimizer": optimizer, "scheduler": "inverse_sqrt"})
      for precision in ("fp32", "fp16", "fp16 in separate copies") for optimizer in ("adam", "sgd")),
    *(("fp32", {"optimizer": optimizer, "interrupted_after": 2})
      for optimizer in ("adagrad", "adadelta", "adamax", "nag", "adafactor")),
    *(("fp32", {"scheduler": scheduler, "interrupted_after": 1}) for scheduler in SCHEDULES),
])  # fmt: skip
def test_modulators_move_ten_times_as_far(precision, options, trainer):
    """In every precision, with every optimizer and every kind of schedule, and after resuming."""
    options = {"optimizer": "adam", "decay": 0, **options}
    options["lr"] = RATES.get(options["optimizer"], 0.01)
    moves, rates = moved(trainer, precision, 1, **options)
    scaled, scaled_rates = moved(trainer, precision, 10, **options)
    assert rates == scaled_rates
    assert any(".mapping." in name for name in moves)
    for name, move in moves.items():
        if ".mapping." in name:
            assert move.abs().mean() > 1e-4
            torch.testing.assert_close(scaled[name], 10 * move, atol=2e-6, rtol=1e-4)
        else:
            # the norm of the gradient, by which all is clipped, is a sum in another order
            torch.testing.assert_close(scaled[name], move, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("precision", ["fp16", "fp16 without copies"])
@pytest.mark.parametrize("site", ["modulator", "other"])
def test_a_scaled_gradient_that_is_not_finite_lowers_the_scale(site, precision, trainer):
    built = trainer(precision, "--modulator-clip-norm", "1")
    modulators, others = split(built.model)
    built.optimizer.zero_grad()
    built.optimizer.backward(sum(p.float().sum() for p in built.model.parameters()))
    (modulators if site == "modulator" else others)[0].grad.view(-1)[0] = float("inf")
    with pytest.raises(OverflowError, match="setting loss scale to: 32"):
        built.optimizer.clip_grad_norm(1.0)


def test_clipping_others_hard_does_not_make_modulators_overflow_without_copies(trainer):
    """A gradient of 400 scaled by 64 is half of what fp16 holds; clipping the others makes it 1/2000 of itself."""
    built = trainer("fp16 without copies", "--modulator-clip-norm", "0", optimizer="adamax", decay=0)
    modulators, others = split(built.model)
    built.optimizer.zero_grad()
    terms = [(400 * p.float()).sum() for p in modulators] + [(16 * p.float()).sum() for p in others]
    built.optimizer.backward(sum(terms))
    built.optimizer.clip_grad_norm(1.0)
    built.optimizer._unscale_grads()
    for parameter in modulators:
        torch.testing.assert_close(parameter.grad.float(), torch.full(parameter.shape, 400.0), rtol=2e-3, atol=0)
    norm = torch.cat([p.grad.float().flatten() for p in others]).norm().item()
    assert norm == pytest.approx(1.0, rel=0.01)


def test_composite(build):
    """Each of its optimizers takes its own modulators; they are clipped together."""
    from fairseq.optim.composite import FairseqCompositeOptimizer
    from omegaconf import OmegaConf

    built = build("multimax_transformer_lm", "--modulator-lr-scale", "10")
    group = {"optimizer": {"_name": "adam", "lr": [0.1], "adam_betas": "(0.9, 0.999)", "adam_eps": 1e-8,
                           "weight_decay": 0.0, "use_old_adam": False, "fp16_adam_stats": False, "tpu": False},
             "lr_scheduler": {"_name": "fixed", "force_anneal": None, "lr_shrink": 0.1, "warmup_updates": 0,
                              "lr": [0.1]},
             "lr": [0.1], "lr_float": None}  # fmt: skip
    for name, parameter in built.model.named_parameters():
        parameter.param_group = "layer0" if "layers.0" in name else "default"
    cfg = OmegaConf.create({"_name": "composite", "groups": {"layer0": group, "default": group}})
    optimizer = fairseq.optim.build_optimizer(cfg, list(built.model.parameters()))
    assert isinstance(optimizer, FairseqCompositeOptimizer)
    before = {name: parameter.detach().clone() for name, parameter in built.model.named_parameters()}
    set_gradients(list(built.model.parameters()), norm=1e4)
    with metrics.aggregate(new_root=True) as log:
        optimizer.clip_grad_norm(0.0)
    optimizer.step()
    assert 0 < log.get_smoothed_values()["modulator_gnorm"] < 1e4
    for name, parameter in built.model.named_parameters():
        rate = 1.0 if ".mapping." in name else 0.1
        expected = torch.full_like(parameter, rate)  # Adam's first step has the length of the rate
        torch.testing.assert_close((parameter.detach() - before[name]).abs(), expected, rtol=1e-3, atol=1e-5)


# ---------------------------------------------------------------------- where it cannot be


@pytest.mark.parametrize("flag, value, message", [
    ("--modulator-weight-decay", "-1", "finite number of at least 0; got -1.0"),
    ("--modulator-weight-decay", "inf", "finite number of at least 0; got inf"),
    ("--modulator-clip-norm", "nan", "finite number of at least 0; got nan"),
    ("--modulator-lr-scale", "0", "finite number above 0; got 0"),
    ("--modulator-lr-scale", "-3", "finite number above 0; got -3"),
])  # fmt: skip
def test_a_number_out_of_its_range_is_an_error(flag, value, message, build):
    with pytest.raises(ValueError, match=f"^{flag} takes a {message}"):
        build("multimax_transformer_lm", flag, value)


def test_a_config_files_null_or_text_is_an_error():
    for value in (None, "ten"):
        with pytest.raises(ValueError, match=f"--modulator-lr-scale takes a finite number above 0; got {value}"):
            modulator_training.ModulatorTraining.from_options(SimpleNamespace(modulator_lr_scale=value))


@pytest.mark.parametrize("option", ["--modulator-weight-decay", "--modulator-clip-norm", "--modulator-lr-scale"])
def test_an_optimizer_that_does_not_hold_the_modulators_is_an_error_at_the_second_update(option, build):
    """As with FSDP, whose parameters are others."""
    model = build("multimax_transformer", option, "2").model.train()
    model.set_num_updates(0)
    with pytest.raises(ValueError, match=f"^{option}: the optimizer .* drop sharding"):
        model.set_num_updates(1)


def test_models_without_modulators_and_of_fairseq_are_left_alone(training, build):
    for _, optimizer in [training(arch="transformer"), training("--attention-mapping", "sparsemax")]:
        assert not hasattr(optimizer.clip_grad_norm, "func") and len(optimizer.param_groups) == 1
    before = fairseq.optim.build_optimizer
    modulator_training.install()
    assert fairseq.optim.build_optimizer is before


def test_another_plugins_wrapper_is_not_taken_for_ours(monkeypatch):
    stock = fairseq.optim.build_optimizer.__wrapped__
    monkeypatch.setattr(fairseq.optim, "build_optimizer", functools.wraps(stock)(lambda *args: stock(*args)))
    theirs = fairseq.optim.build_optimizer
    modulator_training.install()
    assert fairseq.optim.build_optimizer.__wrapped__ is theirs


@pytest.mark.slow
def test_in_training(build, corpus, tmp_path):
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
    assert "cross_g_d" in result.stdout + result.stderr
    state = torch.load(tmp_path / "checkpoint_last.pt")["model"]
    names = [name for name in state if ".mapping." in name]
    start = build("multimax_transformer", seed=1).model.state_dict()  # the same seed: what training began with
    assert names
    for name in names:
        assert (state[name] - start[name]).abs().max() <= 4 * 0.01 * 1.1
    assert state["encoder.layers.0.fc1.weight"].abs().max() < 0.05
