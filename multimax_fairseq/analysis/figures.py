"""Draws the figures of a report from its results, without a model: PNG, SVG and PDF, with a CSV of what is drawn.

A figure is a table, the CSV, and a function that draws it. Checkpoints with one label are seeds of one model: the
table has a row for each of them, and what is drawn is their mean with its standard deviation.
"""

import re
import textwrap
from fnmatch import fnmatchcase
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import matplotlib
import numpy
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_pdf import FigureCanvasPdf
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..tools import grouped, write_table
from .style import BLACK, GREY, LINES, MARKERS, ONE_COLUMN, SKY, STYLE, TWO_COLUMNS, colour_of

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
MAPPING_NAMES = {"entmax15": "1.5-entmax", "evsoftmax": "EvSoftMax"}

# White to dark blue, even in lightness, so also readable in grey.
PROBABILITY_COLOURS = LinearSegmentedColormap.from_list("probability", ["white", "#9ECAE1", "#3182BD", "#08306B"])

Row = Dict[str, Any]
Results = Dict[str, Any]


class Plan(NamedTuple):
    """A figure that can be drawn.

    Attributes:
        part: of the page.
        draw: from the rows and a width in inch; None: one column or two of a paper.
        is_usual: whether it is drawn without being asked for.
    """

    name: str
    part: str
    caption: str
    rows: Callable[[], List[Row]]
    draw: Callable[[List[Row], Optional[float]], Figure]
    is_usual: bool = True


def draw_all(plans: Sequence[Plan], folder: Path, width: Optional[float]) -> None:
    """Draw figures into a folder; ``width`` in inch."""
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
    "model's heads. Left as the paper defines them, right with the same s for all models and M over the largest "
    "scores. The upper right is where MultiMax is meant to lead. Rows without M or S, whose share is in the table, "
    "are left out.",
    "over-smoothing": "Mean cosine distance between the tokens of a sentence after each layer: the lower, the more "
    "alike they have become. (The axis does not begin at 0.)",
    "modulators": "the scores that each module saw, and what its modulator, if any, makes of them. The outermost "
    "0.05 % of the scores on either side are not shown.",
    "simplex": "Where mappings take three scores while one, t, rises from the smallest to the largest (rings: the "
    "end, two equal scores). The lower edge gives nothing to the smallest score; its middle is sparse and bimodal.",
}


def plans_of(results: Results) -> List[Plan]:
    """All figures that these results have the numbers for; their names are those of the files."""
    looks = _looks(results)
    of_heads = ("site", "layer", "head", *METRICS[0], *METRICS[1], "common_reference")
    metrics = partial(_rows, results, "heads", of_heads), partial(_draw_metrics, results["top_k"], looks)
    smoothing = partial(_rows, results, "layers", ("side", "layer", "mad")), partial(_draw_smoothing, looks)
    simplex = partial(_simplex_rows, results), _draw_simplex
    figures = {"sparsity-multimodality": metrics, "over-smoothing": smoothing, "simplex": simplex}
    plans = [Plan(name, name, CAPTIONS[name], *figure) for name, figure in figures.items()]
    for number, (label, models) in enumerate(results["models"].items(), start=1):
        name, caption = re.sub(r"[^\w.-]", "-", label)[:40], f"{label}: {CAPTIONS['modulators']}"
        rows, draw = partial(_module_rows, models), partial(_draw_modulators, looks[label]["color"])
        has_sigma = any("sigma" in module for module in models[0]["modules"])
        plans.append(Plan(f"modulators{number}-{name}", "modulators", caption, rows, draw, is_usual=has_sigma))
    return plans + _plans_of_sentences(results)


def _rows(results: Results, table: str, columns: Sequence[str]) -> List[Row]:
    """These columns of a table of all checkpoints, after the model and the seed."""
    return [
        {"model": label, "seed": seed, **{name: row[name] for name in columns}}
        for label, models in results["models"].items()
        for seed, model in enumerate(models, start=1)
        for row in model[table]
    ]


def _means(values: Sequence[Sequence[float]]) -> Tuple[List[float], Optional[List[float]]]:
    """Means over seeds, and the standard deviations if there are several."""
    return list(map(mean, values)), list(map(stdev, values)) if min(map(len, values), default=0) > 1 else None


# ---------------------------------------------------------------------- what models look like


def _looks(results: Results) -> Dict[str, Row]:
    """Colour, marker and line of each model: the colour is its mapping's, paler for each further model with it.

    That is the first mapping other than softmax, of attention before the output layer's.
    """
    looks: Dict[str, Row] = {}
    seen: List[str] = []
    for number, (label, models) in enumerate(results["models"].items()):
        mappings = (module["mapping"] for module in models[0]["modules"])
        mapping = next((name for name in mappings if name != "softmax"), "softmax")
        share = 0.55 ** seen.count(mapping)
        colour = tuple(1 - share * (1 - part) for part in to_rgb(colour_of(mapping)))
        looks[label] = {"color": colour, "marker": MARKERS[number % 8], "linestyle": LINES[number % 8]}
        seen.append(mapping)
    return looks


def _grid(width: float, height: float, down: int, across: int, **sharing: Any) -> Tuple[Figure, Any]:
    """A figure of this size in inch, and its panels, (down, across)."""
    figure = Figure(figsize=(width, height), layout="constrained")
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


# ---------------------------------------------------------------------- models side by side

METRICS = ("sparsity", "multimodality"), ("common_sparsity", "top_multimodality")  # a column of panels each


def _draw_metrics(top_k: int, looks: Dict[str, Row], rows: List[Row], width: Optional[float]) -> Figure:
    """A row of panels for each site, and a column for each pair of metrics."""
    sites = grouped(rows, "site")
    figure, grid = _grid(width or 0.7 * TWO_COLUMNS, 2 * len(sites) + 0.7, len(sites), 2, sharex="col", sharey="col")
    for (line, (site, at_site)), pair in product(enumerate(sites.items()), (0, 1)):
        axes, s = grid[line, pair], at_site[0]["common_reference"] or 0
        for label, of_model in grouped(at_site, "model").items():
            _draw_heads(axes, of_model, METRICS[pair], label, looks[label])
        axes.set_xlabel(f"sparsity S, s = {s:.2g}" if pair else "sparsity S, s = 1/K")
        axes.set_ylabel(f"M over the {top_k} largest" if pair else "multi-modality M")
        axes.set_title("" if pair else SITE_NAMES[site])
        axes.grid(color="#DDDDDD", lw=0.5)
        axes.set_axisbelow(True)
    return _legend(figure)


def _draw_heads(axes: Axes, rows: List[Row], names: Sequence[str], label: str, look: Row) -> None:
    """A point for each head, and a large one for their mean, with the deviation of seeds."""
    rows = [row for row in rows if None not in (row[name] for name in names)]
    if not rows:
        return
    style = {"color": look["color"], "marker": look["marker"]}
    axes.scatter(*([row[name] for row in rows] for name in names), s=14, alpha=0.45, linewidths=0.6, **style)
    seeds = grouped(rows, "seed").values()
    (x, across), (y, upright) = (_means([[mean(row[name] for row in seed) for seed in seeds]]) for name in names)
    axes.errorbar(x, y, upright, across, ms=8, mec=BLACK, mew=0.6, ecolor=BLACK, elinewidth=0.8, capsize=2, ls="none",
                  label=label, **style)  # fmt: skip


def _draw_smoothing(looks: Dict[str, Row], rows: List[Row], width: Optional[float]) -> Figure:
    """Each model over its layers: means over seeds, with error bars where there are several."""
    sides = grouped(rows, "side")
    figure, panels = _panels(len(sides), width, 2.2, sharey=True)
    for axes, (side, of_side) in zip(panels, sides.items()):
        for label, of_model in grouped(of_side, "model").items():
            layers = grouped([row for row in of_model if row["mad"] is not None], "layer")
            values = [[row["mad"] for row in of_layer] for of_layer in layers.values()]
            axes.errorbar(list(layers), *_means(values), ms=4, capsize=2, label=label, **looks[label])
        axes.set(xlabel=f"{side} layer (0: its input)", title=side)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0].set_ylabel("MAD (mean cosine distance)")
    return _legend(figure)


# ---------------------------------------------------------------------- modulators


def _module_rows(models: Sequence[Row]) -> List[Row]:
    """The density of the scores that a module saw, from each x to the next, and σ there."""
    rows = []
    for seed, model in enumerate(models, start=1):
        for module in model["modules"]:
            place = {"seed": seed, "site": module["site"], "layer": module["layer"]}
            edges, counts = module["histogram"]["edges"], module["histogram"]["counts"]
            density = [count / (high - low) / sum(counts) for count, low, high in zip(counts, edges, edges[1:])]
            for x, y, sigma in zip(edges, [*density, None], module.get("sigma") or [None] * len(edges)):
                rows.append({**place, "x": x, "density": y, "sigma": sigma})
    return rows


def _draw_modulators(colour: str, rows: List[Row], width: Optional[float]) -> Figure:
    """σ of every module over the scores that it saw, above their histogram; a mapping without σ has only that."""
    sites = {site: grouped(at_site, "layer") for site, at_site in grouped(rows, "site").items()}
    most, count = max(map(len, sites.values())), sum(map(len, sites.values()))
    width = width or max(min(TWO_COLUMNS, 1.8 * most + 0.3), ONE_COLUMN)
    figure, panels = _panels(count, width, 1.65, most, 1.1)
    modules = ((site, layer, of_layer) for site, layers in sites.items() for layer, of_layer in layers.items())
    for axes, (site, layer, of_module) in zip(panels, modules):
        _draw_module(axes, of_module, colour)
        axes.set_title(SITE_NAMES[site] if site == "output" else f"{site}, layer {layer + 1}")
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.yaxis.set_major_locator(MaxNLocator(4))
    figure.supxlabel("score x (before the mapping)", fontsize=8)
    has_sigma = any(row["sigma"] is not None for row in rows)
    figure.supylabel("modulated score σ(x)" if has_sigma else "density of the scores", fontsize=8)
    return _legend(figure)


def _draw_module(axes: Axes, rows: List[Row], colour: str) -> None:
    bottom, height = 0.0, 1.0
    if rows[0]["sigma"] is not None:  # the histogram has the lowest quarter
        x, ends = [row["x"] for row in rows], [row[name] for row in rows for name in ("x", "sigma")]
        bottom, top = min(ends) - 0.3 * (max(ends) - min(ends)), max(ends)
        height = 0.28 * (top - bottom) / max(row["density"] or 0 for row in rows)
        axes.plot(*[[min(x), max(x)]] * 2, "--", color=GREY, lw=1, label="identity (softmax)")
    for of_seed in grouped(rows, "seed").values():
        x, density, sigma = ([row[name] for row in of_seed] for name in ("x", "density", "sigma"))
        axes.stairs([bottom + height * part for part in density[:-1]], x, baseline=bottom, color=SKY, alpha=0.6,
                    fill=True, label="histogram of the scores")  # fmt: skip
        if None not in sigma:
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
    by_panel = {panel: grouped(of_panel, "name") for panel, of_panel in grouped(rows, "panel").items()}
    figure, panels = _panels(len(by_panel), width, 2.3 + 0.16 * max(map(len, by_panel.values())))
    for axes, (panel, paths) in zip(panels, by_panel.items()):
        axes.plot([0, 1, 0.5, 0], [0, 0, 3**0.5 / 2, 0], color=BLACK, lw=0.7)
        axes.text(0, -0.07, "p₁ = 1", fontsize=7, va="center")
        axes.text(1, -0.07, "p₂ = 1", fontsize=7, va="center", ha="right")
        axes.text(0.5, 3**0.5 / 2 + 0.03, "p₃ = 1", fontsize=7, ha="center")
        seen: List[str] = []
        for number, (name, path) in enumerate(paths.items()):
            mapping = path[0]["mapping"]
            x, y = [row["p2"] + row["p3"] / 2 for row in path], [row["p3"] * 3**0.5 / 2 for row in path]
            look = {"color": colour_of(mapping), "linestyle": LINES[seen.count(mapping) % 8]}
            # ever thinner, so that lines at the same place are all visible; rings likewise
            axes.plot(x, y, label=MAPPING_NAMES.get(name, name), zorder=3, lw=max(3 - 0.6 * number, 0.9), **look)
            axes.plot(x[-1], y[-1], "o", color=look["color"], ms=4 + 1.5 * number, fillstyle="none", mew=1)
            seen.append(mapping)
        axes.set_title("\n".join(textwrap.wrap(panel, 26)), pad=9)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), fontsize=7)
        axes.set_aspect("equal")
        axes.set_axis_off()
    return figure


# ---------------------------------------------------------------------- attention of a sentence


def _plans_of_sentences(results: Results) -> List[Plan]:
    """Models side by side, the first seed of each: the rollout of a site, the heads of a layer, and a head alone.

    Rollout and last layer of cross-attention (or of the only site) are drawn without being asked for.
    """
    # (sentence, site, what is shown) → label → its matrices, and the tokens along them
    maps: Dict[Tuple[int, str, str], Dict[str, Tuple[List, Any]]] = {}
    heads, cut = _rows(results, "heads", ["site", "layer"]), {}
    last = max((row["site"] for row in heads), key=list(AXIS_NAMES).index)
    depth = 1 + max(row["layer"] for row in heads if row["site"] == last)
    for label, models in results["models"].items():
        for example in models[0]["examples"]:
            cut[example["sentence"]] = " (cut to what can be read)" if example["is_cut"] else ""
            for shown in example["maps"]:
                name = "rollout" if shown["layer"] == "rollout" else f"layer{shown['layer'] + 1}"
                at, tokens = (example["sentence"], shown["site"]), example["tokens"][shown["site"]]
                maps.setdefault((*at, name), {})[label] = shown["heads"], tokens
                for head, matrix in enumerate(shown["heads"] if name != "rollout" else [], start=1):
                    maps.setdefault((*at, f"{name}-head{head}"), {})[label] = [matrix], tokens
    return [
        Plan(
            f"sentence{sentence}-{site}-{name}", "sentences",
            f"Sentence {sentence}{cut[sentence]}, {SITE_NAMES[site]}: {name.replace('-', ', ')}.",
            partial(_map_rows, of_name), partial(_draw_maps, site, name == "rollout"),
            is_usual=site == last and name in ("rollout", f"layer{depth}"),
        )
        for (sentence, site, name), of_name in maps.items()
    ]  # fmt: skip


def _map_rows(maps: Dict[str, Tuple[List, Any]]) -> List[Row]:
    return [
        {"model": label, "head": head, "row": i, "column": j, "query": query, "key": key, "share": matrix[i][j]}
        for label, (matrices, (queries, keys)) in maps.items()
        for head, matrix in enumerate(matrices, start=1)
        for i, query in enumerate(queries)
        for j, key in enumerate(keys)
    ]


def _draw_maps(site: str, is_rollout: bool, rows: List[Row], width: Optional[float]) -> Figure:
    """Heat maps, a row for each head and a column for each model; from 0 to 1, but rollouts to their largest."""
    models = {label: grouped(of_model, "head") for label, of_model in grouped(rows, "model").items()}
    heads, values = list(grouped(rows, "head")), [row["share"] for row in rows]
    height, across = (max(row[name] for row in rows) + 1 for name in ("row", "column"))
    width = width or (TWO_COLUMNS if len(models) > 1 else TWO_COLUMNS * 0.7)
    figure, grid = _grid(width, (0.11 * height + 0.15) * len(heads) + 1.3, len(heads), len(models))
    limits = {"vmin": min(values), "vmax": max(values)} if is_rollout else {"vmin": 0, "vmax": 1}
    size = {"fontsize": 6 if max(height, across) <= 22 else 5}
    for (line, column), axes in numpy.ndenumerate(grid):
        label = list(models)[column]
        of_panel = models[label].get(heads[line])
        if not of_panel:  # a model with fewer heads
            axes.set_axis_off()
            continue
        across = of_panel[-1]["column"] + 1
        matrix = numpy.reshape([row["share"] for row in of_panel], (-1, across))
        image = axes.imshow(matrix, cmap=PROBABILITY_COLOURS, aspect="auto", **limits)
        axes.set(xticks=[], yticks=[])
        if line == len(heads) - 1:
            axes.set_xticks(range(across), [row["key"] for row in of_panel[:across]], rotation=90, **size)
        if column == 0:
            axes.set_yticks(range(height), [row["query"] for row in of_panel[::across]], **size)
            axes.set_ylabel(f"head {heads[line]}" if len(heads) > 1 else "")
        if line == 0:
            axes.set_title(textwrap.fill(label, max(int(width / len(models) * 12), 10)))
        axes.tick_params(length=1.5, width=0.5)
        axes.spines[["top", "right"]].set_visible(True)
    name = "share of the output" if is_rollout else "probability"
    figure.colorbar(image, ax=grid, shrink=0.6, aspect=30, label=name)
    figure.supylabel(AXIS_NAMES[site][0], fontsize=8)
    figure.supxlabel(AXIS_NAMES[site][1], fontsize=8)
    return figure
