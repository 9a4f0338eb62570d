"""Output projection, output mapping and cross-entropy together, in the chunks of :mod:`.chunks`.

With p = softmax(σ(x)), x a token's V logits, t its target, and fairseq's ε_i = ε / (V − 1) for label smoothing ε::

    loss = − (1 − ε − ε_i) log p_t − ε_i Σ_v log p_v = log Σ_v exp σ(x_v) − (1 − ε − ε_i) σ(x_t) − ε_i Σ_v σ(x_v)
    ∂loss / ∂σ(x_v) = p_v − ε_i − (1 − ε − ε_i) [v = t]
"""

from typing import NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from ..compiler import Kernel
from ..rows.compiled import modulate_rows, modulate_rows_backward, present_sigma, sigma, sigma_backward
from ..scores import compute_dtype, is_absent
from .chunks import RowsLoss, blocks_of_rows, check_options, chunked_loss


class TokenLosses(NamedTuple):
    """Sums over tokens, or a number for each, in nat."""

    loss: Tensor  # with label smoothing
    nll_loss: Tensor  # − log p_t; no gradient


def chunked_cross_entropy(
    features: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Optional[Tensor] = None,
    thresholds: Optional[Tensor] = None,
    gains: Optional[Tensor] = None,
    label_smoothing: float = 0.0,
    chunk_tokens: int = 0,
    reduce: bool = True,
) -> TokenLosses:
    """Cross-entropy of ``softmax(σ(features @ weight.T + bias))`` with ``targets``, in bounded memory.

    Besides weight, features and their gradients, it needs memory for the logits of one chunk. Autocast decides the
    dtype of products; under it, and in fp16 and bf16, the gradients are accumulated in fp32.

    Args:
        features: (N, D), fp16, bf16, fp32 or fp64.
        weight: (V, D), of the dtype of ``features``; under autocast, of any.
        targets: (N,), int64, each in [0, V).
        bias: (V,) or None.
        thresholds, gains: (order, 2), as in :func:`multimax_fairseq.mappings.modulate`; None for softmax.
        label_smoothing: ε, in [0, 1).
        chunk_tokens: tokens whose logits are computed at a time; 0: :func:`.chunks.default_chunk_tokens`.
        reduce: whether to return sums, which have a gradient, or a number for each token, which have none.

    Returns:
        losses, () or (N,), of the dtype of ``features``, fp32 at least; differentiable once, in features, weight,
        bias, thresholds and gains. Error of the gradients against float64, in fp32: below 1e-5 of the largest.

    Raises:
        ValueError: ``label_smoothing`` or ``chunk_tokens`` is out of its range.
    """
    check_options(label_smoothing, chunk_tokens)
    if thresholds is None:  # softmax is MultiMax of order 0
        thresholds = gains = features.new_zeros(0, 2, dtype=compute_dtype(features.dtype))
    loss = _CrossEntropy(thresholds, gains, label_smoothing, len(weight))
    return chunked_loss(loss, features, weight, targets, bias, chunk_tokens, reduce)


@Kernel
def cross_entropy_rows_(
    logits: Tensor, smoothing: Tensor, thresholds: Tensor, gains: Tensor
) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    """Replaces the logits by their gradient, without the part that only the target has.

    Args:
        logits: (rows, V); becomes (p − ε_i) · σ'(x).
        smoothing: (1,), ε_i.

    Returns:
        max σ, log Σ exp(σ − max σ) and Σ (σ − max σ), (rows, 1) each, fp32 at least, and ∂L/∂(thresholds, gains),
        (2, order, 2).
    """
    modulated = present_sigma(logits, thresholds, gains)
    peak = modulated.amax(-1, keepdim=True)
    shifted = modulated - peak
    log_total = shifted.exp().sum(-1, keepdim=True).log()  # without the peak: log p would lose its digits
    # Not the exponentials above, divided: the compiler would store them in a tensor of the size of the logits.
    upstream = ((shifted - log_total).exp() - smoothing).masked_fill(is_absent(logits), 0.0)
    grad, grad_parameters = sigma_backward(logits.to(log_total.dtype), upstream, thresholds, gains)
    logits.copy_(grad)
    return peak, log_total, shifted.sum(-1, keepdim=True), grad_parameters


class _CrossEntropy(RowsLoss):
    """Arguments as in :func:`chunked_cross_entropy`."""

    kinds, kernel = TokenLosses, cross_entropy_rows_

    def __init__(self, thresholds: Tensor, gains: Tensor, label_smoothing: float, vocabulary: int):
        self.parameters = thresholds, gains
        self.smoothing = label_smoothing / max(vocabulary - 1, 1)
        self.confidence = 1 - label_smoothing - self.smoothing

    def formula(self, logits: Tensor, targets: Tensor, thresholds: Tensor, gains: Tensor) -> Tuple[Tensor, Tensor]:
        absent = is_absent(logits)
        scores = sigma(logits.masked_fill(absent, 0.0), thresholds, gains).masked_fill(absent, float("-inf"))
        logs = scores.log_softmax(-1)
        nll_loss = -logs.gather(-1, targets).squeeze(-1)
        loss = self.confidence * nll_loss
        return loss - self.smoothing * logs.sum(-1) if self.smoothing else loss, nll_loss

    def compiled_(self, logits: Tensor, targets: Tensor) -> Tuple[Tuple[Tensor, Tensor], Tensor]:
        target_logits = logits.gather(1, targets).to(compute_dtype(logits.dtype))
        target_scores = modulate_rows(target_logits, *self.parameters)
        smoothing = target_logits.new_full((1,), self.smoothing)
        results = [cross_entropy_rows_(*block, smoothing, *self.parameters) for block in blocks_of_rows(logits)]
        *columns, grads = zip(*results)
        peak, log_total, total = (torch.cat(column) for column in columns)
        nll_loss = log_total - (target_scores - peak)
        # The target's own gradient is overwritten, as what is stored is rounded: 1 − ε taken from it would leave 0.
        slope, unit = modulate_rows_backward(target_logits, torch.ones_like(target_logits), *self.parameters)
        upstream = torch.expm1(-nll_loss) + (1 - self.confidence - self.smoothing)
        logits.scatter_(1, targets, (upstream * slope).to(logits.dtype))
        loss = log_total - self.confidence * (target_scores - peak)
        if self.smoothing:
            loss = loss - self.smoothing * total
        return (loss.squeeze(1), nll_loss.squeeze(1)), sum(grads).double() - self.confidence * unit
