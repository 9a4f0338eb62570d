"""scripts/record_run.py on files as the commands write them. Whole runs: test_run_experiments.py."""

import platform
from unittest.mock import ANY

import pytest
import torch
from conftest import PLUGIN, load_script, parse, save_checkpoint

from multimax_fairseq.tools import UserError

record_run = load_script("record_run")

EVAL = """\
INFO:fairseq_cli.eval_lm:num. model params: 156,000,000
INFO:fairseq_cli.eval_lm:Evaluated 245,569 tokens in 9.1s (26985.60 tokens/s)
INFO:fairseq_cli.eval_lm:Loss (base 2): {loss}, Perplexity: {perplexity}
"""


def test_perplexities_are_read_from_what_the_command_prints(tmp_path):
    for window, loss, perplexity in ((0, "4.9069", "30.00"), (400, "4.8580", "29.00"), (80, "4.8", "27.86")):
        (tmp_path / f"test.context-{window}.eval").write_text(EVAL.format(loss=loss, perplexity=perplexity))
    scores = record_run.perplexities(tmp_path, is_sparse=False)
    assert list(scores) == ["test, context 400", "test, context 80", "test, context 0"]
    expected = {"tokens": 245569, "output": "test.context-400.eval"}
    assert scores["test, context 400"] == {"perplexity": 29.0, **expected}
    assert record_run.perplexities(tmp_path, is_sparse=True)["test, context 400"] == {
        "epsilon_perplexity": 29.0, **expected}


def test_settings_are_all_that_can_change_a_result(corpus):
    """Each of these options is one setting more or another; those of machines, paths and logs are none."""
    command = [corpus / "data-bin", "--user-dir", PLUGIN, "--arch", "multimax_transformer", "--optimizer", "adam"]
    flags = """--lr 2e-3 --fp16 --dropout 0.2 --max-tokens 9 --clip-norm 1 --update-freq 2 --adam-betas (0.9,0.98)
        --criterion label_smoothed_cross_entropy --label-smoothing 0.1 --encoder-layers 2 --patience 3 --max-update 7
        --no-epoch-checkpoints --seed 3 --save-dir x --log-interval 5 --num-workers 0 --attention-mapping softmax"""
    usual, found = (load_script("settings").settings_of(parse([*command, *more])[1]) for more in ([], flags.split()))
    expected = {
        "lr": [0.002], "fp16": True, "dropout": 0.2, "max_tokens": 9, "max_tokens_valid": 9, "clip_norm": 1.0,
        "update_freq": [2], "adam_betas": "(0.9,0.98)", "criterion": "label_smoothed_cross_entropy",
        "label_smoothing": 0.1, "ignore_prefix_size": 0, "report_accuracy": False, "encoder_layers": 2, "patience": 3,
        "max_update": 7,
    }
    assert all(str(usual.get(name)) != str(value) for name, value in expected.items())
    assert {name: str(value) for name, value in found.items()} == {
        name: str(value) for name, value in (usual | expected).items()}
    assert (usual["arch"], usual["task"], usual["dictionary"]) == ("multimax_transformer", "translation", ANY)


def test_shared_parameters_count_once():
    embedding = torch.zeros(10, 4)
    state = {"encoder.version": torch.tensor([3.0]), "decoder.embed_tokens.weight": embedding,
             "decoder.output_projection.weight": embedding, "encoder.mapping.gains": torch.zeros(2, 2)}
    assert record_run.count_parameters(state) == 40 + 4


def test_hardware_names_no_machine():
    text = str(record_run.hardware())
    assert platform.node() not in text.split() and "cores" in text


def test_validation_is_of_the_best_checkpoint_and_length_of_the_last(build, tmp_path):
    best = save_checkpoint(build("multimax_transformer"), tmp_path / "checkpoint_best.pt")
    state = torch.load(best, weights_only=False)
    state["optimizer_history"][-1]["num_updates"] = 7
    torch.save(state, tmp_path / "checkpoint_last.pt")
    with pytest.raises(UserError, match="has no scores"):
        record_run.record(tmp_path)
    (tmp_path / "test.context-0.eval").write_text(EVAL.format(loss="4.9", perplexity="30.00"))
    found = record_run.record(tmp_path)
    assert (found["validation"]["updates"], found["updates"]) == (1, 7)
