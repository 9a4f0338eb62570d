"""What ``python -m build`` makes: an sdist with everything, and of that a wheel that is enough without a checkout."""

import importlib.metadata
import os
import re
import shutil
import site
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from conftest import PLUGIN, ROOT, needs_compiler, run
from test_distributed import TRAINING, TWO_GPUS

import multimax_fairseq

pytest.importorskip("build", reason="needs build: pip install build")
pytest.importorskip("setuptools", reason="needs setuptools: without isolation build takes the one that is there")
pytestmark = pytest.mark.slow

NOT_THERE = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "data", "runs", "demo")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with the sdist and the wheel, made of a copy: a build leaves folders behind."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "tree", ignore=NOT_THERE)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", folder / "tree")
    return folder / "dist"


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """The wheel unpacked, and an environment in which it is what Python finds, from a folder without anything."""
    folder = tmp_path_factory.mktemp("site-packages")
    (wheel,) = built.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder)
    variables = {"PYTHONPATH": str(folder), "TORCH_EXTENSIONS_DIR": str(folder.parent / "extensions")}
    return folder, {"env": variables | {"MULTIMAX_BACKEND": "auto"}, "cwd": tmp_path_factory.mktemp("empty")}


def test_the_wheel_has_every_source_file_and_nothing_else(built, installed):
    folder, _ = installed
    sources = {str(path.relative_to(ROOT)) for path in PLUGIN.rglob("*") if path.suffix in (".py", ".cpp", ".hpp")}
    metadata = f"multimax_fairseq-{multimax_fairseq.__version__}.dist-info"
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {name for name in found if not name.startswith(metadata)} == sources
    assert any(name.endswith(".cpp") for name in sources)
    assert (folder / metadata / "licenses" / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    (distribution,) = importlib.metadata.distributions(name="multimax_fairseq", path=[str(folder)])
    commands = {entry.name for entry in distribution.entry_points}
    assert commands == {"multimax-analyze", "multimax-doctor"} and distribution.metadata["License"] == "MIT"


def test_the_sdist_has_what_a_checkout_has(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    expected = {name for name in tracked if not name.startswith(".") and (ROOT / name).is_file()}
    assert {"scripts/demo.sh", "tests/conftest.py", "docs/flags.md"} <= names and expected - names == set()


@needs_compiler
def test_it_trains_in_two_processes_with_its_own_kernels_and_the_doctor_finds_all_well(corpus, installed, tmp_path):
    folder, where = installed
    result = run(sys.executable, "-m", "multimax_fairseq.doctor", **where)
    assert result.stdout.endswith("All is well.\n") and "fp32 in C++" in result.stdout
    compiled = {path.name for path in (folder.parent / "extensions").rglob("*.so")}
    assert {re.sub("-.*", "", name) for name in compiled} >= {"attention", "rows"}
    (tmp_path / "spawn.py").write_text(TWO_GPUS)
    result = run(sys.executable, tmp_path / "spawn.py", corpus / "data-bin", *TRAINING, "--ddp-backend", "legacy_ddp",
                 "--user-dir", folder / "multimax_fairseq", "--save-dir", tmp_path / "run",
                 "--distributed-world-size", 2, "--distributed-backend", "gloo", **where)  # fmt: skip
    log = result.stderr + result.stdout
    assert "distributed init (rank 1)" in log
    losses = [float(loss) for loss in re.findall(r'"loss": "([\d.]+)"', log)]
    assert losses[0] - losses[-1] > 0.5 and os.listdir(where["cwd"]) == []


@pytest.fixture(scope="module")
def without_fairseq(installed, tmp_path_factory):
    """An environment with the wheel and all that is installed here but fairseq."""
    folder = tmp_path_factory.mktemp("without")
    for path in filter(Path.is_dir, map(Path, site.getsitepackages())):
        for entry in path.iterdir():
            if "fairseq" not in entry.name and not entry.name.endswith(".pth"):
                (folder / entry.name).symlink_to(entry)
    variables = {"PYTHONPATH": os.pathsep.join([str(installed[0]), str(folder)])}
    return {"env": variables | {"MULTIMAX_BACKEND": "auto"}, "cwd": tmp_path_factory.mktemp("nothing")}


def test_without_fairseq_the_mappings_work_and_the_rest_says_in_a_line_what_is_missing(installed, without_fairseq):
    python = [sys.executable, "-S"]  # finds what PYTHONPATH names and no more
    result = run(*python, "-m", "multimax_fairseq.doctor", check=False, **without_fairseq)
    # a problem where it could be had, and none elsewhere
    problems = re.findall("^PROBLEM (.*)", result.stdout, re.M)
    assert all(re.match("(ve-)?fairseq is missing: install", line) for line in problems)
    assert "ok      fairseq is not installed. Linux" in result.stdout
    imports = "import torch; from multimax_fairseq.attention import mapped_attention"
    attend = "q = torch.ones(2, 3, 250, 8, requires_grad=True); mapped_attention(q, q, q, 'multimax').sum()"
    run(*python, "-c", f"{imports}; {attend}.backward()", **without_fairseq)
    refused = run(*python, "-c", "import multimax_fairseq.models", check=False, **without_fairseq)
    last = refused.stderr.splitlines()[-1]
    assert "fairseq is not installed. Linux on x86-64 has it for Python 3.11 and 3.12" in last
    result = run(*python, "-m", "multimax_fairseq", **without_fairseq)  # for --user-dir
    assert "fairseq is not installed. Linux on x86-64" in result.stderr
    assert result.stdout == f"{installed[0] / 'multimax_fairseq'}\n"
    analyze = "from multimax_fairseq.without_fairseq import analyze; analyze()"  # the command of the wheel
    refused = run(*python, "-c", analyze, "a.pt", "--data", ".", "--out", "report", check=False, **without_fairseq)
    assert refused.returncode == 1 and len(refused.stderr.splitlines()) == 1
    assert "fairseq is not installed. Linux on x86-64" in refused.stderr
