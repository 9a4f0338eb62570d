"""What a score of −inf means, in one place.

A score of −inf is *not there*: its probability is exactly 0, its gradient is exactly 0 and it takes no part in
any statistic of its row. A row of nothing but −inf gives zeros.

Mappings keep that contract by the same three steps: *fill* the absent scores with something harmless, compute,
and *refill*. One ``torch.where`` at the end is not enough: the branch that is thrown away still sends NaN back
through the gradient, because 0 · inf is NaN. For a mapping of one's own, :func:`probabilities_by` does so.
"""

import itertools
from typing import Callable, Tuple

import torch
from torch import Tensor, nn

from ..kernels.rows import rows_of
from ..kernels.rows.mapped import map_rows
from ..kernels.scores import HALF, compute_dtype, is_absent

# fairseq's encoder layers and some models built on it mask with finite numbers: −1e4 in half precision (which
# bfloat16 rounds to −9984), −1e8 in single. No real bias comes near: the steepest ALiBi slope, 1/2, reaches
# −4096 over 8,192 tokens.
FINITE_MASK = -9e3

# What a mapping of one's own gets in place of −inf: exp of it is 0, and 0 times it, also squared, is 0.
ABSENT = -1e15


def additive_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Turns a mask in any of fairseq's conventions into one to add to scores, −inf where a key is hidden.

    Args:
        mask: bool or uint8 (true: hidden), or floating point to be added to the scores, where numbers at or
            below ``FINITE_MASK`` (fairseq's −1e4 and −1e8) hide a key as −inf does. σ is quadratic, so a finite
            mask left as it is can come out as the largest score of all.
        dtype: dtype of the scores.

    Returns:
        ``dtype``, the shape of ``mask``.
    """
    if not mask.is_floating_point():
        return torch.zeros_like(mask, dtype=dtype).masked_fill(mask.bool(), float("-inf"))
    return mask.to(dtype).masked_fill(mask <= FINITE_MASK, float("-inf"))


def probabilities_by(mapping: nn.Module) -> Callable[[Tensor], Tensor]:
    """``mapping`` as a function of scores: :func:`function_of` with its tensors."""
    function, tensors = function_of(mapping)
    is_half = any(tensor.dtype in HALF for tensor in itertools.chain(mapping.parameters(), mapping.buffers()))
    return (lambda scores: function(scores, *tensors)) if is_half else function


def function_of(mapping: nn.Module) -> Tuple[Callable[..., Tensor], Tuple[Tensor, ...]]:
    """``mapping`` as function(scores, *tensors), which keeps the contract of this file; and its tensors.

    Without tensors the function takes the mapping's own as they are.

    Mappings of this package are called as they are. So are those derived from one, or made of one: they have to deal
    with −inf. Any other module gets ``ABSENT`` in place of −inf, so that the gradients of its own parameters are
    numbers; what it gives to absent scores is replaced by 0. It computes in fp32 at least: tensors in half precision
    become fp32 once, here, so that their gradients are summed in fp32. A row without scores gets zeros.
    """
    rows = rows_of(mapping)
    if rows is not None:
        numbers = tuple(number.float() if number.dtype in HALF else number for number in rows.numbers)
        return lambda scores, *other: map_rows(rows._replace(numbers=other or rows.numbers), scores), numbers
    takes_infinities = any(hasattr(module, "kernel_rows") for module in mapping.modules())
    named = dict(itertools.chain(mapping.named_parameters(), mapping.named_buffers()))

    def function(scores: Tensor, *tensors: Tensor) -> Tensor:
        if scores.numel() == 0:
            return scores.clone()
        absent, x = is_absent(scores), scores.to(compute_dtype(scores.dtype))
        if not takes_infinities:
            x = x.masked_fill(absent, ABSENT).masked_fill(absent.all(-1, keepdim=True), 0.0)
        result = torch.func.functional_call(mapping, dict(zip(named, tensors)), x) if tensors else mapping(x)
        return result.to(scores.dtype).masked_fill(absent, 0.0)

    return function, tuple(tensor.float() if tensor.dtype in HALF else tensor for tensor in named.values())
