"""Lets fairseq run on current torch and numpy, which it was not written for."""

import argparse
import collections
import functools
import importlib
import inspect
import logging
import types
import warnings
from typing import Any, List

import numpy
import omegaconf
import torch

# fairseq modules that use what numpy has removed; only these see numpy through :class:`OldNumpy`.
OUTDATED = ("fairseq.data.token_block_dataset", "fairseq.data.language_pair_dataset", "fairseq.data.data_utils")


# How the warnings begin that fairseq's calls of hydra and torch cause.
OUTDATED_CALLS = (
    r"hydra\.experimental\.(initialize|compose)\(\) is no longer experimental",
    r"\nThe version_base parameter is not specified",
    r"In 'config': Usage of deprecated keyword in package header",
    r"\n'config' is validated against ConfigStore schema",
    r"\nThe strict flag in the compose API is deprecated",
    r"`torch\.cuda\.amp\.",
    r"Support for mismatched key_padding_mask and attn_mask is deprecated",
)


def apply() -> None:
    """Restore what fairseq needs from older torch and numpy; does nothing if nothing is missing."""
    import_quietly()
    trust_plain_records()
    avoid_fused_layers()
    if not hasattr(numpy, "compat") or "interpolation" not in inspect.signature(numpy.percentile).parameters:
        for name in OUTDATED:
            importlib.import_module(name).np = OldNumpy("numpy")


def import_quietly() -> None:
    """Import fairseq without what one of its models does to logging, and silence warnings that nobody can act on.

    That model sets the root logger to DEBUG unless it has a handler. The warnings are about how fairseq, which has no
    newer version, calls hydra and torch; each command would print twenty lines of them.
    """
    root, handler = logging.getLogger(), logging.NullHandler()
    root.addHandler(handler)
    try:
        importlib.import_module("fairseq.tasks")
    finally:
        root.removeHandler(handler)
    for message in OUTDATED_CALLS:
        warnings.filterwarnings("ignore", message)


def trust_plain_records() -> None:
    """Let torch ≥ 2.6 load fairseq's checkpoints; it loads only types on its list of safe ones.

    Checkpoints hold an ``argparse.Namespace`` and, after ``--eval-bleu``, numpy arrays; what the first of several
    processes sends the others of a checkpoint has fairseq's placeholders for tensors, and omegaconf's configuration.
    These are plain records, so loading stays safe with them on the list.
    """
    if hasattr(torch.serialization, "add_safe_globals"):
        from fairseq.distributed.utils import _TensorPlaceholder

        containers = [omegaconf.DictConfig, omegaconf.ListConfig, omegaconf.base.ContainerMetadata]
        values = [omegaconf.AnyNode, omegaconf.base.Metadata, collections.defaultdict, dict, int, list, Any]
        records = [argparse.Namespace, _TensorPlaceholder, *containers, *values, *globals_of_arrays()]
        torch.serialization.add_safe_globals(records)


def avoid_fused_layers() -> None:
    """Keep encoder layers of fairseq 0.12.2 out of torch's fused kernel.

    It has softmax inside, and since torch 2.0 it refuses the masks that fairseq gives it: ``fairseq-generate`` would
    end at the first batch that has padding.
    """
    from fairseq.modules.transformer_layer import TransformerEncoderLayerBase as Layer

    build = Layer.__init__

    @functools.wraps(build)
    def build_unfused(layer, *args, **kwargs):
        build(layer, *args, **kwargs)
        layer.can_use_fastpath = False

    if "can_use_fastpath" in inspect.getsource(Layer):
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


def globals_of_arrays() -> List[Any]:
    """The globals in a pickled array or number of numpy's; some have moved between its versions."""
    dtypes = {type(numpy.dtype(kind)) for kind in (numpy.int64, numpy.float32, numpy.float64)}
    return [numpy.ndarray, numpy.dtype, numpy.zeros(1).__reduce__()[0], numpy.float64(1).__reduce__()[0], *dtypes]
