"""The backend belongs to a run: a checkpoint does not bring its own."""

import pytest
import torch
from conftest import save_checkpoint
from fairseq import checkpoint_utils

from multimax_fairseq.kernels import backend, compiler, rows
from multimax_fairseq.models import backend_option

ARCHITECTURES = ["multimax_transformer_tiny", "multimax_transformer_lm"]


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.delenv("MULTIMAX_BACKEND", raising=False)
    monkeypatch.setattr(backend, "_chosen", "auto")


@pytest.fixture
def checkpoint(build, tmp_path, monkeypatch):
    """checkpoint(arch, chosen) → the path of one trained with this --multimax-backend, as if in another process."""

    def checkpoint(arch, chosen):
        path = save_checkpoint(build(arch, "--multimax-backend", chosen), tmp_path / f"{arch}-{chosen}.pt")
        assert backend.backend() == chosen
        saved = torch.load(path)["cfg"]["model"]
        assert (saved if isinstance(saved, dict) else vars(saved))["multimax_backend"] == chosen
        monkeypatch.setattr(backend, "_chosen", "auto")
        return str(path)

    return checkpoint


def load(paths, overrides=None):
    models, _, _ = checkpoint_utils.load_model_ensemble_and_task(paths, overrides)
    return models


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("trained_with", ["compiled", "eager"])
@pytest.mark.parametrize("chosen", ["auto", "eager", "compiled"])
def test_a_checkpoint_changes_nothing(arch, trained_with, chosen, checkpoint, monkeypatch):
    path = checkpoint(arch, trained_with)
    monkeypatch.setattr(backend, "_chosen", chosen)
    load([path])
    assert backend.backend() == chosen


def test_an_ensemble_changes_nothing(checkpoint):
    paths = [checkpoint("multimax_transformer_tiny", name) for name in ("compiled", "eager", "auto")]
    assert len(load(paths)) == 3 and backend.backend() == "auto"


def test_trained_compiled_and_used_where_there_is_no_compiler(checkpoint, monkeypatch):
    def fail(*_):
        raise RuntimeError("no C++ compiler found")

    path = checkpoint("multimax_transformer_lm", "compiled")
    monkeypatch.setattr(compiler, "compile_function", fail)
    monkeypatch.setattr(compiler, "_failure", "")
    monkeypatch.setattr(rows.multimax_rows, "_compiled", {})  # what another test has had compiled
    (model,) = load([path])
    with torch.no_grad():
        logits, _ = model.double()(torch.arange(4, 12).view(2, 4))  # of double precision there is no C++ either
    assert logits.isfinite().all() and compiler._failure


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_what_overrides_a_model_says_is_of_this_run(arch, checkpoint):
    load([checkpoint(arch, "compiled")], {"multimax_backend": "eager"})
    assert backend.backend() == "eager"


def test_installing_twice_does_nothing():
    before = checkpoint_utils.load_checkpoint_to_cpu
    backend_option.install()
    assert checkpoint_utils.load_checkpoint_to_cpu is before
