"""MultiMax: softmax of scores that a learned piece-wise polynomial has modulated.

Softmax has one temperature. A low one is sparse but keeps a single mode, a high one keeps many modes but gives
everything else some probability too. MultiMax bends the scores first, steeper where they are small (so that
they vanish) and flatter where they are large (so that several survive), and learns where and how much::

    σ(x) = x + Σ_{n=1..N} [ g_b,n · max(b_n − x, 0)^n + g_d,n · max(x − d_n, 0)^n ]

Source: Zhou, Fritz, Keuper, *MultiMax: Sparse and Multi-Modal Attention Learning*, ICML 2024 (PMLR
235:61897-61912). In the paper's temperatures t, g_b,n = 1 − t_b,n and g_d,n = t_d,n − 1: g = 0 is softmax.
"""

import math
from typing import Any, Dict, Sequence, Tuple, Union

import torch
from torch import Tensor, nn

from ..kernels.rows import Rows
from ..kernels.rows.mapped import map_rows
from ..kernels.rows.modulated import modulated
from ..kernels.scores import compute_dtype, is_absent
from .exponential import masked_softmax

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
    return masked_softmax(modulate_formula(x, thresholds, gains), is_absent(x)).to(scores.dtype)


def _check_shapes(thresholds: Tensor, gains: Tensor) -> None:
    if thresholds.shape not in ((1, 2), (2, 2)) or gains.shape != thresholds.shape:
        raise ValueError(
            "thresholds and gains must both have the shape (order, 2), order 1 or 2, rows (below, above); "
            f"got {tuple(thresholds.shape)} and {tuple(gains.shape)}"
        )


class MultiMax(nn.Module):
    """:func:`multimax` over the last dimension, with its own thresholds and gains.

    Args:
        order: N of σ, 1 or 2.
        init: ``"normal"`` draws thresholds and gains from a normal of std 0.02 truncated at ±2, as the paper's
            authors do.
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
        lr_scale: the learning rate of thresholds and gains, times that of other parameters, with every optimizer: the
            trained tensors are the numbers divided by it. A state dict holds the numbers themselves.

    Attributes:
        thresholds: parameter (N, 2), rows (b_n, d_n), divided by ``lr_scale``.
        gains: parameter (N, 2), rows (g_b,n, g_d,n), likewise; :meth:`coefficients` has both as σ uses them.
        gradient_scale: factor of the gradient that the parameters get, 1 unless set.

    Raises:
        ValueError: an order, initialisation, term or scale that does not exist.
    """

    options = {  # of the command line: name, argument of the constructor, help
        "multimax_order": ("order", "order N of MultiMax's modulator: 1 or 2"),
        "multimax_terms": ("terms", "comma-separated sides of the modulator that are learned: below, above"),
        "multimax_init": ("init", "start of the modulator: normal (std 0.02, as in the paper), identity (softmax at "
                          "step 0), or shaped (steeper below, flatter above)"),
        "modulator_lr_scale": ("lr_scale", "learning rate of the modulators, times that of the other parameters"),
    }  # fmt: skip
    may_change = ("init", "lr_scale")  # arguments with which a run need not go on

    def __init__(
        self,
        order: int = 2,
        init: str = "normal",
        terms: Union[str, Sequence[str]] = ",".join(TERMS),
        lr_scale: float = 1.0,
    ):
        super().__init__()
        terms = [term.strip() for term in (terms.split(",") if isinstance(terms, str) else terms)]
        if order not in ORDERS:
            raise ValueError(f"MultiMax has the orders {', '.join(map(str, ORDERS))}; got {order!r}")
        if init not in INITS:
            raise ValueError(f"MultiMax can start as {' or '.join(INITS)}; got {init!r}")
        if not terms or set(terms) - set(TERMS):
            raise ValueError(f"MultiMax learns the terms {', '.join(TERMS)}, or one of them; got {terms}")
        if not (isinstance(lr_scale, (int, float)) and 0 < lr_scale < math.inf):
            raise ValueError(f"the modulators' learning rate is scaled by a finite number above 0; got {lr_scale!r}")
        self.order = order
        self.init = init
        self.terms = tuple(term for term in TERMS if term in terms)
        self.lr_scale = lr_scale
        self.gradient_scale = 1.0
        self.thresholds = nn.Parameter(torch.zeros(order, 2))
        self.gains = nn.Parameter(torch.zeros(order, 2))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for parameter, shape in ((self.thresholds, SHAPED_THRESHOLDS), (self.gains, SHAPED_GAINS)):
            if self.init == "normal":
                nn.init.trunc_normal_(parameter, std=0.02, a=-2.0, b=2.0)
            else:
                parameter.copy_(torch.tensor(shape)[: self.order] if self.init == "shaped" else torch.zeros(1))
            parameter.div_(self.lr_scale)
            for side, term in enumerate(TERMS):
                if term not in self.terms:
                    parameter[:, side] = 0

    def extra_repr(self) -> str:
        return f"order={self.order}, init={self.init!r}, terms={self.terms}, lr_scale={self.lr_scale}"

    def kernel_rows(self) -> Rows:
        return Rows("multimax", self.coefficients(), multimax_formula)

    def forward(self, scores: Tensor) -> Tensor:
        return map_rows(self.kernel_rows(), scores)

    def modulate(self, scores: Tensor) -> Tensor:
        """:func:`modulate` with this module's parameters; softmax of it is :meth:`forward`."""
        return modulate(scores, *self.coefficients())

    def coefficients(self) -> Tuple[Tensor, Tensor]:
        """Thresholds and gains, both (N, 2), as σ uses them: a side that is not learned has gains of 0.

        A parameter q stands for the number p = ``lr_scale`` · q, and gets ``gradient_scale`` times the gradient of p.
        """
        thresholds, gains = self.thresholds, self.gains
        if not self.lr_scale == self.gradient_scale == 1:
            thresholds, gains = map(self._number, (thresholds, gains))
        if self.terms != TERMS:  # with a gain of 0 the threshold gets no gradient either
            side = TERMS.index(self.terms[0])
            gains = nn.functional.pad(gains[:, side : side + 1], (side, 1 - side))
        return thresholds, gains

    def _number(self, parameter: Tensor) -> Tensor:
        return (self.lr_scale * parameter).detach() + self.gradient_scale * (parameter - parameter.detach())

    def _save_to_state_dict(self, destination: Dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in ("thresholds", "gains") if self.lr_scale != 1 else ():
            destination[prefix + name] = destination[prefix + name] * self.lr_scale

    def _load_from_state_dict(self, state_dict: Dict[str, Tensor], prefix: str, *args: Any) -> None:
        own = {prefix + name for name in ("thresholds", "gains")}
        stored = {name: tensor / self.lr_scale if name in own else tensor for name, tensor in state_dict.items()}
        super()._load_from_state_dict(stored, prefix, *args)
