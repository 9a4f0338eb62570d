"""The formula of MultiMax block by block: what autograd makes of it, in a fraction of the time and memory.

Left to autograd, σ takes some sixty passes over the scores, forward and backward, and keeps a dozen tensors of their
size. Here the scores are taken in blocks of rows that stay in a core's cache for all of these passes, the backward is
written by hand, and what is kept is the scores and the result. With u = ∂L/∂σ, and sums over all scores::

    ∂L/∂x     = u · (1 − Σ_n n g_b,n max(b_n − x, 0)^(n−1) [x < b_n] + Σ_n n g_d,n max(x − d_n, 0)^(n−1) [x > d_n])
    ∂L/∂g_b,n = Σ u · max(b_n − x, 0)^n            ∂L/∂b_n =   Σ u · n g_b,n max(b_n − x, 0)^(n−1) [x < b_n]
    ∂L/∂g_d,n = Σ u · max(x − d_n, 0)^n            ∂L/∂d_n = − Σ u · n g_d,n max(x − d_n, 0)^(n−1) [x > d_n]
"""

import math
from itertools import product
from typing import Callable, Iterator, Optional, Tuple

import torch
from torch import Tensor
from torch.autograd import Function

from .masking import compute_dtype, is_absent, masked_softmax

# Scores in a block on the CPU: 512 KiB in fp32. What is touched at a time, three tensors of that size, fits into a
# cache of 2 MiB. An accelerator has no use for blocks: there, one launch beats many.
BLOCK_SIZE = 2**17


class BlockedMultiMax(Function):
    """``formula(scores, thresholds, gains)`` over the last dimension: softmax of σ, or σ itself.

    Args of ``apply``:
        scores, thresholds, gains: as in :func:`.multimax.multimax`; a gradient for each.
        formula: the same in plain torch, for gradients of gradients.
        normalise: whether ``formula`` ends in softmax.
    """

    @staticmethod
    def forward(
        ctx, scores: Tensor, thresholds: Tensor, gains: Tensor, formula: Callable[..., Tensor], normalise: bool
    ) -> Tensor:
        result = torch.empty_like(scores, memory_format=torch.contiguous_format)
        for scores_block, result_block in _blocks(scores, result):
            x, absent = _filled(scores_block)
            modulated = _modulate(x, thresholds.to(x.dtype), gains.to(x.dtype))
            if normalise:
                result_block.copy_(masked_softmax(modulated, absent, dim=-1))
            else:
                result_block.copy_(modulated.masked_fill_(absent, float("-inf")))
        ctx.formula, ctx.normalise = formula, normalise
        ctx.save_for_backward(scores, thresholds, gains, result if normalise else None)
        return result

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        scores, thresholds, gains, probabilities = ctx.saved_tensors
        if torch.is_grad_enabled():
            return (*_differentiable_backward(ctx, grad), None, None)

        dtype = compute_dtype(scores.dtype)
        parameters = thresholds.to(dtype), gains.to(dtype)
        grad_scores = torch.empty_like(scores, memory_format=torch.contiguous_format)
        grad_thresholds = torch.zeros_like(thresholds, dtype=dtype)
        grad_gains = torch.zeros_like(gains, dtype=dtype)
        # σ has no probabilities; the scores hold their place
        blocks = _blocks(scores, grad, grad_scores, scores if probabilities is None else probabilities)
        for scores_block, grad_block, out_block, p in blocks:
            x, absent = _filled(scores_block)
            grad_block = grad_block.to(dtype)
            if ctx.normalise:
                p = p.to(dtype)  # 0 where a score is absent, and so is what it is multiplied into
                upstream = (grad_block - (grad_block * p).sum(-1, keepdim=True)).mul_(p)
            else:
                upstream = grad_block.masked_fill(absent, 0.0)
            out_block.copy_(_modulate_backward(x, upstream, *parameters, grad_thresholds, grad_gains))
        return grad_scores, grad_thresholds.to(thresholds.dtype), grad_gains.to(gains.dtype), None, None


def _blocks(*tensors: Tensor) -> Iterator[Tuple[Tensor, ...]]:
    """Matching blocks of rows, (rows, last dimension), of tensors of one shape."""
    *leading, width = tensors[0].shape
    height = math.prod(leading)
    if height * width == 0:
        return iter(())
    count = max(BLOCK_SIZE // width, 1) if tensors[0].device.type == "cpu" else height
    return zip(*(tensor.reshape(height, width).split(count) for tensor in tensors))


def _filled(scores: Tensor) -> Tuple[Tensor, Tensor]:
    """Finite scores in the dtype to compute in, 0 where a score is absent; and where that is."""
    x = scores.to(compute_dtype(scores.dtype))
    absent = is_absent(x)
    return x.masked_fill(absent, 0.0), absent


def _excess(x: Tensor, threshold: Tensor, side: int) -> Tensor:
    """max(b − x, 0) on side 0 (below), max(x − d, 0) on side 1 (above)."""
    return (x - threshold if side else threshold - x).clamp_(min=0)


def _modulate(x: Tensor, thresholds: Tensor, gains: Tensor) -> Tensor:
    """σ of finite scores."""
    modulated = x.clone()
    for row, side in product(range(len(gains)), (0, 1)):
        power = _excess(x, thresholds[row, side], side)
        if row:
            power.pow_(row + 1)
        modulated.addcmul_(power, gains[row, side])
    return modulated


def _modulate_backward(
    x: Tensor, upstream: Tensor, thresholds: Tensor, gains: Tensor, grad_thresholds: Tensor, grad_gains: Tensor
) -> Tensor:
    """∂L/∂x of finite scores from ∂L/∂σ; adds to the gradients of thresholds and gains in place."""
    grad_x = upstream.clone()
    for row, side in product(range(len(gains)), (0, 1)):
        n, gain, sign = row + 1, gains[row, side], 1 if side else -1
        excess = _excess(x, thresholds[row, side], side)
        # u · n max(·, 0)^(n−1) [· > 0]
        slope = upstream.masked_fill(excess == 0, 0.0) if n == 1 else excess.pow(n - 1).mul_(upstream).mul_(n)
        grad_gains[row, side] += torch.dot(slope.flatten(), excess.flatten()) / n
        grad_thresholds[row, side] -= sign * gain * slope.sum()
        grad_x.addcmul_(slope, gain, value=sign)
    return grad_x


def _differentiable_backward(ctx, grad: Tensor) -> Iterator[Optional[Tensor]]:
    """The gradients as autograd has them from the formula, which it can differentiate again."""
    inputs, needed = ctx.saved_tensors[:3], ctx.needs_input_grad[:3]
    wanted = [tensor for tensor, is_needed in zip(inputs, needed) if is_needed]
    gradients = iter(torch.autograd.grad(ctx.formula(*inputs), wanted, grad, create_graph=True))
    return (next(gradients) if is_needed else None for is_needed in needed)
