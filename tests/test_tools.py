"""What users meet when files or options are wrong: each tool says it in a line, and leaves nothing behind."""

import json
import os
import re
import shutil

import pytest
import torch
from conftest import call, load_script, save_checkpoint

from multimax_fairseq.analysis import cli
from multimax_fairseq.tools import UserError, read_checkpoint, replacing


def evaluated_run(built, folder):
    """A folder as an evaluated run leaves it, of an untrained model."""
    path = save_checkpoint(built, folder / "checkpoint_best.pt")
    for name in ("checkpoint_last.pt", "checkpoint1.pt"):
        shutil.copy(path, folder / name)
    (folder / "best.bleu").write_text("BLEU|nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.6.0 = 1.00 1/1 (")
    return folder


@pytest.fixture(scope="module")
def intact(build, tmp_path_factory):
    return evaluated_run(build("multimax_transformer"), tmp_path_factory.mktemp("run"))


@pytest.fixture
def folder(intact, tmp_path):
    return shutil.copytree(intact, tmp_path / "run")


class Malice:
    """Pickled, it makes whoever unpickles it without care write a file."""

    def __reduce__(self):
        return os.mkdir, ("it-was-run",)


def saved(change):
    """Damage to a checkpoint's content rather than its bytes."""

    def damage(path):
        state = torch.load(path)
        changed = change(state)
        torch.save(state if changed is None else changed, path)

    return damage


def filled(name, value, rows=slice(1)):
    def change(state):
        state["model"][name][rows].fill_(value)

    return saved(change)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


UNREADABLE = "cannot be read as a checkpoint of fairseq (damaged, cut off, or something else)"
CHECKPOINTS = {
    "absent": (lambda path: path.unlink(), "cannot be read: No such|no such file|has no checkpoint_best.pt: train"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()),
                 "cannot be read: Is a directory|no such file|has no checkpoint_best.pt"),
    "empty": (lambda path: path.write_bytes(b""), re.escape(UNREADABLE)),
    "cut": (cut, re.escape(UNREADABLE)),
    "a bit": (flip_a_bit, "the checksum of .* is wrong"),
    "text": (lambda path: path.write_text("Ein Hund läuft.\n" * 50), re.escape(UNREADABLE)),
    "a tensor": (saved(lambda state: torch.ones(3)), f"has no entry 'model'|{re.escape(UNREADABLE)}"),
    "without model": (saved(lambda state: {"cfg": state["cfg"]}), f"has no entry 'model'|{re.escape(UNREADABLE)}"),
    "no parameters": (saved(lambda state: {**state, "model": {}}), "holds no parameters"),
    "no tensors": (saved(lambda state: {**state, "model": {"a": "b"}}), "'a' is not a tensor"),
    "infinite": (filled("decoder.layers.1.fc1.bias", float("inf")),
                 "has NaN or infinity in decoder.layers.1.fc1.bias: its training has diverged"),
}
if hasattr(torch.serialization, "add_safe_globals"):
    CHECKPOINTS["malicious"] = saved(lambda state: {**state, "extra": Malice()}), re.escape(UNREADABLE)

# name → command line, of a run's folder and the corpus
TOOLS = {
    "average_checkpoints": lambda run, corpus: [run / "checkpoint_best.pt", "--output", run / "average.pt"],
    "check_decoding": lambda run, corpus: [corpus / "data-bin", "--path", run / "checkpoint_best.pt",
                                           "--sentences", 4],
    "record_run": lambda run, corpus: [run, "--experiment", "x"],
    "multimax-analyze": lambda run, corpus: [run / "checkpoint_best.pt", "--data", corpus / "data-bin", "--out",
                                             run / "report", "--max-sentences", 2, "--no-progress-bar"],
}
TRANSLATORS = {
    "score_translation": lambda run, corpus: [
        "--data-bin", corpus / "data-bin", "--checkpoint", run / "checkpoint_best.pt",
        "--reference", corpus / "text" / "test.en", "--out", run / "test"],
    "translate": lambda run, corpus: ["--data", corpus, "--run", run],
}  # fmt: skip


def error_of(tool, arguments):
    """The line that a tool ends with, called in this process; None where it succeeds."""
    result = call(cli if tool == "multimax-analyze" else tool, *arguments, check=False)
    message = result.stderr.strip().splitlines()[-1] if result.returncode else None
    assert message is None or message.startswith("ERROR: "), f"{tool} ends with {message!r}"
    return message


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("what", CHECKPOINTS)
def test_a_checkpoint_that_is_none(what, tool, folder, corpus, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr("multimax_fairseq.analysis.measure.Measurement.run", None)  # not reached
    damage, message = CHECKPOINTS[what]
    damage(folder / "checkpoint_best.pt")
    before = set(folder.rglob("*"))
    assert re.search(message, error_of(tool, TOOLS[tool](folder, corpus)))
    assert set(folder.rglob("*")) == before


# tool, changes of the command line, what is said
@pytest.mark.parametrize("tool, options, message", [
    ("average_checkpoints", ["--output", "{run}"], "run is a folder: name a file"),
    ("average_checkpoints", ["--output", "{run}/no/average.pt"], "there is no folder {run}/no to write"),
    ("average_checkpoints", ["--output", "/proc/average.pt"], "could not write /proc/average.pt: "),
    ("average_checkpoints", ["--last", "2"], "--last goes with one folder"),
    ("average_checkpoints", ["--last", "0"], "'0' is not a whole number above 0; see --help"),
    ("average_checkpoints", ["--output", "-x.pt"], "see --help. A file whose name begins with a dash"),
    ("check_decoding", ["--split", "dev"], "has no split 'dev' for this model; --split takes one of: test, train"),
    ("multimax-analyze", ["--out", "{run}/best.bleu"], "best.bleu is no folder that can be written to"),
    ("multimax-analyze", ["--out", "/proc/report"], "could not write /proc/report: "),
    ("score_translation", ["--checkpoint", "a::b"], "--checkpoint 'a::b' has an empty name"),
    ("score_translation", ["--checkpoint", "{run}/none.pt"], "none.pt: there is no such file"),
    ("score_translation", ["--reference", "{corpus}/text/valid.en"],
     "60 lines in {corpus}/text/valid.en for the 40 sentences"),
    ("score_translation", ["--reference", "{run}/checkpoint_best.pt"], "is not UTF-8"),
    ("score_translation", ["--data-bin", "{run}"], "has no split 'test'"),
    ("score_translation", ["--checkpoint", "{run}/best.bleu"], "best.bleu cannot be read as a checkpoint"),
    ("score_translation", ["--user-dir", "{run}"], "there is no __init__.py in it"),
    ("translate", [], "there is neither a SentencePiece model nor bpe.codes"),
    ("translate", ["--sentencepiece", "{run}/none"], "none: there is neither"),
    ("translate", ["--data-bin", "{run}"], "has no data of a pair of languages"),
])
def test_options_that_cannot_be(tool, options, message, folder, corpus):
    options = [option.format(run=folder, corpus=corpus) for option in options]
    before = set(folder.rglob("*"))
    error = error_of(tool, [*(TOOLS | TRANSLATORS)[tool](folder, corpus), *options])
    assert message.format(run=folder, corpus=corpus) in error
    assert set(folder.rglob("*")) == before


# A file of the run's folder, what it holds or how it is changed, and what is said.
@pytest.mark.parametrize("name, content, message", [
    ("best.bleu", b"BLEU|\xff = 1.0 ", "best.bleu is damaged: it is not UTF-8"),
    ("best.bleu", b"BLEU|x = 1.2.3 ", "best.bleu is not what sacrebleu prints"),
    ("test.context-0.eval", b"Traceback\n", "test.context-0.eval is not what fairseq-eval-lm prints"),
    ("test.context-0.eval", b"Evaluated 0 tokens\nLoss (base 2): 0.0, Perplexity: 1.00\n", "no token was evaluated"),
    ("test.context-0.eval", b"Evaluated 9 tokens\nLoss (base 2): nan, Perplexity: nan\n", "of a finite perplexity"),
    ("checkpoint_best.pt", saved(lambda state: state.update(optimizer_history=[])),
     "has no entry 'optimizer_history.-1.num_updates'"),
])
def test_what_a_record_needs(name, content, message, folder, corpus):
    content(folder / name) if callable(content) else (folder / name).write_bytes(content)
    assert message in error_of("record_run", TOOLS["record_run"](folder, corpus))
    assert not (folder / "run.json").exists()


def test_intact_files_are_no_error(folder, corpus):
    seconds = torch.tensor(2.5)  # as several processes leave it
    saved(lambda state: state["extra_state"].update(previous_training_time=seconds))(folder / "checkpoint_last.pt")
    for tool in ("average_checkpoints", "check_decoding", "record_run"):
        assert error_of(tool, TOOLS[tool](folder, corpus)) is None
    assert json.loads((folder / "run.json").read_text())["training_seconds"] == 2.5
    assert (folder / "average.pt").is_file()


def test_models_and_data_that_do_not_serve(build, folder, corpus, tmp_path):
    """Finite parameters whose products are not; a language model; a split without its target language."""
    lm, output = save_checkpoint(build("multimax_transformer_lm"), tmp_path / "lm.pt"), ["--output", tmp_path / "a"]
    shutil.copytree(corpus / "data-bin", tmp_path / "data-bin")
    for path in (tmp_path / "data-bin").glob("*.de-en.en.*"):
        path.unlink()
    filled("decoder.layers.0.fc1.weight", 3e38, rows=slice(None))(folder / "checkpoint1.pt")
    for tool, arguments, message in [
        ("average_checkpoints", [lm, folder / "checkpoint1.pt", *output], "checkpoint1.pt is of another model than"),
        ("average_checkpoints", [corpus, "--last", 9, *output], "has no checkpoint of a whole epoch"),
        ("check_decoding", [corpus / "data-bin-lm", "--path", lm],
         "is no translation model: there is no beam search to compare with"),
        ("check_decoding", TOOLS["check_decoding"](folder, tmp_path), "has no text in the target language: files of"),
        ("multimax-analyze", TOOLS["multimax-analyze"](folder, tmp_path), "has no text in the target language"),
        ("check_decoding", [corpus / "data-bin", "--path", folder / "checkpoint1.pt"],
         "computes NaN or infinity on sentences of 'test'"),
    ]:  # fmt: skip
        assert message in error_of(tool, arguments)


# ---------------------------------------------------------------------- going on


@pytest.mark.parametrize("names", [["checkpoint_last.pt"], ["checkpoint_last.pt", "checkpoint_best.pt"]])
@pytest.mark.parametrize("what", ["absent", "empty", "cut"])
def test_a_run_goes_on_from_the_newest_checkpoint_that_can_be_read(what, names, folder, capsys):
    mend = load_script("begin_run").mend
    saved(lambda state: state["optimizer_history"][-1].update(num_updates=7))(folder / "checkpoint1.pt")
    for name in names:
        CHECKPOINTS[what][0](folder / name)
    assert mend(folder)[0].updates == 7
    assert "WARNING: going on from checkpoint1.pt" in capsys.readouterr().err
    for name in names:
        assert (folder / name).read_bytes() == (folder / "checkpoint1.pt").read_bytes()
    assert mend(folder)[0].updates == 7 and not capsys.readouterr().err


def test_what_is_lost_is_said(folder):
    mend = load_script("begin_run").mend
    for name in ("checkpoint1.pt", "checkpoint_last.pt"):
        saved(lambda state: state["extra_state"].update(val_loss=4.0))(folder / name)
    cut(folder / "checkpoint_best.pt")
    with pytest.raises(UserError, match="the best checkpoint, .*, is lost"):
        mend(folder)
    for path in folder.glob("*.pt"):
        cut(path)
    with pytest.raises(UserError, match="no checkpoint of .* can be read"):
        mend(folder)


# ---------------------------------------------------------------------- writing


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    for content in (b"first", b"second"):
        with replacing(path) as file:
            file.write(content)
        assert path.read_bytes() == content and os.listdir(tmp_path) == ["file"]
    with pytest.raises(KeyboardInterrupt), replacing(path) as file:
        file.write(b"third")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"second" and os.listdir(tmp_path) == ["file"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_named(tmp_path, monkeypatch):
    real = open
    monkeypatch.setattr("builtins.open", lambda path, mode: real("/dev/full" if mode == "xb" else path, "wb"))
    with pytest.raises(UserError, match="could not write .*: No space left on device"):
        with replacing(tmp_path / "x") as file:
            torch.save({"a": torch.ones(10_000)}, file)


def test_old_and_new_formats_of_torch_are_read(tmp_path):
    for zipped in (True, False):
        torch.save({"model": {"a": torch.ones(2)}}, tmp_path / "x", _use_new_zipfile_serialization=zipped)
        assert read_checkpoint(tmp_path / "x")["model"]["a"].sum() == 2
