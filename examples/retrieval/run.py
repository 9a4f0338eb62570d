"""Retrieval: find all keys that match a query, and nothing else. The task that MultiMax is made for, in minutes.

    python examples/retrieval/run.py --out runs/retrieval                     # the table of README.md, five seeds
    python examples/retrieval/run.py --mappings softmax,multimax:order=1 --seeds 1 --out runs/retrieval

One attention layer sees a query and L keys. k of them match it (1 to 8, and nobody says how many), the others are
distractors; the layer is to return the mean of the k values::

    q, u_j: random directions in 16 dimensions    key_j: direction of 0.8 q + 0.6 u_j, or u_j: no match
    score_j = (W_q q + b_q) · (W_k key_j + b_k) / √32             output = Σ_j mapping(scores)_j value_j

The values are normal, N(0, I_d). A good row of attention is multi-modal (all k matches have a share) and sparse
(nothing else has one). Softmax has to choose. Each layer is trained with 64 keys, and tested with other numbers.

--mappings takes names of mappings, each with options after colons: those of the mapping itself (order, init, terms of
multimax; alpha of entmax), scale=learned (--attention-scale), and lr_scale=10 (--modulator-lr-scale). DIR/models has
a file for each training; one that is there is not run again, so the command can be stopped and given again.
DIR/results.json has a record for each of them and each test length; DIR/table.md and the figures are of the rows and
seeds that are asked for.
"""

import argparse
import json
import logging
import math
import multiprocessing
import os
import sys
import textwrap
from functools import partial
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Tuple

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import normalize
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # in a checkout that is not installed
from multimax_fairseq import tools  # noqa: E402
from multimax_fairseq.analysis import style  # noqa: E402
from multimax_fairseq.mappings import BUILT_IN, MAPPINGS, arguments_of, build_mapping, parse_options  # noqa: E402

DIMENSIONS, PROJECTED = 16, 32  # numbers of a query or key, before and after the projection
LENGTH, MATCHES, NOISE = 64, 8, 0.6  # keys in training; how many match at most, and how far they are off
UPDATES, BATCH, LEARNING_RATE = 1_500, 128, 3e-3
TEST_BATCHES = 16
DEFAULT_ROWS = (
    "softmax,softmax:scale=learned,sparsemax,entmax15,entmax:alpha=learned,evsoftmax,multimax:order=1,multimax:order=2,"
    "multimax:order=1:init=shaped:lr_scale=10,multimax:order=2:init=shaped:lr_scale=10"
)


def parse_row(text: str) -> Tuple[str, Dict[str, str]]:
    """``multimax:order=1:lr_scale=10`` → the mapping, and what is chosen about it."""
    mapping, *options = text.split(":")
    pairs = [option.split("=", 1) for option in options]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError("options are written name=value")
    return mapping, dict(pairs)


class Layer(nn.Module):
    """One attention layer with one head: projections of query and key, a mapping, values as they are.

    Args:
        row: of --mappings.

    Raises:
        ValueError, TypeError: a mapping or option that does not exist.
    """

    def __init__(self, row: str):
        super().__init__()
        self.query, self.key = nn.Linear(DIMENSIONS, PROJECTED), nn.Linear(DIMENSIONS, PROJECTED)
        name, options = parse_row(row)
        scale, self.lr_scale = options.pop("scale", "none"), float(options.pop("lr_scale", 1))
        if scale not in ("none", "learned"):
            raise ValueError(f"there is no scale {scale!r}; choose from: none, learned")
        self.scale = nn.Parameter(torch.ones(()), requires_grad=scale == "learned")
        if name in BUILT_IN:
            own = {option: int(value) if value.isdigit() else value for option, value in options.items()}
        else:
            own = parse_options(name, ",".join(map("=".join, options.items())))
        heads = {"num_heads": 1} if "num_heads" in arguments_of(MAPPINGS.get(name, nn.Identity)) else {}
        self.mapping = build_mapping(name, **own, **heads)

    def scores(self, query: Tensor, keys: Tensor) -> Tensor:
        """(batch, d) and (batch, length, d) → (batch, length)."""
        return self.scale * torch.einsum("bd,bld->bl", self.query(query), self.key(keys)) / math.sqrt(PROJECTED)

    def forward(self, query: Tensor, keys: Tensor, values: Tensor) -> Tuple[Tensor, Tensor]:
        """The output, (batch, d), and the probabilities, (batch, length)."""
        scores = self.scores(query, keys)[:, None, None]  # as in attention: (batch, heads, queries, length)
        probabilities = self.mapping(scores)[:, 0, 0]
        return torch.einsum("bl,bld->bd", probabilities, values), probabilities

    def parameter_groups(self) -> List[Dict[str, Any]]:
        modulators = list(self.mapping.parameters())
        others = [p for name, p in self.named_parameters() if not name.startswith("mapping.")]
        return [{"params": others, "lr": LEARNING_RATE}, {"params": modulators, "lr": LEARNING_RATE * self.lr_scale}]


class Batch(NamedTuple):
    """Questions and answers; matches: bool (batch, length)."""

    query: Tensor
    keys: Tensor
    values: Tensor
    matches: Tensor
    target: Tensor


def draw(generator: torch.Generator, length: int = LENGTH) -> Batch:
    """BATCH questions with ``length`` keys."""
    query = normalize(torch.randn(BATCH, DIMENSIONS, generator=generator), dim=-1)
    keys, values = torch.randn(2, BATCH, length, DIMENSIONS, generator=generator)
    keys = normalize(keys, dim=-1)
    count = torch.randint(1, MATCHES + 1, (BATCH, 1), generator=generator)
    matches = torch.arange(length) < count  # attention does not know of places: the first ones will do
    near = math.sqrt(1 - NOISE**2) * query[:, None] + NOISE * keys
    keys = torch.where(matches[..., None], normalize(near, dim=-1), keys)
    target = (values * matches[..., None]).sum(1) / count
    return Batch(query, keys, values, matches, target)


def train(row: str, seed: int, updates: int) -> Layer:
    """A layer, trained on its own stream of questions, which is the same for all rows of a seed."""
    torch.manual_seed(seed)
    layer = Layer(row)
    optimizer = torch.optim.Adam(layer.parameter_groups(), betas=(0.9, 0.98))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(updates):
        batch = draw(generator)
        output, _ = layer(batch.query, batch.keys, batch.values)
        loss = (output - batch.target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    return layer.eval()


@torch.no_grad()
def test(layer: Layer, length: int) -> Dict[str, Any]:
    """Mean squared error, the same by the number of matches, and the probability that matches have together."""
    generator = torch.Generator().manual_seed(10_000 + length)  # of no training; the same questions for all
    errors, masses, counts = [], [], []
    for _ in range(TEST_BATCHES):
        batch = draw(generator, length)
        output, probabilities = layer(batch.query, batch.keys, batch.values)
        errors.append((output - batch.target).square().mean(-1))
        masses.append((probabilities * batch.matches).sum(-1))
        counts.append(batch.matches.sum(-1))
    error, count = torch.cat(errors), torch.cat(counts)
    return {
        "test_length": length,
        "mse": error.mean().item(),
        "mass_on_matches": torch.cat(masses).mean().item(),
        "mse_by_matches": [error[count == k].mean().item() for k in range(1, MATCHES + 1)],
    }


def model_file(out: Path, row: str, seed: int) -> Path:
    return out / "models" / f"{row}-seed{seed}.pt".replace(":", "-").replace("=", "_")


def run(updates: int, lengths: List[int], out: Path, job: Tuple[str, int]) -> None:
    """Trains and tests a row with a seed; its file has the parameters and the records."""
    (row, seed), (mapping, options) = job, parse_row(job[0])
    layer = train(row, seed, updates)
    about = {"row": row, "mapping": mapping, "options": options, "seed": seed, "updates": updates}
    records = [{**about, **test(layer, length)} for length in lengths]
    with tools.replacing(model_file(out, row, seed)) as file:
        torch.save({"layer": layer.state_dict(), "records": records}, file)


def begin(user_dir: Path) -> None:
    """In a new process."""
    torch.set_num_threads(1)
    tools.import_user_dir(user_dir)


def load_records(path: Path) -> List[Dict[str, Any]]:
    return torch.load(path, weights_only=True).get("records", []) if path.exists() else []


# ---------------------------------------------------------------- the table and the figures


def of_seeds(results: List[Dict[str, Any]], row: str, length: int, name: str = "mse") -> Tensor:
    """A number of each seed of a row, at a test length."""
    found = [record for record in results if (record["row"], record["test_length"]) == (row, length)]
    return torch.tensor([record[name] for record in found], dtype=torch.float64)


def table(results: List[Dict[str, Any]], rows: List[str], lengths: List[int]) -> str:
    """Markdown: mean ± standard deviation of the error at each length over the seeds, and its ratio to softmax's."""
    lines = ["| mapping | " + " | ".join(f"{length} keys" for length in lengths) + " | mass on matches |"]
    lines.append("|---" * (len(lengths) + 2) + "|")
    for row in rows:
        cells = []
        for length in lengths:
            errors, of_softmax = (of_seeds(results, name, length) for name in (row, "softmax"))
            spread = f" ± {errors.std():.4f}" if len(errors) > 1 else ""
            cell = f"{errors.mean():.4f}{spread}"
            if len(of_softmax) and row != "softmax":
                cell += f" ({errors.mean() / of_softmax.mean():.2f}, {(errors / of_softmax).max():.2f})"
            cells.append(cell)
        mass = of_seeds(results, row, lengths[0], "mass_on_matches").mean()
        lines.append(f"| {row} | " + " | ".join(cells) + f" | {mass:.2f} |")
    return "\n".join(lines) + "\n"


def label_of(row: str, width: int = 80) -> str:
    return textwrap.fill(row.translate(str.maketrans(":=_", "   ")), width)


def draw_errors(results: List[Dict[str, Any]], rows: List[str], lengths: List[int]) -> Figure:
    """The error over the number of keys, and over the number of matches among as many keys as in training."""
    figure = Figure(figsize=(style.TWO_COLUMNS, 3.2), layout="constrained")
    by_length, by_matches = figure.subplots(1, 2, sharey=True)
    for number, row in enumerate(rows):
        look = {"color": style.colour_of(row.split(":")[0]), "marker": style.MARKERS[number % 8], "markersize": 3.5,
                "linestyle": style.LINES[number % 8], "fillstyle": "full" if number < 8 else "none"}  # fmt: skip
        means = [of_seeds(results, row, length).mean() for length in lengths]
        by_length.plot(lengths, means, label=label_of(row), **look)
        if LENGTH in lengths:
            by_matches.plot(range(1, MATCHES + 1), of_seeds(results, row, LENGTH, "mse_by_matches").mean(0), **look)
    by_length.set(xscale="log", yscale="log", xlabel="keys", ylabel="mean squared error")
    by_length.set_xticks(lengths, [str(length) for length in lengths], minor=False)
    by_length.minorticks_off()
    by_matches.set(xlabel=f"matches among {LENGTH} keys")
    figure.legend(loc="outside right center")
    return figure


def load(row: str, seed: int, out: Path) -> Layer:
    layer = Layer(row)
    layer.load_state_dict(torch.load(model_file(out, row, seed), weights_only=True)["layer"])
    return layer.eval()


@torch.no_grad()
def draw_modulators(rows: List[str], seed: int, out: Path) -> Figure:
    """σ of each MultiMax over the histograms of the scores of matches and of distractors."""
    figure = Figure(figsize=(min(style.TWO_COLUMNS, 2.2 * len(rows) + 0.4), 2.5), layout="constrained")
    batch = draw(torch.Generator().manual_seed(10_000))
    for axes, row in zip(figure.subplots(1, len(rows), squeeze=False)[0], rows):
        layer = load(row, seed, out)
        scores = layer.scores(batch.query, batch.keys)
        low, high = scores.min().item(), scores.max().item()
        x = torch.linspace(low, high, 400)
        sigma = layer.mapping.modulate(x)
        axes.plot(x, sigma - sigma.max(), color=style.BLACK, label="σ(x) − max σ")
        axes.set(title=label_of(row, 24), xlabel="score x")
        density = axes.twinx()
        density.set_yticks([])
        for matching, colour, name in ((False, style.GREY, "distractors"), (True, style.VERMILLION, "matches")):
            chosen = scores[batch.matches == matching]
            density.hist(chosen, bins=60, range=(low, high), density=True, alpha=0.5, color=colour, label=name)
    handles, labels = (a + b for a, b in zip(axes.get_legend_handles_labels(), density.get_legend_handles_labels()))
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


@torch.no_grad()
def draw_rows(rows: List[str], seed: int, out: Path) -> Figure:
    """The probabilities of one question by each mapping, matches first, the largest of each kind first."""
    batch = draw(torch.Generator().manual_seed(10_001))
    question = int((batch.matches.sum(-1) - 5).abs().argmin())
    count = int(batch.matches[question].sum())
    columns = min(5, len(rows))
    lines = -(-len(rows) // columns)
    figure = Figure(figsize=(style.TWO_COLUMNS, 1.5 * lines + 0.3), layout="constrained")
    for axes, row in zip(figure.subplots(lines, columns, squeeze=False, sharey=True).flat, rows):
        probabilities = load(row, seed, out)(batch.query, batch.keys, batch.values)[1][question]
        kinds = probabilities.split([count, LENGTH - count])
        matches, others = (kind.sort(descending=True).values for kind in kinds)
        axes.bar(range(count), matches, color=style.VERMILLION, width=1.0)
        axes.bar(range(count, LENGTH), others, color=style.GREY, width=1.0)
        axes.axhline(1 / count, color=style.BLACK, lw=0.6, ls=":")
        axes.set_title(label_of(row, 22), fontsize=6.5)
        axes.set_xticks([])
    for axes in figure.axes[len(rows) :]:
        axes.set_axis_off()
    figure.supxlabel(f"{LENGTH} keys: {count} matches, then distractors (dotted: 1 / {count})", fontsize=8)
    figure.supylabel("probability", fontsize=8)
    return figure


# ---------------------------------------------------------------- the command


def numbers(text: str) -> List[int]:
    """The type of an argument that is a list of whole numbers above 0."""
    return [tools.positive(number.strip()) for number in text.split(",")]


def parse_arguments() -> argparse.Namespace:
    parser = tools.ArgumentParser(__doc__)
    parser.add_argument("--mappings", default=DEFAULT_ROWS, help="rows of the table (default: %(default)s)")
    parser.add_argument("--seeds", type=numbers, default="1,2,3,4,5", help="default: %(default)s")
    parser.add_argument("--test-lengths", type=numbers, default="64,256,1024", help="default: %(default)s")
    parser.add_argument("--updates", type=tools.positive, default=UPDATES, help="default: %(default)s")
    parser.add_argument("--processes", type=tools.positive, default=os.cpu_count(), help="default: as many as cores")
    parser.add_argument("--user-dir", type=Path, help="a folder with mappings of your own")
    parser.add_argument("--out", type=Path, required=True, help="folder for results.json, the table and the figures")
    arguments = parser.parse_args()
    if min(arguments.test_lengths) < MATCHES:
        parser.error(f"--test-lengths begin at {MATCHES}, as so many keys may match")
    arguments.rows = [row.strip() for row in arguments.mappings.split(",")]
    try:
        tools.import_user_dir(arguments.user_dir)
        for row in arguments.rows:
            Layer(row)
    except (tools.UserError, TypeError, ValueError) as error:
        parser.error(f"--mappings {arguments.mappings}: {error}")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    logging.getLogger().setLevel(logging.WARNING)  # importing fairseq sets it to DEBUG
    rows, lengths, out = arguments.rows, arguments.test_lengths, arguments.out
    (out / "models").mkdir(parents=True, exist_ok=True)
    jobs = []
    for job in ((row, seed) for seed in arguments.seeds for row in rows):
        records = load_records(model_file(out, *job))
        if any(record["updates"] != arguments.updates for record in records):
            raise tools.UserError(f"{out} has results of another number of updates: choose another --out")
        if not {record["test_length"] for record in records} >= set(lengths):
            jobs.append(job)
    work = partial(run, arguments.updates, lengths, out)
    processes = max(min(arguments.processes, len(jobs)), 1)
    with multiprocessing.get_context("spawn").Pool(processes, begin, [arguments.user_dir]) as pool:
        for _ in tqdm(pool.imap_unordered(work, jobs), total=len(jobs), desc="trainings", disable=None):
            pass
    results = [record for path in sorted((out / "models").glob("*.pt")) for record in load_records(path)]
    with tools.replacing(out / "results.json") as file:
        file.write(json.dumps(results, indent=1).encode())
    results = [record for record in results if record["seed"] in arguments.seeds]
    text = table(results, rows, lengths)
    (out / "table.md").write_text(text, encoding="utf-8")
    with matplotlib.rc_context(style.STYLE):
        draw_errors(results, rows, lengths).savefig(out / "errors.png")
        draw_rows(rows, arguments.seeds[0], out).savefig(out / "rows.png")
        with_modulators = [row for row in rows if row.split(":")[0] == "multimax"]
        if with_modulators:
            draw_modulators(with_modulators, arguments.seeds[0], out).savefig(out / "modulators.png")
    print(f"{text}\nMean squared error ± standard deviation, {len(arguments.seeds)} seeds; in brackets the ratio to "
          f"softmax's, and the largest ratio in a seed. {out} has results.json and the figures.")  # fmt: skip


if __name__ == "__main__":
    with tools.errors_in_a_line():
        main()
