"""Lets fairseq run on torch ≥ 2.6 and numpy ≥ 2, which it was not written for."""

import argparse
import functools
import inspect
import types

import numpy
import torch


def apply() -> None:
    """Give fairseq back what torch and numpy have taken away; does nothing where nothing is missing.

    - torch ≥ 2.6 loads only what it knows to be safe, and fairseq's checkpoints hold an ``argparse.Namespace`` and,
      after ``--eval-bleu``, arrays of numpy: plain records, so they are put on torch's list, and loading stays safe.
    - numpy ≥ 2 has no ``numpy.compat``, whose ``long`` (Python's int) fairseq asks for in ``token_block_dataset``
      (``--sample-break-mode eos``) and ``language_pair_dataset`` (``--num-batch-buckets``).
    - numpy ≥ 2.4 has no keyword ``interpolation`` in ``numpy.percentile``; it is called ``method`` now
      (``--num-batch-buckets``).
    """
    if hasattr(torch.serialization, "add_safe_globals"):
        torch.serialization.add_safe_globals([argparse.Namespace, *_globals_of_arrays()])
    if not hasattr(numpy, "compat"):
        numpy.compat = types.SimpleNamespace(long=int)
    if "interpolation" not in inspect.signature(numpy.percentile).parameters:
        numpy.percentile = _with_old_keyword(numpy.percentile)


def _globals_of_arrays():
    """What a pickled array of numbers refers to; numpy has moved some of it from version to version."""
    dtypes = {type(numpy.dtype(kind)) for kind in (numpy.int64, numpy.float32, numpy.float64)}
    return [numpy.ndarray, numpy.dtype, numpy.zeros(1).__reduce__()[0], *dtypes]


def _with_old_keyword(percentile):
    @functools.wraps(percentile)
    def percentile_with_interpolation(*args, interpolation=None, **kwargs):
        if interpolation is not None:
            kwargs["method"] = interpolation
        return percentile(*args, **kwargs)

    # what is looked at to see that this has been done
    signature = inspect.signature(percentile)
    keyword = inspect.Parameter("interpolation", inspect.Parameter.KEYWORD_ONLY, default=None)
    percentile_with_interpolation.__signature__ = signature.replace(
        parameters=[*signature.parameters.values(), keyword]
    )
    return percentile_with_interpolation
