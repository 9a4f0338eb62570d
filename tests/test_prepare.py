"""scripts/prepare_*.sh, run as a user runs them: what they make, what they refuse, what is left when they are killed.

Texts and archives are made up, in the published layout; fairseq-preprocess is real.
"""

import gzip
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import cache, partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fork_server
import pytest
import sentencepiece
from conftest import ROOT, digest, environment, load_script, run

from multimax_fairseq.tools import UserError

SPLITS = {"train": "train", "valid": "val", "test": "test_2016_flickr"}  # fairseq's names, and Multi30k's
TEST_SETS = ("TED.dev2010", "TEDX.dev2012", "TED.tst2010", "TED.tst2011", "TED.tst2012")
WORDS = {  # umlauts, quotes, other white space, as the real text has them
    "de": "Ein Mädchen Hund läuft über große Straße „Halt“ – grün, rot. Nummer\xa028\x85am  Strand",
    "en": 'A girl dog runs across wide street "Stop" and - green, red. number 28 at the beach',
}

# Lines of train.tags in German and English, and of those that stay the tokens, as Moses' Perl scripts make them.
TRAINING = [
    (("<url>http://www.ted.com/talks/1</url>",) * 2, None),
    (("<keywords>talks, brain</keywords>",) * 2, None),
    (("<title>Al Gore: Die Klimakrise</title>", "<title>Al Gore on the climate crisis</title>"),
     ("al gore : die klimakrise", "al gore on the climate crisis")),
    (("Vielen Dank, Chris & Co. (Gelächter)", "Thank you, Chris & Co. (Laughter)"),
     ("vielen dank , chris &amp; co. ( gelächter )", "thank you , chris &amp; co . ( laughter )")),
    (("Zwei\u2028Zeilen, ein Satz", "Two lines,\x1d one sentence"),
     ("zwei zeilen , ein satz", "two lines , one sentence")),
    (("Ein <url> mitten im Satz", "A <url> inside of a sentence"), None),
    (("<description>Ein <b>Wort</b></description>",) * 2, ("ein &lt; b &gt; wort &lt; / b &gt;",) * 2),
    (("", "Nobody translated this."), None),
    (("Das hat niemand übersetzt.", " "), None),
    (("Ja.", "Yes, and much more than that."), None),
    *(((f"Satz Nummer {n} .", f"Sentence number {n}."), (f"satz nummer {n} .", f"sentence number {n} ."))
      for n in range(1, 47)),
]  # fmt: skip
TOKENS = [tokens for _, tokens in TRAINING if tokens]
SEGMENT = ("  Er sagte: »Nein«, usw.  ", "He said: “No”, it’s over.")  # of each test set
SEGMENT_TOKENS = ("er sagte : » nein « , usw .", "he said : “ no ” , it &apos;s over .")
WIKITEXT = {
    "train": " \n = The <unk> Cat = \n \n The cat @-@ like animal sat , and sat . \n" * 20,
    "valid": " \n = A Dog = \n The cat sat . \n",
    "test": " \n The animal sat \u2028 , and sat . \n \n",
}


# ---------------------------------------------------------------------- sources


def random_text(count, words):
    rng = random.Random(count)
    return "".join(" ".join(rng.choices(words.split(" "), k=rng.randint(3, 12))) + "\n" for _ in range(count))


def segments(name, text):
    return f'<mteval><srcset setid="{name}">\n<title>No segment</title>\n<seg id="1">{text}</seg>\n'


TAGS, XML, TOKENS_FILE = "de-en/train.tags.de-en.{}", "de-en/IWSLT14.{}.de-en.{}.xml", "wikitext-103/wiki.{}.tokens"
SOURCES = {  # of each recipe: what its source is called, its files, and options
    "multi30k": ("source", {f"{name}.{language}": random_text(count, words) for language, words in WORDS.items()
                            for name, count in zip(SPLITS.values(), (300, 20, 10))}, ["--vocab-size", 200]),
    "iwslt14": ("de-en.tgz", {
        **{TAGS.format(language): "".join(f"{pair[side]}\n" for pair, _ in TRAINING)
           for side, language in enumerate(WORDS)},
        **{XML.format(name, language): segments(name, SEGMENT[side]) for side, language in enumerate(WORDS)
           for name in TEST_SETS}}, ["--merges", 80]),
    "wikitext103": ("wikitext-103-v1.zip", {TOKENS_FILE.format(split): t for split, t in WIKITEXT.items()}, []),
    "text_lm": ("source", {f"{split}.tokens": text for split, text in WIKITEXT.items()}, ["--min-count", 2]),
}


def make(recipe, folder, changes=()):
    """The options for a source in a folder: a folder of .gz, a tar or a zip.

    Args:
        changes: name → text or bytes instead; None: not there; a path (in a tar): a link to there.
    """
    name, texts, options = SOURCES[recipe]
    source, is_archive = folder / name, "." in name
    inside = folder / "inside" if is_archive else source
    for file, content in (texts | dict(changes)).items():
        path = inside / (file if is_archive else f"{file}.gz")
        path.parent.mkdir(parents=True, exist_ok=True)
        content = content.encode() if isinstance(content, str) else content
        if isinstance(content, Path):
            path.symlink_to(content)
        elif content is not None:
            path.write_bytes(content if is_archive else gzip.compress(content))
    if is_archive:
        kind = {".tgz": "gztar", ".zip": "zip"}[source.suffix]
        Path(shutil.make_archive(str(source), kind, inside)).rename(source)
        shutil.rmtree(inside)
    return ["--from", source, *options]


# with a Python of its own for prepare.py, which is killed here and cleans up
SETTINGS = {"PYTHON": sys.executable, "NO_PROXY": "127.0.0.1", "MULTIMAX_DATA": ""}


def prepare(recipe, *arguments, check=True, **changes):
    script = ROOT / "scripts" / f"prepare_{recipe}.sh"
    return run("bash", script, *arguments, check=check, env={**SETTINGS, **changes})


def begin(recipe, *arguments, **kwargs):
    command = ["bash", ROOT / "scripts" / f"prepare_{recipe}.sh", *arguments]
    return subprocess.Popen([*map(str, command)], env=environment(fork_server.path()) | SETTINGS, **kwargs)


def refused(recipe, *arguments, **changes):
    """Run, expect one clear error, and return it."""
    result = prepare(recipe, *arguments, check=False, **changes)
    assert result.returncode in (1, 2) and result.stderr.count("ERROR: ") == 1, result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr


def lines_of(path):
    return path.read_text(encoding="utf-8").removesuffix("\n").split("\n")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """made(recipe) → its options, result and output of one run."""

    @cache
    def once(recipe):
        folder = tmp_path_factory.mktemp(recipe)
        arguments = make(recipe, folder)
        return arguments, folder / "out", prepare(recipe, *arguments, "--out", folder / "out")

    return once


# ---------------------------------------------------------------------- what is made


def test_multi30k_keeps_the_text_and_its_pieces_give_it_back(made, tmp_path):
    arguments, out, result = made("multi30k")
    model = sentencepiece.SentencePieceProcessor(model_file=str(out / "sentencepiece.bpe.model"))
    assert model.get_piece_size() == 200
    for split, name in SPLITS.items():
        for language in WORDS:
            raw = out / "raw" / f"{split}.{language}"
            assert raw.read_bytes() == SOURCES["multi30k"][1][f"{name}.{language}"].encode()
            pieces = lines_of(out / "text" / f"{split}.{language}")
            text = [" ".join(line.split()) for line in lines_of(raw)]
            assert [model.decode(line.split()) for line in pieces] == text
    assert "train: 300 sentence pairs; the published corpus has 29000" in result.stderr
    said = refused("multi30k", *arguments, "--vocab-size", 90000, "--out", tmp_path / "out")
    assert "cannot learn 90000 pieces from this text" in said and not list(tmp_path.iterdir())


def test_iwslt14_is_what_moses_and_subword_nmt_make(made, tmp_path):
    _, out, _ = made("iwslt14")
    kept = [pair for pair, tokens in TRAINING if tokens]
    expected = {"train": [t for i, t in enumerate(TOKENS, 1) if i % 23], "valid": TOKENS[22::23],
                "test": [SEGMENT_TOKENS] * 5}
    raw = {"train": [pair for i, pair in enumerate(kept, 1) if i % 23], "valid": kept[22::23]}
    for split, pairs in expected.items():
        for side, language in enumerate(("de", "en")):
            units = lines_of(out / "text" / f"{split}.{language}")
            assert [f"{line} ".replace("@@ ", "").strip() for line in units] == [pair[side] for pair in pairs]
            (tmp_path / "tokens").write_text("".join(f"{pair[side]}\n" for pair in pairs))
            again = run("subword-nmt", "apply-bpe", "-c", out / "bpe.codes", "-i", tmp_path / "tokens").stdout
            assert again.removesuffix("\n").split("\n") == units
            if split in raw:
                text = [re.sub("</?(title|description)>", "", pair[side]) for pair in raw[split]]
                assert lines_of(out / "raw" / f"{split}.{language}") == text
    assert lines_of(out / "raw" / "test.en")[0] == "He said: “No”, it's over."
    (tmp_path / "tokens").write_text("".join(f"{pair[side]}\n" for side in (0, 1) for pair in expected["train"]))
    learned = run("subword-nmt", "learn-bpe", "-s", 80, "-i", tmp_path / "tokens").stdout
    assert (out / "bpe.codes").read_text() == learned


@pytest.mark.parametrize("recipe", ["wikitext103", "text_lm"])
def test_the_text_of_language_models_is_unchanged(recipe, made):
    _, out, _ = made(recipe)
    for split, text in WIKITEXT.items():
        assert (out / "text" / f"{split}.tokens").read_bytes() == text.encode()


@pytest.mark.parametrize("recipe", SOURCES)
def test_fairseq_reads_every_line(recipe, made):
    _, out, _ = made(recipe)
    log = (out / "data-bin" / "preprocess.log").read_text()
    read = {name: int(number) for name, number in re.findall(r"text/(\S+): (\d+) sents", log)}
    assert read == {path.name: len(lines_of(path)) for path in (out / "text").iterdir()}
    if recipe == "wikitext103":
        assert "Dictionary: 16 types" in log


def test_the_published_counts_are_compared(made, tmp_path, capsys):
    _, _, result = made("wikitext103")
    assert "train: 380 tokens" in result.stdout and "the published corpus has 103227021" in result.stderr
    # what fairseq-preprocess logs of the published corpus
    log = "".join(f"text/{split}.tokens: 9 sents, {count} tokens\n"
                  for split, count in (("train", 103227021), ("valid", 217646), ("test", 245569)))
    (tmp_path / "preprocess.log").write_text(f"Dictionary: 267744 types\n{log}")
    load_script("prepare").tokens(tmp_path, "train=103227021", "valid=217646", "test=245569", "types=267744")
    assert not capsys.readouterr().err


def test_rare_words_and_a_text_without_unk(made, tmp_path):
    _, out, _ = made("text_lm")
    assert "like" in (out / "data-bin" / "dict.txt").read_text()
    assert "Dog" not in (out / "data-bin" / "dict.txt").read_text()
    make("text_lm", tmp_path, {"train.tokens": WIKITEXT["train"].replace("<unk>", "Big")})
    # $MULTIMAX_DATA/brown is the source if there is none
    (tmp_path / "source").rename(tmp_path / "brown")
    result = prepare("text_lm", "--out", tmp_path / "out", MULTIMAX_DATA=str(tmp_path))
    assert "has no <unk>, so new words cannot be scored" in result.stderr


# ---------------------------------------------------------------------- complete or absent


@pytest.mark.parametrize("recipe", SOURCES)
def test_a_second_run_does_nothing_and_another_setting_is_refused(recipe, made):
    arguments, out, _ = made(recipe)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert "already prepared" in prepare(recipe, *arguments, "--out", out).stdout
    _, _, options = SOURCES[recipe]
    other = [options[0], 7] if options else ["--corpus", "wikitext-2"]
    assert "was prepared with other settings" in refused(recipe, *arguments, *other, "--out", out)
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert sorted(path.name for path in out.parent.iterdir() if path.name.startswith("out")) == ["out"]


def test_what_is_there_is_not_lost(tmp_path):
    arguments, out = make("text_lm", tmp_path), tmp_path / "out"
    out.mkdir()
    (out / "thesis").write_text("years of work")
    assert "was not made by this script" in refused("text_lm", *arguments, "--out", out)
    (out / "thesis").rename(tmp_path / "thesis")  # an empty folder is as good as none
    prepare("text_lm", *arguments, "--out", out)
    for path, content, message in (
        (out / "text" / "valid.tokens", b"x", "are missing or not as they were made"),
        (out / ".complete", b"{", "is damaged"),
        (tmp_path / "source" / "valid.tokens.gz", gzip.compress(b"new"), "or another source"),
    ):
        before = path.read_bytes()
        path.write_bytes(content)
        assert message in refused("text_lm", *arguments, "--out", out) and path.read_bytes() == content
        path.write_bytes(before)


@pytest.mark.parametrize("recipe", ["multi30k", "iwslt14", "wikitext103"])
def test_killed_at_any_moment_it_is_absent_and_one_more_run_makes_the_same(recipe, made, tmp_path):
    arguments, whole, _ = made(recipe)
    rng, out = random.Random(recipe), tmp_path / "out"
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL):
        process = begin(recipe, *arguments, "--out", out, start_new_session=True, stdout=subprocess.DEVNULL,
                        stderr=subprocess.DEVNULL, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
        time.sleep(rng.uniform(0.2, 2))
        process.send_signal(number)
        status = process.wait()
        assert out.exists() == (status == 0)
        if number != signal.SIGKILL and status:
            assert status == 128 + number and not list(tmp_path.iterdir())
    prepare(recipe, *arguments, "--out", out)
    assert digest(out) == digest(whole) and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_at_once_make_it_once(made, tmp_path):
    arguments, whole, _ = made("wikitext103")
    both = [begin("wikitext103", *arguments, "--out", tmp_path / "out", stdout=subprocess.PIPE, text=True,
                  stderr=subprocess.DEVNULL) for _ in range(2)]
    said = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum("already prepared" in text for text in said) == sum("done: " in text for text in said) == 1
    assert digest(tmp_path / "out") == digest(whole)


# ---------------------------------------------------------------------- what is refused


# recipe; changes of its source's files, or the file that is cut short, or options without a source; what is said
@pytest.mark.parametrize("recipe, fault, message", [
    ("iwslt14", "", "is corrupt or cut short"),
    ("iwslt14", {TAGS.format("en"): None}, "lacks train.tags.de-en.en (it has IWSLT14."),
    ("iwslt14", {TAGS.format("en"): Path("/etc/passwd")}, "lacks train.tags.de-en.en"),
    ("iwslt14", {TAGS.format("de"): "gut\nStraße\n".encode("latin-1")}, "the first bad line is number 2"),
    ("iwslt14", {TAGS.format("de"): "Ein Satz.\n"}, "train.tags.de-en.*: 1 sentences of German and 53 of English"),
    ("iwslt14", {TAGS.format(language): "<url>\n" for language in WORDS}, "no training text is left to learn"),
    ("wikitext103", {TOKENS_FILE.format(split): None for split in SPLITS} | {"wikitext-103-raw/wiki.test.raw": "x"},
     "lacks wiki.train.tokens, wiki.valid.tokens, wiki.test.tokens (it has wiki.test.raw"),
    ("wikitext103", {TOKENS_FILE.format("valid"): " \n"}, "wiki.valid.tokens is empty"),
    ("multi30k", {"val.de": "more\n" * 21}, "valid: 21 lines of German and 20 of English"),
    ("multi30k", "train.de.gz", "is corrupt or cut short"),
    ("text_lm", ["--from", "nowhere"], "nowhere: No such file or directory"),
    ("text_lm", [], "--from PATH is required"),
    ("iwslt14", ["--archive", "a", "--url", "b"], "--url: not allowed with argument --from"),
    ("iwslt14", ["--archive", "a", "--merges", "1e3"], "'1e3' is not a whole number"),
    ("iwslt14", ["--url", "b"], "b: "),
    ("multi30k", ["--vocab", "200"], "--vocab"),
])  # fmt: skip
def test_a_wrong_option_or_source_is_an_error_in_a_line(recipe, fault, message, tmp_path):
    arguments = fault if isinstance(fault, list) else make(recipe, tmp_path, fault if isinstance(fault, dict) else ())
    if isinstance(fault, str):
        whole = arguments[1] / fault
        whole.write_bytes(whole.read_bytes()[:-300])
    before = sorted(tmp_path.rglob("*"))
    assert message in refused(recipe, *arguments, "--out", tmp_path / "a" / "out")
    assert sorted(path for path in tmp_path.rglob("*") if path != tmp_path / "a") == before


def test_what_is_not_installed_is_named(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="fairseq-preprocess was not found"):
        load_script("prepare").need_commands("demo")


# ---------------------------------------------------------------------- downloads


class Handler(SimpleHTTPRequestHandler):
    def copyfile(self, source, outputfile):
        outputfile.write(source.read()[: self.server.most])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path_factory):
    """Of the files in its `folder`, at most `most` bytes of each."""
    folder = tmp_path_factory.mktemp("server")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder)) as server:
        server.folder, server.most, server.url = folder, None, f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_downloads(server, made, tmp_path):
    """What is made of a download is what is made of the same files at hand."""
    arguments, whole, _ = made("iwslt14")
    shutil.copy(arguments[1], server.folder)
    out, options = tmp_path / "out", ["--out", tmp_path / "out", "--merges", 80]
    server.most = 1000  # then the connection ends
    assert "could not download" in refused("iwslt14", "--url", f"{server.url}/de-en.tgz", *options)
    server.most = None
    addresses = f"{server.url}/none.tgz {server.url}/de-en.tgz"  # the first has not got it
    assert "WARNING: could not download" in prepare("iwslt14", "--url", addresses, *options).stderr
    assert digest(out) == digest(whole) and [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("recipe, name, content, message", [
    ("multi30k", "train.de.gz", gzip.compress(b"Ein Hund\n"), "is not the text that this script knows"),
    ("multi30k", "train.de.gz", gzip.compress(b"Ein Hund\n")[:-9], "is corrupt or cut short"),
    ("wikitext103", "wikitext-103-v1.zip", b"PK", "SHA256 hash of downloaded file"),
], ids=["another text", "cut short", "another archive"])  # the bytes of gzip hold the second they are made in
def test_an_unknown_download_is_refused(recipe, name, content, message, server, tmp_path):
    (server.folder / name).write_bytes(content)
    url = server.url if recipe == "multi30k" else f"{server.url}/{name}"
    assert message in refused(recipe, "--url", url, "--out", tmp_path / "out") and not list(tmp_path.iterdir())


# ---------------------------------------------------------------------- real data


@pytest.mark.slow
@pytest.mark.skipif("MULTIMAX_DATA" not in os.environ, reason="needs MULTIMAX_DATA")
@pytest.mark.parametrize("recipe, options, dictionary, types", [
    ("multi30k", [], "dict.de.txt", 5900),
    ("text_lm", ["--min-count", 5], "dict.txt", 14108),  # README: 14,112 with fairseq's four
])
def test_real_data(recipe, options, dictionary, types, tmp_path):
    result = prepare(recipe, "--out", tmp_path / "out", *options, MULTIMAX_DATA=os.environ["MULTIMAX_DATA"])
    assert "WARNING" not in result.stderr  # counts agree with those published; Brown has no <unk> of its own
    assert len((tmp_path / "out" / "data-bin" / dictionary).read_text().splitlines()) == types
