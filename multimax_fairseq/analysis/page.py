"""Writes the page of a report, one HTML file that opens offline, from its results and its pictures."""

import base64
import html
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Dict, List, Sequence, Tuple

from ..tools import grouped

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 66rem; margin: 2rem auto; padding: 0 1rem }
h1, h2, h3 { line-height: 1.2; margin-top: 2.2em } h1 { margin-top: 0 }
table { border-collapse: collapse; font-size: .82rem; margin: 1rem 0; font-variant-numeric: tabular-nums }
th, td { padding: .2rem .5rem; text-align: right; border-bottom: 1px solid #ddd } th { background: #f4f4f4 }
.text { text-align: left } td { white-space: nowrap }
.scroll { overflow-x: auto } figure { margin: 1.2rem 0 } img { max-width: 100%; height: auto }
figcaption { font-size: .9rem; color: #444; max-width: 48rem }
dt { font-weight: 600 } dd { margin: 0 0 .5rem 1.2rem } code { font-size: .9em }
"""

OUTPUT_NOTE = """
<p>Means over target tokens. Here M and S as the paper defines them tell models hardly apart: where one word has most,
M is 1 − top share, and s = 1/K is so large that S is near 1. M of {k}, and S at one s for all models, say more.</p>
"""

DEFINITIONS = """
<dl>
<dt>multi-modality M</dt><dd>1 − mean of (largest probability − φ<sub>n</sub>) over the relevant scores: those above ε
and below the largest. ε = log(1/K) + logsumexp(x), K the number of keys that can be attended to. Rows without such a
score are left out of the mean: <b>no M</b> is their share.</dd>
<dt>M of {k}</dt><dd>the same over the {k} largest scores, wherever ε lies: defined in every row with two different
scores.</dd>
<dt>sparsity S</dt><dd>mean of exp(−φ<sub>l</sub> / s) over the irrelevant scores, those below ε, with s = 1/K.
<b>No S</b> is the share of rows without one. Scores are those before the mapping: with a σ that falls, what is
relevant by its score need not be what is attended to.</dd>
<dt>S at s</dt><dd>the same with one s for all models of this report, at each site: the geometric mean of their
tails. A model's tail is the mean probability of its irrelevant scores; a tail of 0 does not count.</dd>
<dt>entropy</dt><dd>in nats. <b>Support</b>: entries above 0. <b>Effective support</b>: exp(entropy).
<b>Top share</b>: probability of the most attended key. <b>Top-{k} share</b>: of the {k} most attended keys together.
In the output layer, words take the place of keys.</dd>
<dt>MAD</dt><dd>mean cosine distance over pairs of tokens of a sentence, of a layer's output; layer 0 is what goes
into the first.</dd>
<dt>rollout</dt><dd>product over layers of ½A + ½I, heads averaged; for translation each cross-attention takes half of
a decoder layer, and the parts that come from the source are shown.</dd>
<dt>AER</dt><dd>alignment error rate: each target word linked to the source word that it attends to most.</dd>
</dl>
<p>Probabilities are those that the model computes with, without dropout, under teacher forcing. Metrics are means
over all queries that are no padding; of several seeds, mean ± standard deviation. Multi-modality and sparsity: Zhou,
Fritz and Keuper 2024, Definitions 3.2 and 3.3; MAD: Chen et al. 2020; rollout: Abnar and Zuidema 2020; AER: Och and
Ney 2003.</p>
"""

Row = Dict[str, Any]


def render_page(results: Dict[str, Any], pictures: Sequence[Tuple[str, str, Path]]) -> str:
    """The whole page.

    Args:
        pictures: for each the part of the page that it stands in, its caption, and the PNG.
    """
    models, k = results["models"], results["top_k"]
    metrics, count = _metrics(models, k), results["skipped"]
    output, others = ([row for row in metrics if (row["site"] == "output") == is_it] for is_it in (True, False))
    skipped = f"<p>{count:,} sentences are longer than a model's positions, and left out.</p>" if count else ""

    def show(part: str) -> str:
        return "".join(_figure(caption, path) for of, caption, path in pictures if of == part)

    parts = [
        ("", _table([_model(label, seeds) for label, seeds in models.items()]) + skipped),
        ("Sparse, multi-modal?", show("sparsity-multimodality") + _table(others)),
        ("Over-smoothing", show("over-smoothing")),
        ("Word alignment", _table(_alignments(models))),
        ("The output layer", _table(output) + OUTPUT_NOTE.format(k=k) if output else ""),
        ("Modulators and scores", show("modulators") + _table(_modules(models))),
        ("Attention in single sentences", show("sentences")),
        ("Mappings", show("simplex")),
        ("What is measured", DEFINITIONS.format(k=k)),
    ]
    body = "\n".join((f"<h2>{title}</h2>\n" if title else "") + content for title, content in parts if content)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Attention of {html.escape(', '.join(models))}</title>\n<style>{STYLE}</style>\n"
        f"<h1>What the attention learned</h1>\n{body}\n"
        f"<p>Made by <code>{html.escape(results['command'])}</code></p>\n</html>\n"
    )


def _figure(caption: str, path: Path) -> str:
    png = path.read_bytes()
    width = int.from_bytes(png[16:20], "big") * 110 // 200  # CSS pixels; 200 dots an inch
    caption, data = html.escape(caption), base64.b64encode(png).decode()
    return (
        f'<figure><img width="{width}" alt="{caption}" src="data:image/png;base64,{data}">'
        f"<figcaption>{caption} <code>{path.stem}</code></figcaption></figure>"
    )


def _table(rows: List[Row]) -> str:
    if not rows:
        return ""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    words = {name for row in rows for name, value in row.items() if isinstance(value, str)}
    lines = []
    for tag, row in [("th", dict(zip(columns, columns))), *(("td", row) for row in rows)]:
        cells = ((' class="text"' if name in words else "", html.escape(_text(row.get(name)))) for name in columns)
        lines.append("".join(f"<{tag}{kind}>{text}</{tag}>" for kind, text in cells))
    return f'<div class="scroll"><table><tr>{"</tr><tr>".join(lines)}</tr></table></div>'


def _text(value: Any) -> str:
    """A cell: numbers as short as they can be; a list of several seeds' numbers is mean ± standard deviation."""
    if isinstance(value, list):
        there = [number for number in value if number is not None]
        spread = f" ± {_text(stdev(there))}" if len(there) > 1 else ""
        return _text(mean(there) if there else None) + spread
    if value is None:
        return "–"
    if isinstance(value, float):
        digits = ".1e" if 0 < abs(value) < 1e-3 else ",.3f" if abs(value) < 100 else ",.1f"
        return f"{value:{digits}}".replace("-", "−")
    return f"{value:,}" if isinstance(value, int) else str(value)


# ---------------------------------------------------------------------- tables


NAMES = {
    "multimodality": "M",
    "top_multimodality": "M of {k}",
    "sparsity": "S",
    "common_sparsity": "S at s",
    "common_reference": "s",
    "entropy": "entropy",
    "support": "support",
    "effective_support": "effective support",
    "top_share": "top share",
    "top_k_share": "top-{k} share",
}


def _model(label: str, seeds: List[Row]) -> Row:
    mappings = {module["site"]: module["mapping"] for module in seeds[0]["modules"]}
    same = f"{next(iter(mappings.values()))} everywhere" if len(set(mappings.values())) == 1 else None
    return {
        "model": label,
        "seeds": len(seeds),
        "architecture": seeds[0]["architecture"],
        "mappings": same or ", ".join(f"{site}: {name}" for site, name in mappings.items()),
        "parameters": seeds[0]["parameters"],
        "sentences" if seeds[0]["is_translation"] else "samples": seeds[0]["sentences"],
        "target tokens": seeds[0]["target_tokens"],
    }


def _metrics(models: Dict[str, List[Row]], k: int) -> List[Row]:
    """Means over each site's heads (or the output layer), and the share of rows that M and S leave out."""
    rows = []
    for label, seeds in models.items():
        for of_seeds in zip(*(model["sites"] for model in seeds)):
            row = {"model": label, "site": of_seeds[0]["site"]}
            for key, name in NAMES.items():
                name = name.format(k=k)
                row[name] = of_seeds[0][key] if key == "common_reference" else [numbers[key] for numbers in of_seeds]
                if key in ("multimodality", "sparsity"):
                    left_out = mean(numbers[f"{key}_undefined"] / numbers["rows"] for numbers in of_seeds)
                    row[f"no {name} (%)"] = 100 * left_out
            rows.append(row)
    return rows


def _modules(models: Dict[str, List[Row]]) -> List[Row]:
    """Modules that have learned something: their numbers, and the scores that they saw."""
    rows = []
    for label, seeds in models.items():
        for seed, model in enumerate(seeds, start=1):
            for module in (module for module in model["modules"] if module["learned"]):
                row = {"model": label, "seed": seed, "site": module["site"], "layer": module["layer"] + 1}
                for name, value in module["learned"].items():
                    row[name] = ", ".join(map(_text, value)) if isinstance(value, list) else value
                row |= {"lowest score": module["lowest_score"], "highest score": module["highest_score"]}
                if "falling_share" in module:
                    row["scores where σ falls (%)"] = 100 * module["falling_share"]
                rows.append(row)
    return rows


def _alignments(models: Dict[str, List[Row]]) -> List[Row]:
    """The best head, the mean of the heads and the rollout of each model."""
    table = []
    for label, seeds in models.items():
        ways = [grouped(model["alignment"], "rows") for model in seeds]
        for name in ways[0]:
            heads = [[row for row in way[name] if row["head"].isdigit()] for way in ways]
            best = [min(rows, key=lambda row: row["aer"]) for rows in heads]
            table.append({
                "model": label,
                "rows": name,
                "best head": [row["aer"] for row in best],
                "which": ", ".join(f"layer {row['layer'] + 1}, head {int(row['head']) + 1}" for row in best),
                "mean of all heads' AER": [mean(row["aer"] for row in rows) for rows in heads],
                "rollout": [row["aer"] for way in ways for row in way[name] if row["head"] == "rollout"],
            })  # fmt: skip
    return table
