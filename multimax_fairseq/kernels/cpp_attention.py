"""MultiMax attention in one C++ function forward and one backward, for fp32 on a CPU: ``attention.cpp``.

The blocks are those of :mod:`.blockwise_attention`, but each thread has its own, and a block of scores stays in its
cache from the first product to the last. PyTorch's BLAS computes the products. Dropout draws its mask from the
position of each probability, by the counter-based generator Philox4x32-10; the backward draws it again.
"""

import ctypes
import functools
from pathlib import Path
from typing import Callable, Optional, Tuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from . import cpp
from .masks import Masks, length_first, without_gaps

ADDRESS, INTEGER = cpp.ADDRESS, cpp.INTEGER

# Scores in a block: 1 MiB; the backward has two. A block has 128 queries at most, as a causal one wastes queries²/2
# scores, and fewer where a thread would have less than four blocks, which could not be shared evenly.
SCORES, MOST_QUERIES, BLOCKS_PER_THREAD = 2**18, 128, 4


class Matrices(ctypes.Structure):
    """A (heads, length, head_dim) tensor whose last dimension has no gaps."""

    _fields_ = [("data", ADDRESS), ("to_next_head", INTEGER), ("to_next_row", INTEGER)]

    @classmethod
    def of(cls, tensor: Tensor) -> "Matrices":
        return cls(tensor.data_ptr(), tensor.stride(0), tensor.stride(1))


class Dropout(ctypes.Structure):
    """``Dropout`` of the C++: the seed, how many of 2^32 numbers mean drop, and the factor of what is kept."""

    _fields_ = [("seed", INTEGER), ("dropped", INTEGER), ("scale", ctypes.c_float)]

    @classmethod
    def of(cls, dropout: float, seed: int) -> "Dropout":
        return cls(seed, min(int(dropout * 2**32), 2**32 - 1), 1 / (1 - dropout) if dropout < 1 else 0)


class Problem(ctypes.Structure):
    """``Problem`` of the C++, which gives the shapes."""

    _fields_ = [
        *((name, INTEGER) for name in ("heads", "tgt_len", "src_len", "head_dim")),
        *((name, INTEGER) for name in ("order", "is_causal", "block", "threads", "scratch_size")),
        *((name, Matrices) for name in ("query", "key", "value", "output")),
        *((name, Matrices) for name in ("grad_output", "grad_query", "grad_key", "grad_value")),
        *((name, ADDRESS) for name in ("thresholds", "gains", "hidden_keys", "added_scores")),
        *((name, ADDRESS) for name in ("normalisers", "grads_of_parameters", "scratch", "sgemm")),
        ("dropout", ctypes.POINTER(Dropout)),
    ]


SAVED = "query", "key", "value", "thresholds", "gains", "normalisers"
ROUNDED_UP = 64  # Dropout::room(): a row's numbers are drawn in groups of this size

POINTER = ctypes.POINTER(Problem)
LIBRARY = cpp.Library(
    Path(__file__).with_name("attention.cpp"),
    {"blockwise_multimax": [POINTER], "blockwise_multimax_backward": [POINTER]},
)


def serves(
    query: Tensor, key: Tensor, value: Tensor, thresholds: Tensor, gains: Tensor, masks: Masks, dropout: float
) -> bool:
    """Whether :func:`attend` takes these arguments and can run: it needs a compiler and PyTorch's BLAS."""
    return all(map(LIBRARY.serves, (query, key, value))) and sgemm() is not None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    thresholds: Tensor,
    gains: Tensor,
    masks: Masks,
    dropout: float,
    seed: int,
) -> Tensor:
    """:func:`.attention.multimax_attention`, with dropout's ``seed``, 64 bits; laid out with length first."""
    return CppMultiMax.apply(query, key, value, thresholds, gains, masks, dropout, seed)


@functools.lru_cache(maxsize=None)
def sgemm() -> Optional[int]:
    """The address of PyTorch's ``sgemm``; None if its library does not export it."""
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        return ctypes.cast(library.sgemm_, ADDRESS).value
    except (OSError, AttributeError):
        return None


class CppMultiMax(Function):
    """See :func:`attend`."""

    @staticmethod
    def forward(
        ctx,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        thresholds: Tensor,
        gains: Tensor,
        masks: Masks,
        dropout: float,
        seed: int,
    ) -> Tensor:
        query, key, value = (without_gaps(tensor) for tensor in (query, key, value))
        normalisers = query.new_empty(*query.shape[:2], 2)
        saved = dict(zip(SAVED, (query, key, value, thresholds, gains, normalisers)))
        ctx.options = masks, dropout, seed
        output = length_first(query)
        _call(LIBRARY.functions.blockwise_multimax, *ctx.options, **saved, output=output)
        ctx.save_for_backward(*saved.values())
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        saved = dict(zip(SAVED, ctx.saved_tensors))
        grads = {f"grad_{name}": length_first(saved[name]) for name in ("query", "key", "value")}
        grad_parameters = _call(
            LIBRARY.functions.blockwise_multimax_backward,
            *ctx.options,
            **saved,
            **grads,
            grad_output=without_gaps(grad),
        )
        return (*grads.values(), *grad_parameters.to(saved["gains"].dtype).unbind(), None, None, None)


def _call(
    function: Callable[[Problem], None], masks: Masks, dropout: float, seed: int, **tensors: Tensor
) -> Tensor:
    """Call ``function`` with a :class:`Problem` of these tensors, named as its fields.

    Returns:
        ∂L/∂(thresholds, gains), (2, N, 2), fp64, for the backward.

    Raises:
        ValueError: shapes do not match, so that foreign memory would be read.
        RuntimeError: a mask cannot be expanded to what it masks.
    """
    query, key, value = (tensors[name] for name in ("query", "key", "value"))
    (heads, tgt_len, head_dim), src_len = query.shape, key.size(1)
    if not key.shape == value.shape == (heads, src_len, head_dim):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (query, key, value))
        raise ValueError(f"query, key and value must be (heads, length, head_dim), values like keys: {shapes}")
    if masks.causal and tgt_len > src_len:
        raise ValueError(f"{tgt_len} queries need as many keys under a causal mask, not {src_len}")
    tensors["thresholds"], tensors["gains"] = cpp.parameters(tensors["thresholds"], tensors["gains"])
    for name, mask, shape in (
        ("hidden_keys", masks.keys, (heads, 1, src_len)),
        ("added_scores", masks.scores, (tgt_len, src_len)),
    ):
        if mask is not None:
            tensors[name] = mask.expand(shape).float().contiguous()
    threads, order = torch.get_num_threads(), len(tensors["gains"])
    fair_share = -(-heads * tgt_len // (BLOCKS_PER_THREAD * threads))
    block = min(max(SCORES // src_len, 1), MOST_QUERIES, fair_share, tgt_len)
    grads_of_parameters = query.new_zeros(heads * -(-tgt_len // block), 2, order, 2, dtype=torch.float64)
    # For a thread of the backward (the forward needs less): keys and values of a head, twice their gradients, queries
    # and gradients of a block, two blocks of scores, and a row's probabilities and dropout factors.
    scratch_size = 6 * src_len * head_dim + 2 * block * (head_dim + src_len) + 2 * src_len + ROUNDED_UP
    tensors["scratch"] = query.new_empty(threads, scratch_size)
    tensors["grads_of_parameters"] = grads_of_parameters
    problem = Problem(heads, tgt_len, src_len, head_dim, order, masks.causal, block, threads, scratch_size)
    problem.sgemm = sgemm()
    if dropout:
        problem.dropout = ctypes.pointer(Dropout.of(dropout, seed))
    for name, kind in Problem._fields_:
        tensor = tensors.get(name)
        if tensor is not None:
            setattr(problem, name, Matrices.of(tensor) if kind is Matrices else tensor.data_ptr())
    function(problem)
    return grads_of_parameters.sum(0)
