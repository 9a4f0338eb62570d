"""Measures speed and memory, compared with what fairseq and PyTorch ship.

    python benchmarks/benchmark.py                                   # mapping, attention, step, output
    python benchmarks/benchmark.py mapping attention --rounds 21

The sides of a comparison take turns in one process. Its figure is the median of their ratios to the first side of the
same round: below 1 is faster, or less memory. Unlike times, ratios are reliable on a machine that is not quite idle.

    mapping    scores → probabilities, against torch's softmax: MultiMax, its formula in eager PyTorch, the others,
               and those of the package entmax
    attention  the part of fairseq's module between its projections; the module's peak memory
    step       a training step of the IWSLT'14 and WikiText-103 models, against fairseq's own; IWSLT'14 with every
               mapping in attention
    output     output layer and loss at 267,744 types, against fairseq's cross-entropy: time, and peak memory above
               weights and their gradients; sparsemax, entmax15 and entmax (α learned) with entmax_loss

A GPU is used if there is one. On a CPU the process keeps freed memory, as in the recipes (GLIBC_TUNABLES in
examples/train.sh), except in `output`; otherwise the system's paging would be measured too, and the figures would
flip between two values.
"""

import ctypes
import gc
import json
import logging
import multiprocessing
import os
import platform
import statistics
import time
import warnings
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Tuple

import entmax as entmax_package
import torch
import torch.nn.functional as F
from fairseq import options, tasks, utils
from fairseq.data import Dictionary
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.modules import MultiheadAttention
from torch import Tensor, nn

import multimax_fairseq.models  # noqa: F401  registers the models
from multimax_fairseq.attention import mapped_attention
from multimax_fairseq.kernels.loss import chunked_cross_entropy, chunked_entmax_loss
from multimax_fairseq.mappings import BUILT_IN, MAPPINGS, SPARSE, MultiMax, build_mapping, modulate
from multimax_fairseq.mappings.modulator import multimax_formula
from multimax_fairseq.modules import MappedMultiheadAttention
from multimax_fairseq.tools import (
    ArgumentParser,
    UserError,
    check_output,
    errors_in_a_line,
    import_user_dir,
    positive,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Rows = List[Dict[str, Any]]
Sides = Dict[str, Callable[[], Any]]

# ---------------------------------------------------------------- measuring


SECONDS = 20.0  # for a comparison: slow sides run fewer rounds, but at least two


def compare(case: str, sides: Sides, rounds: int) -> Rows:
    """One row for each side: its median time, and its median ratio to the first side of the same round."""
    seconds: Dict[str, List[float]] = {name: [] for name in sides}
    start, number = time.perf_counter(), -1  # the first round compiles
    while number < 2 or number < rounds and time.perf_counter() - start < SECONDS:
        for name, side in sides.items():
            spent = timed(side)
            if spent < 0.1:  # again, as the side before it may have emptied the caches
                spent = timed(side)
            if number >= 0:
                seconds[name].append(spent)
        number += 1
    return [row_of(case, name, seconds[name], next(iter(seconds.values()))) for name in sides]


def timed(side: Callable[[], Any]) -> float:
    """Seconds."""
    synchronise()
    start = time.perf_counter()
    side()
    synchronise()
    return time.perf_counter() - start


def row_of(case: str, side: str, seconds: List[float], of_first: List[float]) -> Dict[str, Any]:
    ratio = statistics.median(own / first for own, first in zip(seconds, of_first))
    return {"case": case, "side": side, "ratio": ratio, "milliseconds": 1e3 * statistics.median(seconds)}


def keep_memory(keep: bool) -> None:
    """Make the GNU C library keep freed memory, or return it as by default; no effect with other libraries."""
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        m_trim_threshold, m_mmap_threshold, m_mmap_max = -1, -3, -4  # malloc.h
        library.mallopt(m_trim_threshold, -1 if keep else 2**26)  # -1: never; else the limit of its own adjustment
        library.mallopt(m_mmap_threshold, 2**25)
        library.mallopt(m_mmap_max, 0 if keep else 65_536)
        library.malloc_trim(0)


def synchronise() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def peak_bytes(side: Callable[[], Any]) -> int:
    """The peak of memory in use during a call, above that before it."""
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        side()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # Linux: reset the peak of resident memory
    before = resident("VmRSS")
    side()
    return resident("VmHWM") - before


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def in_new_process(function: Callable[..., int], *arguments: Any) -> int:
    """Call ``function(*arguments)`` in a new process, with fresh memory."""
    with multiprocessing.get_context("spawn").Pool(1, torch.set_num_threads, [torch.get_num_threads()]) as pool:
        return pool.apply(function, arguments)


def compare_memory(case: str, measure: Callable[..., int], sides: List[str], *arguments: Any) -> Rows:
    """Like :func:`compare`, for the bytes that ``measure(side, *arguments)`` returns."""
    peaks = {side: in_new_process(measure, side, *arguments) for side in sides}
    first = peaks[sides[0]]
    return [
        {"case": case, "side": side, "ratio": peak / first, "megabytes": peak / 2**20} for side, peak in peaks.items()
    ]


# ---------------------------------------------------------------- mapping


def benchmark_mapping(rounds: int) -> Iterator[Rows]:
    for shape in ((512, 32, 32), (32, 512, 512)):
        for masked in (False, True):
            scores = torch.randn(shape, device=DEVICE)
            if masked:
                scores += future_mask(shape[-1])
            upstream = torch.randn(shape, device=DEVICE)
            sides = {name: mapping_sides(mapping, scores, upstream) for name, mapping in mappings().items()}
            case = f"{shape}{' causal' if masked else ''}"
            yield compare(f"{case} forward", {name: forward for name, (forward, _) in sides.items()}, rounds)
            yield compare(f"{case} forward+backward", {name: both for name, (_, both) in sides.items()}, rounds)


def mapping_sides(mapping: Callable[[Tensor], Tensor], scores: Tensor, upstream: Tensor) -> Tuple[Callable, Callable]:
    """Forward alone, and forward with backward to the scores and the mapping's parameters."""
    wanted = [scores.clone().requires_grad_(), *(mapping.parameters() if isinstance(mapping, nn.Module) else ())]

    def forward() -> None:
        with torch.no_grad():
            mapping(wanted[0])

    return forward, lambda: torch.autograd.grad(mapping(wanted[0]), wanted, upstream)


class Formula(MultiMax):
    """MultiMax as it is written, left to autograd."""

    def forward(self, scores: Tensor) -> Tensor:
        return multimax_formula(scores, self.thresholds, self.gains)


def mappings() -> Dict[str, Callable[[Tensor], Tensor]]:
    modules = {
        "multimax": MultiMax(),
        "multimax, formula": Formula(),
        "sparsemax": build_mapping("sparsemax"),
        "entmax15": build_mapping("entmax15"),
        "entmax, α = 1.5": build_mapping("entmax", alpha=1.5),
        "entmax, α = 1.3": build_mapping("entmax", alpha=1.3),
        "entmax, learned": build_mapping("entmax", alpha="learned"),
        "evsoftmax": build_mapping("evsoftmax"),
        **{name: build_mapping(name) for name in MAPPINGS if name not in BUILT_IN},  # from --user-dir
        "sparsemax, package": entmax_package.Sparsemax(),
        "entmax15, package": entmax_package.Entmax15(),
        "entmax, α = 1.5, package": entmax_package.EntmaxBisect(1.5),
    }
    softmax = {"torch softmax": lambda scores: scores.softmax(-1)}
    return softmax | {name: module.to(DEVICE) for name, module in modules.items()}


# ---------------------------------------------------------------- attention

HEADS, WIDTH = 8, 512
ATTENTION_SIZES = (4, 512), (2, 2_048)


def benchmark_attention(rounds: int) -> Iterator[Rows]:
    for dropout in (0.0, 0.1):
        for bsz, length in ATTENTION_SIZES:
            case = f"{bsz} × {length} tokens, causal, dropout {dropout}, forward+backward"
            yield compare(f"core, {case}", attention_core(bsz, length, dropout=dropout), rounds)
    for heads in (1, 3):  # with few heads, threads have to share one
        for _, length in ATTENTION_SIZES:
            case = f"core, {heads} head{'s' * (heads > 1)} × {length} tokens, causal, forward+backward"
            yield compare(case, attention_core(1, length, heads), rounds)
    for bsz, length in (*ATTENTION_SIZES, (1, 8_192)):
        case = f"module, {bsz} × {length} tokens, peak"
        yield compare_memory(case, module_peak, ["stock", *MAPPINGS], bsz, length)


def attention_core(
    bsz: int, length: int, heads: int = HEADS, dropout: float = 0.0, dtype: torch.dtype = torch.float32
) -> Sides:
    """Attention between the projections; stock fairseq uses torch's scaled dot-product attention, with its mask."""
    shape = length, bsz, heads, WIDTH // HEADS
    # as from projections: length first in memory; scores have standard deviation 2
    drawn = [torch.randn(shape, device=DEVICE, dtype=dtype).permute(1, 2, 0, 3) for _ in range(4)]
    inputs, upstream = [(tensor / 2).requires_grad_() for tensor in drawn[:3]], drawn[3]
    mask = future_mask(length).to(dtype)

    def stock() -> None:
        output = F.scaled_dot_product_attention(*inputs, mask, dropout, scale=1.0)
        torch.autograd.grad(output, inputs, upstream)

    def side(name: str) -> Callable[[], None]:
        mapping = build_mapping(name).to(DEVICE)

        def mapped() -> None:
            output = mapped_attention(*inputs, mapping, None, dropout, is_causal=True, scale=1.0)
            torch.autograd.grad(output, (*inputs, *mapping.parameters()), upstream)

        return mapped

    return {"stock": stock, **{name: side(name) for name in MAPPINGS}}


def attention(name: str) -> nn.Module:
    module = MultiheadAttention(WIDTH, HEADS, self_attention=True).to(DEVICE)
    if name != "stock":
        module = MappedMultiheadAttention.adopt(module, build_mapping(name).to(DEVICE), "decoder")
    return module


def future_mask(length: int) -> Tensor:
    return torch.full((length, length), float("-inf"), device=DEVICE).triu_(1)


def module_peak(name: str, bsz: int, length: int) -> int:
    module = attention(name)
    mask = future_mask(length)

    def run(length: int) -> None:
        inputs = torch.randn(length, bsz, WIDTH, device=DEVICE, requires_grad=True)
        module(inputs, inputs, inputs, attn_mask=mask[:length, :length], need_weights=False)[0].sum().backward()

    run(256)  # compiles, and allocates the weights' gradients
    return peak_bytes(lambda: run(length))


# ---------------------------------------------------------------- training step


def benchmark_step(rounds: int) -> Iterator[Rows]:
    sides = {"stock": translation_step(""), **{
        name: translation_step("multimax_", "--attention-mapping", name) for name in MAPPINGS if name != "softmax"
    }}  # fmt: skip
    sides["entmax, learned"] = translation_step(
        "multimax_", "--attention-mapping", "entmax", "--entmax-alpha", "learned"
    )
    yield compare("IWSLT'14, 64 × 24 tokens", sides, rounds)
    for bsz, length, dropout in ((4, 512, 0.0), (4, 512, 0.1), (2, 2_048, 0.0)):
        sides = language_model_sides(bsz, length, "--attention-dropout", dropout)
        yield compare(f"language model, {bsz} × {length} tokens, attention dropout {dropout}", sides, rounds)


def language_model_sides(bsz: int, length: int, *chosen: Any) -> Sides:
    """A training step of stock fairseq, with each mapping, and of softmax with a learned scale."""
    sides = {"stock": language_model_step("", bsz, length, *chosen)}
    for name in MAPPINGS:
        options = ["--attention-scale", "learned"] if name == "softmax" else []
        step = language_model_step("multimax_", bsz, length, "--attention-mapping", name, *options, *chosen)
        sides[" ".join([name, *options[1:]])] = step
    return sides


def words(count: int) -> Dictionary:
    dictionary = Dictionary()
    for number in range(count - len(dictionary)):
        dictionary.add_symbol(f"word{number}")
    return dictionary


def arguments_of(*arguments: Any) -> Any:
    parser = options.get_training_parser()
    return options.parse_args_and_arch(parser, [str(argument) for argument in arguments])


def translation_step(prefix: str, *chosen: str) -> Callable[[], None]:
    args = arguments_of(
        "none", "--arch", f"{prefix}transformer_iwslt_de_en", "--share-decoder-input-output-embed",
        "--dropout", 0.3, "--criterion", "label_smoothed_cross_entropy", "--label-smoothing", 0.1,
        *chosen,
    )  # fmt: skip
    task = tasks.TASK_REGISTRY["translation"](convert_namespace_to_omegaconf(args).task, words(8_848), words(6_632))
    source, target = (torch.randint(4, 6_000, (64, 24), device=DEVICE) for _ in range(2))
    lengths = torch.full((64,), 24, device=DEVICE)
    net_input = {"src_tokens": source, "src_lengths": lengths, "prev_output_tokens": target}
    return step_of(task, args, {"net_input": net_input, "target": target, "ntokens": target.numel()})


def language_model_step(prefix: str, bsz: int, length: int, *chosen: Any) -> Callable[[], None]:
    args = arguments_of(
        "none", "--task", "language_modeling", "--arch", f"{prefix}transformer_lm", "--decoder-layers", 6,
        "--decoder-embed-dim", 512, "--decoder-ffn-embed-dim", 2_048, "--decoder-attention-heads", 8,
        "--share-decoder-input-output-embed", "--dropout", 0.1, "--tokens-per-sample", length,
        "--criterion", "cross_entropy", *chosen,
    )  # fmt: skip
    args.max_target_positions = length
    dictionary = words(6_000)
    task = tasks.TASK_REGISTRY["language_modeling"](args, dictionary, dictionary, targets=["future"])
    source, target = (torch.randint(4, 6_000, (bsz, length), device=DEVICE) for _ in range(2))
    lengths = torch.full((bsz,), length, device=DEVICE)
    net_input = {"src_tokens": source, "src_lengths": lengths}
    return step_of(task, args, {"net_input": net_input, "target": target, "ntokens": target.numel()})


def step_of(task: Any, args: Any, sample: Dict[str, Any]) -> Callable[[], None]:
    """Forward, backward and an update."""
    torch.manual_seed(1)
    cfg = convert_namespace_to_omegaconf(args)
    model, criterion = task.build_model(cfg.model).to(DEVICE).train(), task.build_criterion(cfg.criterion)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-5)

    def step() -> None:
        optimizer.zero_grad()
        criterion(model, sample)[0].backward()
        optimizer.step()

    return step


# ---------------------------------------------------------------- output layer

TYPES = 267_744


def benchmark_output(rounds: int) -> Iterator[Rows]:
    for tokens in (512, 2_048):
        for mapping in ("softmax", "multimax"):
            case = f"{tokens:,} tokens × {TYPES:,} types, {mapping}"
            names = ["stock", "chunked", *(SPARSE if mapping == "softmax" else ())]
            sides = {name: output_side(name, mapping, tokens)[0] for name in names}
            yield compare(f"{case}, forward+backward", sides, max(rounds // 4, 3))
            del sides
            yield compare_memory(f"{case}, peak", output_peak, names, mapping, tokens)


def output_side(name: str, mapping: str, tokens: int) -> Tuple[Callable[[], None], Tuple[Tensor, ...]]:
    """A projection and its loss, forward and backward, and the tensors with gradients; entmax_loss for ``SPARSE``."""
    torch.manual_seed(0)
    features = torch.randn(tokens, WIDTH, device=DEVICE, requires_grad=True)
    weight = nn.Parameter(torch.randn(TYPES, WIDTH, device=DEVICE) * WIDTH**-0.5)
    targets = torch.randint(4, TYPES, (tokens,), device=DEVICE)
    parameters = tuple(MultiMax().to(DEVICE).parameters()) if mapping == "multimax" else ()  # thresholds, gains
    learned = features, weight, *parameters

    def stock() -> None:
        logits = F.linear(features, weight)
        if parameters:
            logits = modulate(logits, *parameters)
        F.nll_loss(utils.log_softmax(logits, dim=-1), targets, reduction="sum").backward()

    def chunked() -> None:
        chunked_cross_entropy(features, weight, targets, None, *(parameters or (None, None))).loss.backward()

    if name not in SPARSE:
        return {"stock": stock, "chunked": chunked}[name], learned
    sparse = build_mapping(name, **({"alpha": "learned"} if name == "entmax" else {})).to(DEVICE)

    def sparse_loss() -> None:
        chunked_entmax_loss(features, weight, targets, sparse, sparse.alpha).loss.backward()

    return sparse_loss, learned


def output_peak(name: str, mapping: str, tokens: int) -> int:
    output_side(name, mapping, 64)[0]()  # compiles
    side, learned = output_side(name, mapping, tokens)
    return peak_bytes(side) - sum(tensor.numel() * tensor.element_size() for tensor in learned)  # their gradients


# ---------------------------------------------------------------- what is printed and written


def show(rows: Rows) -> None:
    figures = [key for key in rows[0] if key not in ("case", "side", "ratio")]
    print(f"\n{rows[0]['case']}")
    for row in rows:
        rest = "  ".join(f"{row[key]:12,.2f} {key}" for key in figures)
        print(f"  {row['side']:20}{row['ratio']:8.2f} ×  {rest}", flush=True)


def machine() -> Dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"CPU, {platform.machine()}",
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def main() -> None:
    sections = {"mapping": benchmark_mapping, "attention": benchmark_attention, "step": benchmark_step,
                "output": benchmark_output}  # fmt: skip
    parser = ArgumentParser(__doc__)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of: {', '.join(sections)}")
    parser.add_argument("--rounds", type=positive, default=15, help="rounds of a comparison, at most (15)")
    parser.add_argument("--threads", type=positive, help="threads on a CPU (what PyTorch takes)")
    parser.add_argument("--json", type=Path, help="write all figures here too")
    parser.add_argument("--user-dir", type=Path, help="a folder with mappings of your own, for mapping")
    args = parser.parse_args()
    chosen = args.sections or list(sections)
    with errors_in_a_line():
        import_user_dir(args.user_dir)
        if args.json:
            check_output(args.json)
        for section in set(chosen) - set(sections):
            raise UserError(f"there is no section {section!r}; choose from: {', '.join(sections)}")
    logging.getLogger().setLevel(logging.WARNING)
    warnings.simplefilter("ignore")  # fairseq, torch and hydra warn about each other
    if args.threads:
        torch.set_num_threads(args.threads)

    results = {"machine": machine(), "rows": []}
    print(results["machine"])
    for section in chosen:
        keep_memory(section != "output")  # its tensors of gigabytes would leave holes in the kept memory
        for rows in sections[section](args.rounds):
            show(rows)
            results["rows"] += [{"section": section, **row} for row in rows]
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
