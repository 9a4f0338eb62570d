"""--modulator-lr-scale 10: modulators move ten times as far, by fairseq's own optimizers and schedules."""

import pytest
import torch
from fairseq.optim import FP16Optimizer, build_optimizer
from fairseq.optim.lr_scheduler import build_lr_scheduler

from multimax_fairseq.mappings import MultiMax


@pytest.fixture
def trainer(build, monkeypatch):
    """trainer(scale, …) → model, optimizer and schedule, in the order in which fairseq makes them."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)  # for fairseq's flat copies

    def trainer(scale=1, optimizer="adam", precision="fp32", lr=0.01, schedule=("fixed",)):
        built = build("multimax_transformer_lm", "--optimizer", optimizer, "--lr", lr, "--lr-scheduler", *schedule,
                      "--fp16-init-scale", 64, "--modulator-lr-scale", scale)  # fmt: skip
        if precision == "fp32":
            built.optimizer = build_optimizer(built.cfg.optimizer, list(built.model.parameters()))
        else:
            built.cfg.common.fp16 = True
            built.optimizer = FP16Optimizer.build_optimizer(built.cfg, list(built.model.half().parameters()))
        built.schedule = build_lr_scheduler(built.cfg.lr_scheduler, built.optimizer)
        built.schedule.step_update(0)
        return built

    return trainer


def numbers(built):
    """By name, as σ uses them, in fp32 where the optimizer has such copies."""
    values = dict(built.model.named_parameters())
    copies = getattr(built.optimizer, "fp32_params", None)
    if copies is not None:
        (flat,) = copies.values()
        values = dict(zip(values, flat.split([parameter.numel() for parameter in built.optimizer.fp16_params])))
    scales = {f"{name}.{kind}": m.lr_scale for name, m in built.model.named_modules() if isinstance(m, MultiMax)
              for kind in ("thresholds", "gains")}  # fmt: skip
    return {name: (value.detach().float() * scales.get(name, 1)).flatten() for name, value in values.items()}


def moves(built, updates):
    """How far all numbers go, and what --clip-norm sees, with gradients that do not depend on where they are."""
    start, norms = numbers(built), []
    for number in range(1, 1 + updates):
        generator, terms = torch.Generator().manual_seed(number), []
        for module in built.model.modules():
            own = module.coefficients() if isinstance(module, MultiMax) else module.parameters(recurse=False)
            factors = (torch.randint(-8, 9, tensor.shape, generator=generator) / 8 for tensor in own)
            terms += [(tensor.float() * factor).sum() for tensor, factor in zip(own, factors)]
        built.optimizer.zero_grad()
        built.optimizer.backward(sum(terms))
        norms.append(built.optimizer.clip_grad_norm(1.0).item())
        built.optimizer.step()
        built.schedule.step_update(number)
    end = numbers(built)
    return {name: end[name] - start[name] for name in start}, norms


@pytest.mark.parametrize("options, updates", [
    ({"optimizer": "sgd", "lr": 0.05}, 1), ({"precision": "fp16"}, 1),
    ({"schedule": ("cosine", "--max-update", 400, "--warmup-updates", 2)}, 100),
], ids=str)  # fmt: skip
def test_every_optimizer_precision_and_schedule(options, updates, trainer):
    (plain, norms), (scaled, other_norms) = (moves(trainer(scale, **options), updates) for scale in (1, 10))
    assert other_norms == pytest.approx(norms, rel=1e-3)
    assert any(".mapping." in name for name in plain)
    for name, move in plain.items():
        factor = 10 if ".mapping." in name else 1
        torch.testing.assert_close(scaled[name], factor * move, atol=1e-6, rtol=1e-4)
