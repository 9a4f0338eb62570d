"""Lets fairseq run on torch ≥ 2.6 and numpy ≥ 2, which it was not written for."""

import argparse
import importlib
import inspect
import types

import numpy
import torch

# Modules of fairseq that ask numpy for what it no longer has.
OUTDATED = ("fairseq.data.token_block_dataset", "fairseq.data.language_pair_dataset", "fairseq.data.data_utils")


def apply() -> None:
    """Give fairseq back what torch and numpy have taken away; does nothing where nothing is missing.

    - torch loads fairseq's checkpoints: :func:`trust_plain_records`.
    - Three modules of fairseq see numpy through :class:`OldNumpy`; nobody else does.
    """
    trust_plain_records()
    if not hasattr(numpy, "compat") or "interpolation" not in inspect.signature(numpy.percentile).parameters:
        for name in OUTDATED:
            importlib.import_module(name).np = OldNumpy("numpy")


def trust_plain_records() -> None:
    """Let torch ≥ 2.6, which loads only what it knows to be safe, load fairseq's checkpoints.

    They hold an ``argparse.Namespace`` and, after ``--eval-bleu``, arrays of numpy: plain records, so they are put on
    torch's list, and loading stays safe.
    """
    if hasattr(torch.serialization, "add_safe_globals"):
        torch.serialization.add_safe_globals([argparse.Namespace, *_globals_of_arrays()])


class OldNumpy(types.ModuleType):
    """numpy, with what fairseq knows it by.

    - numpy ≥ 2 has no ``numpy.compat``, whose ``long`` (Python's int) ``--sample-break-mode eos`` and
      ``--num-batch-buckets`` ask for.
    - numpy ≥ 2.4 has no keyword ``interpolation`` in ``numpy.percentile``; it is called ``method`` since 1.22
      (``--num-batch-buckets``).
    """

    compat = types.SimpleNamespace(long=int)

    def __getattr__(self, name: str):
        return getattr(numpy, name)

    @staticmethod
    def percentile(*args, interpolation: str = "linear", **kwargs):
        return numpy.percentile(*args, **{"method": interpolation, **kwargs})


def _globals_of_arrays():
    """What a pickled array of numbers refers to; numpy has moved some of it from version to version."""
    dtypes = {type(numpy.dtype(kind)) for kind in (numpy.int64, numpy.float32, numpy.float64)}
    return [numpy.ndarray, numpy.dtype, numpy.zeros(1).__reduce__()[0], *dtypes]
