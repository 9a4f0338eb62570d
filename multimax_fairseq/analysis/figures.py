"""The figures of a report: each function draws one and returns it.

Colours are Okabe and Ito's, which colour-blind readers can tell apart; models also differ in marker or line style.
Widths are those of a paper: 3.3 inch for one column, 7 for both.
"""

from typing import Any, Dict, Iterable, List, Optional, Sequence, Tuple

import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from ..mappings import entmax15, evsoftmax, modulate, multimax, softmax, sparsemax
from .measure import ROWS, Example, Measurement, ModuleReport
from .metrics import TOP_K
from .modulator import ModulatorParameters

BLUE, ORANGE, GREEN, VERMILLION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, BLACK, GREY = "#CC79A7", "#56B4E9", "#000000", "#595959"
MODEL_COLOURS = (GREY, BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY, BLACK)
MODEL_MARKERS = ("o", "^", "s", "D", "v", "P", "X", "*")
MODEL_LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)))

ONE_COLUMN, TWO_COLUMNS = 3.3, 7.0  # inch
STYLE = {
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "lines.linewidth": 1.4,
    "figure.dpi": 200,
    "svg.fonttype": "path",
    "svg.hashsalt": "multimax-analyze",  # the same picture gives the same file
}

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

# White to dark blue, even in lightness, so also readable in grey.
PROBABILITY_COLOURS = LinearSegmentedColormap.from_list("probability", ["white", "#9ECAE1", "#3182BD", "#08306B"])


def site_order(sites: Iterable[str]) -> List[str]:
    """Sites in the order of ``SITE_NAMES``."""
    return sorted(set(sites), key=list(SITE_NAMES).index)


# ---------------------------------------------------------------------- modulators


def draw_modulators(modules: Sequence[ModuleReport], label: str) -> Figure:
    """σ of every module over the scores that it saw, above their histogram.

    The identity (softmax) is dashed; a mapping without σ has only the histogram.
    """
    sites = site_order(module.site for module in modules)
    columns = max(sum(module.site == site for module in modules) for site in sites)
    width = max(min(TWO_COLUMNS, 1.8 * columns + 0.3), ONE_COLUMN)
    figure = Figure(figsize=(width, 1.65 * len(sites) + 0.7), layout="constrained")
    grid = figure.subplots(len(sites), columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for row, site in zip(grid, sites):
        at_site = [module for module in modules if module.site == site]
        for axes, module in zip(row, at_site):
            axes.set_axis_on()
            _draw_modulator(axes, module)
            axes.set_title("output layer" if site == "output" else f"{site}, layer {module.layer + 1}")
    figure.supxlabel("score $x$ (before the mapping)", fontsize=8)
    has_sigma = any(module.parameters for module in modules)
    figure.supylabel("modulated score $\\sigma(x)$" if has_sigma else "density of the scores", fontsize=8)
    return _with_legend(figure)


def _draw_modulator(axes: Axes, module: ModuleReport) -> None:
    histogram = module.histogram
    low, high = _bulk(histogram.edges, histogram.counts)
    edges = torch.tensor(histogram.edges, dtype=torch.float64)
    density = torch.tensor(histogram.counts, dtype=torch.float64) / (sum(histogram.counts) * histogram.width)
    if module.parameters is None:
        axes.stairs(density, edges, color=SKY, fill=True, label="histogram of the scores")
        axes.set(xlim=(low, high), ylim=(0, None))
    else:
        x = torch.linspace(low, high, 400, dtype=torch.float64)
        sigma = modulate(x, *module.parameters)
        bottom, top = min(sigma.min().item(), low), max(sigma.max().item(), high)
        bottom -= 0.3 * (top - bottom)  # room for the histogram
        heights = bottom + 0.28 * (top - bottom) * density / density.max()
        axes.stairs(heights, edges, baseline=bottom, color=SKY, fill=True, label="histogram of the scores")
        axes.plot(x, x, "--", color=GREY, lw=1, label="identity (softmax)")
        axes.plot(x, sigma, color=VERMILLION, label="$\\sigma(x)$")
        axes.set(xlim=(low, high), ylim=(bottom, top + 0.04 * (top - bottom)))
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_locator(MaxNLocator(4))


def _bulk(
    edges: Sequence[float], counts: Sequence[int], tail: Tuple[float, float] = (5e-4, 5e-4)
) -> Tuple[float, float]:
    """The range of scores without the lowest and highest share (``tail``), to the width of a bin."""
    cumulative = torch.tensor(counts, dtype=torch.float64).cumsum(0) / max(sum(counts), 1)
    first = int((cumulative <= tail[0]).sum())
    last = int((cumulative < 1 - tail[1]).sum())
    return edges[min(first, len(counts) - 1)], edges[min(last, len(counts) - 1) + 1]


# ---------------------------------------------------------------------- attention of a sentence


def draw_attention(example: Example, site: str, layer: int) -> Figure:
    """Heat maps of a layer's heads on one sentence: tokens on the axes, one scale from 0 to 1."""
    heads = example.attention[site, layer]
    rows, columns = example.tokens[site]
    across = 2 if len(heads) > 1 else 1
    down = -(-len(heads) // across)
    panel = TWO_COLUMNS / 2
    height = panel * max(min(len(rows) / max(len(columns), 1), 1.6), 0.5)
    figure = Figure(figsize=(panel * across, height * down + 0.9), layout="constrained")
    grid = figure.subplots(down, across, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for head, (axes, probabilities) in enumerate(zip(grid.flat, heads)):
        axes.set_axis_on()
        image = _draw_heat_map(axes, probabilities, rows, columns)
        axes.set_title(f"head {head + 1}")
    figure.colorbar(image, ax=grid, shrink=0.6, label="probability")
    _name_axes(figure, site)
    return figure


def draw_rollout(example: Example, site: str) -> Figure:
    """Heat map of the rollout through all layers, scaled from its smallest to its largest entry."""
    rows, columns = example.tokens[site]
    height = TWO_COLUMNS * 0.62 * max(min(len(rows) / max(len(columns), 1), 1.5), 0.5)
    figure = Figure(figsize=(TWO_COLUMNS * 0.7, height + 0.7), layout="constrained")
    axes = figure.subplots()
    matrix = example.rollout[site]
    image = _draw_heat_map(axes, matrix, rows, columns, float(matrix.min()), float(matrix.max()))
    figure.colorbar(image, ax=axes, shrink=0.6, label="share of the output")
    _name_axes(figure, site)
    return figure


def _draw_heat_map(
    axes: Axes, matrix: Tensor, rows: Sequence[str], columns: Sequence[str], lowest: float = 0.0, highest: float = 1.0
):
    image = axes.imshow(matrix, cmap=PROBABILITY_COLOURS, vmin=lowest, vmax=highest, aspect="auto")
    size = 6 if max(len(rows), len(columns)) <= 22 else 5
    axes.set_xticks(range(len(columns)), [_plain(token) for token in columns], rotation=90, fontsize=size)
    axes.set_yticks(range(len(rows)), [_plain(token) for token in rows], fontsize=size)
    axes.tick_params(length=1.5, width=0.5)
    for side in ("top", "right"):
        axes.spines[side].set_visible(True)
    return image


def _plain(token: str) -> str:
    """Escape a token, so that matplotlib does not read it as mathematics."""
    return token.replace("$", r"\$")


def _name_axes(figure: Figure, site: str) -> None:
    rows, columns = AXIS_NAMES[site]
    figure.supylabel(rows, fontsize=8)
    figure.supxlabel(columns, fontsize=8)


# ---------------------------------------------------------------------- models side by side


def _style(number: int) -> Dict[str, str]:
    return {"color": MODEL_COLOURS[number % 8], "marker": MODEL_MARKERS[number % 8]}


def _with_legend(figure: Figure) -> Figure:
    """Add one legend above all panels, for everything drawn in any of them."""
    drawn = [pair for axes in figure.axes for pair in zip(*axes.get_legend_handles_labels())]
    handles = {name: handle for handle, name in reversed(drawn)}
    names = dict.fromkeys(name for _, name in drawn)
    figure.legend([handles[name] for name in names], list(names), loc="outside upper center", ncols=4)
    return figure


def draw_smoothing(measurements: Sequence[Measurement]) -> Figure:
    """MAD of each layer's output, a line for each model, encoder and decoder side by side."""
    sides = [side for side in ("encoder", "decoder") if any(_mad(m, side) for m in measurements)]
    figure = Figure(figsize=(TWO_COLUMNS if len(sides) > 1 else ONE_COLUMN + 0.7, 2.5), layout="constrained")
    grid = figure.subplots(1, len(sides), squeeze=False, sharey=True)[0]
    for axes, side in zip(grid, sides):
        for number, measurement in enumerate(measurements):
            points, label = _mad(measurement, side), _plain(measurement.loaded.label)
            line = MODEL_LINES[number % 8]
            axes.plot(list(points), list(points.values()), ms=4, linestyle=line, label=label, **_style(number))
        axes.set(xlabel=f"{side} layer (0: its input)", title=side)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    grid[0].set_ylabel("MAD (mean cosine distance)")
    return _with_legend(figure)


def _mad(measurement: Measurement, side: str) -> Dict[int, float]:
    rows = [row for row in measurement.layer_rows() if row["side"] == side and row["mad"] is not None]
    return {row["layer"]: row["mad"] for row in sorted(rows, key=lambda row: row["layer"])}


def draw_sparsity_and_multimodality(measurements: Sequence[Measurement]) -> Figure:
    """Sparsity S against multi-modality M: small points for heads, a large one for a model's mean, a panel per site.

    Top: as the paper defines them. Bottom: one s for all models, and M over the largest scores.
    """
    heads = [m.head_rows() for m in measurements]
    sites = site_order({row["site"] for rows in heads for row in rows} - {"output"})
    figure = Figure(figsize=(max(TWO_COLUMNS / 3 * len(sites), ONE_COLUMN), 4.8), layout="constrained")
    grid = figure.subplots(2, len(sites), squeeze=False, sharex="row", sharey="row")
    for is_common, panels in enumerate(grid):
        names = ("common_sparsity", "top_multimodality") if is_common else ("sparsity", "multimodality")
        for axes, site in zip(panels, sites):
            for number, (measurement, rows) in enumerate(zip(measurements, heads)):
                at_site = [row for row in rows if row["site"] == site]
                points = [point for row in at_site if None not in (point := [row[name] for name in names])]
                if not points:
                    continue
                style = dict(linewidths=0.6, **_style(number))
                axes.scatter(*zip(*points), s=14, alpha=0.45, **style)
                middle = [sum(values) / len(points) for values in zip(*points)]
                label = _plain(measurement.loaded.label)
                axes.scatter(*middle, s=75, edgecolors="black", label=label, zorder=3, **style)
            s = at_site[0]["common_reference"]
            of_all = f"one $s$ = {s:.2g}" if s else "one $s$"
            axes.set_xlabel(f"sparsity $S$, {of_all if is_common else '$s = 1/K$'}")
            axes.grid(color="#DDDDDD", lw=0.5)
            axes.set_axisbelow(True)
    for axes, site in zip(grid[0], sites):
        axes.set_title(SITE_NAMES[site])
    grid[0][0].set_ylabel("multi-modality $M$")
    grid[1][0].set_ylabel(f"$M$ over the {TOP_K} largest scores")
    return _with_legend(figure)


# ---------------------------------------------------------------------- mappings

# Drawn if a report has no learned modulator.
ILLUSTRATION = ModulatorParameters(
    torch.tensor([[0.7, 0.8], [0.7, 0.8]], dtype=torch.float64),
    torch.tensor([[-2.0, -0.6], [-1.0, -0.2]], dtype=torch.float64),
)
SIMPLEX_SCORES = (1.5, 0.0)  # the largest and smallest of three; the third moves between them


def draw_simplex(modules: Optional[Dict[str, ModuleReport]] = None) -> Figure:
    """The paths of mappings on the simplex for three scores (h, t, l), as t goes from l to h.

    At the start one score stands out; at the end two are equal. A sparse and multi-modal mapping follows the lower
    edge, where the smallest score gets nothing, to its middle.

    Args:
        modules: with learned modulators, by name. Each is drawn beside softmax, on scores of its own range (the
            median and the 99th percentile of those that it saw). Without any: an illustrative modulator.
    """
    high, low = SIMPLEX_SCORES
    scores = _rising(high, low)
    panels = {
        f"softmax of ({high:g}, t, {low:g}) / T": [
            (f"T = {temperature:g}", softmax(scores / temperature), colour, line)
            for temperature, colour, line in zip((0.25, 0.5, 1, 2), (BLUE, SKY, GREY, ORANGE), ("-", "--", "-", ":"))
        ],
        f"other mappings of ({high:g}, t, {low:g})": [
            ("softmax", softmax(scores), GREY, "-"),
            ("1.5-entmax", entmax15(scores), GREEN, "-."),
            ("sparsemax", sparsemax(scores), VERMILLION, "--"),
            ("EvSoftMax", evsoftmax(scores), BLACK, ":"),
        ],
    }
    if not modules:
        title = f"MultiMax of ({high:g}, t, {low:g})"
        panels[title] = [
            ("softmax", softmax(scores), GREY, "-"),
            ("MultiMax, illustrative", multimax(scores, *ILLUSTRATION), BLUE, "-"),
        ]
    else:
        lines = panels["learned MultiMax, on its own scores"] = []
        for (name, module), colour, line in zip(modules.items(), (BLUE, VERMILLION, GREEN, PURPLE), MODEL_LINES):
            low, high = _bulk(module.histogram.edges, module.histogram.counts, tail=(0.5, 0.01))
            scores = _rising(high, low)
            lines.append((f"{name} ({high:.1f}, t, {low:.1f})", multimax(scores, *module.parameters), colour, line))
            lines.append((None, softmax(scores), colour, (0, (1, 2))))
        lines.append(("dotted: softmax of the same", torch.full((1, 3), float("nan")), GREY, (0, (1, 2))))
    figure = Figure(figsize=(TWO_COLUMNS, 3.2), layout="constrained")
    for axes, (title, lines) in zip(figure.subplots(1, 3), panels.items()):
        _draw_triangle(axes)
        for number, (name, probabilities, colour, line) in enumerate(lines):
            x, y = _on_triangle(probabilities)
            axes.plot(x, y, color=colour, linestyle=line, label=name, zorder=3)
            # rings, so that ends at the same point are all visible
            axes.plot(x[-1], y[-1], "o", color=colour, ms=4 + 1.5 * number, fillstyle="none", mew=1)
        axes.set_title(title, pad=9)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), fontsize=7)
    return figure


def _rising(high: float, low: float) -> Tensor:
    """Scores (h, t, l) with t from l to h, (steps, 3)."""
    t = torch.linspace(low, high, 301, dtype=torch.float64)
    return torch.stack([torch.full_like(t, high), t, torch.full_like(t, low)], dim=1)


def _on_triangle(probabilities: Tensor) -> Tuple[Tensor, Tensor]:
    """Project points of the simplex, (…, 3), to the plane: p₁ at the lower left, p₂ at the lower right, p₃ on top."""
    return probabilities[..., 1] + probabilities[..., 2] / 2, probabilities[..., 2] * 3**0.5 / 2


def _draw_triangle(axes: Axes) -> None:
    corners = _on_triangle(torch.eye(3, dtype=torch.float64)[[0, 1, 2, 0]])
    axes.plot(*corners, color=BLACK, lw=0.7)
    for name, x, y, alignment in [
        ("$p_1 = 1$", 0, -0.07, "left"),
        ("$p_2 = 1$", 1, -0.07, "right"),
        ("$p_3 = 1$", 0.5, 3**0.5 / 2 + 0.03, "center"),
    ]:
        axes.text(x, y, name, ha=alignment, fontsize=7, va="bottom" if y > 0 else "center")
    axes.set_aspect("equal")
    axes.set_axis_off()


def draw_orders() -> Figure:
    """σ of orders 1 and 2 for several gains: which side of a threshold gets steeper or flatter."""
    x = torch.linspace(-3, 3, 400, dtype=torch.float64)
    figure = Figure(figsize=(TWO_COLUMNS, 2.6), layout="constrained")
    for order, axes in enumerate(figure.subplots(1, 2, sharey=True), start=1):
        for b_or_d, name in ((-1, "b"), (1, "d")):
            axes.axvline(b_or_d, color="#BBBBBB", lw=0.7)
            axes.text(b_or_d + 0.06, -7.6, f"${name}$", fontsize=8)
        for gain, colour, line in ((-0.8, BLUE, "-"), (-0.4, SKY, "--"), (0.0, GREY, ":"), (0.4, ORANGE, "-.")):
            thresholds = torch.zeros(order, 2, dtype=torch.float64)
            gains = torch.zeros(order, 2, dtype=torch.float64)
            thresholds[-1] = torch.tensor([-1.0, 1.0])
            gains[-1] = gain
            label = f"$g_b = g_d = {gain:g}$" + ("  (softmax)" if gain == 0 else "")
            axes.plot(x, modulate(x, thresholds, gains), color=colour, linestyle=line, label=label)
        axes.set(title=f"a term of order {order}", xlabel="score $x$", ylim=(-8, 5), xlim=(-3, 3))
    figure.axes[0].set_ylabel("modulated score $\\sigma(x)$")
    return _with_legend(figure)


def draw_alignment(measurements: Sequence[Measurement]) -> Figure:
    """Alignment error rate of each cross-attention head by layer, of the mean of the heads, and of the rollout."""
    measurements = [m for m in measurements if m.alignment_rows()]
    figure = Figure(figsize=(TWO_COLUMNS, 2.6), layout="constrained")
    for axes, (rows_name, verb) in zip(figure.subplots(1, 2, sharey=True), zip(ROWS, ("predict", "read"))):
        for number, measurement in enumerate(measurements):
            style, label = _style(number), _plain(measurement.loaded.label)
            shift = (number - (len(measurements) - 1) / 2) * 0.18
            rows = [row for row in measurement.alignment_rows() if row["rows"] == rows_name]
            heads = [(row["layer"] + 1 + shift, row["aer"]) for row in rows if row["head"].isdigit()]
            means = [(row["layer"] + 1, row["aer"]) for row in rows if row["head"] == "mean"]
            axes.scatter(*zip(*heads), s=14, alpha=0.6, linewidths=0.6, **style)
            axes.plot(*zip(*means), color=style["color"], linestyle=MODEL_LINES[number % 8], label=label)
            rollout = next(row["aer"] for row in rows if row["head"] == "rollout")
            axes.axhline(rollout, color=style["color"], lw=0.6, linestyle=(0, (1, 3)))
        axes.set(title=f"rows that {verb} the word", xlabel="decoder layer", ylim=(0, 1))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.axes[0].set_ylabel("alignment error rate")
    return _with_legend(figure)


Drawing = Tuple[str, str, Any]  # file name without ending, caption, function that draws


def drawings_of(measurements: Sequence[Measurement]) -> List[Drawing]:
    """The figures that compare models, as (file name, caption, function to call)."""
    smoothing = (
        "Mean cosine distance between the tokens of a sentence after each layer: the lower, the more alike they "
        "have become. (The axis does not begin at 0.)"
    )
    metrics = (
        "Sparsity against multi-modality, a point a head; the large points are means over a model's heads. Above as "
        "the paper defines them, below with the same s for all models and M over the largest scores. The upper right "
        f"is where MultiMax is meant to lead. {_left_out(measurements)}"
    )
    alignment = (
        "Alignment error rate, lower is better: points are heads, lines the mean of a layer's heads, dotted lines "
        "the rollout of all layers. Left, a word's links are read from the rows that predict it; right, one step "
        "later, from those that read it."
    )
    modules = _last_modulators(measurements)
    simplex = (
        "Where mappings take three scores while one, t, rises from the smallest to the largest (rings: the end, two "
        "equal scores). The lower edge gives nothing to the smallest score; its middle is sparse and bimodal."
    ) + (" Learned modulators on the median and the 99th percentile of the scores they saw." if modules else "")
    orders = (
        "One term of the modulator at order 1 and 2, thresholds b = −1 and d = 1. A negative gain below b makes "
        "small scores smaller (sparser), a negative gain above d makes large ones more equal (multi-modal)."
    )
    aligned = [("alignment", alignment, lambda: draw_alignment(measurements))]
    return [
        ("sparsity-multimodality", metrics, lambda: draw_sparsity_and_multimodality(measurements)),
        ("over-smoothing", smoothing, lambda: draw_smoothing(measurements)),
        *(aligned if any(m.alignment_rows() for m in measurements) else []),
        ("simplex", simplex, lambda: draw_simplex(modules)),
        ("orders", orders, draw_orders),
    ]


def _left_out(measurements: Sequence[Measurement]) -> str:
    """A sentence giving the share of rows without M, for each site and model."""
    shares: Dict[str, List[str]] = {}
    for m in measurements:
        for row in m.site_rows():
            if row["site"] != "output":
                share = f"{m.loaded.label} {row['multimodality_undefined'] / row['rows']:.0%}"
                shares.setdefault(SITE_NAMES[row["site"]], []).append(share)
    sites = "; ".join(f"{site}: {', '.join(of_models)}" for site, of_models in shares.items())
    return f"Rows without a second relevant score have no M; above they are left out ({sites})."


def _last_modulators(measurements: Sequence[Measurement]) -> Dict[str, ModuleReport]:
    """The learned modulators to draw on the simplex: the last layer of each site of the first model that has any."""
    for measurement in measurements:
        learned = [m for m in measurement.modules.values() if m.parameters is not None and m.site != "output"]
        if learned:
            last = {module.site: module for module in learned}
            return {f"{site} {last[site].layer + 1}": last[site] for site in site_order(last)}
    return {}
