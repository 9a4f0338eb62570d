"""examples/retrieval/run.py: the task, the table and the figures, through the command."""

import json
from argparse import Namespace
from multiprocessing.pool import ThreadPool

import pytest
import torch
from conftest import call, load_script, rows_of

from multimax_fairseq import mappings

QUICK = ["--updates", 20, "--test-lengths", "12,64", "--processes", 1]


@pytest.fixture(scope="module")
def retrieval():
    return load_script("run")


def test_a_perfect_layer_has_no_error(retrieval):
    """The target is the mean of the values of the keys that match, which are as many as are said to."""
    batch = retrieval.draw(torch.Generator().manual_seed(0), 20)
    count = batch.matches.sum(-1)
    assert count.min() == 1 and count.max() == 8
    uniform = batch.matches / count[:, None]
    torch.testing.assert_close(torch.einsum("bl,bld->bd", uniform, batch.values), batch.target)
    similarity = torch.einsum("bd,bld->bl", batch.query, batch.keys)
    torch.testing.assert_close(batch.keys.norm(dim=-1), torch.ones(retrieval.BATCH, 20))
    # √(1 − 0.6²) = 0.8 of a match is the query, and of a distractor nothing
    assert similarity[batch.matches].mean() == pytest.approx(0.8, abs=0.03)
    assert similarity[~batch.matches].mean() == pytest.approx(0.0, abs=0.03)


def test_modulators_have_a_learning_rate_of_their_own(retrieval):
    layer = retrieval.Layer("multimax:order=1:lr_scale=10")
    others, modulators = layer.parameter_groups()
    assert {id(p) for p in modulators["params"]} == {id(layer.mapping.thresholds), id(layer.mapping.gains)}
    assert modulators["lr"] == 10 * others["lr"] and len(others["params"]) == 5  # weights, biases and the scale


class PerHead(torch.nn.Module):
    def __init__(self, num_heads: int = 4):
        super().__init__()
        self.log_temperature = torch.nn.Parameter(torch.zeros(num_heads, 1, 1))

    def forward(self, scores):
        return mappings.softmax(scores * (-self.log_temperature).exp())


def test_a_mapping_of_the_users_own_may_have_a_number_per_head(retrieval, monkeypatch):
    """As the command in docs/own-mapping.md says, with a module for scores of attention."""
    monkeypatch.setitem(mappings.MAPPINGS, "per_head", PerHead)
    layer = retrieval.Layer("per_head")
    query, keys, values = torch.randn(3, 16), torch.randn(3, 7, 16), torch.randn(3, 7, 2)
    output, probabilities = layer(query, keys, values)
    assert layer.mapping.log_temperature.shape == (1, 1, 1)
    torch.testing.assert_close(probabilities, layer.scores(query, keys).softmax(-1))
    output.sum().backward()
    assert layer.mapping.log_temperature.grad.abs() > 0


def test_the_table_has_ratios_to_softmax_of_the_same_seeds(retrieval):
    errors = {"softmax": (1.0, 2.0), "entmax15": (1.0, 3.0)}
    results = [{"row": row, "test_length": 8, "mse": mse, "mass_on_matches": 0.5}
               for row, of_seeds in errors.items() for mse in of_seeds]  # fmt: skip
    cells = rows_of(retrieval.table(results, list(errors), [8]))
    assert cells["softmax"] == ["1.5000 ± 0.7071", "0.50"]
    assert cells["entmax15"] == ["2.0000 ± 1.4142 (1.33, 1.50)", "0.50"]


@pytest.mark.slow
def test_a_run_is_resumed_and_has_a_table_and_figures(retrieval, tmp_path, monkeypatch):
    """In threads here, which have no numbers of threads of their own."""
    monkeypatch.setattr(retrieval.multiprocessing, "get_context", lambda kind: Namespace(Pool=ThreadPool))
    rows = "softmax,multimax:order=1:lr_scale=10,entmax:alpha=learned,softmax:scale=learned"
    call(retrieval, *QUICK, "--mappings", "softmax", "--seeds", 1, "--out", tmp_path)
    kept = json.loads((tmp_path / "results.json").read_text())
    second = call(retrieval, *QUICK, "--mappings", rows, "--seeds", "1,2", "--out", tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results) == 4 * 2 * 2 and all(record in results for record in kept)
    assert {"mapping", "options", "seed", "test_length", "mse", "mass_on_matches"} <= set(results[0])
    assert (tmp_path / "table.md").read_text() in second.stdout
    for name in ("errors", "modulators", "rows"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(retrieval.tools.UserError, match="has results of another number of updates"):
        call(retrieval, *QUICK, "--updates", 30, "--out", tmp_path)


@pytest.mark.parametrize(("options", "message"), [
    (["--mappings", "softmin"], "there is no mapping 'softmin'"),
    (["--mappings", "multimax:heads=2"], "multimax has no option heads"),
    (["--mappings", "multimax:order"], "options are written name=value"),
    (["--mappings", "softmax:scale=sqrt"], "there is no scale 'sqrt'; choose from"),
    (["--seeds", "0"], "argument --seeds: '0' is not a whole number above 0"),
    (["--test-lengths", "64,7"], "--test-lengths begin at 8, as so many keys may match"),
])  # fmt: skip
def test_bad_input_is_refused_before_any_training(options, message, retrieval, tmp_path):
    refused = call(retrieval, *options, "--out", tmp_path / "new", check=False)
    assert refused.returncode == 2 and message in refused.stderr
    assert not (tmp_path / "new").exists()
