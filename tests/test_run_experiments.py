"""examples/*/run.sh and what they are made of: the recipes, their Hydra configs, their whole path on made-up data."""

import dataclasses
import json
import re
import shlex
import shutil
from argparse import Namespace

import pytest
import sacrebleu
import torch
from conftest import PLUGIN, ROOT, parse, run
from fairseq.dataclass.configs import FairseqConfig
from fairseq.dataclass.initialize import add_defaults
from fairseq.models import ARCH_CONFIG_REGISTRY
from fairseq.models.transformer import TransformerConfig
from omegaconf import OmegaConf

from multimax_fairseq.mappings import MAPPINGS
from multimax_fairseq.mappings.multimax import INITS, TERMS
from multimax_fairseq.models.options import MAPPING_OPTIONS, OUTPUT_MAPPINGS, SITES
from multimax_fairseq.modules.scale import SCALES

EXAMPLES = ROOT / "examples"
EXPERIMENTS = ("iwslt14_de_en", "wikitext103", "multi30k_de_en", "brown_lm")


def recipe(experiment, *options, **kwargs):
    return run("bash", EXAMPLES / experiment / "run.sh", *options, **kwargs)


def train_command(experiment, *options):
    """The words of the command that would train."""
    return shlex.split(recipe(experiment, "--dry-run", *options).stdout)


def value(command, flag):
    """Of a flag in a command: the last one, which is what fairseq takes."""
    return command[len(command) - command[::-1].index(flag)]


# ---------------------------------------------------------------------- the recipe and its config


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_hydra_config_is_the_recipe(experiment, tmp_path):
    """Both are taken to the configuration that fairseq trains with; it has hundreds of fields."""
    _, by_flags = parse(train_command(experiment, "--data", tmp_path, "--out", tmp_path)[1:])

    config = OmegaConf.load(EXAMPLES / experiment / f"{experiment}.yaml")
    assert {OmegaConf.to_container(config)[group][key] for group, key in
            (("task", "data"), ("checkpoint", "save_dir"), ("common", "user_dir"))} == {"???"}  # fmt: skip
    config.task.data = str(tmp_path / "data-bin")
    config.checkpoint.save_dir = str(tmp_path)
    config.common.user_dir = str(PLUGIN)
    config.common.log_file = str(tmp_path / "train.log")  # Hydra has its own
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
        is_config = OmegaConf.is_config(cfg.model)
        model = Namespace(**(OmegaConf.to_container(cfg, resolve=True)["model"] if is_config else vars(cfg.model)))
        ARCH_CONFIG_REGISTRY.get(config.model._name, lambda _: None)(model)
        models.append(model)
    expected, found = (dataclasses.asdict(TransformerConfig.from_namespace(model)) for model in models)
    assert found == expected
    for option in MAPPING_OPTIONS:
        assert getattr(models[1], option.name) == getattr(models[0], option.name)


@pytest.mark.parametrize("experiment, tokens", [
    ("iwslt14_de_en", 4096), ("wikitext103", 32768), ("multi30k_de_en", 1024), ("brown_lm", 1024),
])  # fmt: skip
@pytest.mark.parametrize("processes", [1, 4, 32])
def test_an_update_sees_as_many_tokens_whatever_the_number_of_processes(experiment, tokens, processes):
    command = train_command(experiment, "--processes", processes)
    assert value(command, "--distributed-world-size") == str(processes)
    max_tokens, update_freq = int(value(command, "--max-tokens")), int(value(command, "--update-freq"))
    assert processes * max_tokens * update_freq == tokens
    # batches stay as they are for as long as there are several in an update
    assert max_tokens == int(value(train_command(experiment), "--max-tokens")) or update_freq == 1


def test_several_processes_can_be_started_by_torchrun():
    command = train_command("wikitext103", "--processes", 8, "--launch", "torchrun --nnodes 2 --nproc-per-node 4")
    assert command[:7] == ["torchrun", "--nnodes", "2", "--nproc-per-node", "4", "-m", "fairseq_cli.train"]
    assert value(command, "--update-freq") == "2"


# ---------------------------------------------------------------------- options


@pytest.mark.parametrize("option, names", [
    ("--mapping", [*MAPPINGS, "stock"]),
    ("--sites", SITES),
    ("--output-mapping", OUTPUT_MAPPINGS),
    ("--terms", TERMS),
    ("--init", INITS),
    ("--scale", SCALES),
])  # fmt: skip
def test_run_knows_the_choices_that_the_models_know(option, names):
    result = recipe("multi30k_de_en", option, "?", check=False)
    assert result.returncode == 1
    (listed,) = re.findall(r"choose from: (.*)", result.stderr)
    assert sorted(listed.split()) == sorted(names)


@pytest.mark.parametrize("options, message", [
    (["--sites", "encoder,nowhere"], "--sites: there is no 'nowhere'"),
    (["--order", "3"], "--order: there is no '3'"),
    (["--entmax-alpha", "2.5"], "--entmax-alpha takes a number in (1, 2] or 'learned'"),
    (["--mapping", "stock", "--sites", "cross"], "--mapping stock is fairseq's own model"),
    (["--mapping", "stock", "--order", "1"], "--mapping stock is fairseq's own model"),
    (["--archive", "x.zip"], "multi30k_de_en takes --from DIR instead"),
    (["--epochs", "3"], "say how many with --updates"),
    (["--processes", "3"], "1024 tokens cannot be shared among 3"),
    (["--seed"], "--seed takes a whole number"),
    (["--epoch", "3"], "unknown option '--epoch'"),
])  # fmt: skip
def test_wrong_options_end_before_anything_is_made(options, message, tmp_path):
    result = recipe("multi30k_de_en", *options, check=False, cwd=tmp_path)
    assert result.returncode == 1 and message in result.stderr and "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


def test_the_options_of_a_run_reach_its_model():
    command = train_command("iwslt14_de_en", "--mapping=entmax", "--entmax-alpha=learned", "--sites=encoder,cross",
                            "--seed=3", "--updates=70", "--", "--lr", "1e-3")  # fmt: skip
    args, _ = parse(command[1:])
    assert (args.attention_mapping, args.entmax_alpha, args.attention_mapping_sites) == (
        "entmax", "learned", "encoder,cross")  # fmt: skip
    assert (args.seed, args.max_update, args.lr) == (3, 70, [1e-3])
    assert args.save_dir == "runs/iwslt14_de_en/entmax-encoder+cross-alpha_learned-seed3"
    assert value(train_command("iwslt14_de_en", "--mapping", "stock"), "--arch") == "transformer_iwslt_de_en"


def test_sparse_attention_has_a_lower_learning_rate_unless_the_user_gives_one():
    for options, lr in (("evsoftmax", "3e-3"), ("sparsemax", "1e-3"), ("entmax15", "2e-3"), ("entmax", "2e-3"),
                        ("entmax15 -- --lr 5e-4", "5e-4")):  # fmt: skip
        assert value(train_command("multi30k_de_en", "--mapping", *options.split()), "--lr") == lr


def test_a_sparse_output_mapping_is_trained_with_its_own_loss():
    for name, loss in (("multimax", ("chunked_cross_entropy", 0.1)), ("entmax15", ("entmax_loss", 0))):
        args, _ = parse(train_command("multi30k_de_en", "--output-mapping", name)[1:])
        assert (args.output_mapping, args.criterion, args.label_smoothing) == (name, *loss)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_help_is_the_recipes_own_and_that_of_all(experiment):
    text = recipe(experiment, "--help").stdout
    assert f"examples/{experiment}/run.sh --mapping multimax" in text and "--cpu-smoke" in text
    assert "shellcheck" not in text


@pytest.mark.parametrize("chosen, kept", [
    ("-u GLIBC_TUNABLES", "glibc.malloc.mmap_max=0:"), ("GLIBC_TUNABLES=", "\n"), ("GLIBC_TUNABLES=a=1", "a=1\n")
])  # fmt: skip
def test_memory_is_kept_unless_the_user_has_chosen(chosen, kept):
    script = f"source {shlex.quote(str(ROOT))}/scripts/common.sh && keep_memory printenv GLIBC_TUNABLES"
    assert run("env", *chosen.split(), "bash", "-c", script).stdout.startswith(kept)


# ---------------------------------------------------------------------- lists of runs


def test_a_list_is_run_with_each_seed():
    names = {}
    for experiment, file in (("multi30k_de_en", "mappings.txt"), ("iwslt14_de_en", "ablation.txt"),
                             ("iwslt14_de_en", "sites.txt"), ("wikitext103", "wikitext103/rows.txt")):  # fmt: skip
        lines = run("bash", EXAMPLES / "run_list.sh", experiment, EXAMPLES / file, "--seeds", "1,2", "--runs", "r",
                    "--updates", 12, "--dry-run").stdout.splitlines()  # fmt: skip
        commands = list(map(shlex.split, lines))
        assert all(value(command, "--max-update") == "12" for command in commands)
        names[file] = [value(command, "--save-dir").removeprefix("r/") for command in commands]
        assert len(set(names[file])) == len(names[file])  # no run overwrites another
    assert names["mappings.txt"] == [
        f"{name}-seed{seed}"
        for name in ("softmax", "multimax", "sparsemax", "entmax15", "entmax-alpha_learned", "evsoftmax")
        for seed in (1, 2)
    ]
    assert names["ablation.txt"][::2] == [
        f"{name}-seed1"
        for name in ("softmax", "multimax-order1", "multimax", "multimax-below", "multimax-above")
    ]
    assert names["sites.txt"][::2] == [
        f"{name}-seed1"
        for name in ("softmax", "multimax", "multimax-encoder", "multimax-decoder", "multimax-cross")
    ]
    assert names["wikitext103/rows.txt"][::2] == [
        "softmax-seed1", "multimax-seed1", "multimax-output_multimax-seed1"
    ]  # fmt: skip


@pytest.mark.parametrize("arguments, message", [
    (["wmt", EXAMPLES / "mappings.txt"], "there is no experiment 'wmt'"),
    (["wikitext103", "absent.txt"], "absent.txt: there is no such file"),
    (["wikitext103"], "the experiment and the list of runs are required"),
    (["wikitext103", EXAMPLES / "mappings.txt", "--seed", "2"], "--seed is for a single run"),
    (["wikitext103", EXAMPLES / "mappings.txt", "--seeds", "1,b"], "--seeds takes a whole number"),
])  # fmt: skip
def test_a_list_that_cannot_be_run(arguments, message, tmp_path):
    result = run("bash", EXAMPLES / "run_list.sh", *arguments, check=False, cwd=tmp_path)
    assert result.returncode == 1 and message in result.stderr and not list(tmp_path.iterdir())


def test_slurm_gives_each_line_and_seed_a_job(tmp_path):
    lines = ["# comment", "", "--mapping softmax --dry-run", "  ", "--mapping multimax --order 1 --dry-run"]
    (tmp_path / "list.txt").write_text("\n".join(lines) + "\n")

    def job(number, **kwargs):
        command = ["bash", EXAMPLES / "slurm.sh", "iwslt14_de_en", tmp_path / "list.txt", 3]
        return run("env", f"SLURM_ARRAY_TASK_ID={number}", *command, cwd=ROOT, **kwargs)

    folders = [value(shlex.split(job(number).stdout), "--save-dir") for number in range(1, 7)]
    assert [folder.removeprefix("runs/iwslt14_de_en/") for folder in folders] == [
        f"{name}-seed{seed}" for name in ("softmax", "multimax-order1") for seed in (1, 2, 3)
    ]
    result = job(7, check=False)
    assert result.returncode == 1 and "has no line 3: --array is too long" in result.stderr


# ---------------------------------------------------------------------- the whole path


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """One translation experiment from made-up data to scores: (folder, what it printed)."""
    folder = tmp_path_factory.mktemp("smoke")
    return folder, recipe("iwslt14_de_en", "--cpu-smoke", cwd=folder).stdout


DATA = "data/smoke/iwslt14_de_en"
RUN = "runs/smoke/iwslt14_de_en/multimax-seed1"


@pytest.mark.slow
def test_the_record_says_what_the_run_was(smoke):
    folder, printed = smoke
    record = json.loads((folder / RUN / "run.json").read_text())
    assert (record["experiment"], record["smoke"], record["seed"]) == ("iwslt14_de_en", True, 1)
    assert record["mapping"]["attention_mapping"] == "multimax"
    for name, score in record["scores"].items():
        assert score["details"] in printed and f" = {score['bleu']:.2f} " in score["details"]
        hypotheses = (folder / RUN / score["hypotheses"]).read_text().splitlines()
        references = (folder / RUN / score["references"]).read_text().splitlines()
        assert len(hypotheses) == len(references) > 0, name
        lower_case = [[line.lower() for line in lines] for lines in (hypotheses, references)]
        bleu = sacrebleu.corpus_bleu(lower_case[0], [lower_case[1]])
        assert bleu.score == pytest.approx(score["bleu"], abs=0.005) and "case:lc" in score["signature"]
        assert "@@" not in "".join(hypotheses) and not re.search(r"&\w+;| [,.]", "".join(hypotheses))
    assert set(record["scores"]) == {"best", "average"}

    best = torch.load(folder / RUN / "checkpoint_best.pt")
    assert len(record["learned"]) == 3  # one layer each: encoder, decoder, cross
    for module, learned in record["learned"].items():
        for name in ("thresholds", "gains"):
            parameter = best["model"][f"{module}.{name}"]
            torch.testing.assert_close(torch.tensor(learned[name]), parameter, atol=1e-6, rtol=0)
    log = (folder / RUN / "train.log").read_text()
    logged = re.findall(r"valid on 'valid' subset \| loss (\S+) .* ppl (\S+) \| bleu (\S+) .* num_updates (\d+)", log)
    loss, ppl, bleu, updates = max(logged, key=lambda line: float(line[2]))  # the best checkpoint is that by BLEU
    assert record["validation"] == {
        "updates": int(updates), "metric": "bleu", "value": float(bleu), "loss": float(loss), "ppl": float(ppl)
    }  # fmt: skip
    assert record["whole_epochs"] == 2 and record["updates"] == int(re.findall(r"num_updates (\d+)", log)[-1])
    assert record["versions"]["torch"] == torch.__version__ and record["training_seconds"] > 0
    assert "--cpu-smoke" in record["command"] and "--attention-mapping multimax" in record["train_command"]
    # decoder embeddings and output are one matrix, counted once
    assert record["parameters"] == sum(p.numel() for p in parameters_of(folder / RUN / "checkpoint_best.pt"))


def parameters_of(path):
    from fairseq import checkpoint_utils

    (model,), _, _ = checkpoint_utils.load_model_ensemble_and_task(
        [str(path)], arg_overrides={"data": str(path.parents[4] / DATA / "data-bin")}
    )
    return model.parameters()


@pytest.mark.slow
def test_what_is_done_is_not_done_again_and_nothing_is_mixed(smoke):
    folder, _ = smoke
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    again = recipe("iwslt14_de_en", "--cpu-smoke", cwd=folder).stdout
    assert again == f"already done: {RUN}/run.json\n"
    mixed = recipe("iwslt14_de_en", "--cpu-smoke", "--mapping", "softmax", "--out", RUN, cwd=folder, check=False)
    assert "holds a run with other settings (there: mapping=multimax; asked for: mapping=softmax)" in mixed.stderr
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def translate(smoke, lines, *options, **kwargs):
    arguments = ["--run", smoke[0] / RUN, "--data", smoke[0] / DATA, *options]
    command = ["bash", ROOT / "scripts" / "translate.sh", *arguments]
    return run(*command, check=False, input="".join(f"{line}\n" for line in lines), **kwargs)


@pytest.mark.slow
def test_raw_german_is_translated_from_one_command_up_to_a_sentence_that_is_too_long(smoke):
    """Line by line, the translations of the test set, which fairseq-generate made in batches."""
    german = (smoke[0] / DATA / "raw" / "test.de").read_text().splitlines()[:3]
    result = translate(smoke, [*german, "ja " * 1100, "nein"])
    assert result.stdout.splitlines() == (smoke[0] / RUN / "best.hypotheses").read_text().splitlines()[:3]
    message = r"ERROR: line 4 is longer than the model or --max-tokens takes \(.*\): shorten it, or let .*\n"
    assert result.returncode == 1 and re.fullmatch(message, result.stderr)


@pytest.mark.slow
def test_a_sentence_that_is_too_long_can_be_cut(smoke):
    result = translate(smoke, ["ja " * 1100, "nein"], "--truncate")
    assert result.returncode == 0 and result.stdout.count("\n") == 2
    assert re.fullmatch(r"WARNING: line 1 is cut: it has \d{4} units, and the model takes 1023\n", result.stderr)


SAYS = "cat >/dev/null; echo 'Traceback' >&2; echo '{}' >&2; exit 1"


# a stand-in for fairseq-interactive, damage to a file, and what is said; "": nothing
@pytest.mark.slow
@pytest.mark.parametrize("stand_in, damaged, damage, status, message", [
    (SAYS.format("x"), f"{RUN}/checkpoint_best.pt", b"PK", 1, "checkpoint_best.pt cannot be read as a checkpoint"),
    (SAYS.format("x"), f"{DATA}/data-bin/dict.de.txt", None, 1, "data-bin has no dictionary dict.de.txt"),
    (SAYS.format("x"), f"{DATA}/data-bin/dict.de.txt", b"ja 1\n", 1, "is another one than that of"),
    (SAYS.format("ValueError: max_tokens"), None, None, 1, "line 1 is longer than the model or --max-tokens takes"),
    (SAYS.format("disk"), None, None, 1, "ERROR: fairseq-interactive failed: disk"),
    ("sleep 1", f"{RUN}/checkpoint_best.pt", None, 1, "checkpoint_best.pt: there is no such file"),
    ("sleep 1", f"{DATA}/bpe.codes", None, 1, "has neither bpe.codes nor sentencepiece.bpe.model"),
    ("seq -f 'H-%g\t0\tja' 99999", None, None, 0, ""),
])  # fmt: skip
def test_what_translate_says(stand_in, damaged, damage, status, message, smoke, tmp_path):
    (tmp_path / "fairseq-interactive").write_text(f"#!/bin/sh\n{stand_in}\n")
    (tmp_path / "fairseq-interactive").chmod(0o755)
    command = f'PATH={tmp_path}:$PATH; bash {ROOT}/scripts/translate.sh "$@" | head -n 1; exit ${{PIPESTATUS[0]}}'
    if damaged:
        shutil.copytree(smoke[0] / "data", tmp_path / "data")
        shutil.copytree(smoke[0] / "runs", tmp_path / "runs")
        (tmp_path / damaged).unlink()
        if damage is not None:
            (tmp_path / damaged).write_bytes(damage)
    folder = tmp_path if damaged else smoke[0]
    arguments = ["--run", folder / RUN, "--data", folder / DATA]
    result = run("bash", "-c", command, "-", *arguments, check=False, input="ja\n")
    assert result.returncode == status and message in result.stderr
    assert result.stderr.count("ERROR: ") == result.stderr.count("\n") == status


@pytest.mark.slow
def test_translate_needs_a_place_for_temporary_files(smoke):
    result = run("env", "TMPDIR=/nowhere", "bash", ROOT / "scripts" / "translate.sh", "--run", smoke[0] / RUN,
                 "--data", smoke[0] / DATA, check=False)  # fmt: skip
    assert result.returncode == 1 and result.stderr == (
        "ERROR: no temporary file can be made in /nowhere: set TMPDIR to a folder that is there\n"
    )


# ---------------------------------------------------------------------- a training that fails


def train_with(stand_in, folder, *options, shell=("bash", "-c"), before=":"):
    """multi30k_de_en/run.sh --only train, with a stand-in for fairseq-train, whose save-dir is $run."""
    for split in ("train", "valid", "test"):
        path = folder / "data" / "data-bin" / f"{split}.bin"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    (folder / "disk").mkdir(exist_ok=True)
    (folder / "fairseq-train").write_text(f"#!/bin/sh\nrun={folder}/disk/run\n{stand_in}\n")
    (folder / "fairseq-train").chmod(0o755)
    command = [EXAMPLES / "multi30k_de_en" / "run.sh", "--only", "train", "--data", folder / "data",
               "--out", folder / "disk" / "run", *options]  # fmt: skip
    return run(*shell, f'{before}; PATH={folder}:$PATH; bash "$@"', "-", *command, check=False)


def test_an_option_that_fairseq_does_not_know_binds_nothing(tmp_path):
    says = 'case "$*" in *--nonsense*) echo "fairseq-train: error: unrecognized arguments" >&2; exit 2;; esac'
    result = train_with(says, tmp_path, "--", "--nonsense")
    assert result.returncode == 1
    assert result.stderr.endswith("\nERROR: fairseq-train failed (exit status 2), as its last lines say\n")
    assert train_with(says, tmp_path).returncode == 0 and (tmp_path / "disk/run/trained").is_file()
    # once there is a checkpoint, another option is another run
    (tmp_path / "disk/run/checkpoint_last.pt").write_bytes(b"x")
    result = train_with(says, tmp_path, "--", "--nonsense")
    assert result.returncode == 1 and "holds a run with other settings" in result.stderr


def test_machines_train_a_run_together_and_any_goes_on_with_it(tmp_path):
    rank = "-- --distributed-init-method tcp://localhost:1 --distributed-rank"
    other = f"bash {EXAMPLES}/multi30k_de_en/run.sh --only train --data {tmp_path}/data --out $run {rank} 4"
    together = f'case "$*" in *"rank 0"*) {other} || exit 1;; esac; touch $run/checkpoint_last.pt'
    first = train_with(together, tmp_path, *f"{rank} 0".split())
    assert first.returncode == 0, first.stderr
    assert "already trained" in train_with(together, tmp_path).stdout  # no rank is a setting of the run


def test_a_full_disk_is_named(tmp_path):
    shell = ["unshare", "--user", "--map-root-user", "--mount", "bash", "-c"]
    mount = f"mount -t tmpfs -o size=1200k tmpfs {tmp_path}/disk"
    (tmp_path / "disk").mkdir()
    if run(*shell, mount, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    result = train_with("head -c 9000000 /dev/zero >$run/checkpoint1.pt", tmp_path, shell=shell, before=mount)
    assert "ERROR: fairseq-train failed (exit status 1), as its last lines say. The disk is full (" in result.stderr
