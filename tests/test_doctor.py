"""multimax-doctor: what it finds here, and that it finds what is not well."""

import importlib.metadata
import sys

import pytest
import torch
from conftest import run

from multimax_fairseq import doctor, mappings


@pytest.mark.slow
def test_the_command_finds_all_well_here():
    result = run(sys.executable, "-m", "multimax_fairseq.doctor")
    lines = result.stdout.splitlines()
    assert lines[-1] == "All is well." and all(line.startswith(("ok ", "INFO ")) for line in lines[:-1])
    assert lines[0].startswith("ok      Python 3.")
    for name in mappings.MAPPINGS:
        assert any(line.startswith(f"ok      {name}: error cpu float32") for line in lines)


def test_a_mapping_that_is_wrong_in_single_precision(monkeypatch, capsys):
    class Wrong(mappings.Softmax):
        def forward(self, scores):
            return super().forward(scores) * (1 if scores.dtype == torch.float64 else 1.1)

    monkeypatch.setitem(mappings.MAPPINGS, "wrong", Wrong)
    monkeypatch.setattr(sys, "argv", ["multimax-doctor"])
    assert doctor.main() == 1
    assert "PROBLEM wrong: error cpu float32" in capsys.readouterr().out


def test_packages_that_are_missing_or_do_not_fit(monkeypatch):
    requirements = ["torch>=99", "no-such-package>=1.0", "numpy; extra == 'test'", "tqdm"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: requirements)
    _, too_old, missing, present = doctor.check_packages()
    assert too_old == (False, f"torch {importlib.metadata.version('torch')}: install 'torch>=99'")
    assert missing == (False, "no-such-package is missing: install 'no-such-package>=1.0'")
    assert present[0] and present[1].startswith("tqdm ")
