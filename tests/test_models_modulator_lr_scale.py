"""--modulator-lr-scale 10: modulators move ten times as far, by fairseq's own optimizers and schedules."""

import pytest
import torch
from fairseq.optim import FP16Optimizer, build_optimizer
from fairseq.optim.lr_scheduler import build_lr_scheduler

from multimax_fairseq.mappings import MultiMax


def numbers(model, optimizer):
    """By name, as σ uses them, in fp32 where the optimizer has such copies."""
    values = dict(model.named_parameters())
    if isinstance(optimizer, FP16Optimizer):
        (flat,) = optimizer.fp32_params.values()
        values = dict(zip(values, flat.split([parameter.numel() for parameter in optimizer.fp16_params])))
    scales = {f"{name}.{kind}": m.lr_scale for name, m in model.named_modules() if isinstance(m, MultiMax)
              for kind in ("thresholds", "gains")}  # fmt: skip
    return {name: (value.detach().float() * scales.get(name, 1)).flatten() for name, value in values.items()}


def moves(build, scale, updates, *options):
    """How far all numbers go, and what --clip-norm sees, with gradients that do not depend on where they are."""
    built = build("multimax_transformer_lm", "--fp16-init-scale", 64, "--modulator-lr-scale", scale, *options)
    if built.cfg.common.fp16:
        optimizer = FP16Optimizer.build_optimizer(built.cfg, list(built.model.half().parameters()))
    else:
        optimizer = build_optimizer(built.cfg.optimizer, list(built.model.parameters()))
    schedule = build_lr_scheduler(built.cfg.lr_scheduler, optimizer)
    schedule.step_update(0)
    start, norms = numbers(built.model, optimizer), []
    for number in range(1, 1 + updates):
        generator, terms = torch.Generator().manual_seed(number), []
        for module in built.model.modules():
            own = module.coefficients() if isinstance(module, MultiMax) else module.parameters(recurse=False)
            factors = (torch.randint(-8, 9, tensor.shape, generator=generator) / 8 for tensor in own)
            terms += [(tensor.float() * factor).sum() for tensor, factor in zip(own, factors)]
        optimizer.zero_grad()
        optimizer.backward(sum(terms))
        norms.append(optimizer.clip_grad_norm(1.0).item())
        optimizer.step()
        schedule.step_update(number)
    end = numbers(built.model, optimizer)
    return {name: end[name] - start[name] for name in start}, norms


@pytest.mark.parametrize("options, updates", [
    ("--optimizer sgd --lr 0.05 --lr-scheduler fixed", 1),
    ("--optimizer adam --lr 0.01 --lr-scheduler fixed --fp16", 1),
    ("--optimizer adam --lr 0.01 --lr-scheduler cosine --max-update 400 --warmup-updates 2", 100),
])  # fmt: skip
def test_every_optimizer_precision_and_schedule(options, updates, build, monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)  # for fairseq's flat copies
    (plain, norms), (scaled, other_norms) = (moves(build, scale, updates, *options.split()) for scale in (1, 10))
    assert other_norms == pytest.approx(norms, rel=1e-3)
    assert any(".mapping." in name for name in plain)
    for name, move in plain.items():
        factor = 10 if ".mapping." in name else 1
        torch.testing.assert_close(scaled[name], factor * move, atol=1e-6, rtol=1e-4)
