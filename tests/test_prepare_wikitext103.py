"""scripts/prepare_wikitext103.sh, run as a user runs it, on small zips in the published layout."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
from recipes import (
    WIKITEXT,
    Prepared,
    check_bad_archive,
    check_second_run,
    fail,
    fairseq_task,
    lines_of,
    siblings,
    succeed,
)

TEXTS = {
    "train": " \n = The <unk> Cat = \n \n The cat @-@ like animal sat , and sat . \n" * 20,
    "valid": " \n = A Dog = \n The cat sat . \n",
    "test": " \n The animal sat \u2028 , and sat . \n \n",
}

# What fairseq-preprocess prints of the published corpora.
KNOWN = {
    "wikitext-103": {"train": 103227021, "valid": 217646, "test": 245569, "dictionary": 267744},
    "wikitext-2": {"train": 2088628, "valid": 217646, "test": 245569, "dictionary": 33280},
}

# Of the published zips.
SHA256 = {
    "wikitext-103": "242ba0f20b329cfdf1ccc61e9e9e5b59becf189db7f7a81cd2a0e2fc31539590",
    "wikitext-2": "92675f1d63015c1c8b51f1656a52d5bdbc33aafa60cc47a218a66e7ee817488c",
}


def make_archive(path: Path, name: str = "wikitext-103/wiki.{}.tokens", texts: dict = TEXTS) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name.partition("/")[0] + "/", b"")
        for split, text in texts.items():
            archive.writestr(name.format(split), text)
    return path


def preprocess_log(train: int, valid: int, test: int, dictionary: int) -> str:
    """What fairseq-preprocess writes of so many tokens."""
    counts = {"train": train, "valid": valid, "test": test}
    return "".join(
        f"[None] Dictionary: {dictionary} types\n"
        f"[None] text/{split}.tokens: 12 sents, {count} tokens, 0.0% replaced (by <unk>)\n"
        for split, count in counts.items()
    )


# ---------------------------------------------------------------------- what is made


@pytest.fixture(scope="module")
def wikitext(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """Archive, result and output of one real run."""
    folder = tmp_path_factory.mktemp("wikitext")
    archive = make_archive(folder / "wikitext-103-v1.zip")
    out = folder / "parent" / "out"
    return archive, out, succeed(WIKITEXT, "--archive", archive, "--out", out)


def test_text_is_kept(wikitext):
    _, out, _ = wikitext
    assert {path.name: path.read_text() for path in (out / "text").iterdir()} == {
        f"{split}.tokens": text for split, text in TEXTS.items()
    }
    assert sorted(path.name for path in out.iterdir()) == [".complete", "data-bin", "text"]
    assert siblings(out) == ["out"]


def test_data_bin_is_what_fairseq_trains_on(wikitext):
    """<unk> of the text is fairseq's own <unk>, every line has an end, and so have empty ones."""
    _, out, _ = wikitext
    task = fairseq_task("language_modeling", out, "--tokens-per-sample", "1000")
    dictionary = task.source_dictionary
    words = {word for word in TEXTS["train"].split() if word != "<unk>"}
    assert words <= set(dictionary.symbols)
    assert len(words) == 11 and len(dictionary) == 16  # with 4 special ones, and filled up to a multiple of 8
    assert dictionary.index("<unk>") == dictionary.unk()
    for split in TEXTS:
        task.load_dataset(split)
        (block,) = task.dataset(split)
        expected = []
        for line in lines_of(out / "text" / f"{split}.tokens"):
            expected += [dictionary.index(word) for word in line.split()] + [dictionary.eos()]
        assert block["target"].tolist() == expected


def test_counts_are_compared_with_the_published_ones(wikitext):
    _, _, result = wikitext
    tokens = {split: len(text.split()) + text.count("\n") for split, text in TEXTS.items()}
    for split, known in (("train", 103227021), ("valid", 217646), ("test", 245569)):
        assert f"WARNING: {split}: {tokens[split]} tokens, the published wikitext-103 has {known}" in result.stderr
    assert "WARNING: dictionary: 16 entries, the published wikitext-103 has 267744" in result.stderr
    assert "wikitext-103-v1.zip is not the published wikitext-103-v1.zip, by its SHA-256" in result.stderr


@pytest.mark.parametrize("corpus", KNOWN)
def test_the_published_corpora_pass(tmp_path, stand_in, corpus):
    """With stand-ins that count and sum as if they were there."""
    command = tmp_path / "stand-in" / "sha256sum"
    command.write_text(f"#!/bin/sh\necho '{SHA256[corpus]}  -'\n")
    command.chmod(0o755)
    archive = make_archive(tmp_path / "archive.zip", f"{corpus}/wiki.{{}}.tokens")
    arguments = [WIKITEXT, "--corpus", corpus, "--archive", archive]
    log = preprocess_log(**KNOWN[corpus])
    assert succeed(*arguments, "--out", tmp_path / "right", STAND_IN_LOG=log, **stand_in).stderr == ""

    for name, count in KNOWN[corpus].items():
        log = preprocess_log(**{**KNOWN[corpus], name: count - 1})
        result = succeed(*arguments, "--out", tmp_path / name, STAND_IN_LOG=log, **stand_in)
        unit = "entries" if name == "dictionary" else "tokens"
        assert result.stderr == f"WARNING: {name}: {count - 1} {unit}, the published {corpus} has {count}\n"


def test_second_run_and_other_settings(wikitext):
    archive, out, _ = wikitext
    command = [WIKITEXT, "--archive", archive, "--out", out]
    check_second_run(command, ["--corpus", "wikitext-2"], "there: recipe=wikitext-103; asked for: recipe=wikitext-2")


# ---------------------------------------------------------------------- bad archives


# What is wrong with archives of any kind: test_prepare_iwslt14.py and test_unpack.py.
FAULTS = {
    "the raw version": (
        lambda path: make_archive(path, "wikitext-103-raw/wiki.{}.raw"),
        "lacks wiki.test.tokens, wiki.train.tokens, wiki.valid.tokens (it has wiki.test.raw, wiki.train.raw,",
    ),
    "empty text": (
        lambda path: make_archive(path, texts={**TEXTS, "valid": " \n"}),
        "has a wiki.valid.tokens that is empty",
    ),
    "another encoding": (
        lambda path: make_archive(path, texts={**TEXTS, "test": b"gut\nStra\xdfe\n"}),
        "has a wiki.test.tokens that is not UTF-8 (the first bad line is number 2)",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_archives_are_refused(tmp_path, stand_in, fault):
    check_bad_archive(WIKITEXT, *FAULTS[fault], tmp_path / "wikitext-103-v1.zip", stand_in)


# ---------------------------------------------------------------------- downloads


@pytest.fixture
def server(server, tmp_path):
    """The server, with the archive."""
    server.files["wikitext-103-v1.zip"] = make_archive(tmp_path / "served.zip").read_bytes()
    return server


@pytest.fixture
def mirrors(server) -> dict[str, str]:
    """Two addresses, as the recipe has them, of which the first has nothing."""
    gone = server.url.replace("raw", "gone")
    return {"WIKITEXT_URL": f"{gone}/wikitext-103-v1.zip {server.url}/wikitext-103-v1.zip"}


def test_the_next_mirror_is_tried(tmp_path, server, mirrors, downloader):
    out = tmp_path / "out"
    log = preprocess_log(**KNOWN["wikitext-103"])
    result = succeed(WIKITEXT, "--out", out, "--no-checksum", STAND_IN_LOG=log, **mirrors, **downloader)
    (warning,) = [line for line in result.stderr.splitlines() if line.startswith("WARNING")]
    first = mirrors["WIKITEXT_URL"].split()[0]
    assert warning == f"WARNING: could not download {first}: trying the next address"
    assert (out / "text" / "train.tokens").read_text() == TEXTS["train"]
    assert siblings(out) == ["out"]


def test_no_mirror_left(tmp_path, server, mirrors, stand_in):
    server.files.clear()
    message = fail(WIKITEXT, "--out", tmp_path / "out", **mirrors, **stand_in)
    addresses = mirrors["WIKITEXT_URL"].replace(" ", " or ")
    assert f"ERROR: could not download wikitext-103-v1.zip from {addresses}. " in message
    assert "Run the command again to resume, or use --archive FILE with an archive you already have" in message
    assert siblings(tmp_path / "out") == ["out.download"]


def test_default_addresses(tmp_path, no_network):
    message = fail(WIKITEXT, "--corpus", "wikitext-2", "--out", tmp_path / "out", **no_network)
    assert (
        "ERROR: could not download wikitext-2-v1.zip from https://wikitext.smerity.com/wikitext-2-v1.zip or "
        "https://s3.amazonaws.com/research.metamind.io/wikitext/wikitext-2-v1.zip. "
    ) in message


def test_a_download_is_resumed_from_its_own_mirror(tmp_path, server, mirrors, stand_in):
    arguments = [WIKITEXT, "--out", tmp_path / "out", "--no-checksum"]
    server.troubles["wikitext-103-v1.zip"] = "cut short"
    fail(*arguments, **mirrors, **stand_in)
    assert (tmp_path / "out.download" / "wikitext-103-v1.zip.part2").stat().st_size == 100
    server.troubles.clear()
    succeed(*arguments, **mirrors, **stand_in)
    assert server.requests[-1] == ("wikitext-103-v1.zip", "bytes=100-")


def test_unknown_downloads_are_refused(tmp_path, server, stand_in):
    out = tmp_path / "out"
    arguments = [WIKITEXT, "--out", out]
    address = {"WIKITEXT_URL": f"{server.url}/wikitext-103-v1.zip"}
    message = fail(*arguments, **address, **stand_in)
    assert "wikitext-103-v1.zip, as downloaded, is not the file this script knows, by its SHA-256" in message
    assert "--no-checksum accepts it" in message
    assert [path.name for path in (tmp_path / "out.download").iterdir()] == ["url"]
    succeed(*arguments, "--no-checksum", **address, **stand_in)
    assert siblings(out) == ["out"]


def test_a_web_page_is_called_so(tmp_path, server, stand_in):
    """Before the checksum says that it is not the file."""
    server.troubles["wikitext-103-v1.zip"] = "web page"
    url = f"{server.url}/wikitext-103-v1.zip"
    message = fail(WIKITEXT, "--url", url, "--out", tmp_path / "out", **stand_in)
    assert "wikitext-103-v1.zip, as downloaded, is a web page, not an archive" in message

