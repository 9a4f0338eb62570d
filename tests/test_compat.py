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


def test_numpy_has_the_integer_that_fairseq_asks_for():
    compat.apply()
    assert numpy.dtype(numpy.compat.long) == numpy.dtype(int)


def test_a_second_call_changes_nothing():
    compat.apply()
    namespace = numpy.compat
    compat.apply()
    assert numpy.compat is namespace


def test_both_datasets_that_need_numpy_compat_build(corpus, build):
    built = build("multimax_transformer_lm", "--sample-break-mode", "eos", "--tokens-per-sample", 64)
    built.task.load_dataset("valid")  # token_block_dataset
    assert len(built.task.dataset("valid")) == 60
    built = build("multimax_transformer", "--num-batch-buckets", 3)
    built.task.load_dataset("valid")  # language_pair_dataset
    lengths = [length for _, length in built.task.dataset("valid").buckets]
    assert 1 < len(lengths) <= 2 * 3 and lengths == sorted(lengths)  # 3 of each language, or the longer of the two
