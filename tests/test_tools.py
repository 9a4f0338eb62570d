"""What users meet when files or options are wrong: each tool says it in a line, and leaves nothing behind."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, load_script, run, save_checkpoint

from multimax_fairseq.analysis.cli import main as analyze
from multimax_fairseq.tools import UserError, read_checkpoint, replacing

SCRIPTS = ROOT / "scripts"


@pytest.fixture(scope="module")
def intact(build, corpus, tmp_path_factory):
    """A folder as an evaluated run leaves it, of an untrained model."""
    folder = tmp_path_factory.mktemp("run")
    path = save_checkpoint(build("multimax_transformer"), folder / "checkpoint_best.pt")
    shutil.copy(path, folder / "checkpoint_last.pt")
    shutil.copy(path, folder / "checkpoint1.pt")
    (folder / "best.bleu").write_text("BLEU|nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.6.0 = 1.00 1/1 (")
    return folder


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


def filled(name, value):
    def change(state):
        state["model"][name].fill_(value)

    return saved(change)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def a_folder(path):
    path.unlink()
    path.mkdir()


UNREADABLE = "cannot be read as a checkpoint of fairseq (damaged, cut off, or something else)"
CHECKPOINTS = {
    "absent": (lambda path: path.unlink(), "there is no checkpoint|no such file|has no checkpoint_best.pt: train"),
    "a folder": (a_folder, "cannot be read: Is a directory|no such file|has no checkpoint_best.pt"),
    "empty": (lambda path: path.write_bytes(b""), "is empty"),
    "cut": (cut, re.escape(UNREADABLE)),
    "a bit": (flip_a_bit, "the checksum of .* is wrong"),
    "text": (lambda path: path.write_text("Ein Hund läuft.\n" * 50), re.escape(UNREADABLE)),
    "a tensor": (saved(lambda state: torch.ones(3)), "has no entry 'model'"),
    "a list": (saved(lambda state: [1, 2]), "has no entry 'model'"),
    "without model": (saved(lambda state: {"cfg": state["cfg"]}), "has no entry 'model'"),
    "model None": (saved(lambda state: {**state, "model": None}), "holds no parameters"),
    "no parameters": (saved(lambda state: {**state, "model": {}}), "holds no parameters"),
    "no tensors": (saved(lambda state: {**state, "model": {"a": "b"}}), "'a' is not a tensor"),
    "NaN": (
        filled("decoder.layers.1.fc1.weight", float("nan")),
        "has NaN or infinity in decoder.layers.1.fc1.weight: its training has diverged",
    ),
    "infinite": (
        filled("decoder.layers.1.fc1.bias", float("inf")),
        "has NaN or infinity in decoder.layers.1.fc1.bias: its training has diverged",
    ),
    "malicious": (saved(lambda state: {**state, "extra": Malice()}), r"it holds \w+\.mkdir, and not only tensors"),
}  # fmt: skip

# name → command line, of a run's folder and the corpus
TOOLS = {
    "average_checkpoints": lambda run, corpus: [run / "checkpoint_best.pt", "--output", run / "average.pt"],
    "check_decoding": lambda run, corpus: [corpus / "data-bin", "--path", run / "checkpoint_best.pt",
                                           "--sentences", 4],
    "check_model": lambda run, corpus: ["--checkpoint", run / "checkpoint_best.pt", "--data", corpus / "data-bin"],
    "record_run": lambda run, corpus: [run, "--experiment", "x"],
    "multimax-analyze": lambda run, corpus: [run / "checkpoint_best.pt", "--data", corpus / "data-bin", "--out",
                                             run / "report", "--max-sentences", 2, "--no-progress-bar"],
}  # fmt: skip


def start(tool, arguments, monkeypatch):
    """A tool in this process: the message that it ends with; None where it succeeds."""
    main = analyze if tool == "multimax-analyze" else load_script(tool).main
    monkeypatch.setattr("sys.argv", [tool, *map(str, arguments)])
    try:
        main()
    except SystemExit as stopped:
        return str(stopped.code)


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("what", CHECKPOINTS)
def test_a_checkpoint_that_is_none(what, tool, folder, corpus, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr("multimax_fairseq.analysis.measure.Measurement.run", None)  # not reached
    damage, message = CHECKPOINTS[what]
    damage(folder / "checkpoint_best.pt")
    before = set(folder.rglob("*"))
    error = start(tool, TOOLS[tool](folder, corpus), monkeypatch)
    assert error.startswith("ERROR: ") and re.search(message, error) and "\n" not in error
    assert set(folder.rglob("*")) == before


# tool, what is wrong, changes of the command line, what is said
@pytest.mark.parametrize("tool, options, message", [
    ("average_checkpoints", ["--output", "{run}"], "run is a folder: name a file"),
    ("average_checkpoints", ["--output", "{run}/no/average.pt"], "there is no folder {run}/no to write"),
    ("average_checkpoints", ["--output", "{run}/best.bleu/average.pt"], "there is no folder"),
    ("average_checkpoints", ["--output", "/proc/average.pt"], "could not write /proc/average.pt: "),
    ("average_checkpoints", ["--last", "0"], None),
    ("average_checkpoints", ["--output", "-x.pt"], None),
    ("check_decoding", ["--split", "dev"], "has no split 'dev' for this model; --split takes one of: test, train"),
    ("check_decoding", ["--sentences", "0"], None),
    ("check_decoding", ["--sentences", "-5"], None),
    ("check_model", ["--checkpoint", "a::b"], "has an empty name"),
    ("check_model", ["--data", "a\nb"], r"there is no folder a\\nb"),
    ("check_model", ["--data", "{run}"], "has no dictionary|cannot be built"),
    ("check_model", ["--data", "{corpus}/data-bin-lm"], "cannot be built with the data in"),
    ("multimax-analyze", ["--out", "{run}/best.bleu"], "is a file; --out takes a folder"),
    ("multimax-analyze", ["--out", "/proc/report"], "could not write /proc/report: "),
    ("multimax-analyze", ["--labels", "a\nb"], "cannot be printed"),
])  # fmt: skip
def test_options_that_cannot_be(tool, options, message, folder, corpus, monkeypatch, capsys):
    """Without a message: argparse's, in a line, and exit status 2."""
    names = {"{run}": str(folder), "{corpus}": str(corpus)}
    options = [re.sub(r"\{\w+\}", lambda name: names[name[0]], option) for option in options]
    error = start(tool, [*TOOLS[tool](folder, corpus), *options], monkeypatch)
    if message is None:
        assert error == "2" and re.fullmatch(r"ERROR: .*see --help.*\n", capsys.readouterr().err)
    else:
        assert error.startswith("ERROR: ") and re.search(message.replace("{run}", str(folder)), error)
        assert "\n" not in error


@pytest.mark.parametrize("name, content, message", [
    ("best.bleu", b"BLEU|\xff = 1.0 ", "best.bleu is damaged: it is not UTF-8"),
    ("best.bleu", b"BLEU|x = 1.2.3 ", "best.bleu is not what sacrebleu prints"),
    ("test.context-0.eval", b"Traceback\n", "test.context-0.eval is not what fairseq-eval-lm prints"),
    ("test.context-0.eval", b"Evaluated 0 tokens\nLoss (base 2): 0.0, Perplexity: 1.00\n", "no token was evaluated"),
    ("test.context-0.eval", b"Evaluated 9 tokens\nLoss (base 2): nan, Perplexity: nan\n", "of a finite perplexity"),
])  # fmt: skip
def test_scores_that_are_none(name, content, message, folder, corpus, monkeypatch):
    (folder / name).write_bytes(content)
    error = start("record_run", TOOLS["record_run"](folder, corpus), monkeypatch)
    assert error.startswith("ERROR: ") and message in error and not (folder / "run.json").exists()


@pytest.mark.parametrize("change, message", [
    (lambda state: state.update(optimizer_history=[]), "has no entry 'optimizer_history.-1'"),
    (lambda state: state.pop("cfg"), "has no entry 'cfg'"),
])  # fmt: skip
def test_a_checkpoint_that_lacks_what_a_record_needs(change, message, folder, corpus, monkeypatch):
    saved(lambda state: change(state) and None)(folder / "checkpoint_best.pt")
    assert message in start("record_run", TOOLS["record_run"](folder, corpus), monkeypatch)


def test_intact_files_are_no_error(folder, corpus, monkeypatch):
    for tool in ("average_checkpoints", "check_decoding", "check_model", "record_run"):
        assert start(tool, TOOLS[tool](folder, corpus), monkeypatch) is None
    assert (folder / "run.json").is_file() and (folder / "average.pt").is_file()


def test_what_computes_nan_is_no_success(folder, corpus, monkeypatch):
    """Parameters that are finite, and whose products are not."""
    filled("decoder.layers.0.fc1.weight", 3e38)(folder / "checkpoint_best.pt")
    error = start("check_decoding", TOOLS["check_decoding"](folder, corpus), monkeypatch)
    assert "computes NaN or infinity on sentences of 'test'" in error


@pytest.mark.parametrize("tool", ["check_decoding", "check_model", "multimax-analyze"])
def test_a_split_without_its_target_language(tool, folder, corpus, tmp_path, monkeypatch):
    shutil.copytree(corpus / "data-bin", tmp_path / "data-bin")
    for path in (tmp_path / "data-bin").glob("*.de-en.en.*"):
        path.unlink()
    arguments = TOOLS[tool](folder, tmp_path)
    options = ["--split", "test"] if tool == "check_model" else []
    error = start(tool, [*arguments, *options], monkeypatch)
    assert re.search("of .* has no text in the target language: files of it are missing$", error or "")


def test_a_language_model_has_no_beam_search(build, corpus, tmp_path, monkeypatch):
    path = save_checkpoint(build("multimax_transformer_lm"), tmp_path / "lm.pt")
    error = start("check_decoding", [corpus / "data-bin-lm", "--path", path], monkeypatch)
    assert error.endswith("is no translation model: there is no beam search to compare with")


# ---------------------------------------------------------------------- going on


@pytest.mark.parametrize("names", [["checkpoint_last.pt"], ["checkpoint_last.pt", "checkpoint_best.pt"]])
@pytest.mark.parametrize("what", ["absent", "empty", "cut"])
def test_a_run_goes_on_from_the_newest_checkpoint_that_can_be_read(what, names, folder, monkeypatch, capsys):
    saved(lambda state: state["optimizer_history"][-1].update(num_updates=7))(folder / "checkpoint1.pt")
    for name in names:
        CHECKPOINTS[what][0](folder / name)
    assert start("resume_checkpoint", [folder], monkeypatch) is None
    assert "WARNING: going on from checkpoint1.pt, after 7 updates" in capsys.readouterr().out
    for name in names:
        assert (folder / name).read_bytes() == (folder / "checkpoint1.pt").read_bytes()
    assert start("resume_checkpoint", [folder], monkeypatch) is None and not capsys.readouterr().out


def test_without_a_checkpoint_that_can_be_read_nothing_goes_on(folder, monkeypatch):
    for path in folder.glob("*.pt"):
        cut(path)
    assert "no checkpoint of" in start("resume_checkpoint", [folder], monkeypatch)


def test_the_best_checkpoint_is_not_replaced_by_another(folder, monkeypatch):
    for name in ("checkpoint1.pt", "checkpoint_last.pt"):
        saved(lambda state: state["extra_state"].update(val_loss=4.0))(folder / name)
    cut(folder / "checkpoint_best.pt")
    assert "the best checkpoint, of score 3.0, is lost" in start("resume_checkpoint", [folder], monkeypatch)


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


# ---------------------------------------------------------------------- the shell's part

SCORE = ["score_translation.sh", "--data-bin", "{corpus}/data-bin", "--checkpoint", "{run}/checkpoint_best.pt",
         "--reference", "{corpus}/text/test.en", "--out", "{run}/test"]  # fmt: skip
RUN = ["../examples/multi30k_de_en/run.sh"]


@pytest.mark.parametrize("command, options, message", [
    (SCORE, ["--out", "-dash"], "a file of this name is ./-dash"),
    (SCORE, ["--checkpoint", "a::b"], "--checkpoint 'a::b' has an empty name"),
    (SCORE, ["--checkpoint", "{run}/checkpoint_best.pt:{run}/none.pt"], "none.pt: there is no such file"),
    (SCORE, ["--reference", "{corpus}/text/valid.en"], "60 lines in {corpus}/text/valid.en for the 40 sentences"),
    (SCORE, ["--reference", "{run}/lone-cr"], "has carriage returns within its lines"),
    (SCORE, ["--reference", "{run}"], "is not a file"),
    (SCORE, ["--data-bin", "{run}"], "has no split 'test'"),
    (SCORE, ["--data-bin", "a:b"], "fairseq takes ':' for what separates names"),
    (SCORE, ["--out", "{run}/best.bleu/x"], "best.bleu cannot be made: "),
    (["translate.sh"], ["--data", "a:b", "--run", "{run}"], "fairseq takes ':' for what separates names"),
    (["translate.sh"], ["--data", "a\nb", "--run", "{run}"], "a name with control characters"),
    (RUN, ["--entmax-alpha", "1.000"], "--entmax-alpha takes a number in (1, 2]"),
    (RUN, ["--epochs", "1", "--updates", "2"], "exclude each other"),
    (RUN, ["--out", "a:b"], "fairseq takes ':' for what separates names"),
    (RUN, ["--out", "a\nb"], "a name with control characters"),
    (RUN, ["--out", "{run}/best.bleu", "--data", "{run}/data", "--only", "evaluate"], "best.bleu cannot be made"),
    (RUN, ["--out", "{run}/new", "--data", "{run}/data", "--only", "train"], "has no text of the split 'train'"),
])  # fmt: skip
def test_the_shell_scripts_say_it_in_a_line(command, options, message, folder, corpus):
    (folder / "lone-cr").write_bytes(b"a\rb\n" * 40)
    (folder / "data" / "data-bin").mkdir(parents=True)
    (folder / "data" / "data-bin" / "train.de-en.de.bin").write_bytes(b"")
    words = [word.replace("{run}", str(folder)).replace("{corpus}", str(corpus)) for word in [*command, *options]]
    result = run("bash", SCRIPTS / words[0], *words[1:], check=False, cwd=folder)
    assert result.returncode == 1 and not result.stdout
    assert result.stderr.startswith("ERROR: ") and result.stderr.count("\n") == 1
    assert message.replace("{corpus}", str(corpus)) in result.stderr


def test_a_folder_that_is_not_the_users(folder, corpus, tmp_path):
    if subprocess.run(["unshare", "--user", "--map-user=1000", "true"], capture_output=True).returncode:
        pytest.skip("no name space can be opened here")
    folder.chmod(0o500)
    try:
        result = run("unshare", "--user", "--map-user=1000", "bash", SCRIPTS / SCORE[0],
                     *[word.format(run=folder, corpus=corpus) for word in SCORE[1:]], check=False)  # fmt: skip
    finally:
        folder.chmod(0o700)
    assert result.returncode == 1 and "cannot be written to" in result.stderr and result.stderr.count("\n") == 1


def test_two_runs_do_not_share_a_folder(folder):
    script = f"source {SCRIPTS}/common.sh; lock {folder}/.lock $1; echo held; sleep $2"
    with subprocess.Popen(["bash", "-c", script, "-", "", "60"], stdout=subprocess.PIPE,
                          env={**os.environ, "PYTHON": sys.executable}) as holder:  # fmt: skip
        assert holder.stdout.readline() == b"held\n"
        for how in ("", "shared"):
            result = run("bash", "-c", script, "-", how, 0, check=False)
            assert result.returncode == 1 and "another command is at work in" in result.stderr
        subprocess.run(["pkill", "-P", str(holder.pid)])
        holder.kill()
    assert run("bash", "-c", script, "-", "", 0).stdout == "held\n"


def test_sites_in_another_order_are_the_same_run():
    def folder_of(sites):
        command = run("bash", SCRIPTS / RUN[0], "--dry-run", "--sites", sites).stdout
        return re.search(r"--save-dir (\S+)", command)[1]

    assert {Path(folder_of(sites)).name for sites in ("cross,encoder", "encoder,cross")} == {
        "multimax-encoder+cross-seed1"
    }
    assert folder_of("decoder,cross,encoder") == "runs/multi30k_de_en/multimax-seed1"
