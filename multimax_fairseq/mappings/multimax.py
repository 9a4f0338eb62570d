"""MultiMax: softmax of scores that a learned piece-wise polynomial has modulated.

Softmax has one temperature. A low one is sparse but keeps a single mode, a high one keeps many modes but gives
everything else some probability too. MultiMax bends the scores first, steeper where they are small (so that
they vanish) and flatter where they are large (so that several survive), and learns where and how much::

    σ(x) = x + Σ_{n=1..N} [ g_b,n · max(b_n − x, 0)^n + g_d,n · max(x − d_n, 0)^n ]

Source: Zhou, Fritz, Keuper, *MultiMax: Sparse and Multi-Modal Attention Learning*, ICML 2024 (PMLR
235:61897-61912). In the paper's temperatures t, g_b,n = 1 − t_b,n and g_d,n = t_d,n − 1: g = 0 is softmax.
"""

import hashlib
from typing import Optional, Sequence

import torch
from torch import Tensor, nn

from ..kernels.rows import Rows
from ..kernels.rows.mapped import map_rows
from ..kernels.rows.modulated import modulated
from .masking import compute_dtype, is_absent, masked_softmax

TERMS = ("below", "above")  # the columns of thresholds and gains: (b_n, d_n) and (g_b,n, g_d,n)
ORDERS = (1, 2)
INITS = ("normal", "identity", "shaped")

# "shaped": (b_n, d_n), and (g_b,n, g_d,n), for n = 1, 2.
SHAPED_THRESHOLDS = ((0.0, 2.0), (0.0, 2.0))
SHAPED_GAINS = ((-0.5, -0.5), (-0.05, -0.02))


def modulate(scores: Tensor, thresholds: Tensor, gains: Tensor) -> Tensor:
    """σ(x), the modulated scores.

    σ acts on absolute scores: it is not shift-invariant, and it need not be monotone. −inf stays −inf; with all gains
    0, finite scores of any size stay as they are. Otherwise σ follows the formula: a gain g_b,2 = 0.1 turns −1e9,
    which some use as a mask, into +1e17, and what exceeds the dtype becomes ±inf. So masks must be −inf here
    (:func:`.masking.additive_mask` converts others).

    Args:
        scores: any shape, fp16, bf16, fp32 or fp64. The polynomial is computed in fp32 at least; fp16 holds
            the result only up to 65,504 (σ(x) ≈ g·x² gets there at x = 256 / √g), so cast before, not after,
            where scores are large.
        thresholds: (N, 2), rows (b_n, d_n): the score below, or above, which the n-th term acts.
        gains: (N, 2), rows (g_b,n, g_d,n); 0 switches a term off.

    Returns:
        shape and dtype of ``scores``. Error against float64: below 1e-6 relative to |x| + Σ|terms| in fp32.

    Raises:
        ValueError: ``thresholds`` and ``gains`` are not both (N, 2), N 1 or 2.
    """
    _check_shapes(thresholds, gains)
    return modulated(scores, thresholds, gains, modulate_formula)


def multimax(scores: Tensor, thresholds: Tensor, gains: Tensor, dim: int = -1) -> Tensor:
    """softmax(σ(x)) over the scores that are there.

    Args:
        scores: any shape, fp16, bf16, fp32 or fp64; −inf marks an absent score: its probability and its
            gradient are exactly 0. A row without scores gives zeros. Other rows are as from PyTorch's softmax: all
            NaN where a score is NaN or +inf, where a σ overflows to +inf, or where all σ overflow to −inf.
        thresholds, gains: (N, 2), as in :func:`modulate`.
        dim: the dimension that holds the distribution.

    Returns:
        probabilities, shape and dtype of ``scores``. Error against float64 in fp32: about 1e-7 · max |σ(x)|,
        which is 1e-6 for scores within ±20 and gains as they start.

    Raises:
        ValueError: ``thresholds`` and ``gains`` are not both (N, 2), N 1 or 2.
    """
    _check_shapes(thresholds, gains)
    return map_rows(Rows("multimax", (thresholds, gains), multimax_formula), scores, dim)


def modulate_formula(scores: Tensor, thresholds: Tensor, gains: Tensor) -> Tensor:
    """:func:`modulate` as the paper writes it, for readers, and for autograd to differentiate twice."""
    x = scores.to(compute_dtype(scores.dtype))
    absent = is_absent(x)
    x = x.masked_fill(absent, 0.0)
    modulated, thresholds, gains = x, thresholds.to(x.dtype), gains.to(x.dtype)
    for n in reversed(range(len(gains))):  # the square first: it decides for huge scores; last, it could meet −inf
        (b, d), (gain_b, gain_d) = thresholds[n], gains[n]
        below, above = (b - x).relu(), (x - d).relu()
        terms = gain_b * below, gain_d * above
        if n == 1:  # gain first: a gain of 0 times a square that overflows would be NaN
            terms = terms[0] * below, terms[1] * above
        modulated = modulated + terms[0] + terms[1]
    return modulated.masked_fill(absent, float("-inf")).to(scores.dtype)


def multimax_formula(scores: Tensor, thresholds: Tensor, gains: Tensor) -> Tensor:
    """:func:`multimax` over the last dimension, as softmax of :func:`modulate_formula`."""
    x = scores.to(compute_dtype(scores.dtype))
    return masked_softmax(modulate_formula(x, thresholds, gains), is_absent(x), dim=-1).to(scores.dtype)


def _check_shapes(thresholds: Tensor, gains: Tensor) -> None:
    if thresholds.shape not in ((1, 2), (2, 2)) or gains.shape != thresholds.shape:
        raise ValueError(
            "thresholds and gains must both have the shape (order, 2), order 1 or 2, rows (below, above); "
            f"got {tuple(thresholds.shape)} and {tuple(gains.shape)}"
        )


class _Draws:
    """Random numbers that depend on torch's random state, and leave it unchanged.

    If torch's state has changed since the last draw, it seeds the generator anew; if not, as between modules made in
    a row, the generator goes on. So under one ``torch.manual_seed`` the same modules made in the same order get the
    same numbers, and no two of them share any.
    """

    def __init__(self):
        self.state: Optional[Tensor] = None
        self.generator = torch.Generator()

    def generator_now(self) -> torch.Generator:
        state = torch.get_rng_state()
        if self.state is None or not torch.equal(state, self.state):
            digest = hashlib.blake2b(state.numpy().tobytes(), digest_size=8).digest()
            self.generator.manual_seed(int.from_bytes(digest, "little"))
            self.state = state
        return self.generator


_draws = _Draws()


class MultiMax(nn.Module):
    """:func:`multimax` over the last dimension, with its own thresholds and gains.

    Args:
        order: N of σ, 1 or 2.
        init: ``"normal"`` draws thresholds and gains from a normal of std 0.02 truncated at ±2, as the paper's
            authors do. Drawing leaves torch's global random state unchanged, so that models with other mappings
            start from the same projections under the same seed. The draws depend on that state; modules made in a
            row differ. (Repeating ``torch.manual_seed(s)`` after one module, with nothing else drawn, goes unnoticed:
            the next module is the second in the row.)
            ``"identity"`` sets them to 0: exact softmax at step 0, and still trainable (the gradient of a gain does
            not vanish with the gain).
            ``"shaped"`` starts all modules in the shape that the paper shows: thresholds of 0 below and 2 above,
            gains of −0.5 (order 1) and −0.05 below, −0.02 above (order 2). The slope of σ is then 1.5 and more below
            0, 1 between, and 0.5 and less above 2; with order 2 it stays positive up to scores of 14. Only the signs
            matter: with random ones, order 2 finds the better of two optima only by chance. On retrieval (one layer,
            64 keys of which 1 to 8 match, modulators at 10 × the learning rate), gains of −0.3 above, −1 below, or
            other second orders give the same within 1 %, so the numbers are round.
        terms: which sides are learned, of ``("below", "above")``. The other side is switched off: its gains and
            thresholds are 0 and get no gradient.

    Attributes:
        thresholds: parameter (N, 2), rows (b_n, d_n).
        gains: parameter (N, 2), rows (g_b,n, g_d,n).

    Raises:
        ValueError: an order, initialisation or term that does not exist.
    """

    def __init__(self, order: int = 2, init: str = "normal", terms: Sequence[str] = TERMS):
        super().__init__()
        if order not in ORDERS:
            raise ValueError(f"MultiMax has the orders {', '.join(map(str, ORDERS))}; got {order!r}")
        if init not in INITS:
            raise ValueError(f"MultiMax can start as {' or '.join(INITS)}; got {init!r}")
        if not terms or set(terms) - set(TERMS):
            raise ValueError(f"MultiMax learns the terms {', '.join(TERMS)}, or one of them; got {list(terms)}")
        self.order = order
        self.init = init
        self.terms = tuple(term for term in TERMS if term in terms)
        learned = torch.tensor([float(term in terms) for term in TERMS])
        self.register_buffer("learned", learned, persistent=False)  # (2,)
        self.thresholds = nn.Parameter(torch.zeros(order, 2))
        self.gains = nn.Parameter(torch.zeros(order, 2))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        starts = {"identity": [torch.zeros(2, 2)] * 2, "shaped": map(torch.tensor, (SHAPED_THRESHOLDS, SHAPED_GAINS))}
        with torch.no_grad():
            for parameter, start in zip((self.thresholds, self.gains), starts.get(self.init, [None] * 2)):
                if start is None:
                    start = torch.empty(self.order, 2, device="cpu")
                    nn.init.trunc_normal_(start, std=0.02, a=-2.0, b=2.0, generator=_draws.generator_now())
                parameter.copy_(start[: self.order].to(parameter.device) * self.learned.to(parameter.device))

    def extra_repr(self) -> str:
        return f"order={self.order}, init={self.init!r}, terms={self.terms}"

    def rows(self) -> Rows:
        return Rows("multimax", (self.thresholds, self.effective_gains), multimax_formula)

    def forward(self, scores: Tensor) -> Tensor:
        return multimax(scores, self.thresholds, self.effective_gains)

    def modulate(self, scores: Tensor) -> Tensor:
        """:func:`modulate` with this module's parameters; softmax of it is :meth:`forward`."""
        return modulate(scores, self.thresholds, self.effective_gains)

    @property
    def effective_gains(self) -> Tensor:
        """(N, 2): the gains, 0 on a side that is not learned, so that its threshold gets no gradient either."""
        return self.gains if self.terms == TERMS else self.gains * self.learned
