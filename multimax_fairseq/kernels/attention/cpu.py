"""Attention with the built-in mappings, fp32 on a CPU, in C++: plain functions, without autograd.

Threads take blocks of queries, whose rows of scores are whole. PyTorch's BLAS computes the products. Dropout draws
its mask from the position of each probability, by the counter-based generator Philox4x32-7; the backward draws it
again.
"""

import ctypes
import functools
from pathlib import Path
from typing import Callable, Optional, Tuple

import torch
from torch import Tensor

from .. import cpp
from ..rows.cpu import Numbers
from .call import Call, length_first

ADDRESS, INTEGER = cpp.ADDRESS, cpp.INTEGER

# Scores in a block: 1 MiB; the backward has two. A block has 128 queries at most, as a causal one wastes queries²/2
# scores. There are at least so many blocks, and so many parts of heads, of that many blocks at least, for threads to
# share; how many threads there are decides nothing, so that results do not depend on it.
SCORES, MOST_QUERIES = 2**18, 128
BLOCKS, PARTS, BLOCKS_PER_PART = 16, 32, 2

LANES = 16  # the most that a vector has
GROUP = 64  # of Dropout::room()


class Matrices(ctypes.Structure):
    """A (bsz, num_heads, length, dim) tensor whose last dimension has no gaps."""

    _fields_ = [("data", ADDRESS)] + [(f"to_next_{name}", INTEGER) for name in ("sentence", "head", "row")]


class Problem(ctypes.Structure):
    """``Problem`` of the C++, which gives the shapes."""

    _fields_ = [
        *((name, INTEGER) for name in ("bsz", "num_heads", "tgt_len", "src_len", "head_dim", "value_dim")),
        *((name, INTEGER) for name in ("is_causal", "block", "parts", "threads", "scratch_size")),
        ("numbers", Numbers),
        *((name, Matrices) for name in ("query", "key", "value", "mask", "output")),
        *((name, Matrices) for name in ("grad_output", "grad_query", "grad_key", "grad_value")),
        *((name, ADDRESS) for name in ("states", "scratch", "sgemm")),
        *((name, INTEGER) for name in ("seed", "dropped")),
        ("scale", ctypes.c_float),
    ]


ARGUMENTS = [INTEGER, ctypes.POINTER(Problem)]
LIBRARY = cpp.Library(Path(__file__).with_name("attention.cpp"), {"attend": ARGUMENTS, "attend_backward": ARGUMENTS})


def serves(query: Tensor, key: Tensor, value: Tensor, call: Call) -> bool:
    """Whether :func:`forward` takes these arguments, of one dtype and not empty: fp32, where there is a compiler."""
    if not LIBRARY.serves(query) or sgemm() is None:
        return False
    shape = (*query.shape[:3], key.size(-2))
    return call.rows.name != "entmax" or Numbers(call.rows, torch.Size(shape)).count in (1, query.size(1))


@functools.lru_cache(maxsize=None)
def sgemm() -> Optional[int]:
    """The address of PyTorch's ``sgemm``; None if its library does not export it."""
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        return ctypes.cast(library.sgemm_, ADDRESS).value
    except (OSError, AttributeError):
        return None


def forward(query: Tensor, key: Tensor, value: Tensor, call: Call) -> Tuple[Tensor, Tuple[Tensor, ...]]:
    """dropout(mapping(query · keyᵀ + mask)) · value; arguments as in :func:`.attend_by`, all fp32.

    Returns:
        (bsz, num_heads, tgt_len, value_dim), laid out with length first, and what :func:`backward` needs besides:
        three numbers of each row of scores.

    Raises:
        ValueError: shapes do not match, so that foreign memory would be read.
    """
    output = length_first(query, query.size(-2), value.size(-1))
    states = query.new_empty(*query.shape[:3], 3)
    _call(LIBRARY.functions.attend, query, key, value, call, output=output, states=states)
    return output, (states,)


def backward(
    query: Tensor, key: Tensor, value: Tensor, call: Call, saved: Tuple[Tensor, ...], grad_output: Tensor
) -> Tuple[Optional[Tensor], ...]:
    """The gradients of query, key, value and ``rows.numbers``, from that of the output; None for that of an ε."""
    (states,) = saved
    grads = [length_first(query, *tensor.shape[-2:]) for tensor in (query, key, value)]
    tensors = dict(zip(("grad_query", "grad_key", "grad_value"), grads))
    tensors.update(states=states, grad_output=grad_output)
    grads_of_numbers = _call(LIBRARY.functions.attend_backward, query, key, value, call, **tensors)
    return (*grads, *grads_of_numbers)


def _call(
    function: Callable, query: Tensor, key: Tensor, value: Tensor, call: Call, **tensors: Tensor
) -> Tuple[Optional[Tensor], ...]:
    """Call ``function`` with a :class:`Problem` of these tensors, named as its fields.

    Returns:
        for the backward, the gradients of ``rows.numbers``.
    """
    (bsz, num_heads, tgt_len, head_dim), (*_, src_len, value_dim) = query.shape, value.shape
    shapes = {
        "query": query.shape,
        "key": (bsz, num_heads, src_len, head_dim),
        "value": (bsz, num_heads, src_len, value_dim),
        "mask": (bsz, num_heads, tgt_len, src_len),
        "grad_output": (bsz, num_heads, tgt_len, value_dim),
        "states": (bsz, num_heads, tgt_len, 3),
    }
    tensors.update(query=query, key=key, value=value)
    if call.mask is not None:
        mask = call.mask.expand(*call.mask.shape[:3], src_len)
        tensors["mask"] = (mask if mask.stride(-1) == 1 else mask.contiguous()).expand(shapes["mask"])
    numbers = Numbers(call.rows, torch.Size(shapes["mask"]))
    most = min(SCORES // src_len, MOST_QUERIES, bsz * num_heads * tgt_len // BLOCKS)
    block = min(max(most, 1), tgt_len)
    parts = min(-(-PARTS // (bsz * num_heads)), max(-(-tgt_len // block) // BLOCKS_PER_PART, 1))
    threads = min(torch.get_num_threads(), max(bsz * num_heads * parts, 2))
    # for a thread of the backward; the forward needs less
    sizes = (
        *2 * [src_len * head_dim, src_len * value_dim],  # keys and values, and their gradients
        *2 * [block * src_len],  # scores, and their gradients
        *2 * [block * max(head_dim, value_dim)],  # queries, and gradients of the output
        src_len, src_len + GROUP, 3 * (src_len + LANES),  # probabilities, dropout's factors, room of a mapping
    )  # fmt: skip
    scratch_size = sum(size + LANES for size in sizes) // LANES * LANES
    scratch, grads = query.new_empty(threads, scratch_size), numbers.new_gradients()
    layout = call.is_causal, block, parts, threads, scratch_size
    problem = Problem(bsz, num_heads, tgt_len, src_len, head_dim, value_dim, *layout, numbers.located(grads))
    kept = []  # copies, until they have been read
    for name, tensor in tensors.items():
        if tensor.shape != shapes.get(name, tensor.shape):
            raise ValueError(f"{name} is {tuple(tensor.shape)}; expected {tuple(shapes[name])}")
        if tensor.stride(-1) != 1 or name == "states":
            tensor = tensor.contiguous()
        kept.append(tensor)
        address = tensor.data_ptr()
        setattr(problem, name, address if name == "states" else Matrices(address, *tensor.stride()[:3]))
    problem.scratch, problem.sgemm = scratch.data_ptr(), sgemm()
    if call.dropout:
        problem.seed, problem.dropped = call.seed, min(int(call.dropout * 2**32), 2**32 - 1)
        problem.scale = 1 / (1 - call.dropout) if call.dropout < 1 else 0
    function(numbers.kind, problem)
    return numbers.gradients(grads)
