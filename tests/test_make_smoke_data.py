"""scripts/make_smoke_data.py: archives in the published layout, and the same every time."""

from __future__ import annotations

import gzip
import os
import re
import sys
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT, run
from recipes import siblings

SCRIPT = ROOT / "scripts" / "make_smoke_data.py"
DATASETS = ("iwslt14", "wikitext103", "multi30k")


def make(dataset: str, out: Path, *options: object, hash_seed: str = "0", check: bool = True):
    command = [SCRIPT, dataset, out, "--sentences", 200, *options]
    return run(sys.executable, *command, env={"PYTHONHASHSEED": hash_seed}, check=check)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with the three."""
    folder = tmp_path_factory.mktemp("smoke") / "new"
    for dataset in DATASETS:
        make(dataset, folder / dataset)
    return folder


def content(path: Path) -> dict[str, bytes] | bytes:
    return {file.name: file.read_bytes() for file in path.iterdir()} if path.is_dir() else path.read_bytes()


@pytest.mark.parametrize("dataset", DATASETS)
def test_same_seed_same_bytes(made, tmp_path, dataset):
    again, other = tmp_path / "another name", tmp_path / "other"
    make(dataset, again, hash_seed="1")
    assert content(again) == content(made / dataset)
    make(dataset, other, "--seed", 2)
    assert content(other) != content(made / dataset)
    assert siblings(again) == [again.name]


def test_iwslt14(made):
    with tarfile.open(made / "iwslt14", "r:gz") as archive:
        files = {info.name: archive.extractfile(info).read().decode() for info in archive if info.isfile()}
    sets = ("TED.dev2010", "TEDX.dev2012", "TED.tst2010", "TED.tst2011", "TED.tst2012")
    for language in ("de", "en"):
        train = files.pop(f"de-en/train.tags.de-en.{language}").splitlines()
        text = [line for line in train if not re.match("<(url|keywords|talkid)>", line)]
        assert len(text) == 200 + 2 * 4 + 3  # sentences, titles and descriptions of 4 talks, odd pairs
        assert len(train) == len(text) + 3 * 4
        for name in sets:
            test = files.pop(f"de-en/IWSLT14.{name}.de-en.{language}.xml")
            numbers = re.findall(r'^<seg id="(\d+)"> \S.* </seg>$', test, re.M)
            assert numbers == [str(number) for number in range(1, 41)]
    assert files == {}


def test_wikitext103(made):
    with zipfile.ZipFile(made / "wikitext103") as archive:
        assert archive.testzip() is None
        texts = {name: archive.read(name).decode() for name in archive.namelist() if not name.endswith("/")}
    assert sorted(texts) == [f"wikitext-103/wiki.{split}.tokens" for split in ("test", "train", "valid")]
    counts = Counter(texts["wikitext-103/wiki.train.tokens"].split())
    assert counts.pop("<unk>") > 0 and min(counts.values()) >= 3
    for text in texts.values():
        assert set(text.split()) <= {*counts, "<unk>"}
        lines = text.splitlines()
        assert lines[:2] == [" ", " = Article <unk> = "] and all(line[0] == line[-1] == " " for line in lines)


def test_multi30k(made):
    files = {path.name: gzip.decompress(path.read_bytes()) for path in (made / "multi30k").iterdir()}
    lengths = {name: text.count(b"\n") for name, text in files.items()}
    splits = {"train": 200, "val": 20, "test_2016_flickr": 20}
    assert lengths == {f"{name}.{language}.gz": n for name, n in splits.items() for language in ("de", "en")}
    for text in files.values():
        assert all(re.fullmatch(r"[A-ZÄÖÜ].*[^ ][.?]", line) for line in text.decode().splitlines())


def test_errors_are_one_line_and_leave_nothing(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work")
    result = make("multi30k", tmp_path / "full", check=False)
    assert result.returncode == 1 and result.stderr.startswith("make_smoke_data.py: ")
    assert result.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == ["full"] and os.listdir(tmp_path / "full") == ["thesis.tex"]
    assert "less than 1" in make("iwslt14", tmp_path / "x", "--sentences", 0, check=False).stderr
