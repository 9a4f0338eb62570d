"""benchmarks/check_gpu.sh, as far as it goes without a GPU."""

import json

import pytest
import torch
from conftest import ROOT, load_script, run

SCRIPT = ROOT / "benchmarks" / "check_gpu.sh"
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")


@without_gpu
def test_without_a_gpu_it_ends_with_one_line(tmp_path):
    result = run("bash", SCRIPT, "--out", tmp_path / "figures.json", check=False)
    assert result.returncode == 1 and not list(tmp_path.iterdir())
    (line,) = result.stderr.splitlines()
    assert line.startswith("ERROR: torch sees no GPU here: run this on a machine with one, or --without-gpu")


@pytest.mark.slow
@without_gpu
def test_what_goes_without_a_gpu(tmp_path):
    figures = tmp_path / "figures.json"
    result = run("bash", SCRIPT, "--without-gpu", "--short", "--out", figures)
    results = json.loads(figures.read_text())
    assert result.stdout.splitlines()[-1].startswith("everything is right") and results["wrong"] == 0
    (training,) = [row for row in results["rows"] if row["check"].startswith("training")]
    assert len(training["losses"]) == 6 and training["losses"][-1] < training["losses"][0]
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]


def test_what_is_wrong_is_said(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    check_gpu = load_script("check_gpu")

    def rows(*verdicts, fails=False):
        for right in verdicts:
            yield {"check": "a", "figure": "", "right": right}
        if fails:
            raise RuntimeError("no such kernel")

    for name, found in (("attention", rows(True, False)), ("compiled", rows(True, fails=True)), ("training", ()),
                        ("speed", ())):  # fmt: skip
        monkeypatch.setattr(check_gpu, f"check_{name}", lambda _, found=found: found)
    gpu = [] if torch.cuda.is_available() else ["--without-gpu"]
    monkeypatch.setattr("sys.argv", ["check_gpu", "--out", str(tmp_path / "figures.json"), *gpu])
    assert check_gpu.main() == 1
    assert "no such kernel" in (output := capsys.readouterr().out) and "2 of 4 are WRONG" in output


def test_losses_beside_each_other(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    check_gpu = load_script("check_gpu")
    for losses, right in (([4.0, 3.1], True), ([4.0, 3.2], False), ([4.0], False), ([float("nan"), 3.0], False)):
        assert check_gpu.beside("losses", losses, [4.0, 3.0])["right"] == right
    assert not check_gpu.beside("none", [], [])["right"]
