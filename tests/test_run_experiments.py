"""examples/*/run.sh and what they are made of: the recipes, their Hydra configs, their whole path on made-up data."""

import argparse
import dataclasses
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace

import fork_server
import pytest
import sacrebleu
import torch
from conftest import PLUGIN, ROOT, TINY, TWICE, environment, load_script, parse, rows_of, run, train_command
from fairseq import options
from fairseq.dataclass.configs import FairseqConfig
from fairseq.dataclass.initialize import add_defaults
from fairseq.models import ARCH_CONFIG_REGISTRY
from fairseq.models.transformer import TransformerConfig
from omegaconf import OmegaConf

from multimax_fairseq.models.options import MAPPING_OPTIONS
from multimax_fairseq.tools import UserError

EXAMPLES = ROOT / "examples"
EXPERIMENTS = ("iwslt14_de_en", "wikitext103", "multi30k_de_en", "brown_lm")


def recipe(experiment, *arguments, data="data", **kwargs):
    return run("bash", EXAMPLES / experiment / "run.sh", *arguments, env={"DATA": str(data)}, **kwargs)


# ---------------------------------------------------------------------- the recipe and its config


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_hydra_config_is_the_recipe(experiment, tmp_path):
    """Both are taken to the configuration that fairseq trains with; it has hundreds of fields."""
    precision = ["--fp16"] if experiment == "wikitext103" else []  # the config is for a GPU
    _, by_flags = parse(train_command(experiment, tmp_path, *precision))

    config = OmegaConf.load(EXAMPLES / experiment / f"{experiment}.yaml")
    assert {OmegaConf.to_container(config)[group][key] for group, key in
            (("task", "data"), ("checkpoint", "save_dir"), ("common", "user_dir"))} == {"???"}
    unnamed = {option.name for option in MAPPING_OPTIONS} - set(config.model)  # an override of these needs a "+"
    assert not unnamed
    config.task.data = str(tmp_path / "data-bin")
    config.checkpoint.save_dir = str(tmp_path / "run")
    config.common.user_dir = str(PLUGIN)
    config.common.log_file = str(tmp_path / "run" / "train.log")  # Hydra has its own
    # the schema and the defaults of the parts, as fairseq-hydra-train adds them
    config = OmegaConf.merge(OmegaConf.structured(FairseqConfig()), config)
    add_defaults(config)
    for group in config:  # scoring is of fairseq-generate: the parser of fairseq-train does not have it
        if group not in ("model", "scoring"):
            expected, found = (OmegaConf.to_container(cfg, resolve=True)[group] for cfg in (by_flags, config))
            assert found == expected, group

    models = []
    for cfg in (by_flags, config):
        # all that a model can ask for: what was given, then what its architecture leaves open
        model = Namespace(**load_script("settings").plain(cfg.model))
        ARCH_CONFIG_REGISTRY.get(config.model._name, lambda _: None)(model)
        models.append(model)
    expected, found = (dataclasses.asdict(TransformerConfig.from_namespace(model)) for model in models)
    assert found == expected
    for option in MAPPING_OPTIONS:
        assert getattr(models[1], option.name) == getattr(models[0], option.name)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_without_a_folder_it_says_what_it_takes(experiment):
    for arguments in ([], ["--seed", 1]):
        result = recipe(experiment, *arguments, check=False)
        assert result.returncode == 1 and f"/{experiment}/run.sh RUN [OPTION OF fairseq-train" in result.stderr


@pytest.mark.parametrize("path", sorted(EXAMPLES.rglob("*.txt")), ids=lambda path: str(path.relative_to(EXAMPLES)))
def test_the_lines_of_the_lists_are_options(path, tmp_path):
    command = train_command("iwslt14_de_en" if path.parent == EXAMPLES else path.parent.name, tmp_path)
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    mapping_of, found = load_script("settings").mapping_of, set()
    for line in lines:
        args = options.parse_args_and_arch(options.get_training_parser(), [*command, *line.split()])
        found.add(json.dumps(mapping_of(args)))
    assert len(found) == len(lines) >= 3


# ---------------------------------------------------------------------- before it begins


@pytest.fixture
def begin(monkeypatch, tmp_path):
    """begin(*words) → begin_run.py, of a run in tmp_path."""
    monkeypatch.setattr("argparse.ArgumentParser.error", argparse.ArgumentParser.error)  # which it replaces
    module = load_script("begin_run")
    usual = [tmp_path / "data-bin", "--user-dir", PLUGIN, "--save-dir", tmp_path / "run", "--arch",
             "multimax_transformer", "--max-update", 4]
    return lambda *words: module.begin(tmp_path / "run", [str(word) for word in [*usual, *words]])


@pytest.mark.parametrize("words, message", [
    (["--nonsense"], "unrecognized arguments: --nonsense"),
    (["--lr", "fast"], "argument --lr"),
    (["--attention-mapping", "sparsemex"], "there is no 'sparsemex'; choose from: softmax, multimax"),
    (["--multimax-order", "3"], "3"),
    (["--entmax-alpha", "2.5"], "2.5"),
    (["--user-dir", "nowhere"], "nowhere"),
    (["--save-dir", "elsewhere"], "--save-dir elsewhere: the first argument"),
    pytest.param(["--fp16"], "--fp16 needs a GPU", marks=pytest.mark.skipif(
        torch.cuda.is_available(), reason="there is a GPU")),
])
def test_a_wrong_option_is_said_before_any_work(words, message, begin, tmp_path):
    with pytest.raises(UserError, match=re.escape(message)):
        begin(*words)
    assert not list(tmp_path.iterdir())


def test_an_end_within_the_warm_up_is_said(begin, capsys):
    begin("--lr-scheduler", "inverse_sqrt", "--warmup-updates", 5)
    assert "WARNING: the learning rate still rises at the end: 4 updates of 5" in capsys.readouterr().err


def test_a_damaged_folder_of_data_is_said(begin, tmp_path):
    (tmp_path / "data-bin").mkdir()
    with pytest.raises(UserError, match="has no text of the split 'train': remove it"):
        begin()


# ---------------------------------------------------------------------- the whole path


@pytest.fixture(scope="module")
def made_up(tmp_path_factory):
    """A folder with data of two experiments, made up."""
    folder = tmp_path_factory.mktemp("made-up")
    run("bash", ROOT / "scripts" / "make_smoke_data.sh", folder, 300)
    run("bash", ROOT / "scripts" / "prepare_multi30k.sh", "--out", folder / "multi30k_de_en", "--from",
        folder / "multi30k", "--vocab-size", 300)
    run("bash", ROOT / "scripts" / "prepare_iwslt14.sh", "--out", folder / "iwslt14_de_en", "--archive",
        folder / "de-en.tgz", "--merges", 200)
    return folder


SHORT = [*TINY, "--lr", "5e-3", "--num-workers", 0, "--cpu"]
OWN = ["--attention-mapping", "topk_softmax", "--mapping-options", "k=3", "--user-dir", EXAMPLES / "own_mapping"]


@pytest.fixture(scope="module")
def done(made_up):
    """A run of IWSLT'14, with a mapping of the user's own: (its folder, what it printed)."""
    out = made_up / "runs" / "own"
    return out, recipe("iwslt14_de_en", out, *SHORT, *OWN, "--max-epoch", 2, data=made_up / "iwslt14_de_en").stdout


@pytest.mark.slow
def test_the_record_says_what_the_run_was(done, made_up):
    folder, printed = done
    record = json.loads((folder / "run.json").read_text())
    assert (record["experiment"], record["seed"]) == ("iwslt14_de_en", 1)
    assert record["mapping"] | {"attention_scale": "none"} == {
        "attention_mapping": "topk_softmax", "mapping_options": "k=3",
        "attention_mapping_sites": "cross,decoder,encoder", "attention_scale": "none", "output_mapping": "softmax"}
    assert record["settings"]["lr"] == [0.005] and record["settings"]["encoder_layers"] == 2
    for name, score in record["scores"].items():
        assert score["details"] in printed and f" = {score['bleu']:.2f} " in score["details"]
        hypotheses, references = ((folder / score[kind]).read_text() for kind in ("hypotheses", "references"))
        assert references == (made_up / "iwslt14_de_en" / "raw" / "test.en").read_text(), name
        bleu = sacrebleu.corpus_bleu(hypotheses.lower().splitlines(), [references.lower().splitlines()])
        assert bleu.score == pytest.approx(score["bleu"], abs=0.005) and "case:lc" in score["signature"]
        assert not re.search(r"@@|&\w+;| [,.]", hypotheses)
    assert list(record["scores"]) == ["best", "average"]
    assert load_script("average_checkpoints").last_epochs(folder, 1) == [folder / "checkpoint2.pt"]
    log = (folder / "train.log").read_text()
    logged = re.findall(r"valid on 'valid' subset \| loss (\S+) .* ppl (\S+) \| bleu (\S+) .* num_updates (\d+)", log)
    loss, ppl, bleu, updates = max(logged[::-1], key=lambda line: float(line[2]))  # the last of the best by BLEU
    assert record["validation"] == {
        "updates": int(updates), "metric": "bleu", "value": float(bleu), "loss": float(loss), "ppl": float(ppl)}
    assert record["whole_epochs"] == 2 and record["updates"] == int(re.findall(r"num_updates (\d+)", log)[-1])
    assert torch.__version__.startswith(record["versions"]["torch"])  # which may leave out "+cu121"
    assert record["training_seconds"] > 0
    text = run(sys.executable, ROOT / "scripts" / "results_table.py", folder.parent / "own").stdout
    assert list(rows_of(text)) == ["mapping", "topk_softmax, mapping_options k=3"]


@pytest.mark.slow
def test_what_is_done_is_not_done_again_and_nothing_is_mixed(done, made_up):
    folder, _ = done
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    arguments = ["iwslt14_de_en", folder, *SHORT, *OWN, "--max-epoch", 2]
    assert recipe(*arguments, data=made_up / "iwslt14_de_en").stdout == f"already done: {folder}/run.json\n"
    mixed = recipe(*arguments, "--mapping-options", "k=4", "--seed", 2, data=made_up / "iwslt14_de_en", check=False)
    assert "(mapping_options: there k=3, asked for k=4; seed: there 1, asked for 2)" in mixed.stderr
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_to_the_same_end(made_up, tmp_path):
    """Killed at random moments of training, at each epoch's end among them, or of scoring."""
    arguments = [*SHORT, "--max-update", 40, "--max-tokens", 512, "--save-interval-updates", 3,
                 "--keep-interval-updates", 1]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    start = time.monotonic()
    recipe("multi30k_de_en", whole, *arguments, data=made_up / "multi30k_de_en")
    longest = time.monotonic() - start
    variables = environment(fork_server.path()) | {"DATA": str(made_up / "multi30k_de_en")}
    command = ["bash", EXAMPLES / "multi30k_de_en" / "run.sh", killed, *arguments]
    rng = random.Random(3)
    for _ in range(3):
        process = subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                   start_new_session=True, env=variables)
        try:
            process.wait(rng.uniform(0.3, 0.9) * longest)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            time.sleep(0.2)
    recipe("multi30k_de_en", killed, *arguments, data=made_up / "multi30k_de_en")
    found, expected = (torch.load(folder / "checkpoint_last.pt")["model"] for folder in (killed, whole))
    different = {name for name in expected if not torch.equal(found[name], expected[name])}
    # fairseq 0.12.2 leaves the copies of parameters and a mark of its own as the process has begun with them
    assert {name for name in different if not (TWICE.fullmatch(name) or name.endswith("._float_tensor"))} == set()
    scores = [json.loads((folder / "run.json").read_text())["scores"] for folder in (killed, whole)]
    assert scores[0] == scores[1]


@pytest.mark.slow
def test_raw_german_is_translated_up_to_a_sentence_that_is_too_long_and_that_can_be_cut(done, made_up):
    """Line by line, the translations of the test set, which fairseq-generate made in batches."""
    data = made_up / "iwslt14_de_en"
    german = (data / "raw" / "test.de").read_text().splitlines()[:3]

    def translate(lines, *more):
        command = ["bash", ROOT / "scripts" / "translate.sh", "--run", done[0], "--data", data, "--user-dir",
                   EXAMPLES / "own_mapping", *more]
        return run(*command, check=False, input="".join(f"{line}\n" for line in lines))

    result = translate([*german, "ja " * 1100, "nein"])
    assert result.stdout.splitlines() == (done[0] / "best.hypotheses").read_text().splitlines()[:3]
    message = r"ERROR: line 4 is longer than the model or --max-tokens takes \(.*\): shorten it, or let .*\n"
    assert result.returncode == 1 and re.fullmatch(message, result.stderr)
    result = translate(["ja " * 1100, "nein"], "--truncate")
    assert result.returncode == 0 and result.stdout.count("\n") == 2
    assert re.search(r"WARNING: line 1 is cut: it has \d{4} units, and the model takes 1023\n$", result.stderr)


# ---------------------------------------------------------------------- lists of runs


def test_a_list_is_run_with_each_seed_and_is_slurms_array(tmp_path):
    examples, log = tmp_path / "examples", tmp_path / "log"
    (examples / "x").mkdir(parents=True)
    (tmp_path / "scripts").mkdir()
    for name in ("run_list.sh", "slurm.sh"):
        shutil.copy(EXAMPLES / name, examples)
    (examples / "x" / "run.sh").write_text(f'echo "$*" >>{log}; [[ $* != *softmax*"--seed 2"* ]]\n')
    (tmp_path / "scripts" / "results_table.py").write_text("import sys\nprint('table of', *sys.argv[1:])\n")
    lines = ["# comment", "", "--attention-mapping softmax", "--attention-mapping multimax --multimax-order 1"]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    expected = [f"runs/{name}-seed{seed} {options} --seed {seed}" for name, options in (
        ("attention-mapping-softmax", lines[2]), ("attention-mapping-multimax-multimax-order-1", lines[3]))
        for seed in (1, 2)]
    result = run("bash", "examples/run_list.sh", "x", "list.txt", "runs", "1 2", "--lr", 7, check=False, cwd=tmp_path)
    assert log.read_text().splitlines() == [f"{line} --lr 7" for line in expected]
    assert result.returncode == 1 and result.stdout == "table of runs\n"  # one has failed, and the others have run
    log.unlink()
    for number in range(4):
        run("bash", "examples/slurm.sh", "x", "list.txt", "runs", "1 2", check=False, cwd=tmp_path,
            env={"SLURM_ARRAY_TASK_ID": str(number)})
    assert log.read_text().splitlines() == expected
    result = run("bash", "examples/run_list.sh", "x", "absent.txt", "runs", "1", check=False, cwd=tmp_path)
    assert result.returncode == 1 and "run_list.sh EXPERIMENT LIST RUNS" in result.stderr
