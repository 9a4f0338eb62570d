"""The mappings under test, their oracles and tolerances, and scores to try them on, for test_mappings_*.

``CASES`` is the one table. ``case_params`` turns it, or some of its rows, into a parametrisation.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import reference
import torch
from hypothesis import strategies as st

from multimax_fairseq import mappings

INF = float("inf")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

# Multiples of 1/32, exact in every dtype: what a test measures is the computation, not the parameters.
THRESHOLDS = torch.tensor([[0.5, -0.25], [1.0, 0.75]], dtype=torch.float64)
GAINS = torch.tensor([[0.25, -0.125], [-0.0625, 0.03125]], dtype=torch.float64)
ALPHA = 1.25


@dataclass(frozen=True)
class Case:
    """A mapping, its oracle, and the largest error of its arithmetic on scores within ±20."""

    name: str
    function: Callable  # (scores, dim=-1) → probabilities
    oracle: Callable  # list of floats → list of floats
    fp64: float  # absolute
    fp32: float  # absolute; the figure that the docstring states, or less
    fp16: float = 0.0  # absolute, besides: what the docstring says of fp16

    def expected(self, scores, dim=-1):
        return reference.over_rows(self.oracle, scores, dim)

    def tolerance(self, dtype):
        """``atol`` and ``rtol`` for a result in ``dtype``.

        fp64, fp32: the error of the arithmetic in that dtype, from the table below.
        fp16, bf16: the arithmetic is fp32, so its error and one rounding to the dtype: half a unit in the
        last of 11 or 8 binary digits, and in fp16 up to half of the smallest number there is, 2^-24.
        """
        atol, rtol = {
            torch.float64: (self.fp64, 0.0),
            torch.float32: (self.fp32, 0.0),
            torch.float16: (self.fp32 + self.fp16 + 2.0**-25, 2.0**-11),
            torch.bfloat16: (self.fp32, 2.0**-8),
        }[dtype]
        return {"atol": atol, "rtol": rtol}


CASES = {
    case.name: case
    for case in (
        # exp of a difference and one quotient: a few units in the last place.
        Case("softmax", mappings.softmax, reference.softmax, 3e-14, 3e-7),
        # |σ| reaches 35 under these parameters; its rounding error is the relative error of exp(σ).
        Case("multimax", partial(mappings.multimax, thresholds=THRESHOLDS, gains=GAINS),
             partial(reference.multimax, thresholds=THRESHOLDS.tolist(), gains=GAINS.tolist()), 1e-13, 3e-6),
        # A threshold from a sum of scores less the largest one, of which the support lies within 1.
        Case("sparsemax", mappings.sparsemax, reference.sparsemax, 1e-14, 3e-7),
        # The threshold is a root, and the difference from it is squared.
        Case("entmax15", mappings.entmax15, partial(reference.entmax, alpha=1.5), 1e-14, 1e-6),
        # (α − 1)·x is rounded before the power 1 / (α − 1) multiplies its error.
        Case("entmax", partial(mappings.entmax, alpha=ALPHA), partial(reference.entmax, alpha=ALPHA), 1e-13, 3e-6),
        # A softmax of what is kept.
        Case("evsoftmax", mappings.evsoftmax, reference.evsoftmax, 3e-14, 3e-7),
        # In fp16 raised to the smallest normal number, in rows of 80 at most.
        Case("evsoftmax_training", partial(mappings.evsoftmax, training=True),
             partial(reference.evsoftmax, training=True), 3e-14, 3e-7, 80 * 2.0**-14),
    )
}  # fmt: skip


def case_params(*names):
    """``@case_params()`` runs a test for every mapping, ``@case_params("softmax", …)`` for these."""
    cases = [CASES[name] for name in names or CASES]
    return pytest.mark.parametrize("case", cases, ids=[case.name for case in cases])


dtype_params = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).split(".")[-1])


def random_scores(*shape, scale=1.0, seed=0, dtype=torch.float64):
    """Normal scores of standard deviation ``scale``."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def masked_scores(*shape, scale=1.0, seed=0, dtype=torch.float64):
    """Normal scores, about a third of them absent; no row is empty."""
    scores = random_scores(*shape, scale=scale, seed=seed, dtype=dtype)
    absent = torch.rand(*shape, generator=torch.Generator().manual_seed(seed + 1)) < 1 / 3
    absent[..., 0] &= ~absent.all(-1)
    return scores.masked_fill(absent, -INF)


def weighted_gradient(function, scores):
    """Gradient of Σ weight · function(scores) with weights that differ from entry to entry."""
    scores = scores.detach().clone().requires_grad_()
    probabilities = function(scores)
    weights = torch.arange(1.0, probabilities.numel() + 1).sin().reshape(probabilities.shape)
    (probabilities * weights.to(probabilities.dtype)).sum().backward()
    return scores.grad


def assert_matches_oracle(case, scores):
    probabilities = case.function(scores)
    assert probabilities.dtype == scores.dtype
    torch.testing.assert_close(probabilities.double(), case.expected(scores), **case.tolerance(scores.dtype))


def assert_on_simplex(case, probabilities, scores):
    """Finite, not negative, exactly 0 where absent, of sum 1 (0 where nothing is there)."""
    p, absent = probabilities.double(), scores == -INF
    assert p.isfinite().all() and (p >= 0).all()
    assert (p[absent] == 0).all()
    tolerance = case.tolerance(probabilities.dtype)
    atol = tolerance["rtol"] + scores.size(-1) * tolerance["atol"]  # Σ (atol + rtol · p)
    torch.testing.assert_close(p.sum(-1), (~absent).any(-1).double(), atol=atol, rtol=0)


@st.composite
def score_matrices(draw, limit, dtypes=DTYPES):
    """A few rows of scores within ±``limit``, any of them absent, in one of ``dtypes``.

    Scores are multiples of 1/8: their sums are exact in fp32, so that a score equal to its row's mean is so
    for the oracle too, and none comes within rounding of it without being equal.
    """
    rows, columns = draw(st.integers(1, 3)), draw(st.integers(1, 8))
    present = st.integers(-8 * limit, 8 * limit).map(lambda eighths: eighths / 8)
    entries = st.lists(present | st.just(-INF), min_size=rows * columns, max_size=rows * columns)
    scores = torch.tensor(draw(entries), dtype=torch.float64).reshape(rows, columns)
    return scores.to(draw(st.sampled_from(dtypes)))
