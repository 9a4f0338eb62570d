"""MultiMax attention on a GPU: one Triton kernel forward and two backward, those of :mod:`.triton_kernels`.

Memory is linear in the length: the backward keeps the inputs and two numbers per query. It runs on NVIDIA's GPUs from
compute capability 8.0 on and on AMD's; for tests also on a CPU, slowly, if the environment variable
``TRITON_INTERPRET`` was 1 when Triton was imported. Sums have a fixed order: the same call gives the same bits.
"""

import functools
import importlib.util
import logging
from types import ModuleType
from typing import Any, Dict, NamedTuple, Optional, Tuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .backend import backend, wants_compiled
from .masks import Masks, length_first, without_gaps

logger = logging.getLogger(__name__)

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MOST_DIMENSIONS = 128
MOST_ORDER = 2
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


def serves(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    thresholds: Tensor,
    gains: Tensor,
    masks: Masks,
    dropout: float = 0.0,
) -> bool:
    """Whether :func:`attend` takes these arguments and can run."""
    (heads, tgt_len, head_dim), src_len = query.shape, key.size(1)
    return (
        query.dtype in DTYPES
        and query.dtype == key.dtype == value.dtype
        and query.device == key.device == value.device
        and 0 < head_dim <= MOST_DIMENSIONS
        and key.shape == value.shape == (heads, src_len, head_dim)
        and min(heads, tgt_len, src_len) > 0
        and (not masks.causal or tgt_len <= src_len)
        and thresholds.shape == gains.shape == (len(gains), 2)
        and len(gains) <= MOST_ORDER
        and 0 <= dropout < 1
        and wants_compiled(query)
        and _runs_on(query.device, query.dtype)
    )


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    thresholds: Tensor,
    gains: Tensor,
    masks: Masks,
    dropout: float = 0.0,
    seed: int = 0,
) -> Tensor:
    """dropout(multimax(query · keyᵀ + masks)) · value, head by head; differentiable once.

    A query that sees no key gets zeros. All is computed in fp32, with products of fp16 and bf16 numbers on tensor
    cores. Products of fp32 numbers have full precision ("ieee"), as PyTorch's have by default. Three products in TF32
    ("tf32x3") would be faster; their error has not been measured.

    Args:
        query, key, value, masks, dropout: as in :func:`.attention.multimax_attention`. fp16, bf16 or fp32; tensors
            whose last dimension has gaps are copied. Masks get no gradient; dropout is in [0, 1).
        thresholds, gains: (order, 2); order 0 is softmax.
        seed: of dropout's random numbers, int64: the same seed drops the same ones.

    Returns:
        (heads, tgt_len, head_dim), laid out in memory as (tgt_len, heads, head_dim).
    """
    return _TritonMultiMax.apply(query, key, value, thresholds, gains, masks, dropout, seed)


class _TritonMultiMax(Function):
    """See :func:`attend`."""

    @staticmethod
    def forward(
        ctx, query: Tensor, key: Tensor, value: Tensor, thresholds: Tensor, gains: Tensor, masks: Masks,
        dropout: float, seed: int,
    ) -> Tensor:  # fmt: skip
        query, key, value = (without_gaps(tensor) for tensor in (query, key, value))
        output = length_first(query)
        peaks, factors = query.new_empty(2, *query.shape[:2], dtype=torch.float32)
        ctx.call = _Call(query, key, masks, len(gains), dropout, seed)
        ctx.call("forward", query, key, value, thresholds, gains, output=output, peaks=peaks, factors=factors)
        ctx.save_for_backward(query, key, value, thresholds, gains, peaks, factors)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        query, key, value, thresholds, gains, peaks, factors = ctx.saved_tensors
        inputs, order = (query, key, value, thresholds, gains), len(gains)
        grads = {f"grad_{name}": length_first(tensor) for name, tensor in zip(("query", "key", "value"), inputs)}
        rows = {"peaks": peaks, "factors": factors, "expecteds": torch.empty_like(peaks), "grad": without_gaps(grad)}
        table = peaks.new_empty(ctx.call.programs("backward_queries"), 2, order, 2)
        ctx.call("backward_queries", *inputs, grad_query=grads["grad_query"], table=table, **rows)
        ctx.call("backward_keys", *inputs, grad_key=grads["grad_key"], grad_value=grads["grad_value"], **rows)
        slopes, powers = table.sum(0, dtype=torch.float64)
        signs = slopes.new_tensor([1.0, -1.0])
        return (
            *grads.values(),
            (gains * slopes * signs).to(thresholds.dtype),
            powers.to(gains.dtype),
            None,
            None,
            None,
        )


class _Call:
    """Launches the kernels of one call of :func:`attend`."""

    def __init__(self, query: Tensor, key: Tensor, masks: Masks, order: int, dropout: float, seed: int):
        (self.heads, self.tgt_len, self.head_dim), self.src_len = query.shape, key.size(1)
        self.dtype, self.device = query.dtype, query.device
        hidden, added = masks.keys, masks.scores
        if hidden is not None:
            hidden = hidden.expand(self.heads, 1, self.src_len)
        if added is not None:
            added = added.expand(self.tgt_len, self.src_len)
        self.arguments = {
            "hidden": hidden,
            "hidden_head": 0 if hidden is None else hidden.stride(0),
            "hidden_key": 0 if hidden is None else hidden.stride(2),
            "added": added,
            "added_query": 0 if added is None else added.stride(0),
            "added_key": 0 if added is None else added.stride(1),
            "tgt_len": self.tgt_len,
            "src_len": self.src_len,
            "seed": seed,
            "dropout": dropout,
            "ORDER": order,
            "CAUSAL": masks.causal,
            "DROPOUT": dropout > 0,
            "HEAD_DIM": self.head_dim,
            "BLOCK_DIM": padded(self.head_dim),
        }

    def blocks(self, kernel: str) -> Blocks:
        return blocks_of(kernel, self.dtype, self.head_dim, self.arguments["added"] is not None)

    def programs(self, kernel: str) -> int:
        blocks = self.blocks(kernel)
        length, block = (self.src_len, blocks.keys) if kernel == "backward_keys" else (self.tgt_len, blocks.queries)
        return self.heads * -(-length // block)

    def __call__(
        self, kernel: str, query: Tensor, key: Tensor, value: Tensor, thresholds: Tensor, gains: Tensor, **tensors
    ) -> None:
        blocks = self.blocks(kernel)
        tensors = {"query": query, "key": key, "value": value, **tensors}
        strides: Dict[str, Any] = {}
        for name, tensor in tensors.items():
            if tensor.dim() == 3 and name != "table":
                strides[f"{name}_head"], strides[f"{name}_row"] = tensor.stride()[:2]
        with torch.cuda.device_of(query):  # no effect on a CPU
            getattr(_kernels(), kernel)[(self.programs(kernel),)](
                **tensors,
                **strides,
                **self.arguments,
                thresholds=thresholds.float().contiguous(),
                gains=gains.float().contiguous(),
                BLOCK_QUERIES=blocks.queries,
                BLOCK_KEYS=blocks.keys,
                **blocks.options(),
            )


def version() -> Optional[str]:
    """Triton's; None if it is missing, or older than ``FIRST_TRITON``."""
    if importlib.util.find_spec("triton") is None:
        return None
    import triton

    return triton.__version__ if tuple(map(int, triton.__version__.split(".")[:2])) >= FIRST_TRITON else None


@functools.lru_cache(maxsize=None)
def _kernels() -> Optional[ModuleType]:
    """The kernels; None without a Triton that they can use."""
    if version() is None:
        return None
    from . import triton_kernels

    return triton_kernels


@functools.lru_cache(maxsize=None)
def _runs_on(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether kernels run on this device: a new enough GPU, or a CPU with Triton's interpreter."""
    kernels = _kernels()
    if kernels is None:
        return False
    if kernels.INTERPRETED:
        return device.type == "cpu" and dtype != torch.bfloat16  # which the interpreter gets wrong
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device) >= FIRST_CAPABILITY
        and compiles(kernels, device)
    )


def compiles(kernels: ModuleType, device: torch.device) -> bool:
    """Whether a small kernel can be compiled and run, which also takes a C compiler."""
    written = torch.zeros(1, device=device)
    try:
        with torch.cuda.device_of(written):
            kernels.write_one[(1,)](written)
        return True
    except Exception as error:
        if backend() == "compiled":
            raise
        logger.warning(
            "attention runs without Triton, which is slower, as compiling a kernel failed: %s",
            str(error).strip().partition("\n")[0] or type(error).__name__,
        )
        return False
