"""Mappings from scores to probabilities, in plain torch, without fairseq.

Each is a function (``multimax``) and a module over the last dimension (``MultiMax``), which :func:`build_mapping`
makes from its name. :func:`register_mapping` adds your own.
"""

from ..kernels.scores import compute_dtype, is_absent
from .exponential import EvSoftmax, Softmax, evsoftmax, softmax
from .masking import ABSENT, additive_mask
from .modulator import MultiMax, modulate, multimax
from .registry import BUILT_IN, MAPPINGS, SPARSE, arguments_of, build_mapping, parse_options, register_mapping
from .sparse import Entmax, Entmax15, Sparsemax, entmax, entmax15, sparsemax
