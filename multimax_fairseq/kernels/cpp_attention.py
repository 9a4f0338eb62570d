"""MultiMax attention in one C++ function forward and one backward, for fp32 on a CPU: ``attention.cpp``.

The blocks are those of :mod:`.blockwise_attention`, but each thread goes through those of its own heads, and its
block of scores stays in its cache from the first product to the last. The products are the BLAS's that PyTorch uses.
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
from .masks import length_first

ADDRESS, INTEGER = cpp.ADDRESS, cpp.INTEGER

# Scores in a block: 1 MiB, of which the backward has two. Of 128 queries at most, as a causal block has queries²/2
# scores in vain.
SCORES, MOST_QUERIES = 2**18, 128


class Matrices(ctypes.Structure):
    """A (heads, length, head_dim) tensor whose last dimension has no gaps."""

    _fields_ = [("data", ADDRESS), ("to_next_head", INTEGER), ("to_next_row", INTEGER)]

    @classmethod
    def of(cls, tensor: Tensor) -> "Matrices":
        return cls(tensor.data_ptr(), tensor.stride(0), tensor.stride(1))


class Problem(ctypes.Structure):
    """``Problem`` of the C++, where shapes are given."""

    _fields_ = [
        *((name, INTEGER) for name in ("heads", "tgt_len", "src_len", "head_dim")),
        *((name, INTEGER) for name in ("order", "is_causal", "block", "threads", "scratch_size")),
        *((name, Matrices) for name in ("query", "key", "value", "output")),
        *((name, Matrices) for name in ("grad_output", "grad_query", "grad_key", "grad_value")),
        *((name, ADDRESS) for name in ("thresholds", "gains", "hidden_keys", "added_scores")),
        *((name, ADDRESS) for name in ("normalisers", "grads_of_parameters", "scratch", "sgemm")),
    ]


POINTER = ctypes.POINTER(Problem)
LIBRARY = cpp.Library(
    Path(__file__).with_name("attention.cpp"),
    {"blockwise_multimax": [POINTER], "blockwise_multimax_backward": [POINTER]},
)


def serves(query: Tensor) -> bool:
    """Whether attention of these queries can be computed here: a compiler, and a BLAS in PyTorch, are needed."""
    return LIBRARY.serves(query) and sgemm() is not None


@functools.lru_cache(maxsize=None)
def sgemm() -> Optional[int]:
    """The address of PyTorch's matrix product; None where its library does not show it."""
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        return ctypes.cast(library.sgemm_, ADDRESS).value
    except (OSError, AttributeError):
        return None


class CppMultiMax(Function):
    """:class:`.blockwise_attention.BlockwiseMultiMax`, of the masks one by one.

    Args of ``apply``:
        query, key, value: (heads, length, head_dim), fp32.
        thresholds, gains: (N, 2).
        is_causal: whether a query sees only the keys up to its own position.
        hidden_keys: (heads, 1, src_len), 0 or −inf, or None.
        added_scores: (tgt_len, src_len), or None.
    """

    @staticmethod
    def forward(
        ctx,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        thresholds: Tensor,
        gains: Tensor,
        is_causal: bool,
        hidden_keys: Optional[Tensor],
        added_scores: Optional[Tensor],
    ) -> Tensor:
        query, key, value = (_without_gaps(tensor) for tensor in (query, key, value))
        output, normalisers = length_first(query), query.new_empty(*query.shape[:2], 2)
        saved = {"query": query, "key": key, "value": value, "thresholds": thresholds, "gains": gains}
        saved.update(output=output, normalisers=normalisers)
        ctx.is_causal, ctx.masks = is_causal, {"hidden_keys": hidden_keys, "added_scores": added_scores}
        _call(LIBRARY.functions.blockwise_multimax, is_causal, **ctx.masks, **saved)
        ctx.names = tuple(saved)
        ctx.save_for_backward(*saved.values())
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        saved = dict(zip(ctx.names, ctx.saved_tensors))
        gains = saved["gains"]
        grads = {f"grad_{name}": length_first(saved[name]) for name in ("query", "key", "value")}
        grads_of_parameters = grad.new_zeros(len(grad), 2, len(gains), 2, dtype=torch.float64)
        _call(
            LIBRARY.functions.blockwise_multimax_backward,
            ctx.is_causal,
            **ctx.masks,
            **saved,
            **grads,
            grad_output=_without_gaps(grad),
            grads_of_parameters=grads_of_parameters,
        )
        return (*grads.values(), *grads_of_parameters.sum(0).to(gains.dtype).unbind(), None, None, None)


def _call(function: Callable[[Problem], None], is_causal: bool, **tensors: Optional[Tensor]) -> None:
    """``function`` with a :class:`Problem` of these tensors, by the names of its fields.

    Raises:
        ValueError: shapes do not go together; here it would be foreign memory that is read.
        RuntimeError: a mask cannot be expanded to what it masks.
    """
    query, key, value = (tensors[name] for name in ("query", "key", "value"))
    (heads, tgt_len, head_dim), src_len = query.shape, key.size(1)
    if not key.shape == value.shape == (heads, src_len, head_dim):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (query, key, value))
        raise ValueError(f"query, key and value must be (heads, length, head_dim), values like keys: {shapes}")
    if is_causal and tgt_len > src_len:
        raise ValueError(f"{tgt_len} queries need as many keys under a causal mask, not {src_len}")
    tensors["thresholds"], tensors["gains"] = cpp.parameters(tensors["thresholds"], tensors["gains"])
    for name, shape in (("hidden_keys", (heads, 1, src_len)), ("added_scores", (tgt_len, src_len))):
        if tensors[name] is not None:
            tensors[name] = tensors[name].expand(shape).float().contiguous()
    threads = min(torch.get_num_threads(), heads)
    block = min(max(SCORES // src_len, 1), MOST_QUERIES, tgt_len)
    # What a thread of the backward needs, and the forward less: queries, keys and values of a head, as many
    # gradients, and two blocks of scores.
    scratch_size = 2 * (tgt_len + 2 * src_len) * head_dim + 2 * block * max(src_len, head_dim)
    tensors["scratch"] = query.new_empty(threads, scratch_size)
    order = len(tensors["gains"])
    problem = Problem(heads, tgt_len, src_len, head_dim, order, is_causal, block, threads, scratch_size)
    problem.sgemm = sgemm()
    for name, kind in Problem._fields_:
        tensor = tensors.get(name)
        if tensor is not None:
            setattr(problem, name, Matrices.of(tensor) if kind is Matrices else tensor.data_ptr())
    function(problem)


def _without_gaps(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
