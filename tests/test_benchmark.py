"""The benchmark: its ratios and peaks on what is known beforehand. No time is asserted."""

import os
import sys
import time

import pytest
import torch
from conftest import ROOT, call, load_script, run


@pytest.fixture(scope="module")
def benchmark():
    return load_script("benchmark")


def test_a_ratio_is_the_median_of_the_ratios_of_rounds_in_which_sides_take_turns(benchmark, monkeypatch):
    order, now = [], [0.0]
    seconds = {"first": iter([7, 1, 1, 10]), "second": iter([7, 2, 9, 30])}

    def side(name):
        order.append(name)
        now[0] += next(seconds[name])

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(benchmark, "SECONDS", 1000)
    rows = benchmark.compare("case", {name: lambda name=name: side(name) for name in seconds}, rounds=3)
    assert order == ["first", "second"] * 4  # of which the first round does not count
    assert rows == [
        {"case": "case", "side": "first", "ratio": 1.0, "milliseconds": 1_000.0},
        {"case": "case", "side": "second", "ratio": 3.0, "milliseconds": 9_000.0},
    ]


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
    rows, scores = benchmark.mappings(), torch.randn(2, 3, 5)
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


@pytest.mark.parametrize("name", ["stock", "chunked", "sparsemax", "entmax15", "entmax"])
def test_sides_of_the_output_layer_give_gradients(benchmark, name, monkeypatch):
    monkeypatch.setattr(benchmark, "TYPES", 50)
    side, learned = benchmark.output_side(name, "softmax", 7)
    side()
    assert all(tensor.grad.abs().sum() > 0 for tensor in learned)


@pytest.mark.parametrize("arguments, message", [
    (["mappings"], "there is no section 'mappings'; choose from: mapping, attention, step"),
    (["mapping", "--rounds", "0"], "--rounds: '0' is not a whole number above 0"),
    (["mapping", "--json", "no/such/folder/figures.json"], "there is no folder no/such/folder"),
])  # fmt: skip
def test_wrong_arguments_end_it_before_any_work(benchmark, arguments, message):
    result = call(benchmark, *arguments, check=False)
    assert result.returncode and message in result.stderr and not result.stdout
