"""scripts/make_demo_corpus.py: its files, and the German, English and alignments in them."""

import sys

import pytest
from conftest import ROOT, run

SIZES = {"train": 2000, "valid": 200, "test": 300}
SUFFIXES = ("de", "en", "align")
# Written by hand. A verb's finite form also means the "do" that supports it in English.
DICTIONARY = {"angerufen": "called call", "anruft": "calls call does", "ansehen": "look at", "kann": "can",
              "weil": "because", "nicht": "not", "Abend": "in the evening", "im": "in the", "Schlüssel": "key"}


def generate(out, *options, **sizes):
    """The files' lines by their names."""
    run(sys.executable, ROOT / "scripts" / "make_demo_corpus.py", f"--out={out}", *options,
        *(f"--{split}={size}" for split, size in {**SIZES, **sizes}.items()))
    return {path.name: path.read_text(encoding="utf-8").splitlines() for path in out.iterdir()}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return generate(tmp_path_factory.mktemp("demo") / "not" / "there" / "yet")


def test_the_seed_decides_and_more_training_data_leaves_the_rest_alone(files, tmp_path):
    assert {name: len(lines) for name, lines in files.items()} == {
        f"{split}.{suffix}": size for split, size in SIZES.items() for suffix in SUFFIXES}
    larger = generate(tmp_path / "larger", train=2010)
    assert {name for name in files if larger[name] != files[name]} == {f"train.{suffix}" for suffix in SUFFIXES}
    assert all(larger[f"train.{suffix}"][:2000] == files[f"train.{suffix}"] for suffix in SUFFIXES)
    assert len(set(files["test.de"]) & set(generate(tmp_path / "other", "--seed=2")["test.de"])) < 3


def test_sentences_are_distinct_and_aligned_to_their_translations(files):
    columns = [sum((files[f"{split}.{suffix}"] for split in SIZES), []) for suffix in SUFFIXES]
    assert all(len(set(column)) == len(column) for column in columns[:2])
    met, lengths = set(), []
    for german, english, alignment in zip(*([line.split() for line in column] for column in columns)):
        links = [tuple(map(int, link.split("-"))) for link in alignment]
        assert links == sorted(set(links)) and {j for _, j in links} == set(range(len(english))), english
        assert {i for i, word in enumerate(german) if word != ","} <= {i for i, _ in links}, german
        for i, word in enumerate(german):
            if word in DICTIONARY:
                linked = {english[j] for i_linked, j in links if i_linked == i}
                assert linked <= set(DICTIONARY[word].split()), (word, linked, german, english)
                met.add(word)
        lengths += [len(german), len(english)]
    assert met == set(DICTIONARY) and 4 <= min(lengths) and 20 < max(lengths) <= 25
