#!/usr/bin/env python
"""Checks Triton's attention kernels against float64, and compiles them for GPUs that this machine need not have.

    python benchmarks/check_kernels.py cases --cases 200 --seed 1      # on a GPU, or interpreted on a CPU
    python benchmarks/check_kernels.py halves --length 512             # against plain PyTorch in the same dtype
    python benchmarks/check_kernels.py binaries --targets sm_80 sm_90 gfx942 --dtypes fp16 fp32 --head-dims 64 128

    cases      random shapes, masks, dropout, layouts and dtypes: output and all gradients
    halves     the error in each dtype, which may be at most twice that of plain PyTorch's attention
    binaries   registers, spills and shared memory of each kernel
"""

import argparse
import contextlib
import io
import itertools
import os
import random
import re
import sys
from dataclasses import dataclass
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple
from unittest import mock

import numpy
import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if __name__ == "__main__" and DEVICE.type == "cpu" and sys.argv[1:2] != ["binaries"]:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

from multimax_fairseq import attention as mapped  # noqa: E402
from multimax_fairseq.kernels import attention as kernels  # noqa: E402
from multimax_fairseq.kernels.attention import gpu  # noqa: E402
from multimax_fairseq.kernels.attention.call import Call  # noqa: E402
from multimax_fairseq.kernels.rows import Rows  # noqa: E402
from multimax_fairseq.mappings.multimax import multimax_formula  # noqa: E402

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
MOST_SHARED = {"cuda": 99 * 1024, "hip": 64 * 1024}  # NVIDIA's small GPUs; AMD's
RESULTS = ("output", "query", "key", "value", "thresholds", "gains")
INF, EPSILON = float("inf"), torch.finfo(torch.float32).eps

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


def with_gradients(function, inputs: Sequence[Tensor], upstream: Tensor, *arguments) -> List[Tensor]:
    """Output and gradients of all inputs; at order 0 those of thresholds and gains are zeros."""
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    output = function(*inputs, *arguments)
    grads = torch.autograd.grad(output, inputs, upstream.to(output.dtype), allow_unused=True)
    return [output.detach(), *(torch.zeros_like(i) if g is None else g for i, g in zip(inputs, grads))]


def full_mask(added: Optional[Tensor], causal: bool, tgt_len: int, src_len: int) -> Tensor:
    mask = torch.zeros(1, tgt_len, src_len, dtype=torch.float64, device=DEVICE)
    if causal:
        mask = mask + torch.full_like(mask, -INF).triu(1)
    return mask if added is None else mask + added.double()


# ---------------------------------------------------------------- random cases


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

    def laid_out(length: int) -> Tensor:
        spread = draw.choice([0.5, 1.0]) * head_dim**-0.25
        tensor = draw.choice([0.0, 1.0]) + spread * torch.randn(length, heads, head_dim + 3)
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
    inputs = [laid_out(length) for length in (tgt_len, src_len, src_len)]
    inputs += [torch.randn(order, 2, device=DEVICE), draw.choice([0.02, 0.2]) * torch.randn(order, 2, device=DEVICE)]
    dropout = draw.choice([0.0, 0.0, 0.1, 0.5])
    return Case(inputs, mask, causal, dropout, draw.getrandbits(63), laid_out(tgt_len))


def triton_results(case: Case) -> List[Tensor]:
    mask = None if case.mask is None else case.mask[None]

    def attend(query: Tensor, key: Tensor, value: Tensor, *numbers: Tensor) -> Tensor:
        rows = Rows("multimax", numbers, multimax_formula) if len(numbers[0]) else Rows("softmax")
        tensors, call = (query[None], key[None], value[None]), Call(rows, mask, case.causal, case.dropout)
        if not gpu.serves(*tensors, call):
            raise RuntimeError(f"Triton does not serve: {case}")
        return kernels.attend_by(gpu, mapped.attend, *tensors, call)[0]

    with mock.patch.object(kernels, "_seed", lambda: case.seed):
        return with_gradients(attend, case.inputs, case.upstream)


def exact_results(case: Case) -> Tuple[List[Tensor], List[Tuple[Tensor, Tensor]]]:
    """Output and gradients in float64, and the sizes of the terms that they sum.

    Two sizes for each: plain, and with each term multiplied by how much it amplifies a relative error of scores.
    """
    doubles = [tensor.detach().double() for tensor in case.inputs]
    query, key, value, thresholds, gains = doubles
    upstream, mask = case.upstream.double(), full_mask(case.mask, case.causal, *case.lengths)
    factors = dropout_factors((len(query), *case.lengths), case.dropout, case.seed).to(DEVICE)
    results = with_gradients(attention, doubles, upstream, mask, factors)

    scores = query @ key.mT + mask
    p = multimax_formula(scores, thresholds, gains)
    x = scores.masked_fill(scores == -INF, 0)
    score_sizes = 1 + query.abs() @ key.abs().mT + mask.masked_fill(mask == -INF, 0).abs()
    # upper bounds of |σ'|, and of each parameter's part in σ
    slope, jump, parts = torch.ones_like(x), torch.zeros_like(x), []
    for n, ((b, d), (gain_b, gain_d)) in enumerate(zip(thresholds, gains), start=1):
        for distance, gain in ((b - x, gain_b.abs()), (x - d, gain_d.abs())):
            slopes = gain * n * distance.clamp(min=0) ** (n - 1) * (distance > 0)
            # If a score lies at a threshold, rounding decides whether it has the first order's slope.
            jumps = gain * (n == 1) * (distance.abs() < EPSILON * score_sizes) / EPSILON
            slope, jump = slope + slopes, jump + jumps
            parts.append((slopes, jumps, distance.clamp(min=0) ** n))
    # The absolute error of a score becomes a relative error of its probability, and of its row's.
    errors = slope * score_sizes
    weights = p * (1 + errors + (p * errors).sum(-1, keepdim=True))
    grad_p = factors * (upstream.abs() @ value.abs().mT)

    def sizes(weights: Tensor, rounded: bool) -> List[Tensor]:
        terms = weights * (grad_p + (p * grad_p).sum(-1, keepdim=True)) + p * (weights * grad_p).sum(-1, keepdim=True)
        slope_terms = terms * (slope + rounded * jump)
        sums = [[(terms * (slopes + rounded * jumps)).sum(), (terms * power).sum()] for slopes, jumps, power in parts]
        return [
            (weights * factors) @ value.abs(),
            slope_terms @ key.abs(),
            slope_terms.mT @ query.abs(),
            (weights * factors).mT @ upstream.abs(),
            *(torch.stack(kind).view(gains.shape) for kind in zip(*sums)),
            *(() if parts else 2 * [gains]),
        ]

    return results, list(zip(sizes(p, False), sizes(weights, True)))


def case_errors(case: Case) -> Dict[str, float]:
    """The largest error of each result, in units of what rounding explains: below 1 is right."""
    dtype, largest = case.inputs[0].dtype, max(tensor.abs().max().item() for tensor in case.inputs[:3])
    largest = max(largest, case.upstream.abs().max().item())
    errors = {}
    for name, result, exact, (size, amplified) in zip(RESULTS, triton_results(case), *exact_results(case)):
        # fp32: a few roundings of every term; half precision: one of a factor of each product, and one of the result
        allowed = 4 * EPSILON * amplified + 1e-30
        if dtype != torch.float32 and name not in ("thresholds", "gains"):
            allowed = allowed + torch.finfo(dtype).eps * size
            if dtype == torch.float16:  # terms may be below its smallest number
                allowed = allowed + 2.0**-25 * (1 + max(case.lengths) * largest)
        error = (result.double() - exact).abs() / allowed
        errors[name] = error.max().item() if error.numel() else 0.0  # NaN stays NaN, which is not below 1
    return errors


def check_cases(count: int, seed: int, dtypes: Optional[Sequence[str]] = None) -> Iterator[Dict[str, Any]]:
    """Rows {case, errors, right} of random cases."""
    available = [d for d in DTYPES if DEVICE.type == "cuda" or d != "bf16"]  # the interpreter computes bf16 wrongly
    chosen = [DTYPES[name] for name in dtypes or available]
    draw = random.Random(seed)
    for _ in range(count):
        case = random_case(draw, chosen)
        errors = case_errors(case)
        yield {"case": str(case), "errors": errors, "right": all(error < 1 for error in errors.values())}


# ---------------------------------------------------------------- beside plain PyTorch


def check_halves(length: int, causal: bool, mean: float, dtype: torch.dtype, heads: int = 1) -> Dict[str, Any]:
    """Relative errors against float64 of each result, (Triton, plain PyTorch), for values with this mean."""
    torch.manual_seed(1)
    shape = heads, length, 64
    inputs = [torch.randn(shape) * 64**-0.25 for _ in range(2)] + [torch.randn(shape) + mean]
    inputs = [tensor.to(DEVICE, dtype) for tensor in inputs]
    inputs += [tensor.to(DEVICE) for tensor in (torch.randn(2, 2), 0.2 * torch.randn(2, 2))]
    case = Case(inputs, None, causal, 0.0, 0, torch.randn(shape).to(DEVICE, dtype))
    mask, factors = full_mask(None, causal, length, length), torch.ones(1, 1, 1, dtype=torch.float64, device=DEVICE)
    doubles = [tensor.double() for tensor in inputs]
    exact = with_gradients(attention, doubles, case.upstream.double(), mask, factors)
    plain = with_gradients(attention, inputs, case.upstream, mask, factors)
    errors = {
        name: tuple(((result.double() - e).norm() / e.norm()).item() for result in (ours, theirs))
        for name, ours, theirs, e in zip(RESULTS, triton_results(case), plain, exact)
    }
    name = f"{str(dtype)[6:]}, {length}{' causal' if causal else ''}, values of mean {mean:g}"
    return {"case": name, "errors": errors, "right": all(ours <= 2 * other for ours, other in errors.values())}


# ---------------------------------------------------------------- binaries

KERNELS = ("forward", "backward_queries", "backward_keys")
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
POINTERS_FP32 = ("thresholds", "gains", "mask", "peaks", "factors", "expecteds", "table")
VARIANTS = {  # arguments that need the most registers; without dropout; with an added mask
    "dropout": {"order": 2, "causal": True, "dropout": True, "mask": 1},
    "plain": {"order": 2, "causal": True, "dropout": False, "mask": 0},
    "added": {"order": 2, "causal": False, "dropout": True, "mask": 2},
}


def binary(kernel: str, target: str, dtype: str, head_dim: int, variant: str = "dropout") -> Dict[str, Any]:
    """A kernel's registers per thread, spilled bytes (AMD: registers), and bytes of shared memory.

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
    if name == "hip":
        registers, spilled = (
            int(re.search(rf"\.{field}:\s+(\d+)", compiled.asm["amdgcn"])[1])
            for field in ("vgpr_count", "vgpr_spill_count")
        )
    else:
        registers = int(re.search(r"Used (\d+) registers", log.getvalue())[1])
        spilled = sum(int(count) for count in re.findall(r"(\d+) bytes spill", log.getvalue()))
    return {
        "kernel": kernel, "target": target, "dtype": dtype, "head_dim": head_dim, "variant": variant,
        "blocks": list(blocks), "registers": registers, "spilled": spilled, "shared": compiled.metadata.shared,
        "right": spilled == 0 and compiled.metadata.shared <= MOST_SHARED[name],
    }  # fmt: skip


def check_binaries(targets, dtypes, head_dims, variants=("dropout",)) -> Iterator[Dict[str, Any]]:
    for target, dtype, head_dim, variant, kernel in itertools.product(targets, dtypes, head_dims, variants, KERNELS):
        yield binary(kernel, target, dtype, head_dim, variant)


# ---------------------------------------------------------------- what is printed


def show(row: Dict[str, Any]) -> None:
    verdict = "right" if row["right"] else "WRONG"
    if "kernel" in row:
        print("{target:8}{kernel:18}{dtype:6}{head_dim:4} {variant:8} blocks {blocks}  {registers} registers, "
              "{spilled} spilled, {shared:,} bytes shared: ".format(**row) + verdict, flush=True)  # fmt: skip
        return
    figures = []
    for name, error in row["errors"].items():
        figure = f"{error:.2f}" if isinstance(error, float) else "{:.1e} / {:.1e}".format(*error)
        figures.append(f"{name} {figure}")
    print(f"{row['case']}\n    {'  '.join(figures)}: {verdict}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    cases = commands.add_parser("cases")
    cases.add_argument("--cases", type=int, default=20)
    cases.add_argument("--seed", type=int, default=1)
    cases.add_argument("--dtypes", nargs="+", choices=DTYPES)
    halves = commands.add_parser("halves")
    halves.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp16", "fp32"])
    halves.add_argument("--length", type=int, default=512)
    halves.add_argument("--mean", type=float, default=4.0)
    halves.add_argument("--full", action="store_true", help="not causal")
    binaries = commands.add_parser("binaries")
    binaries.add_argument("--targets", nargs="+", default=list(TARGETS))
    binaries.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    binaries.add_argument("--head-dims", nargs="+", type=int, default=[64, 128])
    binaries.add_argument("--variants", nargs="+", choices=VARIANTS, default=["dropout"])
    args = parser.parse_args()
    if args.command == "cases":
        rows = check_cases(args.cases, args.seed, args.dtypes)
    elif args.command == "halves":
        rows = (check_halves(args.length, not args.full, args.mean, DTYPES[dtype]) for dtype in args.dtypes)
    else:
        rows = check_binaries(args.targets, args.dtypes, args.head_dims, args.variants)
    count = wrong = 0
    for row in rows:
        show(row)
        count, wrong = count + 1, wrong + (not row["right"])
    print(f"{count - wrong} of {count} right")
    sys.exit(int(wrong > 0))


if __name__ == "__main__":
    main()
