"""Sparsemax, 1.5-entmax and α-entmax, exact, and safe on empty rows.

The formulas find without gradients which scores have a probability (the *support*), or the threshold. From that they
compute the probabilities in closed form, or by one more step of Newton, so that autograd finds the implicit gradient.

Sources: sparsemax, Martins & Astudillo 2016; entmax, Peters, Niculae & Martins 2019; one learned α per head,
Correia, Niculae & Martins 2019. Newton's method on a norm is ours.
"""

import math
from typing import Callable, Optional, Tuple, Union

import torch
from torch import Tensor, nn

from ..kernels.rows import Rows
from ..kernels.rows.mapped import map_rows
from ..kernels.scores import compute_dtype, is_absent

LEARNED_ALPHA_MIN = 1.01

# Rows of normal scores take 6 steps of Newton. A step reduces (N − 1)·N' to a quarter or less. The worst rows found,
# whose scores are powers of a number, take 7 with 512 scores and 12 with 32,768.
STEPS = 12


def sparsemax(scores: Tensor, dim: int = -1) -> Tensor:
    """The Euclidean projection of the scores on the simplex: argmin_p ‖p − x‖².

    Args:
        scores: any shape, fp16, bf16, fp32 or fp64; −inf marks an absent score. NaN or +inf makes its row NaN.
        dim: the dimension that holds the distribution.

    Returns:
        probabilities, shape and dtype of ``scores``; zeros in a row without scores. Error against float64:
        below 1e-6 in fp32 for scores within ±20.
    """
    return map_rows(Rows("sparsemax", (), sparsemax_formula), scores, dim)


def entmax15(scores: Tensor, dim: int = -1) -> Tensor:
    """1.5-entmax: p_i = max(x_i / 2 − τ, 0)², with the τ that makes Σ p = 1.

    Args, Returns: as :func:`sparsemax`.
    """
    return map_rows(Rows("entmax15", (), entmax15_formula), scores, dim)


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
    if isinstance(alpha, Tensor) and alpha.dim():
        alpha = alpha.expand([1] * (scores.dim() - alpha.dim()) + list(alpha.shape)).movedim(dim, -1)
    return map_rows(_entmax_rows(alpha), scores, dim)


def sparsemax_formula(scores: Tensor) -> Tensor:
    """:func:`sparsemax` over the last dimension, by sorting, in PyTorch's operators."""

    def project(d: Tensor) -> Tensor:
        support = _support(d, lambda size, mean, squares: mean - 1 / size)
        size, mean = _moments(d, support)
        return torch.where(support, d - mean + 1 / size, 0.0).relu()

    return _project(scores, project)


def entmax15_formula(scores: Tensor) -> Tensor:
    """:func:`entmax15` over the last dimension, by sorting, in PyTorch's operators."""

    def threshold(size: Tensor, mean: Tensor, squares: Tensor) -> Tensor:
        return mean - ((1 - squares).clamp(min=0.0) / size).sqrt()

    def project(d: Tensor) -> Tensor:
        half = d / 2
        support = _support(half, threshold)
        size, mean = _moments(half, support)
        squares = torch.where(support, half - mean, 0.0).square().sum(-1, keepdim=True)
        return torch.where(support, half - mean + ((1 - squares) / size).sqrt(), 0.0).relu().square()

    return _project(scores, project)


def entmax_formula(scores: Tensor, c: Union[float, Tensor]) -> Tensor:
    """:func:`entmax` with α = 1 + c over the last dimension, by Newton's method, in PyTorch's operators.

    With d = x − max x, p = max(t + c·d, 0)^(1/c) for the t in (0, 1] that makes Σ p = 1. It is the root
    of N(t) − 1 with the norm N(t) = (Σ max(t + c·d, 0)^(1/c))^c, convex and nearly straight, so that Newton's method
    from t = 1 falls to the root in a few steps and never below it::

        q = max(1 + (c / t)·d, 0)^(1/c)        p = q / Σ q        t ← t − (t − (Σ q)^−c) · Σ q / Σ q^(1−c)

    The logarithm of 1 + (c / t)·d keeps its digits where c is small, so this holds down to softmax. One more step
    from the root has the derivative of the root; two more have its second derivative, too.
    """
    if isinstance(c, Tensor):
        c = c.to(compute_dtype(scores.dtype))

    def project(d: Tensor) -> Tensor:
        fixed_c = c.detach() if isinstance(c, Tensor) else c
        with torch.no_grad():
            t = torch.ones_like(d[..., :1])
            for _ in range(STEPS):
                t = _newton_step(d.detach(), t, fixed_c)
        for _ in range(2):
            t = _newton_step(d, t, c)
        q, _ = _powers(d, t, c)
        return q / _at_least(q.sum(-1, keepdim=True))

    return _project(scores, project)


def _newton_step(d: Tensor, t: Tensor, c: Union[float, Tensor]) -> Tensor:
    q, base = _powers(d, t, c)
    total, slopes = _at_least(q.sum(-1, keepdim=True)), _at_least((q / base).sum(-1, keepdim=True))
    return t - (t - (-c * total.log()).exp()) * total / slopes


def _powers(d: Tensor, t: Tensor, c: Union[float, Tensor]) -> Tuple[Tensor, Tensor]:
    """q and its base, which is 1 where q is 0."""
    base_less_1 = (c / t) * d
    outside = base_less_1 <= -1  # false for NaN
    inside = torch.where(outside, 0.0, base_less_1)
    return torch.where(outside, 0.0, (torch.log1p(inside) / c).exp()), 1 + inside


def _at_least(total: Tensor) -> Tensor:
    """``total``, kept above 0. It is 1 or more, except in a row without scores, where all is replaced."""
    return total.clamp(min=torch.finfo(total.dtype).tiny)


def _support(d: Tensor, threshold: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """Where p > 0. A score exactly at the threshold is outside.

    Args:
        d: (…, width), at most 0; those at −1 and below have no part.
        threshold: the threshold if the largest were the support, from their number, mean and squared deviations.
    """
    with torch.no_grad():
        ordered = d.clamp(min=-1.0).sort(-1, descending=True).values
        size = torch.arange(1, d.size(-1) + 1, device=d.device, dtype=d.dtype)
        mean = ordered.cumsum(-1) / size
        squares = ordered.square().cumsum(-1) - size * mean.square()
        is_inside = ordered > threshold(size, mean, squares)
        smallest = ordered.gather(-1, (is_inside.sum(-1, keepdim=True) - 1).clamp(min=0))
        return d >= smallest


def _moments(d: Tensor, support: Tensor) -> Tuple[Tensor, Tensor]:
    """Number and mean of the scores of the support."""
    size = support.sum(-1, keepdim=True).to(d.dtype)
    return size, torch.where(support, d, 0.0).sum(-1, keepdim=True) / size


def _project(scores: Tensor, projection: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply ``projection``, which maps over the last dimension, to the scores that are there."""
    x = scores.to(compute_dtype(scores.dtype))
    peak = x.detach().amax(-1, keepdim=True)
    # Subtracting the peak changes no projection, but saves digits where scores are large. A row of nothing but −inf,
    # or with NaN or +inf, gets scores of 0, and its result is replaced.
    absent, is_number = is_absent(x), peak < math.inf
    d = (x - peak).masked_fill(~peak.isfinite() | absent, 0.0).masked_fill(absent & peak.isfinite(), -1e30)
    probabilities = projection(d).masked_fill(absent, 0.0)
    no_number = x.masked_fill(is_number, 0.0) * torch.where(is_number, 0.0, math.nan)  # nor has it a gradient
    return torch.where(is_number, probabilities, no_number).to(scores.dtype)


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

    options = {
        "entmax_alpha": ("alpha", "α of entmax: a number in (1, 2], or learned (one a head, one for the vocabulary)"),
    }

    def __init__(self, alpha: Union[float, str] = 1.5, num_heads: Optional[int] = None):
        super().__init__()
        self.fixed_alpha = None if alpha == "learned" else self._checked(alpha)
        if self.fixed_alpha is None:
            start = (1.5 - LEARNED_ALPHA_MIN) / (2 - LEARNED_ALPHA_MIN)
            self.alpha_logits = nn.Parameter(torch.full((num_heads or 1,), start).logit())

    @staticmethod
    def _checked(alpha: Union[float, str]) -> float:
        try:
            number = float(alpha)
        except (TypeError, ValueError):
            number = float("nan")
        if not 1 < number <= 2:
            raise ValueError(f"α of entmax is a number in (1, 2] or 'learned'; got {alpha!r}")
        return number

    __jit_unused_properties__ = ["alpha"]  # tracing compiles all others

    @property
    def alpha(self) -> Union[float, Tensor]:
        """The number, or the learned (num_heads,) of them, in (1, 2]."""
        if self.fixed_alpha is not None:
            return self.fixed_alpha
        return 1 + self._learned_c()

    def _learned_c(self) -> Tensor:
        return (LEARNED_ALPHA_MIN - 1) + (2 - LEARNED_ALPHA_MIN) * self.alpha_logits.float().sigmoid()

    def extra_repr(self) -> str:
        return f"alpha={'learned' if self.fixed_alpha is None else self.fixed_alpha}"

    def kernel_rows(self) -> Rows:
        if self.fixed_alpha is not None:
            return _entmax_rows(self.fixed_alpha)
        c = self._learned_c()
        return Rows("entmax", (c.view(-1, 1, 1) if c.numel() > 1 else c,), entmax_formula)

    def forward(self, scores: Tensor) -> Tensor:
        return map_rows(self.kernel_rows(), scores)


class Sparsemax(Entmax):
    """:func:`sparsemax` over the last dimension: entmax with α = 2."""

    options = {}

    def __init__(self):
        super().__init__(2.0)


class Entmax15(Entmax):
    """:func:`entmax15` over the last dimension."""

    options = {}

    def __init__(self):
        super().__init__(1.5)


def _entmax_rows(alpha: Union[float, Tensor]) -> Rows:
    if isinstance(alpha, Tensor):
        return Rows("entmax", (alpha - 1,), entmax_formula)
    if alpha in (1.5, 2.0):  # which are exact
        return Rows("entmax15", (), entmax15_formula) if alpha == 1.5 else Rows("sparsemax", (), sparsemax_formula)
    c = torch.tensor(alpha - 1, dtype=torch.float32)
    return Rows("entmax, fixed", (c,), lambda scores, _: entmax_formula(scores, alpha - 1))
