"""scripts/prepare_multi30k.sh and prepare_text_lm.sh, and what all recipes share, run as a user runs them.

Where a test looks at the data, everything is real. Where it looks at errors, interruptions or
downloads, a stand-in for fairseq-preprocess is first on PATH: it is quick, it can be interrupted
at a known point, and it leaves a trace, so that a test can tell that it was never reached.
"""

from __future__ import annotations

import gzip
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterable
from pathlib import Path

import pytest
import sentencepiece
from recipes import (
    IWSLT14,
    MULTI30K,
    SCRIPTS,
    TEXT_LM,
    WIKITEXT,
    Prepared,
    Server,
    check_second_run,
    clear_error,
    environment,
    fail,
    fairseq_task,
    interrupt,
    lines_of,
    on_small_disk,
    path_without,
    reached,
    siblings,
    snapshot,
    started,
    succeed,
    wait_for,
)

BPE = SCRIPTS / "sentencepiece_bpe.py"
RECIPES = (MULTI30K, TEXT_LM, IWSLT14, WIKITEXT)

# fairseq's name for a split, and Multi30k's.
SPLITS = {"train": "train", "valid": "val", "test": "test_2016_flickr"}
PAIRS = {"train": 300, "valid": 20, "test": 10}
ARCHIVES = [f"{name}.{language}.gz" for name in SPLITS.values() for language in ("de", "en")]

# Upper case, umlauts, quotes, punctuation; no-break and double spaces, as the real text has them.
WORDS = {
    "de": "Ein Mädchen Hund läuft über große Straße „Halt“ – grün, rot. Nummer\xa028 am  Strand",
    "en": 'A girl dog runs across wide street "Stop" and - green, red. number 28 at the beach',
}

# ---------------------------------------------------------------------- helpers


def normalised(line: str) -> str:
    return " ".join(line.split())


def write(path: Path, lines: Iterable[str], compress: bool) -> None:
    text = "".join(f"{line}\n" for line in lines).encode()
    if compress:
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(text))
    else:
        path.write_bytes(text)


def make_multi30k(folder: Path, compress: bool = True) -> Path:
    """The six files of Multi30k with made-up sentences."""
    rng = random.Random(1)
    folder.mkdir(parents=True)
    for split, name in SPLITS.items():
        for language, words in WORDS.items():
            sentences = (" ".join(rng.choices(words.split(" "), k=rng.randint(3, 12))) for _ in range(PAIRS[split]))
            write(folder / f"{name}.{language}", sentences, compress)
    return folder


def make_tokens(folder: Path, prefix: str = "", compress: bool = False) -> Path:
    """Language-model text: some words rare, some only in the test split, empty lines between."""
    rng = random.Random(2)
    folder.mkdir(parents=True)
    for split, number in PAIRS.items():
        words = [f"w{rank}" for rank in range(40)] + ["<unk>", "Straße"]
        paragraphs = [" ".join(rng.choices(words, k=rng.randint(1, 30))) for _ in range(number)]
        paragraphs[0] = f" = only-in-{split} = \n"
        write(folder / f"{prefix}{split}.tokens", paragraphs, compress)
    return folder


# ---------------------------------------------------------------------- what is made: Multi30k


@pytest.fixture(scope="module")
def multi30k(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """Source, result and output of one real run."""
    folder = tmp_path_factory.mktemp("multi30k")
    source = make_multi30k(folder / "source")
    out = folder / "parent" / "out"
    result = succeed(MULTI30K, "--from", source, "--out", out, "--vocab-size", 200)
    return source, out, result


def test_multi30k_keeps_the_raw_text(multi30k):
    source, out, _ = multi30k
    for split, name in SPLITS.items():
        for language in WORDS:
            original = gzip.decompress((source / f"{name}.{language}.gz").read_bytes())
            assert (out / "raw" / f"{split}.{language}").read_bytes() == original


def test_multi30k_pieces_decode_to_the_raw_text(multi30k):
    _, out, _ = multi30k
    for split in SPLITS:
        for language in WORDS:
            pieces = out / "text" / f"{split}.{language}"
            decoded = subprocess.run(
                [sys.executable, BPE, "decode", "--model", out / "sentencepiece.bpe.model"],
                input=pieces.read_bytes(),
                stdout=subprocess.PIPE,
                check=True,
            ).stdout.decode()
            raw = lines_of(out / "raw" / f"{split}.{language}")
            assert decoded.removesuffix("\n").split("\n") == [normalised(line) for line in raw]
            assert lines_of(pieces) != raw


def test_multi30k_data_bin_is_what_fairseq_trains_on(multi30k):
    _, out, _ = multi30k
    task = fairseq_task("translation", out)
    assert task.source_dictionary == task.target_dictionary

    for split in SPLITS:
        task.load_dataset(split)
        dataset = task.dataset(split)
        assert len(dataset) == PAIRS[split]
        for side, language in (("source", "de"), ("target", "en")):
            raw = lines_of(out / "raw" / f"{split}.{language}")
            for index in range(len(dataset)):
                line = task.source_dictionary.string(dataset[index][side], "sentencepiece")
                assert line == normalised(raw[index])


def test_multi30k_says_what_it_made_and_leaves_nothing_beside_it(multi30k):
    _, out, result = multi30k
    for split, known in (("train", 29000), ("valid", 1014), ("test", 1000)):
        assert f"{split}: {PAIRS[split]} sentence pairs, the published Multi30k has {known}" in result.stderr
    assert "SHA-256" in result.stderr and "test_2016_flickr.en" in result.stderr
    assert "text/train.de: 300 sents" in result.stdout and "0.0% replaced" in result.stdout
    assert siblings(out) == ["out"] and not (out / "run.log").exists()
    assert len(sentencepiece.SentencePieceProcessor(model_file=str(out / "sentencepiece.bpe.model"))) == 200


def test_multi30k_result_depends_on_the_text_alone(multi30k, tmp_path):
    """Another folder, plain files instead of .gz, one process instead of two: the same bytes."""
    _, out, _ = multi30k
    plain = make_multi30k(tmp_path / "plain", compress=False)
    other = tmp_path / "other"
    succeed(MULTI30K, f"--from={plain}", f"--out={other}", "--vocab-size=200", "--workers=1")
    first, second = snapshot(out), snapshot(other)
    assert first.keys() == second.keys()
    differing = {name for name in first if first[name][1] != second[name][1]}
    # These two name the source and the options.
    assert differing == {".complete", "data-bin/preprocess.log"}


def test_multi30k_second_run_and_other_settings(multi30k):
    source, out, _ = multi30k
    check_second_run(
        [MULTI30K, "--from", source, "--out", out, "--vocab-size", 200],
        ["--vocab-size", 150],
        "there: vocab-size=200; asked for: vocab-size=150",
    )


# ---------------------------------------------------------------------- what is made: text_lm


@pytest.fixture(scope="module")
def text_lm(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    folder = tmp_path_factory.mktemp("text_lm")
    source = make_tokens(folder / "source")
    out = folder / "out"
    return source, out, succeed(TEXT_LM, "--from", source, "--out", out)


def test_text_lm_keeps_the_text(text_lm):
    source, out, _ = text_lm
    for split in PAIRS:
        name = f"{split}.tokens"
        assert (out / "text" / name).read_bytes() == (source / name).read_bytes()


def test_text_lm_data_bin_is_what_fairseq_trains_on(text_lm):
    """One stream of tokens, cut into blocks; words that the training text lacks are unknown."""
    _, out, _ = text_lm
    task = fairseq_task("language_modeling", out, "--tokens-per-sample", "32")
    for split in PAIRS:
        task.load_dataset(split)
        blocks = [task.dataset(split)[index]["target"] for index in range(len(task.dataset(split)))]
        assert max(map(len, blocks)) == 32 and (split != "train" or len(blocks) > 10)
        stream = " ".join(task.source_dictionary.string(block, include_eos=True) for block in blocks)
        text = "".join(f"{line} </s> " for line in lines_of(out / "text" / f"{split}.tokens"))
        unknown = "" if split == "train" else f"only-in-{split}"
        assert stream.split() == ["<unk>" if word == unknown else word for word in text.split()]


def test_text_lm_min_count_and_max_vocab(text_lm, tmp_path):
    """Thresholds, and the names and compression of WikiText's files."""
    source = make_tokens(tmp_path / "source", prefix="wiki.", compress=True)
    all_words = fairseq_task("language_modeling", text_lm[1]).source_dictionary
    assert "only-in-train" in all_words and "only-in-test" not in all_words

    succeed(TEXT_LM, "--from", source, "--out", tmp_path / "count", "--min-count", 2)
    frequent = fairseq_task("language_modeling", tmp_path / "count").source_dictionary
    assert "only-in-train" not in frequent and "w7" in frequent

    succeed(TEXT_LM, "--from", source, "--out", tmp_path / "vocab", "--max-vocab", 12)
    few = fairseq_task("language_modeling", tmp_path / "vocab").source_dictionary
    words = [word for word in few.symbols[few.nspecial :] if not word.startswith("madeupword")]
    assert len(words) == 12 - few.nspecial
    assert len(few) == 16  # fairseq fills up to a multiple of 8


def test_text_lm_second_run_and_other_settings(text_lm):
    source, out, _ = text_lm
    command = [TEXT_LM, "--from", source, "--out", out]
    check_second_run(command, ["--min-count", 3], "there: min-count=0; asked for: min-count=3")


def test_text_lm_warns_if_unknown_words_cannot_be_learned(text_lm, tmp_path, stand_in):
    assert "WARNING" not in text_lm[2].stderr  # its training text has <unk>
    source = make_tokens(tmp_path / "source")
    train = source / "train.tokens"
    train.write_text(train.read_text().replace("<unk>", "known"))
    result = succeed(TEXT_LM, "--from", source, "--out", tmp_path / "all", **stand_in)
    assert "--min-count 2" in result.stderr
    result = succeed(TEXT_LM, "--from", source, "--out", tmp_path / "two", "--min-count=2", **stand_in)
    assert result.stderr == ""


# ---------------------------------------------------------------------- where the source comes from


def test_multimax_data_is_the_default_source(tmp_path, stand_in):
    make_multi30k(tmp_path / "data" / "multi30k")
    make_tokens(tmp_path / "data" / "brown")
    changes = {**stand_in, "MULTIMAX_DATA": str(tmp_path / "data")}
    result = succeed(MULTI30K, "--out", tmp_path / "translation", "--vocab-size", 200, **changes)
    assert f"using {tmp_path}/data/multi30k (from MULTIMAX_DATA)" in result.stdout.splitlines()
    result = succeed(TEXT_LM, "--out", tmp_path / "lm", **changes)
    assert f"using {tmp_path}/data/brown (from MULTIMAX_DATA)" in result.stdout.splitlines()


@pytest.mark.parametrize(("script", "arguments", "message"), [
    *((script, [], "--out DIR is required") for script in RECIPES),
    *((script, ["--nonsense", "x"], "unknown option '--nonsense'") for script in RECIPES),
    (MULTI30K, [""], "unknown option ''"),
    (MULTI30K, ["--out"], "--out needs a value"),
    (MULTI30K, ["--out", "--force"], "--out needs a value"),
    (MULTI30K, ["--out", "x", "--vocab-size", "many"], "--vocab-size takes a whole number"),
    (MULTI30K, ["--out", "x", "--workers", "0"], "--workers takes a whole number, 1 or more"),
    (MULTI30K, ["--out", "x", "--from", "a", "--url", "b"], "--from and --url exclude each other"),
    (MULTI30K, ["--out", "x", "--from", "nowhere"], "no such folder"),
    (TEXT_LM, ["--out", "x"], "--from DIR is required"),
    (TEXT_LM, ["--out", "x", "--from", "nowhere"], "no such folder"),
    (TEXT_LM, ["--out", "x", "--max-vocab", "4"], "takes a whole number, 5 or more"),
    (IWSLT14, ["--out", "x", "--archive", "nowhere.tgz"], "--archive nowhere.tgz: there is no such file"),
    (IWSLT14, ["--out", "x", "--archive", "a", "--url", "b"], "--archive and --url exclude each other"),
    (IWSLT14, ["--out", "x", "--merges", "0"], "--merges takes a whole number, 1 or more"),
    (WIKITEXT, ["--out", "x", "--corpus", "y"], "there is no 'y'; choose from: wikitext-103 wikitext-2"),
])  # fmt: skip
def test_bad_options(script, arguments, message):
    assert message in fail(script, *arguments)


@pytest.mark.parametrize(("script", "number"), zip(RECIPES, (7, 6, 6, 7)))
def test_help_names_every_option(script, number):
    """And needs nothing installed."""
    result = succeed(script, "--help", PYTHON="/nowhere/python")
    table = script.read_text().partition('OPTIONS="\n')[2].partition('\n"')[0]
    options = {line.split()[0] for line in table.splitlines()}
    assert len(options) == number and "#" not in result.stdout
    for option in options | {"--help"}:
        assert f"  {option} " in result.stdout


def test_missing_tools_are_named(tmp_path):
    source = make_multi30k(tmp_path / "source")
    arguments = (MULTI30K, "--from", source, "--out", tmp_path / "out")

    path = path_without(tmp_path / "no-fairseq", "fairseq-preprocess")
    message = fail(*arguments, PATH=path, PYTHON=sys.executable)
    assert "'fairseq-preprocess' was not found" in message and "pip install" in message

    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "sentencepiece.py").write_text("raise ImportError\n")
    message = fail(*arguments, PYTHONPATH=str(tmp_path / "broken"))
    assert "'sentencepiece'" in message and "pip install sentencepiece" in message

    assert "PYTHON=" in fail(*arguments, PYTHON="/nowhere/python")
    assert siblings(tmp_path / "out") == []


# ---------------------------------------------------------------------- bad sources

DAMAGE = {
    "missing": (lambda path: path.unlink(), "lacks"),
    "empty": (lambda path: path.write_bytes(gzip.compress(b"")), "is empty"),
    "blank": (lambda path: path.write_bytes(gzip.compress(b"\n \n\n")), "is empty"),
    "zero bytes": (lambda path: path.write_bytes(b""), "corrupt or cut short"),
    "cut short": (lambda path: path.write_bytes(path.read_bytes()[:-100]), "corrupt or cut short"),
    "web page": (lambda path: path.write_text("\n<!DOCTYPE html>\n<html><body>Not Found</body>\n"), "is a web page"),
    "latin-1": (
        lambda path: path.write_bytes(gzip.compress(b"gut\n\nStra\xdfe\n")),
        "is not UTF-8 (the first bad line is number 3)",
    ),
}


@pytest.mark.parametrize("script", [MULTI30K, TEXT_LM])
@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_source_is_refused(tmp_path, stand_in, how, script):
    if script == MULTI30K:
        file = make_multi30k(tmp_path / "source") / "val.en.gz"
    else:
        file = make_tokens(tmp_path / "source", compress=True) / "test.tokens.gz"
    damage, expected = DAMAGE[how]
    damage(file)
    message = fail(script, "--from", file.parent, "--out", tmp_path / "out", **stand_in)
    assert expected in message and file.stem in message
    assert siblings(tmp_path / "out") == []
    assert not reached(tmp_path).exists()


def test_a_source_that_unpacks_to_too_much_is_refused(tmp_path, stand_in):
    file = make_multi30k(tmp_path / "source") / "test_2016_flickr.en.gz"
    file.write_bytes(gzip.compress(bytes(1_000_000)))
    arguments = [MULTI30K, "--from", file.parent, "--out", tmp_path / "out"]
    message = fail(*arguments, UNPACK_LIMIT="999999", **stand_in)
    assert f"{file} unpacks to more than 999999 bytes" in message
    assert siblings(tmp_path / "out") == []


def test_multi30k_refuses_unaligned_files(tmp_path, stand_in):
    source = make_multi30k(tmp_path / "source", compress=False)
    lines = (source / "train.en").read_bytes().splitlines(keepends=True)
    (source / "train.en").write_bytes(b"".join(lines[:-1]))
    message = fail(MULTI30K, "--from", source, "--out", tmp_path / "out", **stand_in)
    assert "train: 300 lines of German and 299 of English" in message
    assert siblings(tmp_path / "out") == []
    assert not reached(tmp_path).exists()


def test_a_last_line_without_newline_counts(tmp_path, stand_in):
    source = make_multi30k(tmp_path / "source", compress=False)
    train = source / "train.en"
    train.write_bytes(train.read_bytes().removesuffix(b"\n"))
    out = tmp_path / "out"
    succeed(MULTI30K, "--from", source, "--out", out, "--vocab-size", 200, **stand_in)
    assert len(lines_of(out / "text" / "train.en")) == 300


def test_impossible_vocabulary_size_says_what_is_possible(tmp_path, stand_in):
    source = make_multi30k(tmp_path / "source")
    message = fail(MULTI30K, "--from", source, "--out", tmp_path / "out", **stand_in)
    assert "Vocabulary size too high (6000). Please set it to a value <=" in message
    assert siblings(tmp_path / "out") == []


# ---------------------------------------------------------------------- the user's own files


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_tokens(tmp_path / "source")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def command(source: Path, out: Path) -> list:
    return [TEXT_LM, "--from", source, "--out", out]


def test_a_users_folder_is_never_touched(tmp_path, stand_in, command, out):
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    before = snapshot(out)
    for force in ([], ["--force"]):
        assert "was not made by this script" in fail(*command, *force, **stand_in)
    assert snapshot(out) == before
    assert siblings(out) == ["out"]
    assert not reached(tmp_path).exists()


def test_a_file_in_the_way_is_an_error(stand_in, command, out):
    out.write_text("a file")
    assert "is not a folder" in fail(*command, **stand_in)
    assert out.read_text() == "a file"


def test_an_empty_folder_is_as_good_as_none(stand_in, command, out):
    out.mkdir()
    succeed(*command, **stand_in)
    assert (out / "data-bin").is_dir()
    assert siblings(out) == ["out"]


def test_force_rebuilds(stand_in, command, out):
    succeed(*command, **stand_in)
    (out / "text" / "train.tokens").unlink()

    message = fail(*command, **stand_in)
    assert "files are missing" in message and "--force" in message
    assert "./text/train.tokens" in message and "./text/test.tokens" not in message

    succeed(*command, "--min-count", 2, "--force", **stand_in)
    assert (out / "text" / "train.tokens").exists()
    assert "min-count=2" in lines_of(out / ".complete")
    assert siblings(out) == ["out"]


def test_force_keeps_what_the_user_put_there(stand_in, command, out):
    succeed(*command, **stand_in)
    (out / "checkpoints").mkdir()
    (out / "checkpoints" / "checkpoint_best.pt").write_text("a week of training")
    before = snapshot(out)
    message = fail(*command, "--force", **stand_in)
    assert "./checkpoints/checkpoint_best.pt" in message and "./text" not in message
    assert snapshot(out) == before


@pytest.mark.parametrize("changed, content, message", [
    ("out/text/train.tokens", b"", "are not as they were made (bytes, file: "),
    ("source/train.tokens", b"one more\n", "the source has changed since"),
    ("out/.complete", b"\0" * 40, "is damaged, so nobody knows what"),
    ("out/.complete", b"", "is damaged, so nobody knows what"),
])  # fmt: skip
def test_what_has_changed_is_not_called_prepared(tmp_path, stand_in, command, changed, content, message):
    succeed(*command, **stand_in)
    (tmp_path / changed).write_bytes(content)
    assert message in fail(*command, **stand_in)


def test_a_file_that_cannot_be_read_is_named(stand_in, command, source):
    (source / "test.tokens").unlink()
    (source / "test.tokens").mkdir()
    (source / "test.tokens.gz").symlink_to("/proc/self/mem")  # there, and unreadable to root, too
    message = fail(*command, **stand_in)
    assert "test.tokens" in message and message.count("\n") == 1


def test_two_recipes_with_one_process_number_do_not_share_a_folder(tmp_path, stand_in, command, out):
    """As containers with a common disk have them: what the other one builds stays."""
    script = f"mkdir {out}.partial.$$; touch {out}.partial.$$/theirs; exec {' '.join(map(str, command))}"
    result = subprocess.run(["bash", "-c", script], env=environment(**stand_in), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert len(list(tmp_path.glob("out.partial.*/theirs"))) == 1 and (out / "data-bin").is_dir()


def test_who_comes_second_finds_the_work_done(tmp_path, stand_in, command, out):
    with started(*command, STAND_IN_SECONDS="120", **stand_in) as process:
        wait_for(reached(tmp_path).exists)
        worker = int(reached(tmp_path).read_text())
        succeed(*command, **stand_in)
        os.kill(worker, 15)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "already prepared" in output
    assert siblings(out) == ["out"]


# ---------------------------------------------------------------------- interruption


@pytest.mark.parametrize(("how", "status"), [("Ctrl-C", 130), ("SIGTERM", 143)])
def test_an_interrupted_run_leaves_nothing(tmp_path, stand_in, how, status, command, out):
    """And nothing that is in the way of the next run."""
    assert interrupt(tmp_path, stand_in, how, *command) == status
    assert siblings(out) == []
    succeed(*command, **stand_in)
    assert siblings(out) == ["out"]


def test_an_interrupted_rebuild_keeps_the_old_result(tmp_path, stand_in, command, out):
    succeed(*command, **stand_in)
    before = snapshot(out)
    reached(tmp_path).unlink()
    interrupt(tmp_path, stand_in, "SIGTERM", *command, "--min-count", 2, "--force")
    assert snapshot(out) == before
    assert siblings(out) == ["out"]


def test_a_failing_command_shows_its_output_and_leaves_nothing(tmp_path, stand_in, command, out):
    failing = "#!/usr/bin/env bash\necho no space left on device >&2\nexit 28\n"
    (tmp_path / "stand-in" / "fairseq-preprocess").write_text(failing)
    message = fail(*command, **stand_in)
    assert "no space left on device" in message and "exit status 28" in message
    assert siblings(out) == []


# ---------------------------------------------------------------------- full disks


@pytest.mark.parametrize("script", [MULTI30K, TEXT_LM])
def test_a_full_disk_is_named(tmp_path, stand_in, script):
    source = tmp_path / "source"
    if script == MULTI30K:  # unpacked
        text = gzip.decompress((make_multi30k(source) / "train.de.gz").read_bytes())
        (source / "train.de.gz").write_bytes(gzip.compress(text * 200))
    else:  # copied
        text = (make_tokens(source) / "train.tokens").read_bytes()
        (source / "train.tokens").write_bytes(text * 200)
    disk = tmp_path / "disk"
    result, left = on_small_disk(disk, "1m", script, "--from", source, "--out", disk / "out", **stand_in)
    message = clear_error(result)
    assert "No space left on device" in message
    assert f"kB are free in {disk}): make room and run the command again" in message
    assert left == []


# ---------------------------------------------------------------------- downloads


@pytest.fixture
def server(server: Server, tmp_path: Path) -> Server:
    """The server, with the files of Multi30k."""
    folder = make_multi30k(tmp_path / "served")
    server.files = {path.name: path.read_bytes() for path in folder.iterdir()}
    return server


def test_download(out, server, downloader):
    url = f"{server.url}/"  # the slash changes nothing
    arguments = [MULTI30K, "--url", url, "--out", out, "--vocab-size", 200, "--no-checksum"]
    succeed(*arguments, **downloader)
    assert sorted(name for name, _ in server.requests) == sorted(ARCHIVES)
    for split, name in SPLITS.items():
        original = gzip.decompress(server.files[f"{name}.de.gz"])
        assert (out / "raw" / f"{split}.de").read_bytes() == original
    assert siblings(out) == ["out"]
    assert "already prepared" in succeed(*arguments, **downloader).stdout
    assert len(server.requests) == len(ARCHIVES)


def test_download_address_from_the_environment(tmp_path, server, stand_in):
    """MULTI30K_URL asks for a download, so it goes before the files in MULTIMAX_DATA."""
    changes = {**stand_in, "MULTI30K_URL": server.url, "MULTIMAX_DATA": str(tmp_path / "data")}
    make_multi30k(tmp_path / "data" / "multi30k")
    succeed(MULTI30K, "--out", tmp_path / "out", "--vocab-size=200", "--no-checksum", **changes)
    assert len(server.requests) == len(ARCHIVES)


def test_download_of_unknown_text_is_refused(tmp_path, out, server, stand_in):
    message = fail(MULTI30K, "--url", server.url, "--out", out, "--vocab-size", 200, **stand_in)
    assert "train.de.gz" in message and "SHA-256" in message and "--no-checksum" in message
    assert siblings(out) == ["out.download"]
    assert not (tmp_path / "out.download" / "train.de.gz").exists()  # the next run fetches it anew
    assert not reached(tmp_path).exists()


@pytest.mark.parametrize(("trouble", "expected"), [
    ("web page", "val.en.gz, as downloaded, is a web page"),
    ("404", "could not download"),
    ("cut short", "could not download"),
])  # fmt: skip
def test_bad_download(tmp_path, out, server, downloader, trouble, expected):
    """An error that says what to do; the same command completes once the trouble is over."""
    arguments = [MULTI30K, "--url", server.url, "--out", out, "--vocab-size", 200, "--no-checksum"]
    server.troubles["val.en.gz"] = trouble
    message = fail(*arguments, **downloader)
    assert expected in message and "--from" in message
    assert siblings(out) == ["out.download"]
    assert not reached(tmp_path).exists()

    server.troubles.clear()
    server.requests.clear()
    succeed(*arguments, **downloader)
    assert "train.de.gz" not in [name for name, _ in server.requests]  # it was there already
    ranges = [requested for name, requested in server.requests if name == "val.en.gz"]
    assert ranges == ["bytes=100-" if trouble == "cut short" else None]
    original = gzip.decompress(server.files["val.en.gz"])
    assert (out / "raw" / "valid.en").read_bytes() == original
    assert siblings(out) == ["out"]


def test_download_starts_over_where_it_cannot_resume(out, server, downloader):
    arguments = [MULTI30K, "--url", server.url, "--out", out, "--vocab-size", 200, "--no-checksum"]
    server.troubles["val.en.gz"] = "cut short"
    fail(*arguments, **downloader)
    server.troubles["val.en.gz"] = "no ranges"
    succeed(*arguments, **downloader)
    original = gzip.decompress(server.files["val.en.gz"])
    assert (out / "raw" / "valid.en").read_bytes() == original


def test_downloads_from_two_addresses_are_not_mixed(out, server, stand_in):
    fail(MULTI30K, "--url", server.url, "--out", out, **stand_in)
    message = fail(MULTI30K, "--url", f"{server.url}/other", "--out", out, **stand_in)
    assert "out.download is in the way" in message


def test_download_needs_a_program_for_it(tmp_path, server, stand_in):
    path = path_without(tmp_path / "tools", "curl", "wget")
    path = os.pathsep.join([str(tmp_path / "stand-in"), path])
    arguments = (MULTI30K, "--url", server.url, "--out", tmp_path / "out")
    message = fail(*arguments, PATH=path, PYTHON=sys.executable)
    assert "neither curl nor wget" in message and "--from" in message


# ---------------------------------------------------------------------- sentencepiece_bpe.py


def test_bpe_filters_answer_line_by_line(multi30k):
    """Whoever types a sentence into fairseq-interactive waits for it, not for a full buffer."""
    model = multi30k[1] / "sentencepiece.bpe.model"
    command = [sys.executable, BPE, "encode", "--model", model]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=environment(), **pipes) as process:
        timer = threading.Timer(60, process.kill)
        timer.start()
        process.stdin.write("Ein Hund läuft.\n".encode())
        process.stdin.flush()
        assert process.stdout.readline().decode().startswith("▁Ein ▁Hund")
        timer.cancel()
        process.stdin.close()


def test_bpe_filters_keep_lines_apart(multi30k):
    """Empty lines stay; characters that Python takes for line ends do not end a line."""
    model = multi30k[1] / "sentencepiece.bpe.model"
    text = "Ein\u2028Hund\n\nEin\rHund\nEin\x85Hund\n".encode()
    for command in ("encode", "decode"):
        filter_command = [sys.executable, BPE, command, "--model", model]
        text = subprocess.run(filter_command, input=text, stdout=subprocess.PIPE, check=True).stdout
    assert text.decode() == "Ein Hund\n\nEin Hund\nEin Hund\n"


def test_bpe_errors_are_one_line(tmp_path, multi30k):
    model = multi30k[1] / "sentencepiece.bpe.model"
    for arguments, text in (
        (["encode", "--model", tmp_path / "nothing"], b""),
        (["encode", "--model", BPE], b""),
        (["encode", "--model", model], b"\xff\xfe\n"),
        (["train", "--model", tmp_path / "new", tmp_path / "nothing"], b""),
    ):
        result = subprocess.run([sys.executable, BPE, *arguments], input=text, capture_output=True)
        assert result.returncode == 1
        assert result.stderr.decode().startswith(f"ERROR: sentencepiece_bpe.py {arguments[0]}: ")
        assert result.stderr.count(b"\n") == 1


# ---------------------------------------------------------------------- the real thing


@pytest.fixture
def real_data() -> Path:
    if "MULTIMAX_DATA" not in os.environ:
        pytest.skip("MULTIMAX_DATA is not set: it names the folder that holds multi30k/ and brown/")
    return Path(os.environ["MULTIMAX_DATA"])


@pytest.mark.slow
def test_real_multi30k(tmp_path, real_data):
    out = tmp_path / "out"
    result = succeed(MULTI30K, "--out", out, MULTIMAX_DATA=str(real_data))
    assert result.stderr == ""  # the published text: counts and checksums agree
    for split, pairs in (("train", 29000), ("valid", 1014), ("test", 1000)):
        for language in WORDS:
            raw = lines_of(out / "raw" / f"{split}.{language}")
            pieces = lines_of(out / "text" / f"{split}.{language}")
            assert len(raw) == len(pieces) == pairs
            for line, encoded in zip(raw, pieces, strict=True):
                # How fairseq-generate --remove-bpe sentencepiece undoes it.
                assert encoded.replace(" ", "").replace("▁", " ").strip() == normalised(line)


@pytest.mark.slow
def test_real_brown(tmp_path, real_data):
    out = tmp_path / "out"
    result = succeed(TEXT_LM, "--out", out, MULTIMAX_DATA=str(real_data))
    assert "--min-count 2" in result.stderr  # Brown has no <unk> of its own
    words = {split: sum(len(line.split()) for line in lines_of(out / "text" / f"{split}.tokens")) for split in PAIRS}
    assert words == {"train": 1_046_267, "valid": 58_141, "test": 58_784}
