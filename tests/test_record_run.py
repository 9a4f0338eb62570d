"""scripts/record_run.py on files as the commands write them. Whole runs: test_run_experiments.py."""

import platform

import pytest
import torch
from conftest import PLUGIN, load_script, parse

from multimax_fairseq.tools import UserError

BLEU = "BLEU|nrefs:1|case:lc|eff:no|tok:13a|smooth:exp|version:2.6.0 = 34.56 66.1/41.2/28.0/19.4 (BP = 0.98 …)\n"
EVAL = """\
INFO:fairseq_cli.eval_lm:num. model params: 156,000,000
INFO:fairseq_cli.eval_lm:Evaluated 245,569 tokens in 9.1s (26985.60 tokens/s)
INFO:fairseq_cli.eval_lm:Loss (base 2): {loss}, Perplexity: {perplexity}
"""


@pytest.fixture(scope="module")
def record_run():
    return load_script("record_run")


def test_scores_are_read_from_what_the_commands_print(record_run, tmp_path):
    (tmp_path / "best.bleu").write_text(BLEU)
    for window, loss, perplexity in ((0, "4.9069", "30.00"), (400, "4.8580", "29.00"), (80, "4.8", "27.86")):
        (tmp_path / f"test.context-{window}.eval").write_text(EVAL.format(loss=loss, perplexity=perplexity))
    (bleu,) = record_run.bleu_scores(tmp_path).values()
    assert (bleu["bleu"], bleu["signature"]) == (34.56, BLEU.split(" = ")[0])
    scores = record_run.perplexities(tmp_path, is_sparse=False)
    assert list(scores) == ["test, context 400", "test, context 80", "test, context 0"]
    expected = {"tokens": 245569, "output": "test.context-400.eval"}
    assert scores["test, context 400"] == {"perplexity": 29.0, **expected}
    assert record_run.perplexities(tmp_path, is_sparse=True)["test, context 400"] == {
        "epsilon_perplexity": 29.0, **expected}


def test_settings_are_all_that_can_change_a_result(corpus):
    """Each of these options is one setting more or another; those of machines, paths and logs are none."""
    settings_of = load_script("settings").settings_of
    command = [corpus / "data-bin", "--user-dir", PLUGIN, "--arch", "multimax_transformer",
               "--optimizer", "adam", "--lr", "1e-3"]
    usual = settings_of(parse(command)[1])
    assert (usual["arch"], usual["lr"], usual["dropout"], usual["task"]) == (
        "multimax_transformer", [0.001], 0.1, "translation")
    expected, flags = dict(usual), []
    for option, key, value in (
        ("--lr 2e-3", "lr", [0.002]), ("--fp16", "fp16", True), ("--dropout 0.2", "dropout", 0.2),
        ("--max-tokens 9", "max_tokens", 9), ("--clip-norm 1", "clip_norm", 1.0),
        ("--update-freq 2", "update_freq", [2]),
        ("--adam-betas (0.9,0.98)", "adam_betas", "(0.9,0.98)"), ("--label-smoothing 0.1 --criterion "
         "label_smoothed_cross_entropy", "label_smoothing", 0.1), ("--encoder-layers 2", "encoder_layers", 2),
        ("--patience 3", "patience", 3), ("--max-update 7", "max_update", 7),
        ("--no-epoch-checkpoints --seed 3 --save-dir x --log-interval 5 --num-workers 0", "dropout", 0.2),
        ("--attention-mapping softmax", "dropout", 0.2),
    ):
        assert str(value) != str(usual.get(key))
        expected[key] = value
        flags += option.split()
    expected |= {"criterion": "label_smoothed_cross_entropy", "ignore_prefix_size": 0, "report_accuracy": False,
                 "max_tokens_valid": 9}  # fmt: skip
    found = settings_of(parse([*command, *flags])[1])
    assert {name: str(found[name]) for name in found} == {name: str(expected[name]) for name in expected}


def test_shared_parameters_count_once(record_run):
    embedding = torch.zeros(10, 4)
    state = {"encoder.version": torch.tensor([3.0]), "decoder.embed_tokens.weight": embedding,
             "decoder.output_projection.weight": embedding, "encoder.mapping.gains": torch.zeros(2, 2)}
    assert record_run.count_parameters(state) == 40 + 4


def test_hardware_names_no_machine(record_run):
    text = str(record_run.hardware())
    assert platform.node() not in text.split() and "cores" in text


def test_a_run_without_scores_has_no_record(record_run, tmp_path):
    for name in ("checkpoint_best.pt", "checkpoint_last.pt"):
        torch.save({"model": {"a": torch.ones(1)}, "cfg": {"model": {"arch": "transformer"}}}, tmp_path / name)
    with pytest.raises(UserError, match="has no scores"):
        record_run.record(tmp_path)
