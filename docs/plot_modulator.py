#!/usr/bin/env python3
"""Draw docs/modulator.png: MultiMax's modulator, and what it does to one distribution.

    python docs/plot_modulator.py [--out docs/modulator.png]

Left: σ(x) against the score x: the identity (softmax), order 1 and order 2. Below the threshold b the
slope is above 1, so small scores fall behind and vanish; above d it is below 1, so large scores draw
level and several survive. The dots are the ten scores of the right side.

Right: these scores as probabilities. Softmax at temperature 1 leaves mass on the seven small ones. At a
temperature low enough to remove as much of it as MultiMax does, softmax keeps only one mode; MultiMax
keeps all three. ``multimax_fairseq.mappings`` computes everything from the constants below, which were
chosen for the picture, not learned.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure

from multimax_fairseq.analysis.style import BLACK, BLUE, GREY, SKY, VERMILLION
from multimax_fairseq.mappings import modulate, multimax, softmax

SCORES = torch.tensor([0.6, 2.2, 0.1, 0.8, 3.2, 0.4, -0.1, 0.7, 1.9, 0.3], dtype=torch.float64)
THRESHOLDS = torch.tensor([[1.6, 1.8], [1.6, 1.8]], dtype=torch.float64)  # (order, 2): b, d
GAINS = torch.tensor([[-2.0, -0.6], [-1.0, -0.1]], dtype=torch.float64)  # order 1 is the first row alone
LOW_TEMPERATURE = 0.5
X_RANGE = (-0.5, 3.5)  # σ is monotone here
STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def distributions() -> dict[str, torch.Tensor]:
    """The probabilities of ``SCORES``, shape (10,), under the three mappings of the right side."""
    return {
        "softmax, T = 1": softmax(SCORES),
        f"softmax, T = {LOW_TEMPERATURE}": softmax(SCORES / LOW_TEMPERATURE),
        "MultiMax, order 2": multimax(SCORES, THRESHOLDS, GAINS),
    }


def draw_modulator(axes) -> None:
    low, high = X_RANGE
    b, d = THRESHOLDS[0].tolist()
    x = torch.linspace(low, high, 400, dtype=torch.float64)
    axes.axvspan(low, b, color=VERMILLION, alpha=0.07, lw=0)
    axes.axvspan(d, high, color=BLUE, alpha=0.07, lw=0)
    axes.axvline(b, color=GREY, lw=0.8)
    axes.axvline(d, color=GREY, lw=0.8)
    axes.text(b - 0.06, -6.7, "$b$", ha="right", fontsize=12)
    axes.text(d + 0.06, -6.7, "$d$", ha="left", fontsize=12)
    axes.text((low + b) / 2, 5.4, "small scores:\nsteeper → sparse", ha="center", va="top")
    axes.text((d + high) / 2, 5.4, "large scores:\nflatter → several\nmodes survive", ha="center", va="top")
    axes.plot(x, x, "--", color=GREY, lw=1.2, label="softmax: $σ(x) = x$")
    axes.plot(x, modulate(x, THRESHOLDS[:1], GAINS[:1]), color=SKY, lw=2, label="order 1")
    axes.plot(x, modulate(x, THRESHOLDS, GAINS), color=BLUE, lw=2.5, label="order 2")
    axes.plot(SCORES, modulate(SCORES, THRESHOLDS, GAINS), "o", color=BLUE, ms=5.5, mec="white", mew=0.8)
    axes.legend(loc="center right", bbox_to_anchor=(1, 0.3), frameon=False, handlelength=1.2, borderaxespad=0)
    axes.set(xlim=X_RANGE, ylim=(-7.2, 5.8), xlabel="score $x$", ylabel="modulated score $σ(x)$")
    axes.set_title("1.  MultiMax bends the scores …")


def draw_distributions(panels) -> None:
    modes = SCORES.topk(3).indices.tolist()
    verdicts = ("3 modes, but a tail", "no tail, but 1 mode", "3 modes and no tail")
    colours = (GREY, BLACK, BLUE)
    for axes, colour, verdict, (name, p) in zip(panels, colours, verdicts, distributions().items()):
        axes.bar(range(len(p)), p, color=colour, width=0.75)
        for i in modes:
            axes.text(i, p[i] + 0.03, f"{p[i]:.0%}", ha="center")
        top = p[modes].sum()
        axes.text(-0.5, 1, name, color=colour, weight="bold", va="top")
        axes.text(9.5, 1, f"{verdict}\n(top 3: {top:.0%}, rest: {1 - top:.0%})", ha="right", va="top")
        axes.set(ylim=(0, 1), yticks=(0, 0.5, 1), xlim=(-0.6, 9.6), xticks=[])
    panels[0].set_title("2.  … to be sparse and multi-modal")
    panels[1].set_ylabel("probability")
    labels = [f"{score:g}".replace("-", "−") for score in SCORES.tolist()]
    panels[2].set_xticks(range(len(labels)), labels)
    panels[2].set_xlabel("the ten scores $x$ (dots on the left)")


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw MultiMax's modulator and what it does.")
    parser.add_argument("--out", type=Path, default=Path("docs/modulator.png"), help="a file of matplotlib's formats")
    out = parser.parse_args().out
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 4.3), layout="constrained")
        grid = figure.add_gridspec(3, 2, wspace=0.05)
        draw_modulator(figure.add_subplot(grid[:, 0]))
        draw_distributions([figure.add_subplot(grid[row, 1]) for row in range(3)])
        figure.savefig(out, dpi=160, pil_kwargs={"optimize": True})


if __name__ == "__main__":
    main()
