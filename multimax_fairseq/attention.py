"""Attention with any mapping in place of softmax: what ``F.scaled_dot_product_attention`` is for softmax.

:func:`attend` says what it computes. :func:`mapped_attention` computes that, where rows are long without ever holding
the matrix of probabilities.
"""

import math
from typing import Callable, Optional, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .kernels.attention import attend_by, blocks, kernels_for
from .kernels.attention.call import Call
from .kernels.backend import autocast_dtype, no_autocast, wants_compiled
from .kernels.rows import rows_of
from .kernels.scores import HALF, compute_dtype
from .mappings import build_mapping
from .mappings.masking import additive_mask, function_of, probabilities_by


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    probabilities: Callable[[Tensor], Tensor],
    mask: Optional[Tensor] = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
) -> Tensor:
    """dropout(mapping(query · keyᵀ + mask)) · value: the formula, in PyTorch's operators, with the whole matrix.

    Args:
        query: (…, tgt_len, head_dim), scaled.
        key, value: (…, src_len, head_dim), (…, src_len, value_dim).
        probabilities: scores, −inf where a key is absent, → probabilities over the last dimension.
        mask: to be added to scores, broadcast over (…, tgt_len, src_len).
        is_causal: whether query i sees only the keys up to i.
        dropout_p: the probability to drop a probability; what is kept is divided by 1 − dropout_p.
    """
    return weights(query @ key.transpose(-2, -1), probabilities, mask, is_causal, dropout_p) @ value


def weights(
    products: Tensor,
    probabilities: Callable[[Tensor], Tensor],
    mask: Optional[Tensor],
    is_causal: bool,
    dropout_p: float,
    first: int = 0,
) -> Tensor:
    """dropout(mapping(products + mask)), as in :func:`attend`, of the queries from ``first`` on."""
    scores = masked_scores(products, mask, is_causal, first)
    return F.dropout(probabilities(scores).to(products.dtype), dropout_p)


def masked_scores(products: Tensor, mask: Optional[Tensor] = None, is_causal: bool = False, first: int = 0) -> Tensor:
    """products + mask, (…, tgt_len, src_len), fp32 at least; −inf where a key is hidden. See :func:`weights`."""
    scores = products.to(compute_dtype(products.dtype))
    if mask is not None:
        scores = scores + mask
    if is_causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(first + 1)
        scores = scores.masked_fill(later, -math.inf)
    return scores


def mapped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mapping: Union[str, nn.Module],
    attn_mask: Optional[Tensor] = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: Optional[float] = None,
) -> Tensor:
    """dropout(mapping(scale · query · keyᵀ + attn_mask)) · value, for every mapping, one's own included.

    Arguments and shapes are those of ``torch.nn.functional.scaled_dot_product_attention``. Leading dimensions
    broadcast. Gradients reach query, key, value, the parameters of the mapping, and an added mask that wants one. It
    runs in C++ for the mappings of this package on a CPU, in Triton for MultiMax and softmax on a GPU, and by blocks
    of queries for others where the matrix of probabilities would be large; ``MULTIMAX_BACKEND=eager``, and whoever
    traces or transforms it, get the formula, :func:`attend`.

    Args:
        query: (…, tgt_len, head_dim), fp16, bf16, fp32 or fp64; autocast acts as on PyTorch's function.
        key: (…, src_len, head_dim).
        value: (…, src_len, value_dim).
        mapping: a module over the last dimension of scores, (batch, num_heads, tgt_len, src_len), or the name of one.
            Scores of mappings with numbers per head are (…, num_heads, tgt_len, src_len).
        attn_mask: bool, true where a key takes part, or floating point, to be added to scores; −9,000 and less hides
            a key, as −inf does. Broadcasts to (…, tgt_len, src_len).
        dropout_p: the probability to drop a probability; always applied, as in PyTorch's function.
        is_causal: query i sees the keys up to i; together with ``attn_mask``, those that both show.
        scale: of scores; 1 / √head_dim by default.

    Returns:
        (…, tgt_len, value_dim), in the dtype of ``query``; zeros for a query that sees no key.

    Raises:
        ValueError: shapes, dtypes or numbers that do not fit.
    """
    mapping = build_mapping(mapping) if isinstance(mapping, str) else mapping
    if not isinstance(mapping, nn.Module):
        raise ValueError(f"mapping is a module over the last dimension of scores, or a name; got {mapping!r}")
    leading = _check(query, key, value, attn_mask, dropout_p)
    dtype = autocast_dtype(query) or query.dtype
    wide = torch.float32 if query.is_cpu and dtype in HALF else dtype  # a CPU is no slower in fp32, and rounds once
    query, key, value = (_four_dimensions(tensor.to(dtype).to(wide), leading) for tensor in (query, key, value))
    if attn_mask is not None:
        attn_mask = attn_mask if attn_mask.is_floating_point() else ~attn_mask
        attn_mask = additive_mask(attn_mask, compute_dtype(dtype))
        attn_mask = attn_mask.expand(*attn_mask.shape[:-1], key.size(-2))
        attn_mask = _four_dimensions(attn_mask, leading if len(leading) > 2 and attn_mask.dim() > 3 else ())
    scale = 1 / math.sqrt(max(query.size(-1), 1)) if scale is None else scale
    query = query if scale == 1 else query * scale
    with no_autocast(query):
        output = _attend(query, key, value, mapping, attn_mask, is_causal, dropout_p).to(dtype)
    return output.reshape(*leading, *output.shape[-2:])


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mapping: nn.Module,
    mask: Optional[Tensor],
    is_causal: bool,
    dropout_p: float,
) -> Tensor:
    """:func:`mapped_attention` of (batch, heads, length, dim), scaled: chooses who computes."""
    rows = rows_of(mapping)
    numbers, masks = () if rows is None else rows.numbers, () if mask is None else (mask,)
    is_free = wants_compiled(query, key, value, *numbers, *masks)
    if is_free and rows is not None and not (mask is not None and mask.requires_grad):
        call = Call(rows, mask, is_causal, dropout_p)
        kernels = kernels_for(attend, query, key, value, call)
        if kernels is not None:
            return attend_by(kernels, attend, query, key, value, call)
    if is_free and blocks.pay(query, key):
        function, tensors = function_of(mapping)
        problem = blocks.Problem(weights, function, is_causal, dropout_p)
        return blocks.attend(problem, query, key, value, mask, *tensors)
    return attend(query, key, value, probabilities_by(mapping), mask, is_causal, dropout_p)


def _check(query: Tensor, key: Tensor, value: Tensor, mask: Optional[Tensor], dropout_p: float) -> Tuple[int, ...]:
    """The common leading dimensions; raises ValueError where there are none, or anything else does not fit."""

    def shapes() -> str:
        return ", ".join(str(tuple(tensor.shape)) for tensor in (query, key, value))

    if min(tensor.dim() for tensor in (query, key, value)) < 2:
        raise ValueError(f"query, key and value are (…, length, head_dim), of two dimensions or more; got {shapes()}")
    if query.size(-1) != key.size(-1) or key.size(-2) != value.size(-2):
        raise ValueError(
            f"queries and keys have one head_dim, keys and values one length; got query, key, value: {shapes()}"
        )
    if not query.dtype == key.dtype == value.dtype or not query.is_floating_point():
        kinds = ", ".join(str(tensor.dtype) for tensor in (query, key, value))
        raise ValueError(f"query, key and value have one floating-point dtype; got {kinds}")
    if any(tensor.device != query.device for tensor in (key, value, query if mask is None else mask)):
        raise ValueError("query, key, value and attn_mask have to be on one device")
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p is a probability; got {dropout_p}")
    try:
        leading = torch.broadcast_shapes(*(tensor.shape[:-2] for tensor in (query, key, value)))
    except RuntimeError:
        raise ValueError(f"what stands before the last two dimensions does not broadcast: {shapes()}") from None
    if mask is None:
        return leading
    whole = (*leading, query.size(-2), key.size(-2))
    if not (mask.is_floating_point() or mask.dtype == torch.bool):
        raise ValueError(f"attn_mask is bool, true where a key takes part, or floating-point; got {mask.dtype}")
    sizes = zip(reversed(mask.shape), reversed(whole))
    if mask.dim() > len(whole) or any(size != 1 and size != other for size, other in sizes):
        raise ValueError(f"attn_mask has to broadcast to {whole}; got {tuple(mask.shape)}")
    return leading


def _four_dimensions(tensor: Tensor, leading: Tuple[int, ...]) -> Tensor:
    """(…, length, dim), expanded to the ``leading`` dimensions, as (batch, heads, length, dim)."""
    tensor = tensor.expand(*leading, *tensor.shape[-2:]) if leading else tensor
    while tensor.dim() < 4:
        tensor = tensor[None]
    return tensor.flatten(0, -4)
