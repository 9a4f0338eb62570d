#!/usr/bin/env python
"""Triton's attention kernels: against float64 (for check_gpu.py), and as binaries for GPUs that are not there.

    python benchmarks/check_kernels.py --targets sm_80 sm_90 gfx942 --dtypes fp16 fp32 --head-dims 64 128

compiles them, and says what each spills of its registers, and its shared memory.
"""

import argparse
import contextlib
import io
import itertools
import random
import re
import sys
from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple
from unittest import mock

import numpy
import torch
from torch import Tensor

from multimax_fairseq import attention as mapped
from multimax_fairseq.kernels import attention as kernels
from multimax_fairseq.kernels.attention import gpu
from multimax_fairseq.kernels.attention.call import Call
from multimax_fairseq.kernels.rows import Rows
from multimax_fairseq.mappings.modulator import multimax_formula

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
MOST_SHARED = {"cuda": 99 * 1024, "hip": 64 * 1024}  # NVIDIA's small GPUs; AMD's
INF = float("inf")
Tensors = Dict[str, Tensor]

# ---------------------------------------------------------------- the oracle


def philox(counter: Sequence[numpy.ndarray], key: Tuple[int, int]) -> List[numpy.ndarray]:
    """Philox4x32-7 (Salmon et al. 2011) of broadcast uint32 counters: four words each."""
    words = [numpy.asarray(word, dtype=numpy.uint64) for word in counter]
    low, high = key
    for _ in range(7):
        first, second = (words[0] * 0xD2511F53), (words[2] * 0xCD9E8D57)
        words = [
            (second >> 32) ^ words[1] ^ low, second & 0xFFFFFFFF, (first >> 32) ^ words[3] ^ high, first & 0xFFFFFFFF
        ]  # fmt: skip
        low, high = (low + 0x9E3779B9) & 0xFFFFFFFF, (high + 0xBB67AE85) & 0xFFFFFFFF
    return words


def dropout_factors(shape: Tuple[int, int, int], dropout: float, seed: int) -> Tensor:
    """0 or 1 / (1 − dropout) for each probability, (heads, tgt_len, src_len)."""
    if not dropout:
        return torch.ones(shape, dtype=torch.float64)
    heads, queries, keys = numpy.ogrid[tuple(slice(size) for size in shape)]
    words = philox((keys, queries, heads, numpy.uint64(0)), (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF))[0]
    kept = (words >> 8) * 2.0**-24 >= numpy.float32(dropout)
    return torch.from_numpy(kept / (1 - dropout))


def attention(query, key, value, thresholds, gains, mask, factors) -> Tensor:
    """Attention by its formula: the oracle in float64, plain PyTorch in other dtypes."""
    scores = query @ key.transpose(1, 2) + mask.to(query.dtype)
    return (multimax_formula(scores, thresholds, gains) * factors.to(query.dtype)) @ value


def beside_plain(case: str, ours: Callable, plain: Callable, inputs: Tensors, upstream: Tensor) -> Dict[str, Any]:
    """Relative errors of output and gradients against ``plain`` in float64: (of ``ours``, of ``plain``).

    ``ours`` may have twice the error of ``plain``. Gradients of thresholds and gains, which are differences of large
    sums, may besides have 2e-4, all else 2e-5.
    """
    doubles = {name: tensor.double() for name, tensor in inputs.items()}
    found = [with_gradients(ours, inputs, upstream), with_gradients(plain, inputs, upstream)]
    exact = with_gradients(plain, doubles, upstream.double())
    errors, right = {}, True
    for name, expected in exact.items():
        size = max(expected.norm().item(), 1e-3 * exact["output"].norm().item(), 1e-30)
        errors[name] = tuple((results[name].double() - expected).norm().item() / size for results in found)
        floor = 2e-4 if name in ("thresholds", "gains") else 2e-5
        right = right and errors[name][0] <= 2 * errors[name][1] + floor  # false where one is NaN
    return {"case": case, "errors": errors, "right": right}


def with_gradients(function: Callable, inputs: Tensors, upstream: Tensor) -> Tensors:
    """Output and gradients of all inputs, by name; zeros for inputs of no use, thresholds of order 0, say."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs.values()]
    output = function(*leaves)
    grads = torch.autograd.grad(output, leaves, upstream.to(output.dtype), allow_unused=True, materialize_grads=True)
    return {"output": output.detach(), **dict(zip(inputs, grads))}


def full_mask(added: Optional[Tensor], causal: bool, tgt_len: int, src_len: int) -> Tensor:
    mask = torch.zeros(1, tgt_len, src_len, dtype=torch.float64, device=DEVICE)
    if causal:
        mask = mask + torch.full_like(mask, -INF).triu(1)
    return mask if added is None else mask + added.double()


# ---------------------------------------------------------------- cases


@dataclass
class Case:
    """The arguments of one call of attention; tensors on ``DEVICE``."""

    inputs: List[Tensor]  # query, key, value, thresholds, gains
    mask: Optional[Tensor]  # (heads | 1, tgt_len | 1, src_len), to be added
    causal: bool
    dropout: float
    seed: int
    upstream: Tensor

    @property
    def lengths(self) -> Tuple[int, int]:
        return self.inputs[0].size(1), self.inputs[1].size(1)

    def __str__(self) -> str:
        heads, tgt_len, head_dim = self.inputs[0].shape
        masks = ["causal"] if self.causal else []
        masks += [] if self.mask is None else [" × ".join(map(str, self.mask.shape))]
        return (
            f"{str(self.inputs[0].dtype)[6:]}, {heads} × {tgt_len} × {self.lengths[1]}, head_dim {head_dim}, "
            f"order {len(self.inputs[4])}, dropout {self.dropout}, masks: {' '.join(masks) or 'none'}"
        )


def random_case(draw: random.Random, dtypes: Sequence[torch.dtype], longest: int = 80) -> Case:
    """Draw a case of any kind, with lengths of at most ``longest``."""
    torch.manual_seed(draw.getrandbits(32))
    heads, order, dtype = draw.randint(1, 3), draw.randint(0, 2), draw.choice(dtypes)
    lengths = [n for n in (1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129) if n <= longest]
    tgt_len, src_len = (draw.choice([draw.choice(lengths), draw.randint(1, longest)]) for _ in range(2))
    head_dim = draw.choice([1, 3, 8, 16, 20, 33, 64, 80, 128])
    causal = draw.random() < 0.5
    if causal:
        tgt_len, src_len = sorted((tgt_len, src_len)) if draw.random() < 0.5 else (tgt_len, tgt_len)

    def laid_out(length: int, mean: float = 0.0, spread: float = 1.0) -> Tensor:
        tensor = mean + spread * torch.randn(length, heads, head_dim + 3)
        way = draw.choice(["length first", "head first", "with gaps", "transposed"])
        tensor = tensor[:, :, :head_dim].to(DEVICE, dtype).transpose(0, 1)  # with gaps between rows
        if way == "transposed":
            return tensor.mT.contiguous().mT
        if way == "with gaps":
            return tensor
        return tensor.contiguous() if way == "head first" else tensor.transpose(0, 1).contiguous().transpose(0, 1)

    mask = None
    if draw.random() < 0.5:
        shown = torch.tensor([draw.choice([0, 1, src_len, draw.randint(0, src_len)]) for _ in range(heads)])
        mask = torch.zeros(heads, 1, src_len).masked_fill(torch.arange(src_len) >= shown[:, None, None], -INF)
    if draw.random() < 0.4:
        scores = torch.randn(draw.choice([1, heads]), draw.choice([1, tgt_len]), src_len)
        if draw.random() < 0.5:
            scores = scores.masked_fill(torch.rand_like(scores) < 0.3, -INF)
        mask = scores if mask is None else mask + scores
    mask = None if mask is None else mask.to(DEVICE)
    spread = draw.choice([0.5, 1.0, 1.5]) * head_dim**-0.25
    query, key = laid_out(tgt_len, 0.0, spread), laid_out(src_len, 0.0, spread)
    inputs = [query, key, laid_out(src_len, mean=draw.choice([0.0, 1.0]))]
    inputs += [torch.randn(order, 2, device=DEVICE), draw.choice([0.02, 0.2]) * torch.randn(order, 2, device=DEVICE)]
    dropout = draw.choice([0.0, 0.0, 0.1, 0.5])
    return Case(inputs, mask, causal, dropout, draw.getrandbits(63), laid_out(tgt_len))


def long_case(dtype: torch.dtype, length: int, causal: bool, mean: float) -> Case:
    """Two heads of this length, with values of this mean: large sums, of which half precision loses more."""
    torch.manual_seed(1)
    shape = 2, length, 64
    inputs = [torch.randn(shape) * 64**-0.25, torch.randn(shape) * 64**-0.25, torch.randn(shape) + mean]
    inputs = [tensor.to(DEVICE, dtype) for tensor in inputs]
    inputs += [torch.randn(2, 2).to(DEVICE), 0.2 * torch.randn(2, 2).to(DEVICE)]
    return Case(inputs, None, causal, 0.0, 0, torch.randn(shape).to(DEVICE, dtype))


def check(case: Case) -> Dict[str, Any]:
    """Triton's attention of a case :func:`beside_plain`."""
    added = None if case.mask is None else case.mask[None]
    mask = full_mask(case.mask, case.causal, *case.lengths)
    factors = dropout_factors((len(case.upstream), *case.lengths), case.dropout, case.seed).to(DEVICE)

    def triton(query: Tensor, key: Tensor, value: Tensor, *numbers: Tensor) -> Tensor:
        rows = Rows("multimax", numbers, multimax_formula) if len(numbers[0]) else Rows("softmax")
        tensors, call = (query[None], key[None], value[None]), Call(rows, added, case.causal, case.dropout)
        if not gpu.serves(*tensors, call):
            raise RuntimeError(f"Triton does not serve: {case}")
        return kernels.attend_by(gpu, mapped.attend, *tensors, call)[0]

    with mock.patch.object(kernels, "_seed", lambda: case.seed):
        inputs = dict(zip(("query", "key", "value", "thresholds", "gains"), case.inputs))
        return beside_plain(str(case), triton, lambda *given: attention(*given, mask, factors), inputs, case.upstream)


# ---------------------------------------------------------------- binaries

KERNELS = ("forward", "backward_queries", "backward_keys")
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
POINTERS_FP32 = ("thresholds", "gains", "mask", "peaks", "factors", "expecteds", "table")
VARIANTS = {  # arguments that need the most registers; without dropout; with an added mask
    "dropout": {"order": 2, "causal": True, "dropout": True, "mask": 1},
    "plain": {"order": 2, "causal": True, "dropout": False, "mask": 0},
    "added": {"order": 2, "causal": False, "dropout": True, "mask": 2},
}


def binary(target: str, dtype: str, head_dim: int, variant: str, kernel: str) -> Dict[str, Any]:
    """A kernel's spilled bytes (AMD: registers), and its bytes of shared memory.

    Compiled as by a call of :func:`attend` with contiguous tensors whose rows are multiples of 16 bytes.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from multimax_fairseq.kernels.attention import gpu_kernels

    options = VARIANTS[variant]
    function = getattr(gpu_kernels, kernel)
    blocks = gpu.blocks_of(kernel, DTYPES[dtype], head_dim, options["mask"] == 2)
    constants = {
        "ORDER": options["order"], "CAUSAL": options["causal"], "DROPOUT": options["dropout"],
        "HEAD_DIM": head_dim, "BLOCK_DIM": gpu.padded(head_dim), "MASK": options["mask"],
        "BLOCK_QUERIES": blocks.queries, "BLOCK_KEYS": blocks.keys, **({} if options["mask"] else {"mask": None}),
    }  # fmt: skip
    signature, attributes = {}, {}
    for number, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name == "seed":
            signature[name] = "i64"
        elif name == "dropout":
            signature[name] = "fp32"
        elif name in gpu_kernels.VARIABLE:
            signature[name] = "i32"
        else:
            is_stride = name.endswith(("_head", "_row"))
            signature[name] = "i32" if is_stride else "*fp32" if name in POINTERS_FP32 else f"*{dtype}"
            attributes[(number,)] = [["tt.divisibility", 16]]
    name, width = ("hip", 64) if target.startswith("gfx") else ("cuda", 32)
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)
    log = io.StringIO()
    with triton.knobs.nvidia.scope(), triton.knobs.compilation.scope(), contextlib.redirect_stdout(log):
        triton.knobs.nvidia.dump_ptxas_log = triton.knobs.compilation.always_compile = True
        compiled = triton.compile(
            source,
            target=GPUTarget(name, target if name == "hip" else int(target[3:]), width),
            options=blocks.options(),
        )
    counts = (
        re.findall(r"\.vgpr_spill_count:\s+(\d+)", compiled.asm["amdgcn"]) if name == "hip"
        else re.findall(r"(\d+) bytes spill", log.getvalue())
    )  # fmt: skip
    assert counts, "there is no figure in what the compiler has written"
    spilled = sum(map(int, counts))
    return {
        "kernel": kernel, "target": target, "dtype": dtype, "head_dim": head_dim, "variant": variant,
        "blocks": list(blocks), "spilled": spilled, "shared": compiled.metadata.shared,
        "right": spilled == 0 and compiled.metadata.shared <= MOST_SHARED[name],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--head-dims", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["dropout"])
    args = parser.parse_args()
    wrong = 0
    for chosen in itertools.product(args.targets, args.dtypes, args.head_dims, args.variants, KERNELS):
        row = binary(*chosen)
        verdict = "right" if row["right"] else "WRONG"
        print("{target:8}{kernel:18}{dtype:6}{head_dim:4} {variant:8} blocks {blocks}  {spilled} spilled, "
              "{shared:,} bytes shared: ".format(**row) + verdict, flush=True)  # fmt: skip
        wrong += not row["right"]
    sys.exit(int(wrong > 0))


if __name__ == "__main__":
    main()
