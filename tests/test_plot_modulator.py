"""scripts/plot_modulator.py: the files it writes, and that what its picture says is so."""

from __future__ import annotations

import math
import os
import sys
from types import ModuleType
from xml.etree import ElementTree

import pytest
import torch
from conftest import ROOT, load_script, run

pytest.importorskip("matplotlib")

SCRIPT = ROOT / "scripts" / "plot_modulator.py"


@pytest.fixture(scope="module")
def plot() -> ModuleType:
    return load_script("plot_modulator")


@pytest.fixture(scope="module")
def masses(plot) -> list[tuple[list[float], float]]:
    """For softmax, softmax at the low temperature and MultiMax: the modes' probabilities, and the rest."""
    modes = sorted(range(len(plot.SCORES)), key=lambda i: -plot.SCORES[i])[:3]
    rows = [p.tolist() for p in plot.distributions().values()]
    return [([p[i] for i in modes], sum(p) - sum(p[i] for i in modes)) for p in rows]


def test_png(tmp_path):
    from matplotlib.colors import to_rgb
    from matplotlib.image import imread

    out = tmp_path / "new" / "picture.png"
    assert "DEBUG" not in run(sys.executable, SCRIPT, "--out", out, env={"PYTHONPATH": str(ROOT)}).stderr
    pixels = imread(out)[..., :3]  # (height, width, 3), 0 to 1
    height, width = pixels.shape[:2]
    assert width == 1800 and 0.4 * width < height < 0.6 * width
    assert out.stat().st_size < 150_000
    assert (pixels[0] == 1).all() and (pixels[:, -1] == 1).all(), "the margin is not white"
    # Both curves and all three sets of bars are there; a bar alone is thousands of pixels.
    least_pixels = {"#E69F00": 1000, "#595959": 10_000, "#D55E00": 10_000, "#0072B2": 10_000}
    for colour, at_least in least_pixels.items():
        near = (abs(pixels - to_rgb(colour)) < 0.04).all(axis=-1)
        assert near.sum() > at_least, f"too few pixels of {colour}: {near.sum()}"


def test_svg(plot, tmp_path):
    out = tmp_path / "picture.svg"
    plot.main(["--out", str(out)])
    first = out.read_bytes()
    root = ElementTree.fromstring(first)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    paths = list(root.iter("{http://www.w3.org/2000/svg}path"))
    assert len(paths) > 30 + 3, "fewer paths than bars and curves"
    plot.main(["--out", str(out)])
    assert out.read_bytes() == first, "the same picture should be the same file"


@pytest.mark.parametrize("name", ["picture.jpg", "picture", "picture.PNG.txt"])
def test_unknown_suffix(plot, tmp_path, capsys, name):
    with pytest.raises(SystemExit) as stopped:
        plot.main(["--out", str(tmp_path / name)])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert "must end in .png or .svg" in error and name in error
    assert not any(tmp_path.iterdir())


def test_without_matplotlib(tmp_path):
    (tmp_path / "matplotlib.py").write_text("raise ImportError('not here')")
    result = run(sys.executable, SCRIPT, "--out", tmp_path / "picture.png", check=False,
                 env={"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])})  # fmt: skip
    assert result.returncode == 1
    assert "pip install matplotlib" in result.stderr and "Traceback" not in result.stderr


def test_multimax_is_computed_as_the_formula_says(plot):
    def modulated(x: float) -> float:
        terms = enumerate(zip(plot.THRESHOLDS.tolist(), plot.GAINS.tolist()), start=1)
        return x + sum(g * max(b - x, 0) ** n + h * max(x - d, 0) ** n for n, ((b, d), (g, h)) in terms)

    weights = [math.exp(modulated(x)) for x in plot.SCORES.tolist()]
    expected = [weight / sum(weights) for weight in weights]
    assert list(plot.distributions().values())[2].tolist() == pytest.approx(expected, abs=1e-12)


def test_slopes(plot):
    """Steeper than the identity below b, flatter above d, and never falling, at either order."""
    (b, d), step = plot.THRESHOLDS[0].tolist(), 1e-3
    x = torch.arange(*plot.X_RANGE, step, dtype=torch.float64)
    for order in (1, 2):
        slope = plot.modulate(x, plot.THRESHOLDS[:order], plot.GAINS[:order]).diff() / step
        below, above = x[1:] < b, x[:-1] > d
        assert below.any() and above.any()
        assert (slope[below] > 1.5).all()
        assert (slope[above] < 0.5).all() and (slope > 0).all()


def test_softmax_keeps_the_modes_and_a_tail(masses):
    modes, rest = masses[0]
    assert min(modes) > 0.1
    assert rest > 0.2


def test_low_temperature_leaves_no_tail_but_one_mode(masses):
    modes, rest = masses[1]
    assert rest < 0.03
    assert modes[0] > 0.8 and modes[1] < modes[0] / 5


def test_multimax_keeps_the_modes_and_no_tail(masses):
    (softmax_modes, softmax_rest), (cold_modes, cold_rest), (modes, rest) = masses
    assert sum(modes) > sum(softmax_modes) and rest < softmax_rest / 5
    assert rest <= cold_rest, "the low temperature removes more of the tail: the comparison is not fair"
    for other in (softmax_modes, cold_modes):
        assert modes[1] / modes[0] > other[1] / other[0]
        assert modes[2] / modes[0] > other[2] / other[0]
    assert min(modes) > 0.7 * max(modes)
