"""Writes a folder with figures (PNG and SVG), numbers (JSON and CSV), and a page that shows them offline."""

import base64
import csv
import html
import io
import json
import os
import tempfile
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Sequence, Set, Tuple

import matplotlib
import tqdm
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from . import figures
from .files import UserError, sync_folder
from .measure import Measurement, mean
from .metrics import TOP_K

PAGE = "report.html"


class Picture(NamedTuple):
    """A written figure: its file name without extension, caption, and PNG."""

    name: str
    caption: str
    png: bytes
    width: int  # CSS pixels


STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 66rem; margin: 2rem auto; padding: 0 1rem }
h1, h2, h3 { line-height: 1.2; margin-top: 2.2em } h1 { margin-top: 0 }
table { border-collapse: collapse; font-size: .82rem; margin: 1rem 0; font-variant-numeric: tabular-nums }
th, td { padding: .2rem .5rem; text-align: right; border-bottom: 1px solid #ddd } th { background: #f4f4f4 }
.text { text-align: left } td:first-child { white-space: nowrap }
.scroll { overflow-x: auto } figure { margin: 1.2rem 0 } img { max-width: 100%; height: auto }
figcaption { font-size: .9rem; color: #444; max-width: 48rem }
summary { cursor: pointer; font-weight: 600; margin: .6rem 0 }
dt { font-weight: 600 } dd { margin: 0 0 .5rem 1.2rem } code { font-size: .9em }
"""

OUTPUT_NOTE = f"""
<p>Means over target tokens. Here M and S as the paper defines them tell models hardly apart: where one word has most,
M is 1 − top share, and s = 1/K is so large that S is near 1. M of {TOP_K} and S at s, one s for all models,
measure more. <b>Support</b> is the mean number of words with a probability above 0: all of them with softmax, few
with a sparse mapping.</p>
"""

DEFINITIONS = f"""
<dl>
<dt>multi-modality M</dt><dd>1 − mean of (largest probability − φ<sub>n</sub>) over the relevant scores: those above ε
and below the largest. ε = log(1/K) + logsumexp(x), K the number of keys that can be attended to. Rows without such a
score are left out of the mean: <b>no M</b> is their share.</dd>
<dt>M of {TOP_K}</dt><dd>the same over the {TOP_K} largest scores, wherever ε lies: defined in every row with two
different scores.</dd>
<dt>sparsity S</dt><dd>mean of exp(−φ<sub>l</sub> / s) over the irrelevant scores, those below ε, with s = 1/K.
<b>No S</b> is the share of rows without one. Scores are those before the mapping: with a σ that falls, what is
relevant by its score need not be what is attended to.</dd>
<dt>S at s</dt><dd>the same with one s for all models of this report, at each site: the geometric mean of their
tails. A model's tail is the mean probability of its irrelevant scores; a tail of 0 does not count.</dd>
<dt>entropy</dt><dd>in nats. <b>Support</b>: entries above 0. <b>Effective support</b>: exp(entropy).
<b>Top share</b>: probability of the most attended key. <b>Top-{TOP_K} share</b>: of the {TOP_K} most attended keys
together. In the output layer, words take the place of keys.</dd>
<dt>MAD</dt><dd>mean cosine distance over pairs of tokens of a sentence, of a layer's output; layer 0 is what goes
into the first.</dd>
<dt>rollout</dt><dd>product over layers of ½A + ½I, heads averaged; for translation each cross-attention takes half of
a decoder layer, and the parts that come from the source are shown.</dd>
<dt>AER</dt><dd>alignment error rate: each target word linked to the source word that it attends to most.</dd>
</dl>
<p>Probabilities are those that the model computes with, without dropout, under teacher forcing. Metrics are means
over all queries that are no padding. Multi-modality and sparsity: Zhou, Fritz and Keuper 2024, Definitions 3.2 and
3.3; MAD: Chen et al. 2020; rollout: Abnar and Zuidema 2020; AER: Och and Ney 2003.</p>
"""


def write_report(
    out: Path, measurements: Sequence[Measurement], command: str, replace: bool = False, progress: bool = True
) -> None:
    """Draw and write everything beside ``out``, then move it there.

    Args:
        out: the folder to make; with ``replace``, an earlier report may be there.
        command: the command that makes this report, for the page and the JSON.

    Raises:
        UserError: it cannot be written: a full disk, say.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name[:100]}.") as staging:
            build = Path(staging, "report")
            (build / "figures").mkdir(parents=True)
            write_numbers(build, measurements, command)
            with matplotlib.rc_context(figures.STYLE):
                sections = _draw_all(build / "figures", measurements, progress)
            (build / PAGE).write_text(render_page(measurements, sections, command), encoding="utf-8")
            for path in filter(Path.is_file, build.rglob("*")):
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
            build.chmod(0o755)
            if out.exists() and replace and is_report(out):
                os.replace(out, Path(staging, "replaced"))  # deleted with the staging folder
            os.replace(build, out)  # this may also replace an empty folder
            sync_folder(out.parent)
    except OSError as error:
        raise UserError(f"could not write {out}: {error.strerror or error}") from error


def is_report(folder: Path) -> bool:
    """Whether a folder holds only what :func:`write_report` makes."""
    known = {PAGE, "figures", "results.json", *(f"{name}.csv" for name in TABLES)}
    return (folder / PAGE).is_file() and {path.name for path in folder.iterdir()} <= known


# ---------------------------------------------------------------------- numbers

TABLES = ("heads", "sites", "modules", "layers", "alignment", "output")


def write_numbers(folder: Path, measurements: Sequence[Measurement], command: str) -> None:
    """Write results.json with everything, and a CSV file for each table, with a column for the model."""
    results = [measurement.results() for measurement in measurements]
    document = {"command": command, "models": results}
    (folder / "results.json").write_text(json.dumps(document, indent=1, ensure_ascii=False), encoding="utf-8")
    for table in TABLES:
        rows = []
        for result in results:
            of_model = [result[table]] if isinstance(result[table], dict) else result[table] or []
            rows += [{"model": result["label"], **row} for row in of_model]
        if rows:
            columns = list(dict.fromkeys(name for row in rows for name in row if name != "histogram"))
            with open(folder / f"{table}.csv", "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, columns, extrasaction="ignore")
                writer.writeheader()
                writer.writerows(rows)


# ---------------------------------------------------------------------- figures

Section = Tuple[str, List[Picture]]


def _draw_all(folder: Path, measurements: Sequence[Measurement], progress: bool) -> Dict[str, List[Section]]:
    """Write all figures; return them by part of the page."""
    # part, section, drawing
    plan = [("comparison", drawing[0], drawing) for drawing in figures.drawings_of(measurements)]
    taken: Set[str] = set()
    for measurement in measurements:
        label = measurement.loaded.label
        file_name = _file_name(label, taken)
        plan.append(("modulators", label, (
            f"{file_name}-modulators",
            f"{label}: the scores that each module saw, and what its modulator, if any, makes of them. The outermost "
            "0.05 % of the scores on either side are not shown.",
            lambda m=measurement: figures.draw_modulators(m.modules.values(), m.loaded.label),
        )))  # fmt: skip
        for example in measurement.examples.values():
            section = f"{label}, sentence {example.index}"
            cut = " (cut to what can be read)" if example.is_cut else ""
            for site in example.rollout:
                name = f"{file_name}-{example.index}-{site}-rollout"
                caption = f"{section}{cut}: rollout of {figures.SITE_NAMES[site]}, all layers and heads together."
                plan.append(("sentences", section, (
                    name, caption, lambda e=example, s=site: figures.draw_rollout(e, s),
                )))  # fmt: skip
            for site, layer in example.attention:
                name = f"{file_name}-{example.index}-{site}-layer{layer + 1}"
                caption = f"{section}{cut}: {figures.SITE_NAMES[site]}, layer {layer + 1}."
                plan.append(("sentences", section, (
                    name, caption, lambda e=example, s=site, n=layer: figures.draw_attention(e, s, n),
                )))  # fmt: skip
    parts: Dict[str, Dict[str, List[Picture]]] = {}
    for part, section, (name, caption, draw) in tqdm.tqdm(plan, "figures", unit="figure", disable=not progress):
        parts.setdefault(part, {}).setdefault(section, []).append(_save(draw(), folder / name, caption))
    return {part: list(sections.items()) for part, sections in parts.items()}


def _file_name(label: str, taken: Set[str]) -> str:
    """The start of a model's file names: its label without spaces and the like, distinct from other models'."""
    plain = "".join(character if character.isalnum() or character in "-._" else "-" for character in label)[:40]
    name, number = plain, 1
    while name in taken:
        number += 1
        name = f"{plain}-{number}"
    taken.add(name)
    return name


def _save(figure: Figure, path: Path, caption: str) -> Picture:
    FigureCanvasAgg(figure)
    pixels, png = io.BytesIO(), io.BytesIO()
    figure.savefig(pixels, format="png")
    # A palette makes the file a third as large, with no visible difference.
    Image.open(pixels).convert("RGB").quantize(256).save(png, "png", optimize=True)
    figure.set_layout_engine("none")  # everything has its place now; laying it out again would take as long
    figure.savefig(path.with_name(path.name + ".svg"), format="svg", metadata={"Date": None})
    path.with_name(path.name + ".png").write_bytes(png.getvalue())
    return Picture(path.name, caption, png.getvalue(), round(figure.get_figwidth() * 110))


# ---------------------------------------------------------------------- page


def render_page(measurements: Sequence[Measurement], sections: Dict[str, List[Section]], command: str) -> str:
    """The whole page, with the pictures in it."""
    labels = ", ".join(m.loaded.label for m in measurements)
    comparison = [picture for _, pictures in sections.get("comparison", []) for picture in pictures]
    by_name = {picture.name: picture for picture in comparison}

    def show(name: str) -> str:
        return _figure(by_name[name]) if name in by_name else ""

    parts = [
        "<h1>What the attention learned</h1>",
        _table(_models_table(measurements)),
        "<h2>Sparse, multi-modal?</h2>",
        show("sparsity-multimodality"),
        _table(_metrics_table(measurements, is_output=False)),
        "<h2>Over-smoothing</h2>",
        show("over-smoothing"),
    ]
    if "alignment" in by_name:
        parts += ["<h2>Word alignment</h2>", show("alignment"), _table(_alignment_table(measurements))]
    output = _metrics_table(measurements, is_output=True)
    if output:
        parts += ["<h2>The output layer</h2>", _table(output), OUTPUT_NOTE]
    parts += ["<h2>Modulators and scores</h2>"]
    for (_, pictures), measurement in zip(sections.get("modulators", []), measurements):
        parts += [_figure(picture) for picture in pictures]
        table = _modules_table(measurement)
        if table:
            parts.append(_details("Thresholds and gains", _table(table)))
    if "sentences" in sections:
        parts.append("<h2>Attention in single sentences</h2>")
        for section, pictures in sections["sentences"]:
            parts.append(_details(section, "".join(map(_figure, pictures))))
    parts += ["<h2>Mappings</h2>", show("simplex"), show("orders")]
    parts += ["<h2>All heads</h2>", _details("Every number of every head", _table(_heads_table(measurements)))]
    parts += ["<h2>What is measured</h2>", DEFINITIONS, f"<p>Made by <code>{html.escape(command)}</code></p>"]
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Attention of {html.escape(labels)}</title>\n<style>{STYLE}</style>\n"
        + "\n".join(parts)
        + "\n</html>\n"
    )


def _figure(picture: Picture) -> str:
    data = base64.b64encode(picture.png).decode()
    caption = html.escape(picture.caption)
    return (
        f'<figure><img width="{picture.width}" alt="{caption}" src="data:image/png;base64,{data}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _details(summary: str, content: str) -> str:
    return f"<details><summary>{html.escape(summary)}</summary>{content}</details>"


def _table(rows: List[Dict[str, Any]]) -> str:
    if not rows:
        return ""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    kinds = [_kind(next((row[column] for row in rows if row.get(column) is not None), None)) for column in columns]
    head = "".join(f"<th{kind}>{html.escape(column)}</th>" for column, kind in zip(columns, kinds))
    body = "".join("<tr>" + "".join(_cell(row.get(column)) for column in columns) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _cell(value: Any) -> str:
    if value is None:
        return "<td>–</td>"
    if isinstance(value, bool):
        return f"<td>{'yes' if value else 'no'}</td>"
    if isinstance(value, float):
        digits = ".1e" if 0 < abs(value) < 1e-3 else ",.3f" if abs(value) < 100 else ",.1f"
        return f"<td>{value:{digits}}</td>".replace("-", "−")
    if isinstance(value, int):
        return f"<td>{value:,}</td>"
    return f"<td{_kind(value)}>{html.escape(str(value))}</td>"


def _kind(value: Any) -> str:
    """How to align a value: words left, numbers right."""
    return ' class="text"' if isinstance(value, str) and not value.endswith("%") else ""


def _models_table(measurements: Sequence[Measurement]) -> List[Dict[str, Any]]:
    rows = []
    for m in measurements:
        mappings = {module.site: module.mapping for module in m.modules.values()}
        same = f"{next(iter(mappings.values()))} everywhere" if len(set(mappings.values())) == 1 else None
        rows.append({
            "model": m.loaded.label,
            "architecture": m.loaded.architecture,
            "mappings": same or ", ".join(f"{site}: {name}" for site, name in mappings.items()),
            "parameters": sum(p.numel() for p in m.loaded.model.parameters()),
            "sentences" if m.loaded.is_translation else "samples": m.sentences,
            "target tokens": m.tokens,
        })  # fmt: skip
    return rows


METRIC_NAMES = {
    "multimodality": "M",
    "top_multimodality": f"M of {TOP_K}",
    "sparsity": "S",
    "common_sparsity": "S at s",
    "common_reference": "s",
    "entropy": "entropy",
    "support": "support",
    "effective_support": "effective support",
    "top_share": "top share",
    "top_k_share": f"top-{TOP_K} share",
}


def _metrics_table(measurements: Sequence[Measurement], is_output: bool) -> List[Dict[str, Any]]:
    """Means over each site's heads (or the output layer), and the share of rows that M and S leave out."""
    rows = []
    for m in measurements:
        for numbers in m.site_rows():
            if (numbers["site"] == "output") == is_output:
                where = {"mapping": m.modules["output", 0].mapping} if is_output else {"site": numbers["site"]}
                row = {"model": m.loaded.label, **where}
                for key, name in METRIC_NAMES.items():
                    row[name] = numbers[key]
                    if key in ("multimodality", "sparsity"):
                        row[f"no {name}"] = f"{numbers[f'{key}_undefined'] / numbers['rows']:.1%}"
                rows.append(row)
    return rows


def _heads_table(measurements: Sequence[Measurement]) -> List[Dict[str, Any]]:
    return [
        {
            "model": m.loaded.label,
            "site": row["site"],
            "layer": row["layer"] + 1,
            "head": row["head"] + 1,
            **{name: row[key] for key, name in METRIC_NAMES.items()},
            "rows": row["rows"],
            "no M": row["multimodality_undefined"],
            "no S": row["sparsity_undefined"],
        }
        for m in measurements
        for row in m.head_rows()
        if row["site"] != "output"
    ]


def _modules_table(measurement: Measurement) -> List[Dict[str, Any]]:
    rows = []
    for module in measurement.modules.values():
        numbers = module.numbers()
        numbers["layer"] += 1
        if "is_monotone" in numbers:
            numbers["monotone there"] = numbers.pop("is_monotone")
            numbers["scores where σ falls"] = f"{numbers.pop('falling_share'):.2%}"
        elif module.alpha is not None:
            numbers["alpha"] = ", ".join(f"{alpha:.3f}" for alpha in module.alpha)
        else:
            continue
        rows.append({name.replace("_score", " score"): value for name, value in numbers.items()})
    return rows


def _alignment_table(measurements: Sequence[Measurement]) -> List[Dict[str, Any]]:
    """The best head, the best layer and the rollout of each model."""
    table = []
    for m in measurements:
        rows = m.alignment_rows()
        for name in dict.fromkeys(row["rows"] for row in rows):
            heads = [row for row in rows if row["rows"] == name and row["head"].isdigit()]
            layers = [row for row in rows if row["rows"] == name and row["head"] == "mean"]
            best_head, best_layer = (min(group, key=lambda row: row["aer"]) for group in (heads, layers))
            table.append({
                "model": m.loaded.label,
                "rows": name,
                "best head": best_head["aer"],
                "which": f"layer {best_head['layer'] + 1}, head {int(best_head['head']) + 1}",
                "best layer (mean of heads)": best_layer["aer"],
                "layer": best_layer["layer"] + 1,
                "mean of all heads' AER": mean([row["aer"] for row in heads]),
                "rollout": next(row["aer"] for row in rows if row["rows"] == name and row["head"] == "rollout"),
            })  # fmt: skip
    return table
