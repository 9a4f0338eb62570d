"""Attention with MultiMax or softmax on a GPU: one Triton kernel forward and two backward (:mod:`.gpu_kernels`).

Memory is linear in the length: the backward keeps the inputs and two numbers per query. All is computed in fp32, with
products of fp16 and bf16 numbers on tensor cores. Products of fp32 numbers have full precision ("ieee"), as PyTorch's
have by default. Sums have a fixed order: the same call gives the same bits.

It runs on NVIDIA's GPUs from compute capability 8.0 on and on AMD's; for tests also on a CPU, slowly, where the
environment variable ``TRITON_INTERPRET`` is 1. Kernels are trusted on a device, with their constants, after they have
been compared with plain PyTorch there (:func:`is_right`).
"""

import functools
import importlib.util
import logging
import math
import os
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backend import backend
from ..rows import Rows
from ..scores import compute_dtype
from .call import Call, length_first

logger = logging.getLogger(__name__)

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MOST_DIMENSIONS = 128
FIRST_TRITON = (3, 7)  # the oldest that the kernels were tried with
FIRST_CAPABILITY = (8, 0)


class Blocks(NamedTuple):
    """How a kernel is launched: queries and keys of a block of scores, warps of a program, stages of its loads."""

    queries: int
    keys: int
    warps: int
    stages: int

    def options(self) -> Dict[str, Any]:
        """Triton's. Products and sums are one instruction: faster, and rounded once."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


# By kernel, bytes of a number and largest head_dim: as large as possible without spilling registers on the GPUs that
# benchmarks/check_kernels.py compiles for. In half precision a warp has 16 queries (in backward_keys, keys).
BLOCKS: Dict[Tuple[str, int, int], Blocks] = {
    ("forward", 2, 64): Blocks(128, 32, 8, 2),
    ("forward", 2, 128): Blocks(128, 32, 8, 2),
    ("forward", 4, 64): Blocks(64, 32, 8, 1),
    ("forward", 4, 128): Blocks(32, 16, 4, 1),
    ("backward_queries", 2, 64): Blocks(32, 32, 4, 2),
    ("backward_queries", 2, 128): Blocks(32, 16, 4, 2),
    ("backward_queries", 4, 64): Blocks(16, 32, 8, 1),
    ("backward_queries", 4, 128): Blocks(16, 16, 8, 1),
    ("backward_keys", 2, 64): Blocks(32, 32, 4, 2),
    ("backward_keys", 2, 128): Blocks(32, 32, 4, 2),
    ("backward_keys", 4, 64): Blocks(16, 32, 4, 1),
    ("backward_keys", 4, 128): Blocks(16, 16, 4, 1),
}


def blocks_of(kernel: str, dtype: torch.dtype, head_dim: int, added: bool) -> Blocks:
    """The entry of ``BLOCKS`` for a kernel, dtype and head_dim; with an added mask, a block half as large."""
    blocks = BLOCKS[kernel, torch.finfo(dtype).bits // 8, 64 if head_dim <= 64 else MOST_DIMENSIONS]
    if not added:
        return blocks
    if kernel == "backward_keys":
        return blocks._replace(queries=max(blocks.queries // 2, 16))
    return blocks._replace(keys=max(blocks.keys // 2, 16))


def padded(head_dim: int) -> int:
    """head_dim rounded up to a power of 2, at least 16, as products need."""
    return max(1 << (head_dim - 1).bit_length(), 16)


def serves(query: Tensor, key: Tensor, value: Tensor, call: Call) -> bool:
    """Whether :func:`forward` takes these arguments and can run."""
    return (
        call.rows.name in ("softmax", "multimax")
        and query.dtype in DTYPES
        and query.device == key.device == value.device
        and query.size(-1) == value.size(-1) <= MOST_DIMENSIONS
        and _runs_on(query.device, query.dtype)
        # a CUDA graph would replay one dropout mask, and cannot hold the check of the first call
        and not (query.is_cuda and torch.cuda.is_current_stream_capturing())
    )


def forward(query: Tensor, key: Tensor, value: Tensor, call: Call) -> Tuple[Tensor, Tuple[Tensor, ...]]:
    """dropout(mapping(query · keyᵀ + mask)) · value; arguments as in :func:`.attend_by`.

    Args:
        query, key, value: fp16, bf16 or fp32; tensors whose last dimension has gaps are copied.

    Returns:
        (batch, heads, tgt_len, head_dim), laid out with length first, and what the backward needs.
    """
    output = length_first(query, *query.shape[-2:])
    peaks, factors = query.new_empty(2, query.size(0) * query.size(1), query.size(2), dtype=torch.float32)
    launch = _Launch(query, key, call)
    launch("forward", query=query, key=key, value=value, output=output, peaks=peaks, factors=factors)
    return output, (peaks, factors)


def backward(
    query: Tensor, key: Tensor, value: Tensor, call: Call, saved: Sequence[Tensor], grad_output: Tensor
) -> Tuple[Tensor, ...]:
    """The gradients of query, key, value and of the mapping's numbers."""
    peaks, factors = saved
    inputs = {"query": query, "key": key, "value": value, "grad": grad_output}
    kept = {"peaks": peaks, "factors": factors, "expecteds": torch.empty_like(peaks)}
    grads = [length_first(tensor, *tensor.shape[-2:]) for tensor in (query, key, value)]
    launch = _Launch(query, key, call)
    order = launch.constants["ORDER"]
    table = peaks.new_empty(launch.programs("backward_queries"), 2, order, 2)
    launch("backward_queries", **inputs, **kept, grad_query=grads[0], table=table)
    launch("backward_keys", **inputs, **kept, grad_key=grads[1], grad_value=grads[2])
    if not order:
        return tuple(grads)
    slopes, powers = table.sum(0, dtype=torch.float64)
    thresholds, gains = call.rows.numbers
    grad_thresholds = gains * slopes * slopes.new_tensor([1.0, -1.0])
    return *grads, grad_thresholds.to(thresholds.dtype), powers.to(gains.dtype)


class _Launch:
    """Launches the kernels of one call."""

    def __init__(self, query: Tensor, key: Tensor, call: Call):
        rows, mask, is_causal, dropout, seed = call
        (batch, heads, tgt_len, head_dim), src_len = query.shape, key.size(2)
        self.rows, self.tgt_len, self.src_len, self.dtype = batch * heads, tgt_len, src_len, query.dtype
        numbers = rows.numbers or (query.new_empty(0, 2), query.new_empty(0, 2))
        self.mask = mask if mask is None else mask.float()
        strides = [0] * 4 if mask is None else [s if n > 1 else 0 for s, n in zip(self.mask.stride(), mask.shape)]
        self.arguments = {
            **dict(zip(("thresholds", "gains"), (number.float().contiguous() for number in numbers))),
            **dict(zip(("mask_batch", "mask_head", "mask_query", "mask_key"), strides)),
            "num_heads": heads, "tgt_len": tgt_len, "src_len": src_len, "seed": seed, "dropout": dropout,
        }  # fmt: skip
        self.constants = {
            "ORDER": len(numbers[1]), "CAUSAL": is_causal, "DROPOUT": dropout > 0, "HEAD_DIM": head_dim,
            "MASK": 0 if mask is None else 1 if mask.size(2) == 1 else 2, "BLOCK_DIM": padded(head_dim),
        }  # fmt: skip

    def blocks(self, kernel: str) -> Blocks:
        return blocks_of(kernel, self.dtype, self.constants["HEAD_DIM"], self.constants["MASK"] == 2)

    def programs(self, kernel: str) -> int:
        blocks = self.blocks(kernel)
        length, block = (self.src_len, blocks.keys) if kernel == "backward_keys" else (self.tgt_len, blocks.queries)
        return self.rows * -(-length // block)

    def __call__(self, kernel: str, **tensors: Tensor) -> None:
        from . import gpu_kernels  # here: it imports Triton

        blocks, strides = self.blocks(kernel), {}
        for name, tensor in tensors.items():
            if tensor.dim() == 4 and name != "table":
                tensor = tensor.flatten(0, 1)
                tensors[name] = tensor = tensor if tensor.stride(-1) == 1 else tensor.contiguous()
                strides[f"{name}_head"], strides[f"{name}_row"] = tensor.stride()[:2]
        with torch.cuda.device_of(tensors["query"]):  # no effect on a CPU
            getattr(gpu_kernels, kernel)[(self.programs(kernel),)](
                **tensors, **strides, **self.arguments, **self.constants, mask=self.mask,
                BLOCK_QUERIES=blocks.queries, BLOCK_KEYS=blocks.keys, **blocks.options(),
            )  # fmt: skip


# ---------------------------------------------------------------- is it right here?

# Of the problem that kernels are tried on: more than one block of each, and no multiple of one.
TGT_LEN, SRC_LEN, DROPOUT = 150, 170, 0.25

_tried = set()  # devices with the constants of kernels
_distrusted = set()  # devices on which a kernel was wrong, or failed


def is_right(formula: Callable[..., Tensor], query: Tensor, call: Call) -> bool:
    """Whether kernels with the constants of this call have been right on its device; tries them the first time.

    If not, one warning says what was seen, and nothing runs in Triton on that device from then on. ``formula`` is
    that of :func:`.attend_by`.
    """
    if query.device in _distrusted:
        return False
    rows, mask, is_causal, dropout, _ = call
    mask_rows = 0 if mask is None else 1 if mask.size(2) == 1 else TGT_LEN
    order = len(rows.numbers[0]) if rows.numbers else 0
    key = query.device, query.dtype, query.size(-1), order, mask_rows, is_causal, dropout > 0
    if key not in _tried:
        # whoever calls may want no gradients, or count what is saved for them, as activation checkpointing does
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
        try:
            with torch.inference_mode(False), torch.enable_grad(), hooks:
                problem = _wrong(formula, rows.formula, *key)
        except Exception as error:  # whatever a compiler or a driver raises
            if backend() == "compiled":
                raise
            problem = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        if problem and backend() == "compiled":
            raise RuntimeError(f"Triton's attention is wrong here: {problem}")
        _tried.add(key)
        if problem:
            _distrusted.add(query.device)
            name = torch.cuda.get_device_name(query.device) if query.device.type == "cuda" else "CPU"
            logger.warning(
                "attention runs in plain PyTorch on %s from now on, as Triton's kernels are not right there: %s. "
                "Please report this line: torch %s, Triton %s, %s, head_dim %s, order %s, mask rows %s, causal %s, "
                "dropout %s",
                name, problem, torch.__version__, version(), *key[1:],
            )  # fmt: skip
    return query.device not in _distrusted


def _wrong(
    formula: Callable[..., Tensor], mapping: Callable[..., Tensor], device: torch.device, dtype: torch.dtype,
    head_dim: int, order: int, mask_rows: int, is_causal: bool, drops: bool,
) -> str:  # fmt: skip
    """What is wrong with the kernels on a small problem; empty if nothing is."""
    generator, dropout = torch.Generator().manual_seed(0), DROPOUT if drops else 0.0

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cpu").to(device)

    lengths = TGT_LEN, SRC_LEN, SRC_LEN, TGT_LEN
    *inputs, upstream = (draw(length, 1, 2, head_dim).permute(1, 2, 0, 3).to(dtype) for length in lengths)
    inputs[0] = inputs[0] * head_dim**-0.5
    numbers = (draw(order, 2), 0.1 * draw(order, 2)) if order else ()
    mask = draw(1, 1, mask_rows, SRC_LEN) if mask_rows else None
    if mask_rows:
        mask = mask.masked_fill(mask < -1, -math.inf)
    call = Call(Rows("multimax" if order else "softmax", numbers), mask, is_causal, dropout, seed=1)

    def attend(query: Tensor, key: Tensor, value: Tensor, *numbers: Tensor) -> Tensor:
        return formula(query, key, value, lambda scores: mapping(scores, *numbers) * factors, mask, is_causal)

    factors = 1.0
    if drops:  # equal scores, and values that show which probability is kept
        none, eye = torch.zeros_like(inputs[0]), torch.eye(SRC_LEN, device=device, dtype=dtype)
        columns = F.pad(eye, (0, -SRC_LEN % head_dim)).split(head_dim, dim=1)
        shown = [forward(none, inputs[1], some.expand_as(inputs[1]), call)[0] for some in columns]
        kept = torch.cat(shown, -1)[..., :SRC_LEN] > 0
        seen = kept[attend(none, inputs[1], eye, *numbers) > 0].double()
        share, deviation = seen.mean().item(), math.sqrt(dropout * (1 - dropout) / seen.numel())
        if abs(share - (1 - dropout)) > 5 * deviation:
            return f"dropout of {dropout} kept {share:.3f}"
        factors = kept.double() / (1 - dropout)

    def results(dtype: torch.dtype) -> List[Tensor]:
        leaves = [tensor.to(dtype).requires_grad_() for tensor in inputs]
        leaves += [number.to(compute_dtype(dtype)).requires_grad_() for number in numbers]
        output = attend(*leaves)
        return [output.detach(), *torch.autograd.grad(output, leaves, upstream.to(dtype))]

    exact, plain = results(torch.float64), results(dtype)
    output, saved = forward(*inputs, call)
    ours = [output, *backward(*inputs, call, saved, upstream)]
    for name, a, b, right in zip(("output", "query", "key", "value", "thresholds", "gains"), ours, plain, exact):
        error, usual = (((tensor.double() - right).norm() / right.norm()).item() for tensor in (a, b))
        if not error <= 4 * usual + 1e-5:
            kind = name if name == "output" else f"gradient of {name}"
            return f"{kind} has an error of {error:.1e}, where PyTorch's has {usual:.1e}"
    return ""


def version() -> Optional[str]:
    """Triton's; None if it is missing, or older than ``FIRST_TRITON``."""
    if importlib.util.find_spec("triton") is None:
        return None
    import triton

    return triton.__version__ if tuple(map(int, triton.__version__.split(".")[:2])) >= FIRST_TRITON else None


@functools.lru_cache(maxsize=None)
def _runs_on(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether kernels may run on this device: a new enough GPU, or a CPU with Triton's interpreter."""
    if device.type == "cpu":  # the interpreter gets bf16 wrong
        return INTERPRETED and dtype != torch.bfloat16
    is_new = device.type == "cuda" and torch.cuda.get_device_capability(device) >= FIRST_CAPABILITY
    return is_new and version() is not None


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and version() is not None
