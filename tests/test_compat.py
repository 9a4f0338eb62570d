"""fairseq on current torch and numpy."""

import argparse

import numpy
import pytest
import torch

from multimax_fairseq import compat


def test_a_namespace_can_be_loaded_and_what_is_unsafe_cannot(tmp_path):
    compat.apply()
    torch.save({"args": argparse.Namespace(arch="multimax_transformer")}, tmp_path / "safe.pt")
    assert torch.load(tmp_path / "safe.pt")["args"].arch == "multimax_transformer"
    if not hasattr(torch.serialization, "add_safe_globals"):
        pytest.skip("this torch loads whatever a file holds")
    torch.save({"code": eval}, tmp_path / "unsafe.pt")
    with pytest.raises(Exception, match="weights_only|WeightsUnpickler"):
        torch.load(tmp_path / "unsafe.pt")


@pytest.mark.parametrize("dtype", ["int64", "float32", "float64"])
def test_an_array_can_be_loaded(dtype, tmp_path):
    """--eval-bleu leaves counts of n-grams in a checkpoint."""
    compat.apply()
    counts = numpy.arange(4, dtype=dtype)
    torch.save({"counts": counts}, tmp_path / "counts.pt")
    loaded = torch.load(tmp_path / "counts.pt")["counts"]
    assert loaded.dtype == dtype and (loaded == counts).all()


def test_old_numpy_is_numpy_and_what_fairseq_asks_for():
    old = compat.OldNumpy("numpy")
    assert numpy.dtype(old.compat.long) == numpy.dtype(int) and old.array is numpy.array
    values = [1, 2, 4, 8]
    assert old.percentile(values, 40, interpolation="lower") == 2
    assert old.percentile(values, 40) == numpy.percentile(values, 40)
    assert old.percentile(values, 40, method="higher") == 4


def test_a_trained_encoder_attends_to_a_padded_batch(build, batch):
    built = build("transformer")
    built.model.load_state_dict(built.model.state_dict())  # after which fairseq 0.12.2 would take the fused kernel
    inputs = batch(built)["net_input"]
    assert inputs["src_tokens"].eq(built.task.source_dictionary.pad()).any()
    with torch.no_grad():
        assert torch.isfinite(built.model(**inputs)[0]).all()


def test_other_libraries_see_numpy_as_it_is():
    before = vars(numpy).copy()
    compat.apply()
    assert vars(numpy) == before


def test_both_datasets_that_need_numpy_compat_build(corpus, build):
    built = build("multimax_transformer_lm", "--sample-break-mode", "eos", "--tokens-per-sample", 64)
    built.task.load_dataset("valid")  # token_block_dataset
    assert len(built.task.dataset("valid")) == 60
    built = build("multimax_transformer", "--num-batch-buckets", 3)
    built.task.load_dataset("valid")  # language_pair_dataset
    lengths = [length for _, length in built.task.dataset("valid").buckets]
    assert 1 < len(lengths) <= 2 * 3 and lengths == sorted(lengths)  # 3 of each language, or the longer of the two
