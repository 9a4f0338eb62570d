"""examples/own_mapping: mappings of one's own, from a folder of one's own, through the real commands."""

import json
import runpy
from argparse import Namespace
from unittest import mock

import pytest
import torch
from conftest import ROOT, TINY, run

from multimax_fairseq import mappings
from multimax_fairseq.mappings import softmax

FOLDER = ROOT / "examples" / "own_mapping"
INF = float("inf")


@pytest.fixture
def example():
    """What the example defines; what it registers is forgotten."""
    with mock.patch.dict(mappings.MAPPINGS):
        return Namespace(**runpy.run_path(str(FOLDER / "__init__.py")))


def test_top_k_is_softmax_of_the_largest(example):
    scores = torch.tensor([[3.0, -INF, 1.0, 2.0, 0.0], [-INF, -INF, -INF, -INF, 1.0]])
    expected = softmax(torch.tensor([[3.0, -INF, -INF, 2.0, -INF], [-INF, -INF, -INF, -INF, 1.0]]))
    torch.testing.assert_close(example.TopKSoftmax(k=2)(scores), expected)
    torch.testing.assert_close(example.TopKSoftmax(k=9)(scores), softmax(scores))


def test_softmax_plus_one_may_leave_a_row_empty(example):
    scores = torch.tensor([[1.0, 2.0, -INF], [-50.0, -60.0, -INF]])
    exponentials = scores.exp()
    expected = exponentials / (1 + exponentials.sum(-1, keepdim=True))
    torch.testing.assert_close(example.SoftmaxPlusOne()(scores), expected)


@pytest.mark.slow
def test_it_trains_is_remembered_by_the_checkpoint_and_is_analysed(corpus, tmp_path):
    """test_run_experiments.py: it generates, too."""
    run("fairseq-train", corpus / "data-bin", "--user-dir", FOLDER, "--arch", "multimax_transformer", *TINY,
        "--attention-mapping", "topk_softmax", "--mapping-options", "k=3", "--optimizer", "adam", "--lr", "1e-3",
        "--max-tokens", 1000, "--max-update", 3, "--cpu", "--num-workers", 0, "--save-dir", tmp_path)  # fmt: skip
    state = torch.load(tmp_path / "checkpoint_last.pt", weights_only=False)
    model = state["cfg"]["model"]
    assert (model.attention_mapping, model.mapping_options) == ("topk_softmax", "k=3")
    run("multimax-analyze", tmp_path / "checkpoint_last.pt", "--data", corpus / "data-bin", "--user-dir", FOLDER,
        "--max-sentences", 4, "--show", "--out", tmp_path / "report", "--cpu")  # fmt: skip
    report = json.loads((tmp_path / "report" / "results.json").read_text())
    assert '"topk_softmax"' in json.dumps(report)
