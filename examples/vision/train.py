"""Train small Vision Transformers on handwritten digits with several mappings, and compare them.

    python examples/vision/train.py --mappings softmax,multimax --seeds 1,2,3 --out runs/vision

Data: the 1,797 digits of scikit-learn, 8 × 8 pixels, 500 of them for the test, the same in every run. Model: a token
for each 2 × 2 pixels, 3 blocks of width 64 with 4 heads, the average of all tokens. Each run is a file NAME.json, its
weights are beside it in NAME.pt; what is there already is not run again. In the end ``--out`` has results.json (all
runs), table.md, and two figures: rollout.png and metrics.png.
"""

import argparse
import json
import logging
import os
import time
from pathlib import Path
from typing import Any, Dict, List, Tuple

import torch
from figures import draw_metrics, draw_rollouts, rollout_maps
from multimax_vit import OUTPUT_MAPPINGS, MultiMaxVisionTransformer, recording
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR
from tqdm import tqdm

from multimax_fairseq.analysis import MeanMetrics
from multimax_fairseq.mappings import MAPPINGS

MODEL = {
    "img_size": 8,
    "patch_size": 2,
    "in_chans": 1,
    "num_classes": 10,
    "embed_dim": 64,
    "depth": 3,
    "num_heads": 4,
    "mlp_ratio": 2.0,
    "weight_init": "jax",  # Xavier's; timm's own standard deviation, 0.02, is for models ten times as wide
}
# timm's 0.02 is too little beside the pixels: a first try had 86 % after 30 epochs, and 94 % with this
POSITIONS_STD = 0.5
ATTENTION_OPTIONS = {"entmax": {"alpha": "learned"}}  # with its fixed α, 1.5, it would be entmax15
TEST_SIZE = 500
WARMUP_EPOCHS = 2
METRICS = ("multimodality", "sparsity")


def digits() -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pictures, (count, 1, 8, 8) from −1 to 1, and classes: those to train on, and those of the test."""
    data = load_digits()
    pictures = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    classes = torch.tensor(data.target)
    split = train_test_split(range(len(classes)), test_size=TEST_SIZE, stratify=classes, random_state=0)
    train, test = (torch.tensor(part) for part in split)
    return pictures[train], classes[train], pictures[test], classes[test]


def shifted(pictures: Tensor) -> Tensor:
    """Each picture moved by −1, 0 or 1 pixel in both directions, with background moved in."""
    count, _, height, width = pictures.shape
    moved_in = F.pad(pictures, (1, 1, 1, 1), value=-1.0)
    rows = torch.arange(height) + torch.randint(3, (count, 1))  # (count, height)
    columns = torch.arange(width) + torch.randint(3, (count, 1))
    return moved_in[torch.arange(count)[:, None, None], 0, rows[:, :, None], columns[:, None, :]].unsqueeze(1)


def train(
    model: MultiMaxVisionTransformer, pictures: Tensor, classes: Tensor, args: argparse.Namespace, name: str
) -> None:
    """AdamW with a warm-up and a cosine; timm keeps weight decay off the mappings' numbers."""
    optimizer = create_optimizer_v2(model, opt="adamw", lr=args.lr, weight_decay=0.05)
    updates = args.epochs * -(-len(classes) // args.batch_size)
    warmup = min(WARMUP_EPOCHS / args.epochs, 0.5)
    scheduler = OneCycleLR(optimizer, args.lr, updates, pct_start=warmup, cycle_momentum=False)
    model.train()
    with tqdm(total=updates, desc=name, unit="update", disable=None) as progress:
        for _ in range(args.epochs):
            for batch in torch.randperm(len(classes)).split(args.batch_size):
                loss = F.cross_entropy(model(shifted(pictures[batch])), classes[batch], label_smoothing=0.1)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                scheduler.step()
                progress.update()
            progress.set_postfix(loss=f"{loss.item():.3f}")


def evaluate(model: MultiMaxVisionTransformer, pictures: Tensor, classes: Tensor) -> Dict[str, Any]:
    """Accuracy and loss of the test, and M and S of each block's attention over all its rows."""
    means = [MeanMetrics(1) for _ in model.blocks]

    def measure(block: int, scores: Tensor, probabilities: Tensor) -> None:
        means[block].update(scores.flatten(0, 2).unsqueeze(0), probabilities.flatten(0, 2).unsqueeze(0))

    model.eval()
    with torch.no_grad(), recording(model, measure):
        logits = torch.cat([model(batch) for batch in pictures.split(100)])
    blocks = [mean.result()[0] for mean in means]
    return {
        "accuracy": (logits.argmax(-1) == classes).float().mean().item(),
        "loss": F.cross_entropy(logits, classes).item(),
        **{metric: [block[metric] for block in blocks] for metric in METRICS},
    }


def build(attention_mapping: str, output_mapping: str) -> MultiMaxVisionTransformer:
    """A new model."""
    model = MultiMaxVisionTransformer(
        attention_mapping=attention_mapping,
        attention_options=ATTENTION_OPTIONS.get(attention_mapping),
        output_mapping=output_mapping,
        **MODEL,
    )
    nn.init.trunc_normal_(model.pos_embed, std=POSITIONS_STD)
    return model


def run_once(attention_mapping: str, seed: int, args: argparse.Namespace) -> Dict[str, Any]:
    """Train and evaluate one model, or read what an earlier call has left."""
    settings = {
        "attention_mapping": attention_mapping,
        "output_mapping": args.output_mapping,
        "seed": seed,
        "epochs": args.epochs,
        "batch_size": args.batch_size,
        "lr": args.lr,
    }
    name = f"{attention_mapping}-{args.output_mapping}-seed{seed}"
    report, weights = (args.out / f"{name}.{ending}" for ending in ("json", "pt"))
    if report.exists():
        result = json.loads(report.read_text())
        changed = [key for key in settings if result[key] != settings[key]]
        if changed:
            raise SystemExit(f"{report} is of a run with another {', '.join(changed)}: choose another --out")
        return result
    torch.manual_seed(seed)
    model = build(attention_mapping, args.output_mapping)
    pictures, classes, *test = digits()
    start = time.process_time()
    train(model, pictures, classes, args, name)
    seconds = time.process_time() - start
    result = {**settings, "cpu_seconds": seconds, **evaluate(model, *test)}
    torch.save(model.state_dict(), weights)
    write(report, json.dumps(result, indent=1))
    return result


def write(path: Path, text: str) -> None:
    """The whole file or nothing of it, whenever the run is stopped."""
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(text)
    os.replace(unfinished, path)


def load(result: Dict[str, Any], out: Path) -> MultiMaxVisionTransformer:
    """The trained model of a run."""
    model = build(result["attention_mapping"], result["output_mapping"])
    name = f"{result['attention_mapping']}-{result['output_mapping']}-seed{result['seed']}"
    model.load_state_dict(torch.load(out / f"{name}.pt", weights_only=True))
    return model.eval()


def by_mapping(results: List[Dict[str, Any]]) -> Dict[str, List[Dict[str, Any]]]:
    """The runs that differ only in their seed, under the names of their mappings."""
    groups: Dict[str, List[Dict[str, Any]]] = {}
    for result in results:
        suffix = "" if result["output_mapping"] == "softmax" else f", {result['output_mapping']} on the classes"
        groups.setdefault(result["attention_mapping"] + suffix, []).append(result)
    return groups


def table(results: List[Dict[str, Any]]) -> str:
    """A row a mapping, means over seeds (accuracy with the standard deviation), in Markdown."""
    depth = len(results[0]["sparsity"])
    metrics = [f"{letter}, block {block + 1}" for letter in "MS" for block in range(depth)]
    head = ["attention", "seeds", "accuracy, %", *metrics, "CPU minutes a run"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, runs in by_mapping(results).items():
        accuracies = torch.tensor([100 * run["accuracy"] for run in runs], dtype=torch.float64)
        spread = f" ± {accuracies.std():.2f}" if len(runs) > 1 else ""
        means = torch.tensor([[*run["multimodality"], *run["sparsity"]] for run in runs]).mean(0)
        minutes = sum(run["cpu_seconds"] for run in runs) / len(runs) / 60
        cells = [name, str(len(runs)), f"{accuracies.mean():.2f}{spread}"]
        cells += [*(f"{mean:.3f}" for mean in means), f"{minutes:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(results: List[Dict[str, Any]], out: Path) -> None:
    """metrics.png of all runs, and rollout.png of the first seed's models with softmax and with MultiMax."""
    groups = by_mapping(results)
    metrics = {name: [[run[metric] for run in runs] for metric in METRICS] for name, runs in groups.items()}
    draw_metrics(metrics, out / "metrics.png")
    _, _, pictures, classes = digits()
    shown = [int((classes == digit).nonzero()[0]) for digit in (0, 3, 4, 6, 8)]
    maps = {
        name: rollout_maps(load(groups[name][0], out), pictures[shown])
        for name in ("softmax", "multimax")
        if name in groups
    }
    if maps:
        draw_rollouts(pictures[shown, 0], maps, out / "rollout.png")


def parse(arguments: List[str] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mappings", default=",".join(MAPPINGS), help="of attention, between commas")
    parser.add_argument("--output-mapping", default="softmax", choices=OUTPUT_MAPPINGS, help="on the classes")
    parser.add_argument("--seeds", default="1", help="whole numbers between commas")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-3, help="highest learning rate")
    parser.add_argument("--out", type=Path, default=Path("runs/vision"))
    args = parser.parse_args(arguments)
    args.mappings = args.mappings.split(",")
    unknown = [name for name in args.mappings if name not in MAPPINGS]
    if unknown:
        parser.error(f"there is no mapping {unknown[0]!r}; choose from: {', '.join(MAPPINGS)}")
    try:
        args.seeds = [int(seed) for seed in args.seeds.split(",")]
    except ValueError:
        parser.error(f"--seeds takes whole numbers between commas, not {args.seeds!r}")
    if min(args.epochs, args.batch_size) < 1 or args.lr <= 0:
        parser.error("--epochs and --batch-size take 1 or more, --lr more than 0")
    return args


def main() -> None:
    args = parse()
    logging.getLogger().setLevel(logging.WARNING)  # importing fairseq sets it to DEBUG
    args.out.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        for name in args.mappings:
            run_once(name, seed, args)
    # also the runs of earlier calls, with MultiMax on the classes for one
    results = [json.loads(path.read_text()) for path in sorted(args.out.glob("*-seed*.json"))]
    places = {name: place for place, name in enumerate(MAPPINGS)}
    results.sort(key=lambda run: (places[run["output_mapping"]], places[run["attention_mapping"]], run["seed"]))
    write(args.out / "results.json", json.dumps(results, indent=1))
    write(args.out / "table.md", table(results))
    draw(results, args.out)
    print(table(results), end="")


if __name__ == "__main__":
    main()
