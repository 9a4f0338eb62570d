"""examples/own_mapping: mappings of one's own, from a folder of one's own, through the real commands."""

import importlib.util
import json
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
    """The example's module; what it registers is forgotten afterwards."""
    spec = importlib.util.spec_from_file_location("own_mapping", FOLDER / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(mappings.MAPPINGS):
        spec.loader.exec_module(module)
        yield module


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
def test_it_trains_is_remembered_by_the_checkpoint_and_generates(corpus, tmp_path):
    common = [corpus / "data-bin", "--user-dir", FOLDER]
    training = ["--arch", "multimax_transformer", *TINY, "--attention-mapping", "topk_softmax", "--mapping-options",
                "k=3", "--optimizer", "adam", "--lr", "1e-3", "--max-tokens", 1000, "--max-update", 3, "--cpu",
                "--num-workers", 0, "--save-dir", tmp_path]  # fmt: skip
    run("fairseq-train", *common, *training)
    state = torch.load(tmp_path / "checkpoint_last.pt", weights_only=False)
    model = state["cfg"]["model"]
    assert (model.attention_mapping, model.mapping_options) == ("topk_softmax", "k=3")
    result = run("fairseq-generate", *common, "--path", tmp_path / "checkpoint_last.pt", "--beam", 2, "--cpu",
                 "--max-len-b", 5, "--num-workers", 0)  # fmt: skip
    assert "Generate test with beam=2" in result.stdout

    run("multimax-analyze", tmp_path / "checkpoint_last.pt", "--data", corpus / "data-bin", "--user-dir", FOLDER,
        "--max-sentences", 4, "--show", "--out", tmp_path / "report", "--cpu")  # fmt: skip
    report = json.loads((tmp_path / "report" / "results.json").read_text())
    assert '"topk_softmax"' in json.dumps(report)

    refused = run("fairseq-train", *common, *training, "--mapping-options", "m=3", check=False)
    assert refused.returncode and "topk_softmax has no 'm'; it takes: k" in refused.stderr
