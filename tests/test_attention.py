"""``mapped_attention`` against ten lines of float64, as torch's own operators behave, and with mappings of one's own.

``ATTENTION_CASES=2000 pytest tests/test_attention.py -k random`` takes so many random cases.
"""

import math
import os
import random
import subprocess
import sys
from functools import partial

import entmax as package
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, needs_compiler
from torch import nn
from torch.autograd import forward_ad

from multimax_fairseq.attention import attend, mapped_attention
from multimax_fairseq.kernels import attention as kernels
from multimax_fairseq.kernels.attention import blocks
from multimax_fairseq.mappings import ABSENT, MAPPINGS, MultiMax, build_mapping, softmax
from multimax_fairseq.mappings.masking import probabilities_by

CASES = int(os.environ.get("ATTENTION_CASES", 60))
INF = math.inf


class Temperatures(nn.Module):
    """A mapping of one's own, written as one would: a temperature for each head."""

    def __init__(self, num_heads=1):
        super().__init__()
        self.log_temperature = nn.Parameter(torch.linspace(-0.3, 0.5, num_heads).view(-1, 1, 1))

    def forward(self, scores):
        return torch.softmax(scores * (-self.log_temperature).exp(), dim=-1)


class Sorts(nn.Module):
    """Sparsemax of scores times a buffer, as one would write it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("factor", torch.tensor(0.5))

    def forward(self, scores):
        scores = scores * self.factor
        ordered = scores.sort(dim=-1, descending=True).values
        count = torch.arange(1, scores.size(-1) + 1, dtype=scores.dtype)
        totals = ordered.cumsum(-1) - 1
        size = (count * ordered > totals).sum(-1, keepdim=True)
        return (scores - totals.gather(-1, size - 1) / size).clamp(min=0)


OWN = {"temperatures": Temperatures, "sorts": Sorts}
EVERY = [*MAPPINGS, *OWN]


def make(name, num_heads=1):
    if name in OWN:
        return Temperatures(num_heads) if name == "temperatures" else Sorts()
    options = {"entmax": {"alpha": "learned", "num_heads": num_heads}}
    mapping = build_mapping(name, **options.get(name, {})).eval()
    for parameter in mapping.parameters():
        nn.init.normal_(parameter, std=0.3)
    return mapping


@pytest.fixture(autouse=True)
def compiled(monkeypatch):
    monkeypatch.setenv("MULTIMAX_BACKEND", "auto")


# ---------------------------------------------------------------- the oracle


def oracle_rows(name, mapping, x):
    """Probabilities of rows, absent scores −inf, in the dtype of ``x``."""
    empty = (x == -INF).all(-1, keepdim=True)
    x = x.masked_fill(empty, 0.0)
    if name == "multimax":
        (b, d), (g, h) = mapping.thresholds.to(x.dtype).unbind(1), mapping.gains.to(x.dtype).unbind(1)
        y = x.masked_fill(x == -INF, 0.0)
        sigma = y + sum(g[n] * (b[n] - y).relu() ** (n + 1) + h[n] * (y - d[n]).relu() ** (n + 1) for n in range(len(b)))
        p = sigma.masked_fill(x == -INF, -INF).softmax(-1)
    elif name == "evsoftmax":
        there = x > -INF
        mean = x.masked_fill(~there, 0.0).sum(-1, keepdim=True) / there.sum(-1, keepdim=True)
        p = x.masked_fill(x < mean, -INF).softmax(-1)
    elif name in ("softmax", "temperatures"):
        factor = 1.0 if name == "softmax" else (-mapping.log_temperature).exp().to(x.dtype)
        p = (x.masked_fill(x == -INF, -1e9) * factor).softmax(-1).masked_fill(x == -INF, 0.0)
    elif name == "entmax":
        p = package.entmax_bisect(x, mapping.alpha.to(x.dtype).view(-1, 1, 1).expand(*x.shape[1:-1], 1), n_iter=60)
    else:
        function = package.entmax15 if name == "entmax15" else package.sparsemax
        p = function(x * 0.5 if name == "sorts" else x, dim=-1)
    return p.masked_fill(empty, 0.0)


def oracle(name, mapping, query, key, value, mask, causal, scale):
    scores = query @ key.mT * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -INF) if mask.dtype == torch.bool else scores + mask.to(scores.dtype)
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -INF)
    return oracle_rows(name, mapping, scores) @ value


def gradients(function, inputs, upstream):
    output = function(*inputs)
    return [output.detach(), *torch.autograd.grad(output, inputs, upstream.to(output.dtype), allow_unused=True)]


def random_case(draw):
    torch.manual_seed(draw.getrandbits(32))
    longest = draw.choice([3, 40, 40, 200, 700])
    batch, heads = draw.randint(1, 2), draw.randint(1, 3)
    tgt_len, src_len = draw.randint(1, longest), draw.randint(1, longest)
    tgt_len = src_len if draw.random() < 0.5 else tgt_len
    head_dim, value_dim = draw.randint(1, 160), draw.randint(1, 160)
    value_dim = head_dim if draw.random() < 0.7 else value_dim
    mask = None
    if draw.random() < 0.6:
        shape = [draw.choice([1, size]) for size in (batch, heads, tgt_len, src_len)][draw.randint(0, 3) :]
        mask = torch.rand(shape) > draw.choice([0.1, 0.5, 0.9])
        if draw.random() < 0.5:
            mask = torch.randn(shape).masked_fill(~mask, draw.choice([-INF, -1e4, 0.0]))

    def laid_out(length, dim):
        if draw.random() < 0.5:
            return torch.randn(length, batch, heads, dim).permute(1, 2, 0, 3)
        return torch.randn(batch, heads, length, dim)

    tensors = laid_out(tgt_len, head_dim), laid_out(src_len, head_dim), laid_out(src_len, value_dim)
    spread = draw.choice([0.3, 1.0, 3.0])
    return [tensors[0] * spread, *tensors[1:]], laid_out(tgt_len, value_dim), mask, draw.random() < 0.5


@pytest.mark.parametrize("number", range(CASES))
def test_random_cases(number):
    """No result and no gradient has more than twice the error of the same lines in the dtype of the inputs.

    Besides, for what is a difference of large sums, or jumps where rounding moves a score over a threshold.
    """
    draw = random.Random(number)
    name, dtype = EVERY[number % len(EVERY)], draw.choice([torch.float32, torch.float32, torch.bfloat16])
    tensors, upstream, mask, causal = random_case(draw)
    mapping = make(name, tensors[0].size(1))
    numbers = list(mapping.parameters())
    tensors = [tensor.to(dtype).requires_grad_() for tensor in tensors]
    wide = [tensor.detach().double().requires_grad_() for tensor in tensors]
    upstream, scale = upstream.to(dtype), tensors[0].size(-1) ** -0.5
    if mask is not None and mask.is_floating_point():
        mask = mask.masked_fill(mask < -9_000, -INF)

    def run(function, inputs):
        return gradients(lambda *given: function(*given[:3]), [*inputs, *numbers], upstream)

    exact = run(lambda q, k, v: oracle(name, mapping.double(), q, k, v, mask, causal, scale), wide)
    mapping.float()
    plain = run(lambda q, k, v: oracle(name, mapping, q, k, v, mask, causal, scale).to(dtype), tensors)
    ours = run(lambda q, k, v: mapped_attention(q, k, v, mapping, mask, is_causal=causal), tensors)
    floor = 2e-3 if name == "evsoftmax" else 2e-5
    for kind, a, b, right in zip(["output", "query", "key", "value", *"numbers"], ours, plain, exact):
        size = max(right.norm().item(), 1e-3 * exact[0].norm().item())
        error, usual = ((tensor.double() - right).norm().item() / (size + 1e-30) for tensor in (a, b))
        assert error <= 2 * usual + (10 * floor if kind == "n" else floor), (name, dtype, kind, error, usual)
