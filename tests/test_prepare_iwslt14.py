"""scripts/prepare_iwslt14.sh, run as a user runs it, on an archive made by hand in the published layout."""

from __future__ import annotations

import fcntl
import io
import os
import random
import struct
import subprocess
import sys
import tarfile
import termios
from pathlib import Path

import pytest
from recipes import (
    IWSLT14,
    Prepared,
    check_bad_archive,
    check_second_run,
    clear_error,
    environment,
    fail,
    fairseq_task,
    lines_of,
    on_small_disk,
    reached,
    siblings,
    started,
    stop,
    succeed,
    wait_for,
)

pytest.importorskip("sacremoses")
pytest.importorskip("subword_nmt")

LANGUAGES = ("de", "en")
TEST_SETS = ("TED.dev2010", "TEDX.dev2012", "TED.tst2010", "TED.tst2011", "TED.tst2012")

HEADER = ("<url>http://www.ted.com/talks/1</url>", "<keywords>talks, brain</keywords>", "<talkid>1</talkid>")

# Lines of train.tags in German and English, and of those that stay the tokens, as Moses' Perl scripts make them;
# more of both in test_iwslt14_text.py.
TRAINING = [
    ((HEADER[0], HEADER[0]), None),
    ((HEADER[1], HEADER[1]), None),
    ((HEADER[2], HEADER[2]), None),
    (("<title>Al Gore: Die Klimakrise</title>", "<title>Al Gore on the climate crisis</title>"),
     ("al gore : die klimakrise", "al gore on the climate crisis")),
    (("<description>TED-Talk: „Mit Humor …“</description>", "<description>TED Talk: \"With humor...\"</description>"),
     ("ted-talk : „ mit humor … “", "ted talk : &quot; with humor ... &quot;")),
    (("Vielen Dank, Chris & Co. (Gelächter)", "Thank you, Chris & Co. (Laughter)"),
     ("vielen dank , chris &amp; co. ( gelächter )", "thank you , chris &amp; co . ( laughter )")),
    (("[Musik] <i>Wie geht's?</i>", "[Music] <i>How's it going?</i>"),
     ("&#91; musik &#93; &lt; i &gt; wie geht &apos; s ? &lt; / i &gt;",
      "&#91; music &#93; &lt; i &gt; how &apos;s it going ? &lt; / i &gt;")),
    (("", "Nobody translated this."), None),
    (("Das hat niemand übersetzt.", " "), None),
    (("", ""), None),
    (("Ja.", "Yes, and much more than that."), None),
    *(((f"Satz Nummer {n} .", f"Sentence number {n}."), (f"satz nummer {n} .", f"sentence number {n} ."))
      for n in range(1, 46)),
]  # fmt: skip

# Segments, apostrophes as typographers set them, and their tokens.
TEST = [
    (("  Er sagte: »Nein«, usw.  ", "He said: “No”, it’s over."),
     ("er sagte : » nein « , usw .", "he said : “ no ” , it &apos;s over .")),
    (("In {} fehlt nichts.", "Nothing is missing in {}."), ("in {} fehlt nichts .", "nothing is missing in {} .")),
]  # fmt: skip

TRAINING_TOKENS = [tokens for _, tokens in TRAINING if tokens]
TEST_NAMES = ("dev-2010", "dev-2012", "tst-2010", "tst-2011", "tst-2012")


def texts() -> dict[str, str]:
    """The archive's files by name."""
    made = {}
    for side, language in enumerate(LANGUAGES):
        made[f"train.tags.de-en.{language}"] = "".join(f"{pair[side]}\n" for pair, _ in TRAINING)
        for name, year in zip(TEST_SETS, TEST_NAMES, strict=True):
            segments = [pair[side].format(year) for pair, _ in TEST]
            lines = [
                '<?xml version="1.0" encoding="UTF-8"?>',
                f'<mteval><srcset setid="{name}" srclang="German">',
                '<doc docid="69" genre="lectures">',
                *HEADER,
                "<title>This is no segment</title>",
                *(f'<seg id="{number}">{segment}</seg>' for number, segment in enumerate(segments, start=1)),
                "</doc></srcset></mteval>",
            ]
            made[f"IWSLT14.{name}.de-en.{language}.xml"] = "".join(f"{line}\n" for line in lines)
    return made


def make_archive(path: Path, changes: dict[str, str | bytes | None] | None = None, extra=()) -> Path:
    """de-en.tgz with `changes` to the files (None: left out), after the members `extra`."""
    contents = {name: text for name, text in {**texts(), **(changes or {})}.items() if text is not None}
    with tarfile.open(path, "w:gz") as archive:
        for info in [*extra, tarfile.TarInfo("de-en/README")]:
            archive.addfile(info)
        for name, text in contents.items():
            content = text if isinstance(text, bytes) else text.encode()
            info = tarfile.TarInfo(f"de-en/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def without_bpe(path: Path) -> list[str]:
    return [f"{line} ".replace("@@ ", "").strip() for line in lines_of(path)]


# ---------------------------------------------------------------------- what is made


@pytest.fixture(scope="module")
def iwslt14(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """Archive, result and output of one real run."""
    folder = tmp_path_factory.mktemp("iwslt14")
    archive = make_archive(folder / "de-en.tgz")
    out = folder / "parent" / "out"
    return archive, out, succeed(IWSLT14, "--archive", archive, "--out", out, "--merges", 80)


def expected_tokens(split: str, side: int) -> list[str]:
    if split == "test":
        return [tokens[side].format(year) for year in TEST_NAMES for _, tokens in TEST]
    valid = [tokens[side] for tokens in TRAINING_TOKENS[22::23]]
    return valid if split == "valid" else [t[side] for i, t in enumerate(TRAINING_TOKENS, start=1) if i % 23]


@pytest.mark.parametrize("split", ["train", "valid", "test"])
@pytest.mark.parametrize("side", [0, 1], ids=LANGUAGES)
def test_text_is_what_moses_makes(iwslt14, split, side):
    path = iwslt14[1] / "text" / f"{split}.{LANGUAGES[side]}"
    assert without_bpe(path) == expected_tokens(split, side)


def test_pairs_are_counted(iwslt14):
    """49 pairs stay: 2 for validation (the 23rd and the 46th), 47 for training; 2 segments in each of 5 test sets."""
    _, _, result = iwslt14
    assert "sentence pairs: 47 train, 2 valid, 10 test (published: 160239, 7283, 6750)" in result.stdout
    for split, found, known in (("train", 47, 160239), ("valid", 2, 7283), ("test", 10, 6750)):
        assert f"WARNING: {split}: {found} sentence pairs, the published IWSLT'14 has {known}" in result.stderr


def test_raw_text_is_line_for_line_the_same_sentences(iwslt14):
    _, out, _ = iwslt14
    assert lines_of(out / "raw" / "test.en")[:2] == ["He said: “No”, it's over.", "Nothing is missing in dev-2010."]
    assert lines_of(out / "raw" / "train.de")[:2] == ["Al Gore: Die Klimakrise", "TED-Talk: „Mit Humor …“"]
    for split in ("train", "valid", "test"):
        for language in LANGUAGES:
            raw = lines_of(out / "raw" / f"{split}.{language}")
            tokens = without_bpe(out / "text" / f"{split}.{language}")
            assert len(raw) == len(tokens)
            # The words of both, without what tokenisation puts between and escapes.
            for line, tokenised in zip(raw, tokens, strict=True):
                letters = [c for c in line.lower() if c.isalnum()]
                for escape in ("&quot;", "&apos;", "&amp;", "&#124;", "&lt;", "&gt;", "&#91;", "&#93;"):
                    tokenised = tokenised.replace(escape, "")
                assert letters == [c for c in tokenised if c.isalnum()]


def test_subwords_are_those_of_the_subword_nmt_command(iwslt14, tmp_path):
    """Learned on the training text, German first, then English; applied to all."""
    _, out, _ = iwslt14

    def subword_nmt(lines: list[str], *arguments: object) -> bytes:
        command = [Path(sys.executable).parent / "subword-nmt", *map(str, arguments)]
        text = "".join(f"{line}\n" for line in lines).encode()
        return subprocess.run(command, input=text, capture_output=True, check=True).stdout

    training = [line for language in LANGUAGES for line in without_bpe(out / "text" / f"train.{language}")]
    codes = subword_nmt(training, "learn-bpe", "-s", 80)
    assert (out / "bpe.codes").read_bytes() == codes
    assert codes.count(b"\n") == 81  # a version line first

    pieces = subword_nmt(without_bpe(out / "text" / "test.de"), "apply-bpe", "-c", out / "bpe.codes")
    assert (out / "text" / "test.de").read_bytes() == pieces
    assert b"@@ " in pieces


def test_data_bin_is_what_fairseq_trains_on(iwslt14):
    _, out, _ = iwslt14
    task = fairseq_task("translation", out)
    assert task.source_dictionary != task.target_dictionary  # one for each language, as in fairseq's recipe
    for split in ("train", "valid", "test"):
        task.load_dataset(split)
        dataset = task.dataset(split)
        for side, dictionary, language in (
            ("source", task.source_dictionary, "de"),
            ("target", task.target_dictionary, "en"),
        ):
            lines = lines_of(out / "text" / f"{split}.{language}")
            assert len(dataset) == len(lines)
            for index, line in enumerate(lines):
                known = [word if word in dictionary else "<unk>" for word in line.split()]
                assert dictionary.string(dataset[index][side]) == " ".join(known)


def test_layout_and_second_run(iwslt14):
    archive, out, _ = iwslt14
    assert sorted(path.name for path in out.iterdir()) == [".complete", "bpe.codes", "data-bin", "raw", "text"]
    assert siblings(out) == ["out"]
    command = [IWSLT14, "--archive", archive, "--out", out, "--merges", 80]
    check_second_run(command, ["--merges", 10000], "there: merges=80; asked for: merges=10000")


def test_progress_is_shown_on_a_terminal_only(iwslt14, tmp_path, stand_in):
    assert "tokenising:" not in iwslt14[2].stdout + iwslt14[2].stderr
    terminal, inside = os.openpty()
    fcntl.ioctl(inside, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    command = [str(IWSLT14), "--archive", str(iwslt14[0]), "--out", str(tmp_path / "out"), "--merges", "10"]
    subprocess.run(command, env=environment(**stand_in), stdout=subprocess.DEVNULL, stderr=inside, check=True)
    os.close(inside)
    shown = b""
    try:
        while block := os.read(terminal, 4096):
            shown += block
    except OSError:  # how a terminal ends on Linux
        pass
    os.close(terminal)
    assert b"tokenising: 100%" in shown and b"10/10 " in shown and b"subwords of train.de: 47 lines" in shown


@pytest.mark.parametrize("module", ["sacremoses", "subword_nmt"])
def test_missing_modules_are_named(tmp_path, module):
    (tmp_path / f"{module}.py").write_text("raise ImportError\n")
    archive = make_archive(tmp_path / "de-en.tgz")
    message = fail(IWSLT14, "--archive", archive, "--out", tmp_path / "out", PYTHONPATH=str(tmp_path))
    assert f"the Python module '{module}' cannot be imported: " in message and f"pip install {module}" in message
    assert siblings(tmp_path / "out") == []


# ---------------------------------------------------------------------- bad archives


# That of a file that is there, and by the shell, by unpack.py and by its list of files; more in test_unpack.py.
FAULTS = {
    "cut short": (lambda path: path.write_bytes(make_archive(path).read_bytes()[:-300]), "is corrupt or cut short"),
    "web page": (lambda path: path.write_text("\n<!DOCTYPE html><html>"), "is a web page, not an archive"),
    "a file less": (
        lambda path: make_archive(path, {"train.tags.de-en.en": None}),
        "lacks train.tags.de-en.en (it has IWSLT14.",
    ),
    "path upwards": (
        lambda path: make_archive(path, extra=[tarfile.TarInfo("de-en/../../thesis.tex")]),
        "is not safe to unpack: 'de-en/../../thesis.tex' leads out of its folder",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_archives_are_refused(tmp_path, stand_in, fault):
    (tmp_path / "thesis.tex").write_text("years of work")
    check_bad_archive(IWSLT14, *FAULTS[fault], tmp_path / "de-en.tgz", stand_in)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_an_archive_that_unpacks_to_too_much_is_refused(tmp_path, stand_in):
    archive = make_archive(tmp_path / "de-en.tgz", {"zeros": bytes(10_000_000)})
    assert archive.stat().st_size < 30_000
    arguments = [IWSLT14, "--archive", archive, "--out", tmp_path / "out"]
    message = fail(*arguments, UNPACK_LIMIT="10000000", **stand_in)
    assert f"ERROR: {archive} unpacks to more than 10000000 bytes" in message
    assert siblings(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"train.tags.de-en.de": "Straße\n".encode("latin-1")}, "train.tags.de-en.de is not UTF-8 (the first bad"),
        ({"train.tags.de-en.de": "Ein Satz.\n"}, "train.tags.de-en: more sentences in English than the other"),
        ({"IWSLT14.TED.tst2011.de-en.en.xml": "<doc>\n"}, "IWSLT14.TED.tst2011.de-en: more sentences in German than"),
        ({f"train.tags.de-en.{language}": "\n" for language in LANGUAGES}, "no training text is left"),
    ],
    ids=["not UTF-8", "uneven training", "uneven test", "no text"],
)
def test_bad_text_is_refused(tmp_path, stand_in, changes, expected):
    archive = make_archive(tmp_path / "de-en.tgz", changes)
    message = fail(IWSLT14, "--archive", archive, "--out", tmp_path / "out", **stand_in)
    assert expected in message and "the preparation of the text failed" in message
    assert siblings(tmp_path / "out") == []
    assert not reached(tmp_path).exists()


@pytest.mark.parametrize("split", ["valid", "test"])
def test_a_split_without_a_pair_is_an_error(split, tmp_path, stand_in):
    """Of the training text every 23rd pair is for validation."""
    changes = {f"IWSLT14.{name}.de-en.{language}.xml": "<mteval>\n" for name in TEST_SETS for language in LANGUAGES}
    if split == "valid":
        changes = {f"train.tags.de-en.{language}": "Ja .\n" * 9 for language in LANGUAGES}
    archive = make_archive(tmp_path / "de-en.tgz", changes)
    message = fail(IWSLT14, "--archive", archive, "--out", tmp_path / "out", "--merges", 5, **stand_in)
    assert f"ERROR: no sentence pair is left for {split}: de-en.tgz has too little text" in message
    assert siblings(tmp_path / "out") == [] and not reached(tmp_path).exists()


# ---------------------------------------------------------------------- downloads


@pytest.fixture
def server(server, tmp_path):
    """The server, with the archive."""
    server.files["de-en.tgz"] = make_archive(tmp_path / "served.tgz").read_bytes()
    return server


def test_download(tmp_path, server, downloader):
    out = tmp_path / "out"
    url = f"{server.url}/de-en.tgz"
    server.troubles["de-en.tgz"] = "slow"
    succeed(IWSLT14, "--url", url, "--out", out, **downloader)
    assert without_bpe(out / "text" / "test.de") == expected_tokens("test", 0)
    assert siblings(out) == ["out"]
    assert "already prepared" in succeed(IWSLT14, "--out", out, IWSLT14_URL=url, **downloader).stdout
    assert len(server.requests) == 1


def test_default_address(tmp_path, no_network):
    message = fail(IWSLT14, "--out", tmp_path / "out", **no_network)
    assert "de-en.tgz from http://dl.fbaipublicfiles.com/fairseq/data/iwslt14/de-en.tgz. " in message


@pytest.mark.parametrize(("trouble", "expected"), [
    ("web page", "is a web page, not an archive"),
    ("wrong file", "lacks IWSLT14."),
    ("half a file", "is corrupt or cut short"),
])  # fmt: skip
def test_bad_download(tmp_path, server, stand_in, trouble, expected):
    """An error that says what to do; the same command completes once the trouble is over."""
    good = server.files["de-en.tgz"]
    if trouble == "wrong file":
        make_archive(tmp_path / "wrong.tgz", dict.fromkeys(texts()))
        server.files["de-en.tgz"] = (tmp_path / "wrong.tgz").read_bytes()
    elif trouble == "half a file":  # of which the server says that it is whole
        server.files["de-en.tgz"] = good[: len(good) // 2]
    else:
        server.troubles["de-en.tgz"] = trouble
    out = tmp_path / "out"
    arguments = [IWSLT14, "--url", f"{server.url}/de-en.tgz", "--out", out]
    message = fail(*arguments, **stand_in)
    assert f"de-en.tgz, as downloaded, {expected}" in message and "--archive FILE" in message
    assert siblings(out) == ["out.download"]
    assert [path.name for path in (tmp_path / "out.download").iterdir()] == ["url"]

    server.files["de-en.tgz"] = good
    server.troubles.clear()
    server.requests.clear()
    succeed(*arguments, **stand_in)
    assert server.requests == [("de-en.tgz", None)]
    assert siblings(out) == ["out"]


@pytest.mark.slow
def test_a_stalled_download_ends_and_can_be_resumed(tmp_path, server, downloader):
    server.troubles["de-en.tgz"] = "stalled"
    out = tmp_path / "out"
    arguments = [IWSLT14, "--url", f"{server.url}/de-en.tgz", "--out", out]
    message = fail(*arguments, STALL_SECONDS="1", **downloader)
    assert "could not download" in message and "Run the command again to resume" in message
    half = (tmp_path / "out.download" / "de-en.tgz.part1").stat().st_size
    assert half == len(server.files["de-en.tgz"]) // 2
    server.troubles.clear()
    succeed(*arguments, **downloader)
    assert server.requests[-1] == ("de-en.tgz", f"bytes={half}-")


@pytest.mark.parametrize(("how", "status"), [("Ctrl-C", 130), ("SIGTERM", 143)])
def test_an_interrupted_download_can_be_resumed(tmp_path, server, stand_in, how, status):
    noise = random.Random(1).randbytes(300_000)  # more than a download program keeps to itself before it writes
    server.files["de-en.tgz"] = make_archive(tmp_path / "larger.tgz", {"noise": noise}).read_bytes()
    server.troubles["de-en.tgz"] = "stalled"
    out = tmp_path / "out"
    arguments = [IWSLT14, "--url", f"{server.url}/de-en.tgz", "--out", out]
    part = tmp_path / "out.download" / "de-en.tgz.part1"
    with started(*arguments, **stand_in) as process:
        wait_for(lambda: part.exists() and part.stat().st_size > 0)
        assert stop(process, how) == status
    assert siblings(out) == ["out.download"]
    size = part.stat().st_size
    server.troubles.clear()
    succeed(*arguments, **stand_in)
    assert server.requests[-1] == ("de-en.tgz", f"bytes={size}-")
    assert siblings(out) == ["out"]


# ---------------------------------------------------------------------- kills and full disks


def test_a_full_disk_is_named(tmp_path, stand_in):
    """Full while unpacking, and in the work on the text; nothing is left in either case."""
    disk = tmp_path / "disk"
    long = "".join(f"Satz Nummer {number}.\n" for number in range(20000))  # 0.4 MB
    changes = {f"train.tags.de-en.{language}": long for language in LANGUAGES}
    archive = make_archive(tmp_path / "de-en.tgz", changes)
    for size, expected in (
        ("600k", f"could not unpack {archive}: "),
        ("1500k", "the preparation of the text failed"),
    ):
        arguments = ["--archive", archive, "--out", disk / "out"]
        result, left = on_small_disk(disk, size, IWSLT14, *arguments, **stand_in)
        message = clear_error(result)
        assert expected in message and "The disk is full (" in message and "make room" in message
        assert size != "600k" or "No space left on device" in message
        assert left == []
        disk.rmdir()


def test_a_disk_that_is_full_while_downloading_keeps_the_part(tmp_path, server, stand_in):
    server.files["de-en.tgz"] = bytes(3_000_000)
    disk = tmp_path / "disk"
    arguments = ["--url", f"{server.url}/de-en.tgz", "--out", disk / "out"]
    result, left = on_small_disk(disk, "1m", IWSLT14, *arguments, **stand_in)
    message = clear_error(result)
    assert "could not download" in message and "The disk is full (" in message
    assert left == ["out.download", "out.download/de-en.tgz.part1", "out.download/url"]


def test_a_killed_run_is_mentioned(tmp_path, stand_in):
    out = tmp_path / "out"
    arguments = [IWSLT14, "--archive", make_archive(tmp_path / "de-en.tgz"), "--out", out]
    with started(*arguments, STAND_IN_SECONDS="120", **stand_in) as process:
        wait_for(reached(tmp_path).exists)
        process.kill()
        process.communicate()
    (left,) = [name for name in siblings(out) if name.startswith("out.partial.")]
    result = succeed(*arguments, **stand_in)
    assert f"WARNING: {tmp_path / left} is there: " in result.stderr
    assert siblings(out) == ["out", left]
