#!/usr/bin/env python
"""Makes Markdown tables of results from the run.json files below a folder.

    python scripts/results_table.py runs
    python scripts/results_table.py runs/multi30k_de_en --samples 5000

One table for each experiment, one row for each choice of mappings: mean ± sample standard deviation over seeds (with
n − 1; none for one seed). For translation, sacrebleu's paired bootstrap (Koehn 2004) compares each run with softmax
with the same seed: p is the share of resampled test sets with at least this difference if both were equally good.

--paper FILE adds a column of published numbers. FILE is JSON: {"EXPERIMENT": {"source": "Author (year), table
n", "rows": {"MultiMax": "34.5 ± 0.1"}}}, with the tables' names of experiments and rows.
"""

from __future__ import annotations

import json
import logging
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from multimax_fairseq.tools import ArgumentParser, UserError, errors_in_a_line, positive

FORMAT = 1  # of run.json, as record_run.py writes it

NAMES = {"softmax": "softmax", "multimax": "MultiMax", "sparsemax": "sparsemax", "entmax15": "1.5-entmax",
         "entmax": "α-entmax", "evsoftmax": "EvSoftMax", "stock": "softmax (stock fairseq)"}  # fmt: skip
ALL_SITES = {"encoder", "decoder", "cross"}
BOTH_TERMS = {"below", "above"}
BASELINE = "softmax"


@dataclass(frozen=True)
class Run:
    """The contents of a run.json, and the folder with it and the translations."""

    folder: Path
    content: dict[str, Any]

    @property
    def experiment(self) -> str:
        name = self.content["experiment"]
        return f"{name}, smoke run on made-up data" if self.content["smoke"] else name

    @property
    def row(self) -> str:
        return row_name(self.content["mapping"])

    @property
    def seed(self) -> int:
        return self.content["seed"]

    def lines(self, which: str, kind: str) -> list[str]:
        """The ``hypotheses`` or ``references`` of the score ``which``.

        Raises:
            UserError: the file is missing or not text.
        """
        path = self.folder / self.content["scores"][which][kind]
        try:
            return path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
        except OSError as error:
            raise UserError(f"{self.folder / 'run.json'} needs {path.name} beside it: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is damaged: it is not UTF-8") from error


def row_name(mapping: dict[str, Any]) -> str:
    """The name of a choice of mappings, without its defaults: ``MultiMax, order 1``.

    Args:
        mapping: flag names to values, as in record_run.py.
    """
    attention = mapping["attention_mapping"]
    name = NAMES[attention]
    if attention == "stock":
        return name
    alpha = mapping["entmax_alpha"]
    alpha = ", α learned" if alpha == "learned" else f", α = {alpha}"
    name += alpha if attention == "entmax" else ""
    scale = mapping.get("attention_scale") or "none"  # version 0.1 did not have it
    sites = mapping["attention_mapping_sites"].split(",")
    if (attention, scale) != ("softmax", "none") and not ALL_SITES <= set(sites):
        name += f", {' and '.join(sites)} only"
    name += {"none": "", "learned": ", learned temperature", "log-length": ", times log n"}[scale]
    if "multimax" in (attention, mapping["output_mapping"]):
        terms = mapping["multimax_terms"].split(",")
        name += "" if mapping["multimax_order"] == 2 else f", order {mapping['multimax_order']}"
        name += "" if set(terms) == BOTH_TERMS else f", only {terms[0]}"
        name += "" if mapping["multimax_init"] == "normal" else f", {mapping['multimax_init']} at the start"
        lr_scale = mapping.get("modulator_lr_scale") or 1
        name += "" if lr_scale == 1 else f", {lr_scale:g} × the learning rate"
    if mapping["output_mapping"] != "softmax":
        name += f"; {NAMES[mapping['output_mapping']]}{alpha if mapping['output_mapping'] == 'entmax' else ''}"
        name += " of the vocabulary"
    return name


def is_finite(value: Any, least: float) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value >= least


def is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def is_file_name(value: Any) -> bool:
    return is_text(value) and Path(value).name == value


def is_one_of(names: Iterable[str]) -> Callable[[Any], bool]:
    return lambda value: value in tuple(names)


def is_list_of(names: set[str]) -> Callable[[Any], bool]:
    return lambda value: is_text(value) and set(value.split(",")) <= names


# The entries of a run.json that a table needs: where they are, and the check that each must pass.
ENTRIES = {
    "format": lambda value: value == FORMAT,
    "experiment": is_text,
    "smoke": lambda value: isinstance(value, bool),
    "seed": lambda value: type(value) is int,
    "updates": lambda value: type(value) is int and value > 0,
    "mapping": lambda value: isinstance(value, dict),
    "validation": lambda value: isinstance(value, dict) and is_finite(value.get("ppl", 1), 1),
    "scores": lambda value: isinstance(value, dict) and bool(value),
}
MAPPING_ENTRIES = {
    "attention_mapping": is_one_of(NAMES),
    "attention_mapping_sites": is_list_of(ALL_SITES),
    "output_mapping": is_one_of(NAMES),
    "multimax_order": is_one_of((1, 2)),
    "multimax_terms": is_list_of(BOTH_TERMS),
    "multimax_init": is_text,
    "entmax_alpha": is_text,
    "attention_scale": is_one_of((None, "none", "learned", "log-length")),
    "modulator_lr_scale": lambda value: value is None or is_finite(value, 0),
}
BLEU_ENTRIES = {
    "bleu": lambda value: is_finite(value, 0) and value <= 100,
    "signature": lambda value: is_text(value) and value.startswith("BLEU|"),
    "hypotheses": is_file_name,
    "references": is_file_name,
}
PERPLEXITY_ENTRIES = {"perplexity": lambda value: is_finite(value, 1), "tokens": lambda value: is_finite(value, 1)}


def check_entries(content: Any, entries: dict[str, Callable[[Any], bool]], where: str = "") -> None:
    """Raises:
    ValueError: ``content`` lacks an entry, or it is not what it should be.
    """
    if not isinstance(content, dict):
        raise ValueError(f"{where or 'it'} is no table")
    for name, is_right in entries.items():
        if not is_right(content.get(name)):
            found = repr(content[name])[:60] if name in content else "nothing"
            raise ValueError(f"{where}{name} is {found}")


def load_run(path: Path) -> Run:
    """Load a run.json and check that its scores exist and are those of the files beside it.

    Raises:
        UserError: something is missing, damaged, or no number; or the translations are not those that were scored.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        check_entries(content, ENTRIES)
        mapping = content["mapping"]
        is_stock = mapping.get("attention_mapping") == "stock"
        check_entries(mapping, {} if is_stock else MAPPING_ENTRIES, "mapping: ")
        for name, score in content["scores"].items():
            is_bleu = isinstance(score, dict) and "bleu" in score
            check_entries(score, BLEU_ENTRIES if is_bleu else PERPLEXITY_ENTRIES, f"{name}: ")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is not, or no longer, a file of record_run.py ({error}): evaluate again"
        ) from error
    run = Run(path.parent, content)
    for name, score in content["scores"].items():
        if "bleu" in score:
            check_bleu(run, name)
    return run


def check_bleu(run: Run, which: str) -> None:
    """Raises:
    UserError: the translations beside a run.json do not have its BLEU.
    """
    hypotheses, references = run.lines(which, "hypotheses"), run.lines(which, "references")
    score, where = run.content["scores"][which], run.folder / run.content["scores"][which]["hypotheses"]
    if len(hypotheses) != len(references):
        raise UserError(f"{where} has {len(hypotheses)} lines for {len(references)} references: evaluate again")
    found = metric(score["signature"]).corpus_score(hypotheses, [references]).score
    if abs(found - score["bleu"]) > 0.0051:  # it was printed with two decimals
        raise UserError(
            f"{where} has BLEU {found:.2f}, and run.json says {score['bleu']}: the translations or the references "
            "are not those that were scored; evaluate again"
        )


def metric(signature: str, **options: Any):
    """sacrebleu's BLEU for a signature such as ``BLEU|nrefs:1|case:lc|eff:no|tok:13a|smooth:exp|version:2.6.0``.

    Raises:
        UserError: sacrebleu has no such BLEU.
    """
    from sacrebleu.metrics import BLEU

    parts = dict(part.partition(":")[::2] for part in signature.split("|")[1:])
    try:
        return BLEU(lowercase=parts["case"] == "lc", tokenize=parts["tok"], smooth_method=parts["smooth"],
                    effective_order=parts["eff"] == "yes", **options)  # fmt: skip
    except (KeyError, AssertionError, ValueError) as error:
        raise UserError(f"{signature} is no signature that sacrebleu knows: evaluate again") from error


def load_runs(folder: Path) -> list[Run]:
    """Load every run.json below ``folder``.

    Raises:
        UserError: there is none, one fails its checks, or two are the same run.
    """
    runs: dict[tuple[str, str, int], Run] = {}
    for path in sorted(folder.rglob("run.json")):
        run = load_run(path)
        key = (run.experiment, run.row, run.seed)
        if key in runs:
            raise UserError(
                f"{path} and {runs[key].folder / 'run.json'} are both {run.experiment}, {run.row}, seed {run.seed}: "
                "name the folder of one of them"
            )
        runs[key] = run
    if not runs:
        raise UserError(f"there is no run.json below {folder}")
    return list(runs.values())


def load_paper(path: Path) -> dict[str, Any]:
    """Load the file of ``--paper``.

    Raises:
        UserError: it does not have the required form.
    """
    try:
        paper = json.loads(path.read_text(encoding="utf-8"))
        check_entries(paper, {})
        for name, published in paper.items():
            check_entries(published, {"source": is_text, "rows": lambda rows: isinstance(rows, dict)}, f"{name}: ")
            check_entries(published["rows"], {row: is_text for row in published["rows"]}, f"{name}: ")
    except (ValueError, RecursionError) as error:
        raise UserError(f"--paper {path} is not of the form that --help shows: {error}") from error
    return paper


def mean_and_deviation(values: Iterable[float]) -> str:
    """``35.28 ± 0.12``, or a single value alone."""
    values = list(values)
    mean = f"{statistics.fmean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.2f}"


def difference(values: dict[int, float], baseline: dict[int, float]) -> str:
    """``−0.42``: the mean difference over common seeds.

    Args:
        values: seed → score.
        baseline: the same for softmax.

    Returns:
        "–" without a common seed; bold if larger than both standard deviations between seeds.
    """
    seeds = sorted(values.keys() & baseline.keys())
    if not seeds:
        return "–"
    mean = statistics.fmean(values[seed] - baseline[seed] for seed in seeds)
    text = f"{mean:+.2f}".replace("-", "−")
    if len(seeds) < 2:
        return text
    spread = max(statistics.stdev(scores[seed] for seed in seeds) for scores in (values, baseline))
    return f"**{text}**" if abs(mean) > spread else text


def p_values(runs: list[Run], which: str, samples: int) -> dict[tuple[str, int], float]:
    """sacrebleu's paired bootstrap of each run against softmax with the same seed.

    Args:
        runs: of one experiment.
        which: the score whose translations are compared: ``best``.
        samples: how often the test set is resampled.

    Returns:
        (row, seed) → p, for all runs with a matching softmax run.

    Raises:
        UserError: translations are missing, or were scored with other references or in another way.
    """
    from sacrebleu.significance import PairedTest

    by_seed: dict[int, list[Run]] = defaultdict(list)
    for run in runs:
        if which in run.content["scores"]:
            by_seed[run.seed].append(run)
    found = {}
    for seed, group in by_seed.items():
        baselines = [run for run in group if run.row == BASELINE]
        others = [run for run in group if run.row != BASELINE]
        if not baselines or not others:
            continue
        ordered = [*baselines, *others]
        references = ordered[0].lines(which, "references")
        signature = ordered[0].content["scores"][which]["signature"]
        for run in others:
            if run.lines(which, "references") != references:
                raise UserError(f"{run.folder} and {ordered[0].folder} have different references")
            if run.content["scores"][which]["signature"] != signature:
                raise UserError(f"{run.folder} and {ordered[0].folder} are scored in different ways")
        systems = [(f"{number}", run.lines(which, "hypotheses")) for number, run in enumerate(ordered)]
        # references=None: the test uses the metric's references, tokenised once
        metrics = {"BLEU": metric(signature, references=[references])}
        test = PairedTest(systems, metrics, references=None, test_type="bs", n_samples=samples)
        for run, (_, lines), result in zip(others, systems[1:], test()[1]["BLEU"][1:]):
            # the test counts resampled differences above the real one; equal translations have none, so p would be 0
            found[run.row, seed] = 1.0 if lines == systems[0][1] else result.p_value
    return found


def in_order(rows: Iterable[str]) -> list[str]:
    """softmax first, then in the order of NAMES."""
    names = list(NAMES.values())
    return sorted(rows, key=lambda row: (row != BASELINE, names.index(row.split(",")[0].split(";")[0]), row))


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table whose source has aligned columns."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join("| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths)) + " |" for line in lines)


def table(runs: list[Run], paper: dict[str, Any], samples: int) -> str:
    """The table of one experiment, with notes below."""
    by_row: dict[str, list[Run]] = defaultdict(list)
    for run in sorted(runs, key=lambda run: run.seed):
        by_row[run.row].append(run)
    scores = list(dict.fromkeys(name for run in runs for name in run.content["scores"]))
    is_translation = "best" in scores
    key = "bleu" if is_translation else "perplexity"
    header = ["mapping", "seeds", "valid ppl", *(f"BLEU, {name}" if is_translation else name for name in scores)]
    p = p_values(runs, "best", samples) if is_translation else {}
    first = scores[0]
    by_seed = {row: {run.seed: run.content["scores"][first][key] for run in group if first in run.content["scores"]}
               for row, group in by_row.items()}  # fmt: skip
    baseline = by_seed.get(BASELINE, {}) if len(by_row) > 1 else {}
    header += [f"{first} − softmax's"] if baseline else []
    header += ["p against softmax"] if p else []
    published = paper.get(runs[0].content["experiment"], {})
    header += ["published"] if published else []
    body = []
    for row in in_order(by_row):
        group = by_row[row]
        cells = [row, " ".join(str(run.seed) for run in group)]
        validation = [run.content["validation"].get("ppl") for run in group]
        cells.append("–" if None in validation else mean_and_deviation(validation))
        for name in scores:
            values = [run.content["scores"][name][key] for run in group if name in run.content["scores"]]
            # a mean over fewer runs than the row states could not be compared with the one beside it
            cells.append(mean_and_deviation(values) if len(values) == len(group) else "–")
        if baseline:
            cells.append("–" if row == BASELINE else difference(by_seed[row], baseline))
        if p:
            cells.append(" ".join(f"{p[row, run.seed]:.3f}" for run in group if (row, run.seed) in p) or "–")
        if published:
            cells.append(published["rows"].get(row, "–"))
        body.append(cells)
    lines = [f"### {runs[0].experiment}", "", markdown(header, body), "", *notes(runs, p, published, samples)]
    return "\n".join(lines)


def notes(runs: list[Run], p: dict, published: dict[str, Any], samples: int) -> list[str]:
    """How the numbers were obtained, and warnings if they cannot be compared."""
    found = []
    signatures = sorted({s["signature"] for run in runs for s in run.content["scores"].values() if "signature" in s})
    found += [f"`{signature}`" for signature in signatures]
    if len(signatures) > 1:
        found.append("WARNING: scored in different ways; compare no numbers across signatures.")
    updates = sorted({run.content["updates"] for run in runs})
    found.append(f"{' or '.join(f'{number:,}' for number in updates)} updates.")
    if len(updates) > 1:
        found.append("WARNING: not all runs are equally long.")
    tokens = {(name, s["tokens"]) for run in runs for name, s in run.content["scores"].items() if "tokens" in s}
    if len(tokens) > len({name for name, _ in tokens}):
        found.append("WARNING: perplexities over different numbers of tokens cannot be compared.")
    names = {name for run in runs for name in run.content["scores"]}
    for run in runs:
        missing = sorted(names - set(run.content["scores"]))
        if missing:
            found.append(f"WARNING: {run.row}, seed {run.seed}, has no score {' or '.join(missing)}.")
    if len({run.seed for run in runs}) > 1:
        found.append("Differences are means over seeds; bold: above the standard deviation between seeds of either.")
    if p:
        found.append(f"p: sacrebleu's paired bootstrap of the best checkpoints, {samples:,} samples, a value a seed.")
    if published:
        found.append(f"Published: {published['source']}.")
    return found


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument("folder", type=Path, help="with run.json files in it or below")
    parser.add_argument("--samples", type=positive, default=1000, metavar="N",
                        help="of the bootstrap (default: %(default)s)")  # fmt: skip
    parser.add_argument("--paper", type=Path, metavar="FILE", help="published numbers, as above")
    args = parser.parse_args()
    if args.samples > 1_000_000:
        parser.error("--samples takes no more than a million")
    logging.getLogger("sacrebleu").setLevel(logging.WARNING)  # it logs each system that it resamples
    with errors_in_a_line():
        paper = load_paper(args.paper) if args.paper else {}
        by_experiment: dict[str, list[Run]] = defaultdict(list)
        for run in load_runs(args.folder):
            by_experiment[run.experiment].append(run)
        print("\n\n".join(table(by_experiment[name], paper, args.samples) for name in sorted(by_experiment)))


if __name__ == "__main__":
    main()
