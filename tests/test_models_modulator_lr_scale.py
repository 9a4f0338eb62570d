"""--modulator-lr-scale 10: modulators move ten times as far, by fairseq's own optimizers and schedules."""

import io

import fairseq.optim
import pytest
import torch
from fairseq.optim.lr_scheduler import build_lr_scheduler

from multimax_fairseq.mappings import MultiMax

PRECISIONS = {
    "fp32": [],
    "fp16": ["--fp16"],
    "fp16 without copies": ["--memory-efficient-fp16"],
}


@pytest.fixture
def trainer(build, monkeypatch):
    """trainer(precision, scale, …) → model, optimizer and schedule, in the order in which fairseq makes them."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)  # for fairseq's flat copies

    def trainer(precision="fp32", scale=1, optimizer="adam", schedule=("fixed",), lr=0.01, saved=None):
        built = build("multimax_transformer_lm", "--optimizer", optimizer, "--lr", lr, "--lr-scheduler", *schedule,
                      "--fp16-init-scale", 64, *PRECISIONS[precision],
                      "--modulator-lr-scale", scale)  # fmt: skip
        if saved is not None:
            saved.seek(0)
            weights, state = torch.load(saved)
            built.model.load_state_dict(weights)
        parameters = list((built.model.half() if precision != "fp32" else built.model).parameters())
        if precision == "fp32":
            built.optimizer = fairseq.optim.build_optimizer(built.cfg.optimizer, parameters)
        else:
            kind = "FP16Optimizer" if precision == "fp16" else "MemoryEfficientFP16Optimizer"
            built.optimizer = getattr(fairseq.optim, kind).build_optimizer(built.cfg, parameters)
        if saved is not None:
            built.optimizer.load_state_dict(state, optimizer_overrides={})
        built.schedule = build_lr_scheduler(built.cfg.lr_scheduler, built.optimizer)
        built.schedule.step_update(0)
        return built

    return trainer


def update(built, number):
    """One update of all parameters, whose gradients do not depend on where they are."""
    generator, terms = torch.Generator().manual_seed(number), []
    for module in built.model.modules():
        own = module.coefficients() if isinstance(module, MultiMax) else module.parameters(recurse=False)
        for tensor in own:
            terms.append((tensor.float() * torch.randint(-8, 9, tensor.shape, generator=generator) / 8).sum())
    built.optimizer.zero_grad()
    built.optimizer.backward(sum(terms))
    norm = built.optimizer.clip_grad_norm(1.0)
    built.optimizer.step()
    built.schedule.step_update(number)
    return norm.item()


def numbers(built):
    """All of them by name, as σ uses them, in fp32 where the optimizer has such copies."""
    values = dict(built.model.named_parameters())
    copies = getattr(built.optimizer, "fp32_params", None)
    if copies is not None:
        (flat,) = copies.values()
        values = dict(zip(values, flat.split([parameter.numel() for parameter in built.optimizer.fp16_params])))
    scales = {f"{name}.{kind}": m.lr_scale for name, m in built.model.named_modules() if isinstance(m, MultiMax)
              for kind in ("thresholds", "gains")}  # fmt: skip
    return {name: (value.detach().float() * scales.get(name, 1)).flatten() for name, value in values.items()}


def moves(built, updates, first=1):
    start = numbers(built)
    norms = [update(built, number) for number in range(first, first + updates)]
    end = numbers(built)
    return {name: end[name] - start[name] for name in start}, norms


def assert_ten_times(scaled, plain, is_half=False):
    assert scaled[1] == pytest.approx(plain[1], rel=1e-3)  # what --clip-norm sees
    assert any(".mapping." in name for name in plain[0])
    for name, move in plain[0].items():
        factor = 10 if ".mapping." in name else 1
        # without copies fairseq rounds every number to fp16: weights of 1, and modulators of some 0.02
        tolerance = (3e-4 if factor == 10 else 1e-3) if is_half else 1e-6
        torch.testing.assert_close(scaled[0][name], factor * move, atol=tolerance, rtol=1e-4)


@pytest.mark.parametrize("optimizer, precision", [
    (optimizer, precision) for optimizer in ("sgd", "adam") for precision in PRECISIONS
    if (optimizer, precision) != ("sgd", "fp16 without copies")  # fairseq has no such pair
])  # fmt: skip
def test_the_first_update_in_every_precision(optimizer, precision, trainer):
    plain, scaled = (moves(trainer(precision, scale, optimizer, lr=0.05), 1) for scale in (1, 10))
    assert_ten_times(scaled, plain, is_half="without" in precision)


def test_two_hundred_updates_with_a_schedule(trainer):
    schedule = "cosine", "--max-update", 400, "--warmup-updates", 2
    plain, scaled = (moves(trainer(scale=scale, schedule=schedule), 200) for scale in (1, 10))
    assert_ten_times(scaled, plain)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_going_on_with_another_scale(precision, trainer):
    built, saved = trainer(precision), io.BytesIO()
    moves(built, 3)
    torch.save([built.model.state_dict(), built.optimizer.state_dict()], saved)
    plain, scaled = (trainer(precision, scale, saved=saved) for scale in (1, 10))
    for name, value in numbers(plain).items():  # as the checkpoint has them, in the copies, too
        tolerance = {"atol": 1e-8, "rtol": 1e-6} if precision == "fp32" else {"atol": 1e-6, "rtol": 1e-3}
        torch.testing.assert_close(numbers(scaled)[name], value, **tolerance)
    assert_ten_times(moves(scaled, 3, first=4), moves(plain, 3, first=4))
