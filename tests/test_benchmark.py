"""The benchmark: its ratios and peaks on what is known beforehand, and a run of it on data. No time is asserted."""

import json
import os
import sys
import time

import pytest
import torch
from conftest import ROOT, call, load_script, run

SCRIPT = ROOT / "benchmarks" / "benchmark.py"


@pytest.fixture(scope="module")
def benchmark():
    return load_script("benchmark")


def test_sides_take_turns_with_the_first(benchmark):
    order = []
    sides = {name: lambda name=name: order.append(name) for name in ("first", "second", "third")}
    rows = benchmark.compare("case", sides, rounds=3)
    assert [row["side"] for row in rows] == ["first", "second", "third"] and rows[0]["ratio"] == 1.0
    # three times alone, to see how long that takes; two rounds to warm up; three that count
    assert order == ["second"] * 3 + ["first", "second"] * 5 + ["third"] * 3 + ["first", "third"] * 5


def test_a_ratio_is_the_median_of_the_ratios_of_rounds(benchmark, monkeypatch):
    clock = iter([0, 1, 0, 2, 0, 1, 0, 9, 0, 10, 0, 30])  # seconds of first, second, first, …
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    first, second = benchmark.alternate([int, int], rounds=3, warm_up=0)
    assert (first, second) == ([1, 1, 10], [2, 9, 30])
    row = benchmark.row_of("case", "second", [b / a for a, b in zip(first, second)], second)
    assert row == {"case": "case", "side": "second", "ratio": 3.0, "milliseconds": 9_000.0}


PEAK = f"""
import sys
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
import benchmark, torch

def side():
    torch.ones(2**24)  # 64 MiB, gone when the call is over
    torch.ones(2**22)

print(benchmark.peak_bytes(side))
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="peaks on a CPU are read from /proc")
def test_the_peak_of_an_allocation_that_is_known():
    # in a new process: one that has freed memory may take it from there
    # the kernel counts resident memory in batches of pages for each thread, so not to the last of them
    assert int(run(sys.executable, "-c", PEAK).stdout) == pytest.approx(2**26, rel=0.1)


def test_rows_of_a_mapping_compute_the_same(benchmark):
    rows, scores, upstream = benchmark.mappings(), torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    for name, twin in {
        "multimax, formula": "multimax",
        "sparsemax, package": "sparsemax",
        "entmax15, package": "entmax15",
        "entmax, α = 1.5, package": "entmax, α = 1.5",
        "entmax, learned": "entmax, α = 1.5",
    }.items():
        if name == "multimax, formula":
            rows[name].load_state_dict(rows[twin].state_dict())
        torch.testing.assert_close(rows[name](scores), rows[twin](scores), atol=1e-5, rtol=0)
        (grad, *of_parameters), (expected, *_) = (
            benchmark.mapping_sides(rows[which], scores, upstream)[1]() for which in (name, twin)
        )
        torch.testing.assert_close(grad, expected, atol=1e-5, rtol=0)
        assert len(of_parameters) == len(list(rows[name].parameters()))


@pytest.mark.parametrize("name", ["stock", "chunked", "sparsemax", "entmax15", "entmax"])
def test_sides_of_the_output_layer_give_gradients(benchmark, name, monkeypatch):
    monkeypatch.setattr(benchmark, "TYPES", 50)
    side, learned = benchmark.output_side(name, "softmax", 7)
    side()
    assert all(tensor.grad.abs().sum() > 0 for tensor in learned)


@pytest.mark.parametrize("arguments, message", [
    (["mappings"], "there is no section 'mappings'; choose from: mapping, attention, step"),
    (["epoch"], "generate and epoch need --data DATA_BIN"),
    (["mapping", "--rounds", "0"], "--rounds takes 1 or more"),
    (["mapping", "--json", "no/such/folder/figures.json"], "--json: there is no folder"),
])  # fmt: skip
def test_wrong_arguments_end_it_before_any_work(benchmark, arguments, message):
    result = call(benchmark, *arguments, check=False)
    assert result.returncode == 2 and message in result.stderr and not result.stdout


@pytest.mark.slow
def test_epochs_on_data(corpus, tmp_path):
    figures = tmp_path / "figures.json"
    run("python", SCRIPT, "epoch", "--data", corpus / "data-bin", "--updates", 1, "--json", figures)
    results = json.loads(figures.read_text())
    assert [(row["case"], row["side"]) for row in results["rows"]] == [
        (f"epoch {epoch}, 1 updates", side) for epoch in (1, 2) for side in ("stock", "multimax")
    ]
    assert all(row["words a second"] > 0 and row["ratio"] > 0 for row in results["rows"])
    assert results["compiled"]["graphs"] == 0  # the tests compute eagerly
