"""Compiled or eager: who decides."""

import pytest

from multimax_fairseq.kernels import backend
from multimax_fairseq.kernels.backend import set_backend


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.delenv("MULTIMAX_BACKEND", raising=False)
    monkeypatch.setattr(backend, "_chosen", "auto")


def test_the_environment_overrides_the_choice(monkeypatch):
    assert backend.backend() == "auto"
    set_backend("eager")
    assert backend.backend() == "eager"
    monkeypatch.setenv("MULTIMAX_BACKEND", "compiled")
    assert backend.backend() == "compiled"


def test_a_backend_that_does_not_exist(monkeypatch):
    with pytest.raises(ValueError, match="--multimax-backend: there is no backend 'fast'; choose from: auto, c"):
        set_backend("fast")
    monkeypatch.setenv("MULTIMAX_BACKEND", "slow")
    with pytest.raises(ValueError, match="MULTIMAX_BACKEND: there is no backend 'slow'"):
        set_backend("auto")
