"""Output projection, output mapping and cross-entropy together, in the chunks of :mod:`.chunked_loss`.

With p = softmax(σ(x)), x a token's V logits, t its target, and fairseq's ε_i = ε / (V − 1) for label smoothing ε::

    loss = − (1 − ε − ε_i) log p_t − ε_i Σ_v log p_v = log Σ_v exp σ(x_v) − (1 − ε − ε_i) σ(x_t) − ε_i Σ_v σ(x_v)
    ∂loss / ∂σ(x_v) = p_v − ε_i − (1 − ε − ε_i) [v = t]
"""

from typing import List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from .chunked_loss import RowsLoss, blocks_of_rows, check_options, chunked_loss, gradient_scale
from .compiler import Kernel, kernel
from .rows.compiled import modulate_rows, modulate_rows_backward, present_sigma, sigma_backward
from .scores import compute_dtype, is_absent


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
        thresholds, gains: (order, 2), as in :func:`..mappings.multimax.modulate`; None for softmax.
        label_smoothing: ε, in [0, 1).
        chunk_tokens: tokens whose logits are computed at a time; 0: :func:`.chunked_loss.default_chunk_tokens`.
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


@kernel
def log_total_rows(logits: Tensor, thresholds: Tensor, gains: Tensor) -> Tuple[Tensor, Tensor]:
    """log Σ exp σ and Σ σ, (rows, 1) each, fp32 at least."""
    modulated = present_sigma(logits, thresholds, gains)
    return torch.logsumexp(modulated, -1, keepdim=True), modulated.sum(-1, keepdim=True)


@kernel
def cross_entropy_rows_(
    logits: Tensor, smoothing: Tensor, thresholds: Tensor, gains: Tensor
) -> Tuple[Tensor, Tensor, Tensor]:
    """Replaces the logits by their gradient, without the part that only the target has.

    Args:
        logits: (rows, V); becomes (p − ε_i) · σ'(x), times :func:`.chunked_loss.gradient_scale`.
        smoothing: (1,), ε_i.

    Returns:
        log Σ exp σ and Σ σ, (rows, 1) each, and ∂L/∂(thresholds, gains), (2, order, 2).
    """
    modulated = present_sigma(logits, thresholds, gains)
    peak = modulated.amax(-1, keepdim=True)
    log_total = peak + (modulated - peak).exp().sum(-1, keepdim=True).log()
    # Not the exponentials above, divided: the compiler would store them in a tensor of the size of the logits.
    upstream = ((modulated - log_total).exp() - smoothing).masked_fill(is_absent(logits), 0.0)
    if len(gains):
        grad, grad_parameters = sigma_backward(logits.to(log_total.dtype), upstream, thresholds, gains)
    else:
        grad, grad_parameters = upstream, upstream.new_zeros(2, 0, 2)
    logits.copy_(grad * gradient_scale(logits.dtype))
    return log_total, modulated.sum(-1, keepdim=True), grad_parameters


class _CrossEntropy(RowsLoss):
    """Arguments as in :func:`chunked_cross_entropy`."""

    kinds = TokenLosses

    def __init__(self, thresholds: Tensor, gains: Tensor, label_smoothing: float, vocabulary: int):
        self.parameters = self.thresholds, self.gains = thresholds, gains
        self.smoothing = label_smoothing / max(vocabulary - 1, 1)
        self.confidence = 1 - label_smoothing - self.smoothing

    def losses(self, logits: Tensor, targets: Tensor) -> Tuple[Tensor, Tensor]:
        target_logits = logits.gather(1, targets)
        return self._losses(target_logits, *_rows(log_total_rows, logits, *self.parameters))

    def losses_and_gradients_(self, logits: Tensor, targets: Tensor) -> Tuple[Tuple[Tensor, Tensor], List[Tensor]]:
        target_logits = logits.gather(1, targets)
        smoothing = logits.new_full((1,), self.smoothing, dtype=compute_dtype(logits.dtype))
        *log_totals, dense = _rows(cross_entropy_rows_, logits, smoothing, *self.parameters)
        grad_target, sparse = self._target_part(target_logits)
        logits.scatter_add_(1, targets, grad_target)
        return self._losses(target_logits, *log_totals), list(dense.double() + sparse)

    def _losses(self, target_logits: Tensor, log_total: Tensor, total: Tensor) -> Tuple[Tensor, Tensor]:
        """loss and nll_loss."""
        target_scores = target_logits.to(log_total.dtype)
        if len(self.gains):
            target_scores = modulate_rows(target_scores, self.thresholds, self.gains)
        losses = log_total - self.confidence * target_scores
        if self.smoothing:
            losses = losses - self.smoothing * total
        return losses, log_total - target_scores

    def _target_part(self, target_logits: Tensor) -> Tuple[Tensor, Tensor]:
        """What only targets add to the gradients of the logits, (n, 1), and of the parameters, (2, order, 2)."""
        dtype = compute_dtype(target_logits.dtype)
        grad = torch.full_like(target_logits, -self.confidence, dtype=dtype)
        grad_parameters = grad.new_zeros(2, 0, 2)
        if len(self.gains):
            grad, grad_parameters = modulate_rows_backward(
                target_logits.to(dtype), grad, self.thresholds, self.gains
            )
        return (grad * gradient_scale(target_logits.dtype)).to(target_logits.dtype), grad_parameters


def _rows(function: Kernel, logits: Tensor, *arguments: Tensor) -> List[Tensor]:
    """A kernel's results: (rows, 1) each, and ∂L/∂(thresholds, gains) summed over all rows."""
    if function.compiles(logits):
        results = [function(*block, *arguments) for block in blocks_of_rows(logits)]
    else:
        results = function.over_rows([logits], arguments)
    return [torch.cat(result) if result[0].dim() == 2 else sum(result) for result in zip(*results)]
