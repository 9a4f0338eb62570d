"""Sparsemax, 1.5-entmax and α-entmax, exact, and safe on empty rows.

They run compiled where possible (:mod:`..kernels.sparse`); elsewhere, and as a reference, those of the ``entmax``
package serve.

Sources: sparsemax, Martins & Astudillo 2016; entmax, Peters, Niculae & Martins 2019; one learned α per head,
Correia, Niculae & Martins 2019.
"""

import math
from functools import partial
from typing import Callable, Optional, Union

import entmax as entmax_package
import torch
from torch import Tensor, nn

from ..kernels.sparse import fused_sparse
from .masking import compute_dtype, is_absent
from .option import Option

LEARNED_ALPHA_MIN = 1.01

# For α below this, the package's bisection loses too many digits of x^(1 / (α − 1)) in fp32, so it runs in fp64.
SINGLE_PRECISION_ALPHA = 1.01

# Halvings of an interval shorter than 1. The last 20 of the package's 50 change no bit in fp32.
ITERATIONS = {torch.float32: 30, torch.float64: 50}


def sparsemax(scores: Tensor, dim: int = -1) -> Tensor:
    """The Euclidean projection of the scores on the simplex: argmin_p ‖p − x‖².

    Args:
        scores: any shape, fp16, bf16, fp32 or fp64; −inf marks an absent score. NaN or +inf makes its row NaN.
        dim: the dimension that holds the distribution.

    Returns:
        probabilities, shape and dtype of ``scores``; zeros in a row without scores. Error against float64:
        below 1e-6 in fp32 for scores within ±20.
    """
    return _over_last(scores, dim, lambda x: fused_sparse("sparsemax", x, sparsemax_formula))


def entmax15(scores: Tensor, dim: int = -1) -> Tensor:
    """1.5-entmax: p_i = max(x_i / 2 − τ, 0)², with the τ that makes Σ p = 1.

    Args, Returns: as :func:`sparsemax`.
    """
    return _over_last(scores, dim, lambda x: fused_sparse("entmax15", x, entmax15_formula))


def entmax(scores: Tensor, alpha: Union[float, Tensor] = 1.5, dim: int = -1) -> Tensor:
    """α-entmax: p_i = max((α − 1) x_i − τ, 0)^(1 / (α − 1)), with the τ that makes Σ p = 1.

    Args:
        scores: any shape, fp16, bf16, fp32 or fp64; −inf marks an absent score. NaN or +inf makes its row NaN.
        alpha: 1 < α ≤ 2; 2 is sparsemax, towards 1 it becomes softmax. A tensor broadcasts over the scores,
            with size 1 in ``dim``, and gets a gradient.
        dim: the dimension that holds the distribution.

    Returns:
        probabilities, shape and dtype of ``scores``; zeros in a row without scores. Error against float64:
        below 1e-5 in fp32 for scores within ±20.

    Raises:
        ValueError: a number ``alpha`` outside (1, 2].
    """
    if not isinstance(alpha, Tensor) and not 1 < alpha <= 2:
        raise ValueError(f"α of entmax lies in (1, 2]; got {alpha}")
    if isinstance(alpha, Tensor):
        alpha = alpha.to(compute_dtype(scores.dtype))
        if alpha.dim():
            alpha = alpha.expand([1] * (scores.dim() - alpha.dim()) + list(alpha.shape)).movedim(dim, -1)
        c = alpha - 1
    else:
        c = torch.tensor(alpha - 1, dtype=torch.float64)
    formula = partial(entmax_formula, alpha=alpha)
    return _over_last(scores, dim, lambda x: fused_sparse("entmax", x, formula, c))


def sparsemax_formula(scores: Tensor) -> Tensor:
    """:func:`sparsemax` over the last dimension, by sorting."""
    return _project(scores, entmax_package.sparsemax)


def entmax15_formula(scores: Tensor) -> Tensor:
    """:func:`entmax15` over the last dimension, by sorting."""
    return _project(scores, entmax_package.entmax15)


def entmax_formula(scores: Tensor, alpha: Union[float, Tensor]) -> Tensor:
    """:func:`entmax` over the last dimension, by bisection."""

    def bisect(x: Tensor) -> Tensor:
        if not isinstance(alpha, Tensor) and alpha < SINGLE_PRECISION_ALPHA:
            return entmax_package.entmax_bisect(x.double(), alpha).to(x.dtype)
        return entmax_package.entmax_bisect(x, alpha, n_iter=ITERATIONS[x.dtype])

    return _project(scores, bisect)


def _over_last(scores: Tensor, dim: int, mapping: Callable[[Tensor], Tensor]) -> Tensor:
    if dim in (-1, scores.dim() - 1):
        return mapping(scores)
    return mapping(scores.movedim(dim, -1)).movedim(-1, dim)


def _project(scores: Tensor, projection: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply ``projection``, which maps over the last dimension, to the scores that are there."""
    if scores.numel() == 0:
        return scores.clone()
    x = scores.to(compute_dtype(scores.dtype))
    peak = x.detach().amax(-1, keepdim=True)
    # Subtracting the peak changes no projection, but saves the bisection's digits where scores are large. The package
    # handles single −inf scores, but not a row of them (0 / 0) or NaN: such a row gets scores of 0, and its result
    # is replaced.
    probabilities = projection((x - peak).masked_fill(~peak.isfinite(), 0.0))
    return probabilities.masked_fill(is_absent(x), 0.0).masked_fill(~(peak < math.inf), math.nan).to(scores.dtype)


class Sparsemax(nn.Module):
    """:func:`sparsemax` over the last dimension: entmax with α = 2."""

    alpha = 2.0

    def forward(self, scores: Tensor) -> Tensor:
        return sparsemax(scores)


class Entmax15(nn.Module):
    """:func:`entmax15` over the last dimension."""

    alpha = 1.5

    def forward(self, scores: Tensor) -> Tensor:
        return entmax15(scores)


class Entmax(nn.Module):
    """:func:`entmax` over the last dimension, with α fixed, or learned per head.

    Args:
        alpha: a number in (1, 2], or ``"learned"``: α = 1.01 + 0.99 · sigmoid(a), which starts at 1.5.
        num_heads: with a learned α, scores are (…, num_heads, tgt_len, src_len) and each head has its own;
            without it there is one α for all.

    Attributes:
        alpha_logits: parameter (num_heads,) or (1,), only where α is learned.

    Raises:
        ValueError: α is neither ``"learned"`` nor a number in (1, 2].
    """

    options = (
        Option("entmax_alpha", "alpha", "α of entmax: a number in (1, 2], or learned (one a head, one for the "
               "vocabulary)"),
    )  # fmt: skip

    def __init__(self, alpha: Union[float, str] = 1.5, num_heads: Optional[int] = None):
        super().__init__()
        self.fixed_alpha = None if alpha == "learned" else self._checked(alpha)
        if self.fixed_alpha is None:
            start = (1.5 - LEARNED_ALPHA_MIN) / (2 - LEARNED_ALPHA_MIN)
            self.alpha_logits = nn.Parameter(torch.full((num_heads or 1,), start).logit())

    @staticmethod
    def _checked(alpha: Union[float, str]) -> float:
        try:  # float() takes "1_5" for 15
            number = float("nan") if "_" in str(alpha) else float(alpha)
        except (TypeError, ValueError):
            number = float("nan")
        if not 1 < number <= 2:
            raise ValueError(f"α of entmax is a number in (1, 2] or 'learned'; got {alpha!r}")
        return number

    @property
    def alpha(self) -> Union[float, Tensor]:
        """The number, or the learned (num_heads,) of them, in (1, 2]."""
        if self.fixed_alpha is not None:
            return self.fixed_alpha
        return LEARNED_ALPHA_MIN + (2 - LEARNED_ALPHA_MIN) * self.alpha_logits.float().sigmoid()

    def extra_repr(self) -> str:
        return f"alpha={'learned' if self.fixed_alpha is None else self.fixed_alpha}"

    def forward(self, scores: Tensor) -> Tensor:
        alpha = self.alpha
        if isinstance(alpha, Tensor):
            alpha = alpha.view(-1, 1, 1) if alpha.numel() > 1 else alpha.view(())
        return entmax(scores, alpha)
