#!/usr/bin/env python
"""Makes Markdown tables of results from the run.json files below a folder.

    python scripts/results_table.py runs
    python scripts/results_table.py runs/multi30k_de_en --samples 5000

One table for each experiment, one row for each choice of mappings and settings: mean ± sample standard deviation over
seeds (with n − 1; none for one seed). A row names options of mappings that are not the default, by their flags, and
the settings in which it differs from most runs. For translation, sacrebleu's paired bootstrap (Koehn 2004) compares
each run with softmax with the same seed: p is the share of resampled test sets with at least this difference if both
were equally good. ε-perplexity, of a sparse vocabulary, is another quantity than perplexity: it has columns of its
own, and no difference.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from texts import read_lines, read_text

from multimax_fairseq.tools import ArgumentParser, UserError, errors_in_a_line, positive

FORMAT = 2  # of run.json, as record_run.py writes it

NAMES = {"softmax": "softmax", "multimax": "MultiMax", "sparsemax": "sparsemax", "entmax15": "1.5-entmax",
         "entmax": "α-entmax", "evsoftmax": "EvSoftMax", "stock": "softmax (stock fairseq)"}
DEFAULTS = {
    "mapping_options": "", "attention_mapping_sites": "cross,decoder,encoder", "attention_scale": "none",
    "multimax_order": 2, "multimax_terms": "above,below", "multimax_init": "normal", "modulator_lr_scale": 1.0,
    "entmax_alpha": None,  # this one is always named
}  # fmt: skip
BASELINE = "softmax"
KINDS = {"bleu": "BLEU, {}", "perplexity": "{}", "epsilon_perplexity": "{}, ε-perplexity"}  # names of columns
# What a run.json has to have, and the scores in it.
ENTRIES = {"experiment": str, "seed": int, "updates": int, "mapping": dict, "settings": dict, "validation": dict,
           "scores": dict}
ENTRIES_OF_BLEU = {"bleu": float, "signature": str, "hypotheses": str, "references": str}


@dataclass
class Run:
    """The contents of a run.json, the folder with it and the translations, and the name of its row."""

    folder: Path
    content: dict[str, Any]
    experiment: str
    seed: int
    row: str = ""

    @property
    def setting(self) -> str:
        """All that makes a row, but for the seed."""
        return json.dumps([self.content["mapping"], self.content["settings"]], sort_keys=True)

    def lines(self, which: str, kind: str) -> list[str]:
        """The ``hypotheses`` or ``references`` of the score ``which``."""
        return read_lines(self.folder / self.content["scores"][which][kind])


def name_of_mapping(mapping: dict[str, Any]) -> str:
    """The name of a choice of mappings of settings.py: ``MultiMax, multimax_order 1``."""
    attention, output = mapping["attention_mapping"], mapping.get("output_mapping", "softmax")
    name = NAMES.get(attention, attention)
    for key, default in DEFAULTS.items():
        value = mapping.get(key, default)
        name += "" if value == default else f", {key} {value}"
    return name if output == "softmax" else f"{name}; {NAMES.get(output, output)} of the vocabulary"


def name_rows(runs: list[Run]) -> None:
    """Give the runs of an experiment the names of their rows: mapping, and settings that most runs have not."""
    every = {key for run in runs for key in run.content["settings"]}
    usual = {}
    for key in sorted(every):
        values = [as_text(run.content["settings"].get(key)) for run in sorted(runs, key=lambda run: run.seed)]
        usual[key] = max(dict.fromkeys(values), key=values.count)
    for run in runs:
        name = name_of_mapping(run.content["mapping"])
        for key in sorted(every):
            value = as_text(run.content["settings"].get(key))
            name += "" if value == usual[key] else f", {key} {value}"
        run.row = name


def as_text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else "none" if value is None else str(value)


def check_entries(found: Any, kinds: dict[str, type]) -> None:
    """Raise ValueError if an entry is missing, empty or of another type."""
    for name, kind in kinds.items():
        value = found.get(name)
        if not isinstance(value, (int, float) if kind is float else kind) or value == "":
            raise ValueError(f"{name} is {repr(value)[:60]}")


def refuse(constant: str) -> None:
    raise ValueError(f"there is {constant} in it")


def load_run(path: Path) -> Run:
    """Load a run.json and check that its scores exist and are those of the files beside it.

    Raises:
        UserError: something is missing, damaged, or no number; or the translations are not those that were scored.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)  # NaN, Infinity
        if content.get("format") != FORMAT:
            raise ValueError(f"format is {content.get('format')}")
        check_entries(content, ENTRIES)
        if not content["scores"]:
            raise ValueError("it has no scores")
        for score in content["scores"].values():
            kind = kind_of(score)
            check_entries(score, ENTRIES_OF_BLEU if kind == "bleu" else {kind: float, "tokens": int, "output": str})
        check_entries({"ppl": 1, **content["validation"]}, {"ppl": float})
        name_of_mapping(content["mapping"])
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is not, or no longer, a file of record_run.py ({error}): evaluate again") from error
    run = Run(path.parent, content, content["experiment"], content["seed"])
    for name, score in content["scores"].items():
        if "bleu" in score:
            check_bleu(run, name)
        elif f"Perplexity: {score[kind_of(score)]:.2f}" not in read_text(run.folder / score["output"]):
            raise UserError(f"{path.parent / score['output']} has another perplexity than run.json: evaluate again")
    return run


def kind_of(score: Any) -> str:
    return next((kind for kind in KINDS if kind in score), "perplexity")


def check_bleu(run: Run, which: str) -> None:
    """Raise UserError if the translations beside a run.json do not have its BLEU."""
    hypotheses, references = run.lines(which, "hypotheses"), run.lines(which, "references")
    score, where = run.content["scores"][which], run.folder / run.content["scores"][which]["hypotheses"]
    if len(hypotheses) != len(references):
        raise UserError(f"{where} has {len(hypotheses)} lines for {len(references)} references: evaluate again")
    found = metric(score["signature"]).corpus_score(hypotheses, [references]).score
    if abs(found - score["bleu"]) > 0.0051:  # it was printed with two decimals
        raise UserError(f"{where} has BLEU {found:.2f}, and run.json says {score['bleu']}: the translations or the "
                        "references are not those that were scored; evaluate again")


def metric(signature: str, **options: Any):
    """sacrebleu's BLEU, as score_translation.py computes it: ``BLEU|nrefs:1|case:lc|eff:no|tok:13a|smooth:exp|…``."""
    from sacrebleu.metrics import BLEU

    return BLEU(lowercase="|case:lc|" in signature, **options)


def load_runs(folders: list[Path]) -> dict[str, list[Run]]:
    """Load every run.json below the folders, by experiment, with the names of their rows.

    Raises:
        UserError: there is none, one fails its checks, or two are the same run.
    """
    found: dict[str, list[Run]] = defaultdict(list)
    same: dict[tuple[str, str, int], Run] = {}
    for path in sorted({path.resolve() for folder in folders for path in folder.rglob("run.json")}):
        run = load_run(path)
        other = same.setdefault((run.experiment, run.setting, run.seed), run)
        if other is not run:
            raise UserError(f"{path} and {other.folder / 'run.json'} are both {run.experiment}, "
                            f"{name_of_mapping(run.content['mapping'])}, seed {run.seed}, same settings: name the "
                            "folder of one of them")
        found[run.experiment].append(run)
    if not found:
        raise UserError(f"there is no run.json below {' '.join(map(str, folders))}")
    for runs in found.values():
        name_rows(runs)
    return found


def mean_and_deviation(values: Iterable[float]) -> str:
    """``35.28 ± 0.12``, or a single value alone."""
    values = list(values)
    mean = f"{statistics.fmean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.2f}"


def difference(values: dict[int, float], baseline: dict[int, float]) -> str:
    """``−0.42``: the mean over common seeds, bold if larger than both standard deviations between seeds."""
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
    """sacrebleu's paired bootstrap of each run against softmax with the same seed, if there is one: (row, seed) → p.

    Raises:
        UserError: translations are missing, or were scored with other references or in another way.
    """
    from sacrebleu.significance import PairedTest

    found = {}
    scored = [run for run in runs if which in run.content["scores"]]
    for softmax in (run for run in scored if run.row == BASELINE):
        others = [run for run in scored if run.seed == softmax.seed and run is not softmax]
        if not others:
            continue
        references, signature = softmax.lines(which, "references"), softmax.content["scores"][which]["signature"]
        for run in others:
            if run.lines(which, "references") != references:
                raise UserError(f"{run.folder} and {softmax.folder} have different references")
            if run.content["scores"][which]["signature"] != signature:
                raise UserError(f"{run.folder} and {softmax.folder} are scored in different ways")
        systems = [(f"{number}", run.lines(which, "hypotheses")) for number, run in enumerate([softmax, *others])]
        # references=None: the test uses the metric's references, tokenised once
        metrics = {"BLEU": metric(signature, references=[references])}
        test = PairedTest(systems, metrics, references=None, test_type="bs", n_samples=samples)
        for run, (_, lines), result in zip(others, systems[1:], test()[1]["BLEU"][1:]):
            # the test counts resampled differences above the real one; equal translations have none, so p would be 0
            found[run.row, run.seed] = 1.0 if lines == systems[0][1] else result.p_value
    return found


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table whose source has aligned columns."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join("| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths)) + " |" for line in lines)


LATEX = {"±": r"$\pm$", "−": "$-$", "–": "--", "×": r"$\times$", "α": r"$\alpha$", "ε": r"$\varepsilon$", "_": r"\_",
         "&": r"\&", "%": r"\%", "#": r"\#"}


def latex(header: list[str], rows: list[list[str]]) -> str:
    """A tabular, with booktabs."""
    def line(cells: list[str]) -> str:
        escaped = ["".join(LATEX.get(letter, letter) for letter in cell) for cell in cells]
        return " & ".join(re.sub(r"\*\*(.*?)\*\*", r"\\textbf{\1}", cell) for cell in escaped) + r" \\"

    body = [r"\toprule", line(header), r"\midrule", *map(line, rows), r"\bottomrule"]
    return "\n".join([rf"\begin{{tabular}}{{{'l' * len(header)}}}", *body, r"\end{tabular}"])


def comma_separated(header: list[str], rows: list[list[str]]) -> str:
    csv.writer(text := io.StringIO(), lineterminator="\n").writerows([header, *rows])
    return text.getvalue().rstrip("\n")


FORMATS = {"markdown": markdown, "latex": latex, "csv": comma_separated}


def table(runs: list[Run], samples: int, form: str) -> str:
    """The table of one experiment, with notes below (in Markdown)."""
    by_row: dict[str, list[Run]] = defaultdict(list)
    for run in sorted(runs, key=lambda run: run.seed):
        by_row[run.row].append(run)
    every = (score for run in runs for score in run.content["scores"].items())
    scores = list(dict.fromkeys((name, kind_of(score)) for name, score in every))
    header = ["mapping", "seeds", "valid ppl", *(KINDS[kind].format(name) for name, kind in scores)]

    def values(group: list[Run], name: str, kind: str) -> dict[int, float]:
        return {run.seed: run.content["scores"][name][kind] for run in group
                if kind in run.content["scores"].get(name, {})}

    first = next(((name, kind) for name, kind in scores if kind != "epsilon_perplexity"), None)
    baseline = values(by_row.get(BASELINE, []), *first) if first and len(by_row) > 1 else {}
    header += [f"{first[0]} − softmax's"] if baseline else []
    p = p_values(runs, "best", samples) if ("best", "bleu") in scores else {}
    header += ["p against softmax"] if p else []
    body = []
    for row in sorted(by_row, key=lambda row: (not row.startswith(BASELINE), row)):
        group = by_row[row]
        cells = [row, " ".join(str(run.seed) for run in group)]
        validation = [run.content["validation"].get("ppl") for run in group]
        cells.append("–" if None in validation else mean_and_deviation(validation))
        for name, kind in scores:
            found = values(group, name, kind)
            # a mean over fewer runs than the row states could not be compared with the one beside it
            cells.append(mean_and_deviation(found.values()) if len(found) == len(group) else "–")
        if baseline:
            cells.append("–" if row == BASELINE else difference(values(group, *first), baseline))
        if p:
            cells.append(" ".join(f"{p[row, run.seed]:.3f}" for run in group if (row, run.seed) in p) or "–")
        body.append(cells)
    if form != "markdown":
        return FORMATS[form](header, body)
    below = notes(runs, p, samples)
    return "\n".join([f"### {runs[0].experiment}", "", markdown(header, body), "", *below])


def notes(runs: list[Run], p: dict, samples: int) -> list[str]:
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
    return found


def main() -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument("folders", type=Path, nargs="+", help="with run.json files in them or below")
    parser.add_argument("--format", choices=FORMATS, default="markdown", help="of the table (default: %(default)s)")
    parser.add_argument("--samples", type=positive, default=1000, metavar="N",
                        help="of the bootstrap (default: %(default)s)")
    args = parser.parse_args()
    logging.getLogger("sacrebleu").setLevel(logging.WARNING)  # it logs each system that it resamples
    with errors_in_a_line():
        found = load_runs(args.folders)
        print("\n\n".join(table(found[name], args.samples, args.format) for name in sorted(found)))


if __name__ == "__main__":
    main()
