"""Lets fairseq run on current torch and numpy, which it was not written for."""

import argparse
import functools
import importlib
import inspect
import types

import numpy
import torch

# fairseq modules that use what numpy has removed.
OUTDATED = ("fairseq.data.token_block_dataset", "fairseq.data.language_pair_dataset", "fairseq.data.data_utils")


def apply() -> None:
    """Restore what fairseq needs from older torch and numpy; does nothing if nothing is missing.

    - torch loads fairseq's checkpoints: :func:`trust_plain_records`.
    - Encoder layers attend to padded batches: :func:`avoid_fused_layers`.
    - Only the three fairseq modules in ``OUTDATED`` see numpy through :class:`OldNumpy`.
    """
    trust_plain_records()
    avoid_fused_layers()
    if not hasattr(numpy, "compat") or "interpolation" not in inspect.signature(numpy.percentile).parameters:
        for name in OUTDATED:
            importlib.import_module(name).np = OldNumpy("numpy")


def trust_plain_records() -> None:
    """Let torch ≥ 2.6 load fairseq's checkpoints; it loads only types on its list of safe ones.

    Checkpoints hold an ``argparse.Namespace`` and, after ``--eval-bleu``, numpy arrays. These are plain records, so
    loading stays safe with them on the list.
    """
    if hasattr(torch.serialization, "add_safe_globals"):
        torch.serialization.add_safe_globals([argparse.Namespace, *_globals_of_arrays()])


def avoid_fused_layers() -> None:
    """Keep encoder layers of fairseq 0.12.2 out of torch's fused kernel.

    It has softmax inside, and since torch 2.0 it refuses the masks that fairseq gives it: ``fairseq-generate`` would
    end at the first batch that has padding.
    """
    from fairseq.modules.transformer_layer import TransformerEncoderLayerBase as Layer

    build = Layer.__init__
    if "can_use_fastpath" not in build.__code__.co_names or hasattr(build, "__wrapped__"):  # or done before
        return

    @functools.wraps(build)
    def build_unfused(layer, *args, **kwargs):
        build(layer, *args, **kwargs)
        layer.can_use_fastpath = False

    Layer.__init__ = build_unfused


class OldNumpy(types.ModuleType):
    """numpy with the old names that fairseq uses.

    - numpy ≥ 2 has no ``numpy.compat``; ``--sample-break-mode eos`` and ``--num-batch-buckets`` use its ``long``
      (Python's int).
    - numpy ≥ 2.4 has no keyword ``interpolation`` in ``numpy.percentile``, called ``method`` since 1.22
      (``--num-batch-buckets``).
    """

    compat = types.SimpleNamespace(long=int)

    def __getattr__(self, name: str):
        return getattr(numpy, name)

    @staticmethod
    def percentile(*args, interpolation: str = "linear", **kwargs):
        return numpy.percentile(*args, **{"method": interpolation, **kwargs})


def _globals_of_arrays():
    """The globals in a pickled array of numbers; some have moved between numpy versions."""
    dtypes = {type(numpy.dtype(kind)) for kind in (numpy.int64, numpy.float32, numpy.float64)}
    return [numpy.ndarray, numpy.dtype, numpy.zeros(1).__reduce__()[0], *dtypes]
