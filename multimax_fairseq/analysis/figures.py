"""Draws the figures of a report from its results, without a model: PNG, SVG and PDF, with a CSV of what is drawn.

A figure is a table and a function that draws it; the table is the CSV. Checkpoints with one label are seeds of one
model: heads of all of them are drawn, and means with their standard deviation.
"""

import textwrap
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Callable, Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple

import matplotlib
import numpy
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_pdf import FigureCanvasPdf
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..tools import write_table
from . import style
from .style import BLACK, GREY, LINES, MARKERS, ONE_COLUMN, SKY, TWO_COLUMNS, colour_of

SITE_NAMES = {
    "encoder": "encoder self-attention",
    "decoder": "decoder self-attention",
    "cross": "cross-attention",
    "output": "output layer",
}
AXIS_NAMES = {  # of heat maps: rows, columns
    "encoder": ("attending source token", "attended source token"),
    "decoder": ("attending target token", "attended target token"),
    "cross": ("target token to be predicted", "attended source token"),
}
# Labels are any text, not mathematics; and a second font takes as long to write into a PDF as all the rest.
STYLE = {**style.STYLE, "text.parse_math": False}

MAPPING_NAMES = {"entmax15": "1.5-entmax", "evsoftmax": "EvSoftMax", "multimax": "MultiMax"}

# White to dark blue, even in lightness, so also readable in grey.
PROBABILITY_COLOURS = LinearSegmentedColormap.from_list("probability", ["white", "#9ECAE1", "#3182BD", "#08306B"])

Row = Dict[str, Any]
Results = Dict[str, Any]


class Plan(NamedTuple):
    """A figure that can be drawn.

    Attributes:
        part: of the page.
        is_usual: whether it is drawn without being asked for.
    """

    name: str
    part: str
    caption: str
    rows: Callable[[], List[Row]]
    draw: Callable[[List[Row], Optional[float]], Figure]
    is_usual: bool = True


def by_label(results: Results) -> Dict[str, List[Row]]:
    """The models by label: a list of seeds each."""
    models: Dict[str, List[Row]] = {}
    for model in results["models"]:
        models.setdefault(model["label"], []).append(model)
    return models


def draw_all(plans: Sequence[Plan], folder: Path, width: Optional[float]) -> None:
    """Draw figures into a folder; ``width`` in inch, by default one column or two of a paper."""
    for plan in plans:
        rows = plan.rows()
        write_table(folder / f"{plan.name}.csv", rows)
        with matplotlib.rc_context(STYLE):
            figure = plan.draw(rows, width)
            # not savefig, which draws everything twice
            FigureCanvasAgg(figure).print_png(folder / f"{plan.name}.png")
            figure.set_layout_engine("none")  # all has its place now; laying it out again would take as long
            FigureCanvasSVG(figure).print_svg(folder / f"{plan.name}.svg", metadata={"Date": None})
            FigureCanvasPdf(figure).print_pdf(folder / f"{plan.name}.pdf", metadata={"CreationDate": None})


def chosen(plans: Sequence[Plan], names: Optional[str]) -> Tuple[List[Plan], List[str]]:
    """The figures of a comma list of names, in which ``*`` stands for anything, and names that are none's.

    None: the usual figures.
    """
    if names is None:
        return [plan for plan in plans if plan.is_usual], []
    patterns = [name.strip() for name in names.split(",")]
    unknown = [pattern for pattern in patterns if not any(fnmatchcase(plan.name, pattern) for plan in plans)]
    return [plan for plan in plans if any(fnmatchcase(plan.name, pattern) for pattern in patterns)], unknown


CAPTIONS = {
    "sparsity-multimodality": "Sparsity against multi-modality, a point a head; the large points are means over a "
    "model's heads. Above as the paper defines them, below with the same s for all models and M over the largest "
    "scores. The upper right is where MultiMax is meant to lead.",
    "over-smoothing": "Mean cosine distance between the tokens of a sentence after each layer: the lower, the more "
    "alike they have become. (The axis does not begin at 0.)",
    "alignment": "Alignment error rate, lower is better: points are heads, lines the mean of a layer's heads, dotted "
    "lines the rollout of all layers. Left, a word's links are read from the rows that predict it; right, one step "
    "later, from those that read it.",
    "modulators": "the scores that each module saw, and what its modulator, if any, makes of them. The outermost "
    "0.05 % of the scores on either side are not shown.",
    "simplex": "Where mappings take three scores while one, t, rises from the smallest to the largest (rings: the "
    "end, two equal scores). The lower edge gives nothing to the smallest score; its middle is sparse and bimodal. "
    "Learned modulators are drawn on the median and the 99th percentile of the scores that they saw.",
}


def plans_of(results: Results) -> List[Plan]:
    """All figures that these results have the numbers for; their names are those of the files."""
    looks, plans = _looks(results), []

    def add(name: str, rows: Callable, draw: Callable, part: str = "", caption: str = "") -> None:
        plans.append(Plan(name, part or name, caption or CAPTIONS[name], rows, draw))

    left_out = f"{CAPTIONS['sparsity-multimodality']} {_left_out(results)}"
    draw = partial(_draw_metrics, results["top_k"], looks)
    add("sparsity-multimodality", partial(_metrics_rows, results), draw, caption=left_out)
    add("over-smoothing", partial(_smoothing_rows, results), partial(_draw_smoothing, looks))
    if any(model["alignment"] for model in results["models"]):
        add("alignment", partial(_alignment_rows, results), partial(_draw_alignment, looks))
    for label, models in by_label(results).items():
        name, draw = f"{_file_name(label, plans)}-modulators", partial(_draw_modulators, looks[label]["color"])
        add(name, partial(_modulator_rows, models), draw, "modulators", f"{label}: {CAPTIONS['modulators']}")
    add("simplex", partial(_simplex_rows, results), _draw_simplex)
    return plans + _plans_of_sentences(results)


def _file_name(label: str, plans: Sequence[Plan]) -> str:
    """The start of a model's file names: its label without spaces and the like, distinct from other models'."""
    plain = "".join(character if character.isalnum() or character in "-._" else "-" for character in label)[:40]
    name, number = plain, 1
    while any(plan.name == f"{name}-modulators" for plan in plans):
        number += 1
        name = f"{plain}-{number}"
    return name


# ---------------------------------------------------------------------- what models look like


def mapping_of(model: Row) -> str:
    """The mapping that tells a model from softmax: the first other one, of attention before the output layer's."""
    return next((module["mapping"] for module in model["modules"] if module["mapping"] != "softmax"), "softmax")


def _looks(results: Results) -> Dict[str, Row]:
    """Colour, marker and line of each model: the colour is its mapping's, paler for each further model with it."""
    looks: Dict[str, Row] = {}
    seen: List[str] = []
    for number, (label, models) in enumerate(by_label(results).items()):
        mapping = mapping_of(models[0])
        share = 0.55 ** seen.count(mapping)
        colour = tuple(1 - share * (1 - part) for part in to_rgb(colour_of(mapping)))
        looks[label] = {"color": colour, "marker": MARKERS[number % 8], "linestyle": LINES[number % 8]}
        seen.append(mapping)
    return looks


def _grid(width: float, height: float, down: int, across: int, **sharing: Any) -> Tuple[Figure, Any]:
    """A figure of this size in inch, and its panels, (down, across)."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(down, across, squeeze=False, **sharing)


def _panels(
    count: int, width: Optional[float], height: float, most: int = 3, least: float = 1.75, **sharing: Any
) -> Tuple[Figure, List[Axes]]:
    """A figure of so many panels: at most ``most`` in a row, each at least ``least`` wide, ``height`` high (inch)."""
    width = width or (TWO_COLUMNS if count > 1 else ONE_COLUMN + 0.7)
    across = max(min(count, most, int(width / least)), 1)
    down = -(-count // across)
    figure, grid = _grid(width, height * down + 0.4, down, across, **sharing)
    for axes in grid.flat[count:]:
        axes.set_axis_off()
    return figure, list(grid.flat[:count])


def _legend(figure: Figure) -> Figure:
    """Add one legend above all panels, in as many columns as there is room for."""
    drawn = {name: handle for axes in figure.axes for handle, name in zip(*axes.get_legend_handles_labels())}
    names = [textwrap.fill(name, max(int(figure.get_figwidth() * 14), 20)) for name in drawn]
    for columns in range(min(4, len(names)), 0, -1):
        legend = figure.legend(list(drawn.values()), names, loc="outside upper center", ncols=columns)
        if columns == 1 or legend.get_window_extent().width < figure.bbox.width:
            break
        legend.remove()
    return figure


def _distinct(rows: Iterable[Row], name: str) -> List[Any]:
    return list(dict.fromkeys(row[name] for row in rows))


def _where(rows: Iterable[Row], /, **values: Any) -> List[Row]:
    return [row for row in rows if all(row[name] == value for name, value in values.items())]


def _sites(rows: Iterable[Row]) -> List[str]:
    return sorted(set(_distinct(rows, "site")), key=list(SITE_NAMES).index)


def _spread(values: Sequence[float]) -> Optional[float]:
    """The standard deviation, of several seeds."""
    return stdev(values) if len(values) > 1 else None


# ---------------------------------------------------------------------- models side by side

METRICS = ("sparsity", "multimodality"), ("common_sparsity", "top_multimodality")  # a row of panels each


def _metrics_rows(results: Results) -> List[Row]:
    rows = []
    for label, models in by_label(results).items():
        for seed, model in enumerate(models, start=1):
            for head in model["heads"]:
                numbers = {name: head[name] for name in ("site", "layer", "head", *METRICS[0], *METRICS[1])}
                rows.append({"model": label, "seed": seed, **numbers, "s": head["common_reference"]})
    return rows


def _draw_metrics(top_k: int, looks: Dict[str, Row], rows: List[Row], width: Optional[float]) -> Figure:
    """A row for each pair of metrics and a column for each site; the other way where it is narrow."""
    sites = _sites(rows)
    width = width or max(TWO_COLUMNS / 3 * len(sites), ONE_COLUMN)
    is_narrow = width / len(sites) < 1.9
    if is_narrow:
        figure, grid = _grid(width, 1.9 * len(sites) + 0.6, len(sites), 2, sharex="col", sharey="col")
        grid = grid.T
    else:
        figure, grid = _grid(width, 4.8, 2, len(sites), sharex="row", sharey="row")
    for pair, number in numpy.ndindex(grid.shape):
        axes, names, at_site = grid[pair, number], METRICS[pair], _where(rows, site=sites[number])
        for label in _distinct(at_site, "model"):
            _draw_heads(axes, _where(at_site, model=label), names, looks[label])
        axes.set_xlabel(f"sparsity S, s = {at_site[0]['s'] or 0:.2g}" if pair else "sparsity S, s = 1/K")
        if number == 0 or is_narrow:
            axes.set_ylabel(f"M over the {top_k} largest" if pair else "multi-modality M")
        axes.set_title("" if pair else SITE_NAMES[sites[number]])
        axes.grid(color="#DDDDDD", lw=0.5)
        axes.set_axisbelow(True)
    return _legend(figure)


def _draw_heads(axes: Axes, rows: List[Row], names: Sequence[str], look: Row) -> None:
    """A point for each head, and a large one for their mean, with the deviation of seeds."""
    rows = [row for row in rows if None not in (row[name] for name in names)]
    if not rows:
        return
    style = {"color": look["color"], "marker": look["marker"]}
    axes.scatter(*([row[name] for row in rows] for name in names), s=14, alpha=0.45, linewidths=0.6, **style)
    seeds = [_where(rows, seed=seed) for seed in _distinct(rows, "seed")]
    x, y = ([mean(row[name] for row in of_seed) for of_seed in seeds] for name in names)
    axes.errorbar(mean(x), mean(y), _spread(y), _spread(x), ms=8, mec=BLACK, mew=0.6, ecolor=BLACK, elinewidth=0.8,
                  capsize=2, ls="none", label=rows[0]["model"], **style)  # fmt: skip


def _left_out(results: Results) -> str:
    """A sentence giving the share of rows without M, for each site and model."""
    shares: Dict[str, List[str]] = {}
    for label, models in by_label(results).items():
        for site in _sites(models[0]["sites"]):
            if site != "output":
                share = mean(row["multimodality_undefined"] / row["rows"]
                             for model in models for row in _where(model["sites"], site=site))  # fmt: skip
                shares.setdefault(SITE_NAMES[site], []).append(f"{label} {share:.0%}")
    sites = "; ".join(f"{site}: {', '.join(of_models)}" for site, of_models in shares.items())
    return f"Rows without a second relevant score have no M; above they are left out ({sites})."


def _smoothing_rows(results: Results) -> List[Row]:
    rows = []
    for label, models in by_label(results).items():
        for layer in models[0]["layers"]:
            place = {"side": layer["side"], "layer": layer["layer"]}
            values = [row["mad"] for model in models for row in _where(model["layers"], **place)]
            if None not in values:
                rows.append({"model": label, **place, "mad": mean(values), "standard_deviation": _spread(values)})
    return rows


def _draw_smoothing(looks: Dict[str, Row], rows: List[Row], width: Optional[float]) -> Figure:
    sides = sorted(_distinct(rows, "side"), reverse=True)  # the encoder first
    figure, panels = _panels(len(sides), width, 2.2, sharey=True)
    for axes, side in zip(panels, sides):
        for label in _distinct(_where(rows, side=side), "model"):
            _draw_line(axes, _where(rows, side=side, model=label), "mad", label, looks)
        axes.set(xlabel=f"{side} layer (0: its input)", title=side)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0].set_ylabel("MAD (mean cosine distance)")
    return _legend(figure)


def _draw_line(axes: Axes, rows: List[Row], name: str, label: str, looks: Dict[str, Row], first: int = 0) -> None:
    """A model's numbers over its layers, with error bars where there are several seeds."""
    rows = sorted(rows, key=lambda row: row["layer"])
    spread = [row["standard_deviation"] for row in rows]
    axes.errorbar([row["layer"] + first for row in rows], [row[name] for row in rows], ms=4, capsize=2,
                  yerr=None if None in spread else spread, label=label, **looks[label])  # fmt: skip


def _alignment_rows(results: Results) -> List[Row]:
    rows = []
    for label, models in by_label(results).items():
        for row in models[0]["alignment"]:
            place = {name: row[name] for name in ("rows", "layer", "head")}
            values = [other["aer"] for model in models for other in _where(model["alignment"], **place)]
            if row["head"].isdigit():  # heads of two seeds have nothing to do with each other
                rows += [{"model": label, **place, "aer": value, "standard_deviation": None} for value in values]
            else:
                rows.append({"model": label, **place, "aer": mean(values), "standard_deviation": _spread(values)})
    return rows


def _draw_alignment(looks: Dict[str, Row], rows: List[Row], width: Optional[float]) -> Figure:
    figure, panels = _panels(2, width or TWO_COLUMNS, 2.2, sharey=True)
    labels = _distinct(rows, "model")
    for axes, (name, verb) in zip(panels, (("predicting", "predict"), ("reading", "read"))):
        for number, label in enumerate(labels):
            of_model, style = _where(rows, rows=name, model=label), looks[label]
            shift = 1 + (number - (len(labels) - 1) / 2) * 0.18
            heads = [(row["layer"] + shift, row["aer"]) for row in of_model if row["head"].isdigit()]
            axes.scatter(*zip(*heads), s=14, alpha=0.6, linewidths=0.6, color=style["color"], marker=style["marker"])
            _draw_line(axes, _where(of_model, head="mean"), "aer", label, looks, first=1)
            axes.axhline(_where(of_model, head="rollout")[0]["aer"], color=style["color"], lw=0.6, ls=(0, (1, 3)))
        axes.set(title=f"rows that {verb} the word", xlabel="decoder layer", ylim=(0, 1))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0].set_ylabel("alignment error rate")
    return _legend(figure)


# ---------------------------------------------------------------------- modulators


def _modulator_rows(models: Sequence[Row]) -> List[Row]:
    """σ at the scores that a module saw, and the density of these scores (a step to the next x)."""
    rows = []
    for seed, model in enumerate(models, start=1):
        for module in model["modules"]:
            place = {"seed": seed, "site": module["site"], "layer": module["layer"]}
            edges, counts = module["histogram"]["edges"], module["histogram"]["counts"]
            low, high = module["bulk"]
            area = sum(counts) * (edges[1] - edges[0])
            rows += [{**place, "curve": "density", "x": x, "y": count / area}
                     for x, count in zip(edges, [*counts, 0]) if low <= x <= high]  # fmt: skip
            sigma = module.get("sigma", {"x": [], "y": []})
            rows += [{**place, "curve": "sigma", "x": x, "y": y} for x, y in zip(sigma["x"], sigma["y"])]
    return rows


def _draw_modulators(colour: str, rows: List[Row], width: Optional[float]) -> Figure:
    """σ of every module over the scores that it saw, above their histogram; a mapping without σ has only that."""
    places = [(site, layer) for site in _sites(rows) for layer in _distinct(_where(rows, site=site), "layer")]
    most = max(len(_distinct(_where(rows, site=site), "layer")) for site in _sites(rows))
    width = width or max(min(TWO_COLUMNS, 1.8 * most + 0.3), ONE_COLUMN)
    figure, panels = _panels(len(places), width, 1.65, most, 1.1)
    for axes, (site, layer) in zip(panels, places):
        _draw_module(axes, _where(rows, site=site, layer=layer), colour)
        axes.set_title("output layer" if site == "output" else f"{site}, layer {layer + 1}")
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.yaxis.set_major_locator(MaxNLocator(4))
    figure.supxlabel("score x (before the mapping)", fontsize=8)
    has_sigma = any(row["curve"] == "sigma" for row in rows)
    figure.supylabel("modulated score σ(x)" if has_sigma else "density of the scores", fontsize=8)
    return _legend(figure)


def _draw_module(axes: Axes, rows: List[Row], colour: str) -> None:
    bottom, height, sigmas = 0.0, 1.0, _where(rows, curve="sigma")
    if sigmas:  # the histogram has the lowest quarter
        ends = [row[name] for row in sigmas for name in ("x", "y")]
        bottom, top = min(ends) - 0.3 * (max(ends) - min(ends)), max(ends)
        height = 0.28 * (top - bottom) / max(row["y"] for row in _where(rows, curve="density"))
        axes.plot(*[[min(ends := [row["x"] for row in sigmas]), max(ends)]] * 2, "--", color=GREY, lw=1,
                  label="identity (softmax)")  # fmt: skip
    for seed in _distinct(rows, "seed"):
        of_seed = _where(rows, seed=seed)
        x, density = ([row[name] for row in _where(of_seed, curve="density")] for name in ("x", "y"))
        axes.stairs([bottom + height * part for part in density[:-1]], x, baseline=bottom, color=SKY, alpha=0.6,
                    fill=True, label="histogram of the scores")  # fmt: skip
        if sigmas:
            x, sigma = ([row[name] for row in _where(of_seed, curve="sigma")] for name in ("x", "y"))
            axes.plot(x, sigma, color=colour, label="σ(x)")


# ---------------------------------------------------------------------- mappings by themselves


def _simplex_rows(results: Results) -> List[Row]:
    return [
        {"panel": path["panel"], "name": path["name"], "mapping": path["mapping"], "p1": p1, "p2": p2, "p3": p3}
        for path in results["simplex"]
        for p1, p2, p3 in path["probabilities"]
    ]


def _draw_simplex(rows: List[Row], width: Optional[float]) -> Figure:
    """Paths on the triangle: p₁ at the lower left, p₂ at the lower right, p₃ on top."""
    names = {panel: _distinct(_where(rows, panel=panel), "name") for panel in _distinct(rows, "panel")}
    figure, panels = _panels(len(names), width, 2.3 + 0.16 * max(map(len, names.values())))
    for axes, panel in zip(panels, names):
        axes.plot([0, 1, 0.5, 0], [0, 0, 3**0.5 / 2, 0], color=BLACK, lw=0.7)
        axes.text(0, -0.07, "p₁ = 1", fontsize=7, va="center")
        axes.text(1, -0.07, "p₂ = 1", fontsize=7, va="center", ha="right")
        axes.text(0.5, 3**0.5 / 2 + 0.03, "p₃ = 1", fontsize=7, ha="center")
        for number, name in enumerate(names[panel]):
            path = _where(rows, panel=panel, name=name)
            mapping = path[0]["mapping"]
            x, y = [row["p2"] + row["p3"] / 2 for row in path], [row["p3"] * 3**0.5 / 2 for row in path]
            before = [_where(rows, panel=panel, name=other)[0]["mapping"] for other in names[panel][:number]]
            look = {"color": colour_of(mapping), "linestyle": LINES[before.count(mapping) % 8]}
            # ever thinner, so that lines at the same place are all visible; rings likewise
            axes.plot(x, y, label=MAPPING_NAMES.get(name, name), zorder=3, lw=max(3 - 0.6 * number, 0.9), **look)
            axes.plot(x[-1], y[-1], "o", color=look["color"], ms=4 + 1.5 * number, fillstyle="none", mew=1)
        axes.set_title("\n".join(textwrap.wrap(panel, 26)), pad=9)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), fontsize=7)
        axes.set_aspect("equal")
        axes.set_axis_off()
    return figure


# ---------------------------------------------------------------------- attention of a sentence


def _plans_of_sentences(results: Results) -> List[Plan]:
    """Models side by side, the first seed of each: the rollout of a site, the heads of a layer, and a head alone.

    Of the layers only the last one of cross-attention (or of the only site) is drawn without being asked for.
    """
    examples: Dict[int, Dict[str, Row]] = {}
    for label, models in by_label(results).items():
        for example in models[0]["examples"]:
            examples.setdefault(example["sentence"], {})[label] = example
    plans, last = [], _sites(head for model in results["models"] for head in model["heads"])[-1]
    for sentence, of_models in examples.items():
        for site in AXIS_NAMES:
            # what is shown → label → its matrices
            maps: Dict[Tuple[str, ...], Dict[str, List]] = {}
            for label, example in of_models.items():
                if site in example["rollout"]:
                    maps.setdefault(("rollout",), {})[label] = [example["rollout"][site]]
                for attention in _where(example["attention"], site=site):
                    layer = f"layer{attention['layer'] + 1}"
                    maps.setdefault((layer,), {})[label] = attention["heads"]
                    for head, matrix in enumerate(attention["heads"], start=1):
                        maps.setdefault((layer, f"head{head}"), {})[label] = [matrix]
            depth = max((int(name[0][5:]) for name in maps if name[0] != "rollout"), default=0)
            usual = ("rollout",), (f"layer{depth}",) if site == last else ()
            for name, of_name in maps.items():
                example = of_models[next(iter(of_name))]
                cut = " (cut to what can be read)" if example["is_cut"] else ""
                plans.append(Plan(
                    "-".join([f"sentence{sentence}", site, *name]), "sentences",
                    f"Sentence {sentence}{cut}, {SITE_NAMES[site]}: {', '.join(name)}.",
                    partial(_map_rows, example["tokens"][site], of_name),
                    partial(_draw_maps, site, "share of the output" if name == ("rollout",) else None),
                    is_usual=name in usual,
                ))  # fmt: skip
    return plans


def _map_rows(tokens: Sequence[List[str]], maps: Dict[str, List]) -> List[Row]:
    return [
        {"model": label, "head": head, "row": i, "column": j, "query": query, "key": key, "share": matrix[i][j]}
        for label, matrices in maps.items()
        for head, matrix in enumerate(matrices, start=1)
        for i, query in enumerate(tokens[0])
        for j, key in enumerate(tokens[1])
    ]


def _draw_maps(site: str, scale: Optional[str], rows: List[Row], width: Optional[float]) -> Figure:
    """Heat maps, a row for each head and a column for each model; from 0 to 1, unless ``scale`` has a name."""
    models, heads = _distinct(rows, "model"), _distinct(rows, "head")
    height, across = (max(row[name] for row in rows) + 1 for name in ("row", "column"))
    width = width or (TWO_COLUMNS if len(models) > 1 else TWO_COLUMNS * 0.7)
    figure, grid = _grid(width, (0.11 * height + 0.15) * len(heads) + 1.3, len(heads), len(models))
    values = [row["share"] for row in rows]
    lowest, highest = (min(values), max(values)) if scale else (0, 1)
    size = {"fontsize": 6 if max(height, across) <= 22 else 5}
    for (line, column), axes in numpy.ndenumerate(grid):
        of_panel = _where(rows, model=models[column], head=heads[line])
        if not of_panel:  # a model with fewer heads
            axes.set_axis_off()
            continue
        matrix = numpy.reshape([row["share"] for row in of_panel], (-1, across))
        image = axes.imshow(matrix, cmap=PROBABILITY_COLOURS, vmin=lowest, vmax=highest, aspect="auto")
        axes.set(xticks=[], yticks=[])
        if line == len(heads) - 1:
            axes.set_xticks(range(across), [row["key"] for row in of_panel[:across]], rotation=90, **size)
        if column == 0:
            axes.set_yticks(range(height), [row["query"] for row in of_panel[::across]], **size)
            axes.set_ylabel(f"head {heads[line]}" if len(heads) > 1 else "")
        if line == 0:
            axes.set_title(textwrap.fill(models[column], max(int(width / len(models) * 12), 10)))
        axes.tick_params(length=1.5, width=0.5)
        axes.spines[["top", "right"]].set_visible(True)
    figure.colorbar(image, ax=grid, shrink=0.6, aspect=30, label=scale or "probability")
    figure.supylabel(AXIS_NAMES[site][0], fontsize=8)
    figure.supxlabel(AXIS_NAMES[site][1], fontsize=8)
    return figure
