"""The checks that check_gpu.sh runs; see there."""

import argparse
import json
import logging
import os
import random
import re
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List

import torch

if __name__ == "__main__" and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import check_kernels  # noqa: E402
from check_kernels import DEVICE, DTYPES  # noqa: E402
from torch import Tensor  # noqa: E402

from multimax_fairseq.kernels.attention import gpu  # noqa: E402
from multimax_fairseq.kernels.loss import chunked_cross_entropy  # noqa: E402
from multimax_fairseq.mappings import modulate  # noqa: E402
from multimax_fairseq.mappings.modulator import modulate_formula  # noqa: E402
from multimax_fairseq.tools import check_output, errors_in_a_line, replacing  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS, PLUGIN = ROOT / "scripts", ROOT / "multimax_fairseq"
Rows = Iterator[Dict[str, Any]]  # "check" and "figure" to print; "right": a bool, or None for no verdict

# ---------------------------------------------------------------- kernels


def check_attention(short: bool) -> Rows:
    """Triton's attention: random cases, and long ones with large values."""
    if gpu.version() is None:
        yield {"check": "attention in Triton", "figure": "Triton is not installed, or too old", "right": None}
        return
    on_gpu = DEVICE.type == "cuda"
    count = 40 if on_gpu else 1 if short else 6
    lengths = [(512, True, 4.0), (512, False, 1.0), (1_100, True, 4.0)]
    if not on_gpu:
        lengths = [] if short else [(128, True, 4.0)]
    for dtype in DTYPES if on_gpu else ("fp32", "fp16"):  # the interpreter gets bf16 wrong
        draw = random.Random(1)
        cases = [check_kernels.random_case(draw, [DTYPES[dtype]]) for _ in range(count)]
        cases += [check_kernels.long_case(DTYPES[dtype], *kind) for kind in lengths]
        rows = [check_kernels.check(case) for case in cases]
        wrong = [row for row in rows if not row["right"]]
        yield {
            "check": f"attention in Triton, {dtype}, {len(rows)} cases beside plain PyTorch",
            "figure": f"{len(wrong)} with more than twice its error",
            "right": not wrong,
            "rows": rows,
        }


def check_compiled(short: bool) -> Rows:
    """The kernels of PyTorch's compiler: σ of a vocabulary and the chunked loss, beside their formulas."""
    for dtype in DTYPES if DEVICE.type == "cuda" else ["fp32"]:
        torch.manual_seed(1)
        drawn = 2 * torch.randn(64, 300), torch.randn(100, 64), torch.randn(5_000, 64) / 8
        scores, features, weight = (tensor.to(DEVICE, DTYPES[dtype]) for tensor in drawn)
        numbers = {"thresholds": torch.randn(2, 2, device=DEVICE), "gains": 0.1 * torch.randn(2, 2, device=DEVICE)}
        targets = torch.randint(5_000, (100,), device=DEVICE)

        def chunked(features: Tensor, weight: Tensor, *numbers: Tensor, targets: Tensor = targets) -> Tensor:
            return chunked_cross_entropy(features, weight, targets, None, *numbers, chunk_tokens=32).loss

        def whole(features: Tensor, weight: Tensor, *numbers: Tensor, targets: Tensor = targets) -> Tensor:
            logits = features @ weight.t()
            logits = modulate_formula(logits.to(torch.promote_types(logits.dtype, torch.float32)), *numbers)
            return torch.nn.functional.cross_entropy(logits, targets, reduction="sum")

        upstream, one = torch.randn(64, 300, device=DEVICE), torch.ones((), device=DEVICE)
        for name, ours, plain, inputs, grad in (
            ("σ", modulate, modulate_formula, {"scores": scores}, upstream),
            ("chunked cross-entropy", chunked, whole, {"features": features, "weight": weight}, one),
        ):
            row = check_kernels.beside_plain(f"{name}, {dtype}", ours, plain, inputs | numbers, grad)
            largest = max(error for error, _ in row["errors"].values())
            yield {"check": row["case"], "figure": f"error {largest:.1e}", **row}


# ---------------------------------------------------------------- speed


def check_speed(short: bool) -> Rows:
    """The benchmark: figures without a verdict."""
    import benchmark

    rounds = 5 if short else 15
    for dtype in DTYPES:
        for bsz, length in ((4, 512), (2, 2_048)):
            sides = benchmark.attention_core(bsz, length, dtype=DTYPES[dtype])
            yield from speed_rows(
                benchmark.compare(f"attention beside SDPA, {dtype}, {bsz} × {length}", sides, rounds)
            )
    for bsz, length in ((4, 512), (2, 2_048)):
        sides = benchmark.language_model_sides(bsz, length)
        yield from speed_rows(benchmark.compare(f"step beside stock fairseq, fp32, {bsz} × {length}", sides, rounds))


def speed_rows(rows: List[Dict[str, Any]]) -> Rows:
    for row in rows[1:]:
        yield {"check": row["case"], "figure": f"{row['ratio']:.2f} × ({row['milliseconds']:.2f} ms)", "right": None}


# ---------------------------------------------------------------- training

MODEL = [
    "--task", "language_modeling", "--arch", "multimax_transformer_lm", "--decoder-layers", 2,
    "--decoder-embed-dim", 64, "--decoder-input-dim", 64, "--decoder-output-dim", 64, "--decoder-ffn-embed-dim", 64,
    "--decoder-attention-heads", 2, "--share-decoder-input-output-embed", "--output-mapping", "multimax",
    # no dropout, so that every precision computes the same: dropout drawn on the GPU may differ
    "--dropout", 0, "--criterion", "chunked_cross_entropy",
]  # fmt: skip
TRAINING = [
    "--tokens-per-sample", 256, "--sample-break-mode", "none", "--max-tokens", 1024, "--optimizer", "adam",
    "--lr", 2e-3, "--lr-scheduler", "inverse_sqrt", "--warmup-updates", 10, "--seed", 1, "--num-workers", 0,
    "--no-save", "--disable-validation", "--log-format", "json", "--log-interval", 1, "--fp16-init-scale", 4,
]  # fmt: skip
# Largest relative difference from the fp32 losses, over all updates. Half precision rounds differently, and updates
# amplify that; a loss that does not fall, or is NaN, is far beyond this.
MOST_DIFFERENCE = 0.04


def check_training(short: bool) -> Rows:
    """Compare losses in half precision with fp32's, and those on two GPUs with one's."""
    updates = 6 if short else 40
    with tempfile.TemporaryDirectory() as folder:
        data = smoke_data(Path(folder), short)
        command = ["fairseq-train", data, "--user-dir", PLUGIN, *MODEL, *TRAINING, "--max-update", updates]
        command += [] if DEVICE.type == "cuda" else ["--cpu"]
        losses = training_losses(command)
        fell = len(losses) == updates and losses[-1] < losses[0]
        yield {"check": f"training in fp32, {updates} updates", "figure": f"loss {losses[0]} → {losses[-1]}",
               "right": fell, "losses": losses}  # fmt: skip
        if DEVICE.type != "cuda":
            return
        for flag in ("fp16", "bf16", "amp"):
            yield beside(f"training with --{flag}", training_losses([*command, f"--{flag}"]), losses)
        if torch.cuda.device_count() < 2:
            yield {"check": "training on two GPUs", "figure": "there is one", "right": None}
            return
        one = training_losses([*command, "--update-freq", 2, "--distributed-world-size", 1])
        yield beside("training on two GPUs", training_losses([*command, "--distributed-world-size", 2]), one)


def smoke_data(folder: Path, short: bool) -> Path:
    run("bash", SCRIPTS / "make_smoke_data.sh", folder, 300 if short else 2000)
    run("bash", SCRIPTS / "prepare_wikitext103.sh", "--out", folder / "data", "--archive",
        folder / "wikitext-103-v1.zip")
    return folder / "data" / "data-bin"


def training_losses(command: List[Any]) -> List[float]:
    result = run(*command)
    lines = re.findall(r"\| train_inner \| (\{.*\})", result.stdout + result.stderr)
    return [float(json.loads(line)["loss"]) for line in lines]


def beside(name: str, losses: List[float], expected: List[float]) -> Dict[str, Any]:
    difference = max((abs(a - b) / b for a, b in zip(losses, expected)), default=float("inf"))
    close = all(abs(a - b) <= MOST_DIFFERENCE * b for a, b in zip(losses, expected))  # False if one is NaN
    return {
        "check": name, "figure": f"losses differ by {difference:.2%} at most", "losses": losses, "beside": expected,
        "right": len(losses) == len(expected) > 0 and close,
    }  # fmt: skip


def run(*command: Any) -> subprocess.CompletedProcess:
    """Run a command of this Python's environment, without interpreted kernels; show its last lines if it fails."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    environment["PYTHON"] = sys.executable
    result = subprocess.run([str(part) for part in command], env=environment, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{command[0]} failed: " + " / ".join((result.stderr + result.stdout).splitlines()[-5:]))
    return result


# ---------------------------------------------------------------- all of it


def checked(check: Callable[[bool], Rows], short: bool) -> Rows:
    """The rows of a check; a wrong row if it raises."""
    try:
        yield from check(short)
    except Exception as error:
        name, message = check.__name__.replace("_", " "), f"{type(error).__name__}: {error}"
        yield {"check": name, "figure": message, "right": False}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("check_gpu.json"), help="all figures (default: %(default)s)")
    parser.add_argument("--without-gpu", action="store_true",
                        help="the checks that need none: kernels interpreted on the CPU, a short training in fp32")
    parser.add_argument("--short", action="store_true", help="fewer cases and updates")
    args = parser.parse_args()
    if (DEVICE.type == "cuda") == args.without_gpu:
        sys.exit("ERROR: " + ("there is a GPU: run it without --without-gpu" if args.without_gpu else
                 "torch sees no GPU here: run this on a machine with one, or --without-gpu for what goes without"))
    if DEVICE.type == "cuda" and gpu.version() is None:
        sys.exit("ERROR: Triton is missing, or too old: pip install '.[gpu-tests]'")
    check_output(args.out)
    logging.getLogger().setLevel(logging.WARNING)
    warnings.simplefilter("ignore")
    start = time.monotonic()
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
    results = {"device": device, "gpus": torch.cuda.device_count(), "torch": torch.__version__,
               "triton": gpu.version(), "rows": []}  # fmt: skip
    print("{device}, {gpus} GPUs, torch {torch}, Triton {triton}".format(**results))
    checks = [check_attention, check_compiled, check_training]
    if DEVICE.type == "cuda":
        checks.append(check_speed)
    for check in checks:
        for row in checked(check, args.short):
            verdict = {True: "right", False: "WRONG", None: "-"}[row["right"]]
            print(f"{row['check']:70} {row['figure']:40} {verdict}", flush=True)
            results["rows"].append(row)
    wrong = sum(row["right"] is False for row in results["rows"])
    results["wrong"], results["seconds"] = wrong, round(time.monotonic() - start)
    with replacing(args.out) as file:
        file.write(json.dumps(results, indent=2).encode() + b"\n")
    verdict = "everything is right" if not wrong else f"{wrong} of {len(results['rows'])} are WRONG"
    print(f"{verdict}, in {results['seconds']} s; the figures are in {args.out}")
    return int(wrong > 0)


if __name__ == "__main__":
    with errors_in_a_line():
        sys.exit(main())
