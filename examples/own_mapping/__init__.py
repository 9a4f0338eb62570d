"""Three mappings of our own, for ``fairseq-train --user-dir examples/own_mapping``."""

import torch
from torch import Tensor, nn

import multimax_fairseq.models  # noqa: F401  its architectures and options
from multimax_fairseq.mappings import register_mapping, softmax


@register_mapping("topk_softmax")
class TopKSoftmax(nn.Module):
    """Softmax over the k largest scores of a row; the others get 0."""

    def __init__(self, k: int = 8):
        super().__init__()
        if k < 1:
            raise ValueError(f"topk_softmax takes k from 1; got {k}")
        self.k = k

    def forward(self, scores: Tensor) -> Tensor:
        kept = scores.topk(min(self.k, scores.size(-1)), dim=-1)
        return torch.zeros_like(scores).scatter(-1, kept.indices, softmax(kept.values))


@register_mapping("temperatures")
class Temperatures(nn.Module):
    """Softmax with a learned temperature for each head."""

    def __init__(self, num_heads: int = 1):
        super().__init__()
        self.log_temperature = nn.Parameter(torch.zeros(num_heads, 1, 1))

    def forward(self, scores: Tensor) -> Tensor:
        return torch.softmax(scores * (-self.log_temperature).exp(), dim=-1)


@register_mapping("softmax_plus_one")
class SoftmaxPlusOne(nn.Module):
    """exp(x_i) / (1 + Σ exp(x_k)): softmax beside a score of 0 that belongs to no key, so a row may say nothing.

    Source: Miller, *Attention Is Off By One*, 2023.
    """

    def forward(self, scores: Tensor) -> Tensor:
        return softmax(nn.functional.pad(scores, (0, 1)))[..., :-1]
