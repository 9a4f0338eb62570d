"""The checks that check_gpu.sh runs; see there."""

import argparse
import contextlib
import json
import logging
import os
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
from multimax_fairseq.mappings import modulate, multimax  # noqa: E402
from multimax_fairseq.mappings.multimax import modulate_formula, multimax_formula  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS, PLUGIN = ROOT / "scripts", ROOT / "multimax_fairseq"
Rows = Iterator[Dict[str, Any]]  # "check" and "figure" to print; "right": a bool, or None for no verdict

# ---------------------------------------------------------------- kernels


def check_attention(short: bool) -> Rows:
    """Triton's attention: random cases, and long ones compared with plain PyTorch."""
    if gpu.version() is None:
        yield {"check": "attention in Triton", "figure": "Triton is not installed, or too old", "right": None}
        return
    dtypes = list(DTYPES) if DEVICE.type == "cuda" else ["fp32", "fp16"]
    count = (1 if short else 6) if DEVICE.type == "cpu" else 40
    for dtype in dtypes:
        rows = list(check_kernels.check_cases(count, seed=1, dtypes=[dtype]))
        largest = max(error for row in rows for error in row["errors"].values())
        yield {
            "check": f"attention in Triton, {dtype}, {count} random cases",
            "figure": f"{largest:.2f} of the error allowed",
            "right": all(row["right"] for row in rows),
            "wrong": [row for row in rows if not row["right"]],
        }
    lengths = [(512, True, 4.0), (512, False, 1.0), (1_100, True, 4.0)]
    if DEVICE.type == "cpu":
        lengths = [] if short else [(128, True, 4.0)]
    for dtype in dtypes:
        for length, causal, mean in lengths:
            row = check_kernels.check_halves(length, causal, mean, DTYPES[dtype])
            ratios = {name: ours / max(plain, 1e-30) for name, (ours, plain) in row["errors"].items()}
            worst = max(ratios, key=ratios.get)
            yield {
                "check": f"error beside plain PyTorch: {row['case']}",
                "figure": f"{ratios[worst]:.2f} × ({worst})",
                "right": row["right"],
                "errors": row["errors"],
            }


def check_rows(short: bool) -> Rows:
    """The kernels of PyTorch's compiler: values and gradients against the formulas', relative to the largest."""
    for dtype in DTYPES if DEVICE.type == "cuda" else ["fp32"]:
        torch.manual_seed(1)
        scores = (2 * torch.randn(64, 300)).to(DEVICE, DTYPES[dtype])
        parameters = [torch.randn(2, 2, device=DEVICE), 0.1 * torch.randn(2, 2, device=DEVICE)]
        for name, function, formula in (
            ("multimax", multimax, multimax_formula), ("modulate", modulate, modulate_formula)
        ):  # fmt: skip
            yield compared(f"{name}, {dtype}", function, formula, [scores, *parameters])
        features, weight = torch.randn(100, 64), torch.randn(5_000, 64) / 8
        inputs = [tensor.to(DEVICE, DTYPES[dtype]) for tensor in (features, weight)] + parameters
        targets = torch.randint(5_000, (100,), device=DEVICE)

        def chunked(features: Tensor, weight: Tensor, *parameters: Tensor, targets: Tensor = targets) -> Tensor:
            return chunked_cross_entropy(features, weight, targets, None, *parameters, chunk_tokens=32).loss

        def whole(features: Tensor, weight: Tensor, *parameters: Tensor, targets: Tensor = targets) -> Tensor:
            logits = modulate_formula(features @ weight.t(), *parameters)
            return torch.nn.functional.cross_entropy(logits, targets, reduction="sum")

        yield compared(f"chunked cross-entropy, {dtype}", chunked, whole, inputs)


def compared(name: str, function: Callable, formula: Callable, inputs: List[Tensor]) -> Dict[str, Any]:
    """Compare a function with its formula in float64: errors of values and gradients, relative to the largest number.

    Allowed: 1e-5 in fp32, 8 units in the last place in half precision.
    """
    results = []
    for compute, tensors in ((function, inputs), (formula, [tensor.double() for tensor in inputs])):
        wanted = [tensor.detach().requires_grad_() for tensor in tensors]
        result = compute(*wanted)
        weights = torch.arange(1.0, 1 + result.numel(), dtype=torch.float64, device=DEVICE).sin().view(result.shape)
        grads = torch.autograd.grad((result.double() * (weights if result.dim() else 1)).sum(), wanted)
        results.append([result, *grads])
    errors = [((a.double() - b).abs().max() / b.abs().max()).item() for a, b in zip(*results)]
    allowed = 1e-5 if inputs[0].dtype == torch.float32 else 8 * torch.finfo(inputs[0].dtype).eps
    return {"check": name, "figure": f"error {max(errors):.1e}", "right": all(e <= allowed for e in errors),
            "errors": errors}  # fmt: skip


# ---------------------------------------------------------------- speed


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def check_speed(short: bool) -> Rows:
    """The benchmark: figures without a verdict."""
    import benchmark

    rounds = 5 if short else 15
    for dtype in DTYPES:
        for bsz, length in ((4, 512), (2, 2_048)):
            with default_dtype(DTYPES[dtype]):
                sides = benchmark.attention_core(bsz, length)
                rows = benchmark.compare(f"attention beside SDPA, {dtype}, {bsz} × {length}", sides, rounds)
            yield from speed_rows(rows)
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
    if not args.out.absolute().parent.is_dir():
        sys.exit(f"ERROR: --out: there is no folder {args.out.parent}")
    logging.getLogger().setLevel(logging.WARNING)
    warnings.simplefilter("ignore")
    start = time.monotonic()
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
    results = {"device": device, "gpus": torch.cuda.device_count(), "torch": torch.__version__,
               "triton": gpu.version(), "rows": []}  # fmt: skip
    print("{device}, {gpus} GPUs, torch {torch}, Triton {triton}".format(**results))
    checks = [check_attention, check_rows, check_training]
    if DEVICE.type == "cuda":
        checks.append(check_speed)
    for check in checks:
        for row in checked(check, args.short):
            verdict = {True: "right", False: "WRONG", None: "-"}[row["right"]]
            print(f"{row['check']:70} {row['figure']:40} {verdict}", flush=True)
            results["rows"].append(row)
    wrong = sum(row["right"] is False for row in results["rows"])
    results["wrong"], results["seconds"] = wrong, round(time.monotonic() - start)
    unfinished = args.out.with_name(f"{args.out.name}.partial.{os.getpid()}")
    unfinished.write_text(json.dumps(results, indent=2) + "\n")
    os.replace(unfinished, args.out)
    verdict = "everything is right" if not wrong else f"{wrong} of {len(results['rows'])} are WRONG"
    print(f"{verdict}, in {results['seconds']} s; the figures are in {args.out}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
