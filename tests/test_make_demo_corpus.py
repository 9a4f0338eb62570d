"""scripts/make_demo_corpus.py: its files, and the German, English and alignments in them.

The oracles for the language are lists written by hand: they share no table with the generator.
"""

import re
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT, run

SIZES = {"train": 4000, "valid": 200, "test": 500}
SMALL = {"train": 60, "valid": 5, "test": 20}
SUFFIXES = ("de", "en", "align")


def generate(out, *options, hash_seed="0", **sizes):
    """The files' lines by their names."""
    run(sys.executable, ROOT / "scripts" / "make_demo_corpus.py", f"--out={out}", *options,
        *(f"--{split}={size}" for split, size in sizes.items()), env={"PYTHONHASHSEED": hash_seed})
    return {path.name: path.read_text(encoding="utf-8").splitlines() for path in out.iterdir()}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return generate(tmp_path_factory.mktemp("demo") / "not" / "there" / "yet", **SIZES)


@pytest.fixture(scope="module")
def pairs(files):
    """The sentence pairs of all the splits: both sides as text and as words, links as index pairs."""
    return [
        SimpleNamespace(de=de, en=en, german=de.split(), english=en.split(),
                        links=[tuple(map(int, link.split("-"))) for link in links.split()])
        for split in SIZES
        for de, en, links in zip(*(files[f"{split}.{suffix}"] for suffix in SUFFIXES))
    ]


def test_the_seed_decides_and_more_training_data_leaves_the_rest_alone(files, tmp_path):
    assert {name: len(lines) for name, lines in files.items()} == {
        f"{split}.{suffix}": size for split, size in SIZES.items() for suffix in SUFFIXES
    }
    small = generate(tmp_path / "small", **SMALL)
    assert generate(tmp_path / "again", **SMALL, hash_seed="12345") == small
    other = generate(tmp_path / "other", "--seed=2", **SMALL)
    assert len(set(small["test.de"]) & set(other["test.de"])) < 3
    larger = generate(tmp_path / "larger", **{**SMALL, "train": 70})
    assert {name for name in small if larger[name] != small[name]} == {"train.de", "train.en", "train.align"}


def test_no_sentence_occurs_twice_and_lengths_vary(pairs):
    assert len({pair.de for pair in pairs}) == len({pair.en for pair in pairs}) == len(pairs)
    lengths = [len(words) for pair in pairs for words in (pair.german, pair.english)]
    assert 4 <= min(lengths) and 20 < max(lengths) <= 25 and 10 < sum(lengths) / len(lengths) < 12.5


def test_alignments_are_sorted_links_and_only_commas_have_none(pairs):
    for pair in pairs:
        assert pair.links == sorted(set(pair.links))
        words = {i for i, word in enumerate(pair.german) if word != ","}
        assert words <= {i for i, _ in pair.links} <= set(range(len(pair.german))), pair.de
        assert {j for _, j in pair.links} == set(range(len(pair.english))), pair.en


# Two spaces between entries. A verb's finite form also means the "do" that supports it in English.
DICTIONARY = """
    Frauen: women         Kindern: children      Männer: men           Bauern: farmer farmers
    Schlüssel: key keys   schöner: beautiful     mir: me               ihnen: them
    gekauft: bought buy   angerufen: called call     anruft: calls call does
    gesehen: saw see      angesehen: looked look at  aussucht: chooses choose does
    tanzt: dances dance does do    weil: because     ob: whether       Abend: in the evening
    nicht: not cannot     kann: can cannot       unserem: our          diese: this these
    im: in the            ins: into the          vom: of the
"""


def test_words_are_aligned_to_their_dictionary_translations(pairs):
    entries = [entry.split(": ") for entry in re.split(r"\s{2,}", DICTIONARY.strip())]
    dictionary = {german: set(english.split()) for german, english in entries}
    met = set()
    for pair in pairs:
        for i, word in enumerate(pair.german):
            if word in dictionary:
                linked = {pair.english[j] for i_linked, j in pair.links if i_linked == i}
                assert linked and linked <= dictionary[word], (word, linked, pair.de, pair.en)
                met.add(word)
    assert met == set(dictionary)

