"""Time a training step (forward and backward) of DeiT with MultiMax, and with timm's softmax.

    python examples/vision/benchmark.py --size small --batch-size 8 --rounds 25 --threads 1

Each round takes a step of every model in turn, so that whatever else the machine does meets all of them alike. The
ratio is the median over rounds of a model's time by that of timm's fused softmax in the same round.
"""

import argparse
import logging
import statistics
import time
from typing import Dict, List, Optional

import multimax_vit  # noqa: F401  (registers the models)
import timm
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

BASELINE = "softmax, timm's fused attention"


def models(size: str) -> Dict[str, nn.Module]:
    """Models that differ in their attention alone."""

    def create(mapping: str) -> nn.Module:
        torch.manual_seed(0)
        return timm.create_model(f"multimax_deit_{size}_patch16_224", attention_mapping=mapping)

    unfused = create("softmax")
    for block in unfused.blocks:
        block.attn.fused_attn = False
    names = (BASELINE, "softmax, timm's attention, not fused", "MultiMax")
    return dict(zip(names, (create("softmax"), unfused, create("multimax"))))


def step(model: nn.Module, pictures: torch.Tensor, classes: torch.Tensor) -> float:
    """Seconds of a forward and a backward pass."""
    start = time.perf_counter()
    F.cross_entropy(model(pictures), classes).backward()
    if pictures.is_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    model.zero_grad(set_to_none=True)
    return seconds


def main(arguments: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="small", choices=multimax_vit.DEIT)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(arguments)
    if min(args.batch_size, args.rounds, args.threads) < 1:
        parser.error("--batch-size, --rounds and --threads take 1 or more")
    logging.getLogger().setLevel(logging.WARNING)  # importing fairseq sets it to DEBUG
    torch.set_num_threads(args.threads)
    pictures = torch.randn(args.batch_size, 3, 224, 224, device=args.device)
    classes = torch.arange(args.batch_size, device=args.device)
    compared = {name: model.to(args.device) for name, model in models(args.size).items()}
    for model in compared.values():  # memory, and MultiMax's kernels, which are compiled when first used
        step(model, pictures, classes)
    seconds: Dict[str, List[float]] = {name: [] for name in compared}
    for _ in tqdm(range(args.rounds), unit="round", leave=False, disable=None):
        for name, model in compared.items():
            seconds[name].append(step(model, pictures, classes))
    print("| DeiT-" + args.size + " | median, ms | least, ms | ratio |\n|---|---|---|---|")
    for name, times in seconds.items():
        ratio = statistics.median(mine / base for mine, base in zip(times, seconds[BASELINE]))
        print(f"| {name} | {1e3 * statistics.median(times):.0f} | {1e3 * min(times):.0f} | {ratio:.3f} |")


if __name__ == "__main__":
    main()
